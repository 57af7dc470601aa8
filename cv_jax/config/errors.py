"""Errors that the user can correct, and the parts of their messages."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An error that the user can correct; programs print its message without a traceback.

    The message names the key, file or record that is wrong and says what to do.
    """

    exit_code = 2  # of the program that ends with this error


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'X'?" for the known word closest to `word`, or "" if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def describe(value: Any) -> str:
    """Describes a value that a function returned: "float32 (4, 10)", "(float32 (4,), None)"."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {describe(x)}" for key, x in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    return "None" if value is None else f"a {type(value).__name__}"
