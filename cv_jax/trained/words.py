"""Puts the JSON values that describe a prediction into words."""

import json
from collections.abc import Callable
from typing import Any


def in_text(values: dict[str, Any]) -> str:
    """Returns a description as text: probabilities and objects in %, else "key value".

    Numbers have four digits. With probabilities, "class" is left out: the predicted class is the
    first of them.
    """
    parts = []
    for key, value in values.items():
        if key == "probabilities":
            parts.append(", ".join(f"{name} {100 * x:.1f} %" for name, x in value.items()))
        elif key == "objects":
            parts.append(", ".join(map(_object, value)) or "no objects")
        elif key != "class" or "probabilities" not in values:
            shown = json.dumps(
                _with_numbers(value, lambda x: float(f"{x:.4g}")), ensure_ascii=False
            )
            parts.append(f"{key} {value if isinstance(value, str) else shown}")
    return "; ".join(parts)


def _object(value: dict[str, Any]) -> str:
    corners = ", ".join(f"{x:.0f}" for x in value["box"])
    return f"{value['class']} {100 * value['score']:.1f} % at ({corners})"


def rounded(value: Any) -> Any:
    """Rounds the numbers of a description to six decimals; a prediction says no more."""
    return _with_numbers(value, lambda x: round(x, 6))


def _with_numbers(value: Any, change: Callable[[float], float]) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers(item, change) for item in value]
    return change(value) if isinstance(value, float) else value
