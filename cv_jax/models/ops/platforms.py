"""A lowering for each platform, or none for a program that goes elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jax import lax

_PLAIN = ContextVar("_PLAIN", default=False)


@contextlib.contextmanager
def plain_lax() -> Iterator[None]:
    """While it is entered, models are traced with lax's own operations, whatever the platform.

    So they can be exported, for a number of images that is not known yet, and be compared with what
    cv_jax.ops makes of them. A function that jax.jit has traced before stays as it was.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def by_platform(*args: Any, cpu: Callable, default: Callable) -> Any:
    """`lax.platform_dependent`, and within `plain_lax` the default alone."""
    if _PLAIN.get():
        return default(*args)
    return lax.platform_dependent(*args, cpu=cpu, default=default)
