"""Puts the JSON values that describe a prediction into words."""

import json
from collections.abc import Callable
from typing import Any


def in_text(values: dict[str, Any]) -> str:
    """Returns a description as text: probabilities, objects and areas in %, else "key value".

    Numbers have four digits. With probabilities, "class" is left out: the predicted class is the
    first of them.
    """
    return "; ".join(
        text if key in _LISTS else f"{key} {text}"
        for key, text in texts(values).items()
        if key != "class" or "probabilities" not in values
    )


def texts(values: dict[str, Any]) -> dict[str, str]:
    """Returns the values of a description as texts, see `in_text`."""
    return {key: _LISTS.get(key, _plain)(value) for key, value in values.items()}


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(_with_numbers(value, lambda x: float(f"{x:.4g}")), ensure_ascii=False)


def _object(value: dict[str, Any]) -> str:
    corners = ", ".join(f"{x:.0f}" for x in value["box"])
    return f"{value['class']} {100 * value['score']:.1f} % at ({corners})"


_LISTS: dict[str, Callable[[Any], str]] = {
    "probabilities": lambda value: ", ".join(f"{x} {100 * y:.1f} %" for x, y in value.items()),
    "objects": lambda value: ", ".join(map(_object, value)) or "no objects",
    "areas": lambda value: ", ".join(f"{x['class']} {100 * x['share']:.1f} %" for x in value),
}


def rounded(value: Any) -> Any:
    """Rounds the numbers of a description to six decimals; a prediction says no more."""
    return _with_numbers(value, lambda x: round(x, 6))


def _with_numbers(value: Any, change: Callable[[float], float]) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers(item, change) for item in value]
    return change(value) if isinstance(value, float) else value
