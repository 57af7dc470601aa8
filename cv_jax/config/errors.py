"""The one exception whose message is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Something the user can mend; train.py prints the message alone, without a traceback.

    The message is one clear sentence that names the key, file or record and says what to do.
    """

    exit_code = 2  # of the program that it ends


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'X'?" for the known word closest to `word`, or "" if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: Exception) -> str:
    """The type of an error and the first line of what it says, for a message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def describe(value: Any) -> str:
    """Describes what somebody's function returned: "float32 (4, 10)", "(float32 (4,), None)"."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {describe(x)}" for key, x in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    return "None" if value is None else f"a {type(value).__name__}"
