"""Puts the JSON values that describe a prediction into words."""

import json
from typing import Any


def rounded(value: Any) -> Any:
    """Rounds the numbers of a description to six decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def in_text(values: dict[str, Any]) -> str:
    """Returns a description as text: probabilities in %, everything else as "key value".

    With probabilities, "class" is left out: the predicted class is the first of them.
    """
    parts = []
    for key, value in values.items():
        if key == "probabilities":
            parts.append(", ".join(f"{name} {100 * x:.1f} %" for name, x in value.items()))
        elif key != "class" or "probabilities" not in values:
            shown = json.dumps(rounded(value), ensure_ascii=False)
            parts.append(f"{key} {value if isinstance(value, str) else shown}")
    return "; ".join(parts)
