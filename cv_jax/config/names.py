"""Finds functions that a config names as "module:function"."""

import importlib
import re
from collections.abc import Callable, Mapping

from cv_jax.config.errors import UserError, first_line, nearest

# A module's dotted path and a function in it.
PATTERN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def names_code(text: str) -> bool:
    """Returns whether a text of a config has "module:function" in it, outside of quotes."""
    return re.search(PATTERN, re.sub(r"'[^']*'|\"[^\"]*\"", "", text)) is not None


def find(name: str, known: Mapping[str, Callable], kind: str, how: str = "") -> Callable:
    """Returns the function of a name: one of `known`, or "module:function" of the user's own.

    Args:
        name: what the config says.
        known: the functions that have a name of their own.
        kind: the config's key, for messages.
        how: a sentence on how to bring one's own, for messages.

    Raises:
        UserError: the name is unknown, or the module cannot be imported or lacks the function.
    """
    if name in known:
        return known[name]
    if not re.fullmatch(PATTERN, name):
        raise UserError(
            f"Unknown {kind} {name!r}.{nearest(name, known)} There are: "
            f"{', '.join(sorted(known))}; or name a function of your own as 'module:function'.{how}"
        )
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{kind}={name!r}: the module {module!r} cannot be imported ({first_line(error)})."
        ) from error
    if not callable(found):
        raise UserError(f"{kind}={name!r}: the module {module!r} has no function {attribute!r}.")
    return found
