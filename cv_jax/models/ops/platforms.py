"""Chooses a lowering for each platform, or plain lax for a program that is exported."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jax import lax

_PLAIN = ContextVar("_PLAIN", default=False)


@contextlib.contextmanager
def plain_lax() -> Iterator[None]:
    """Traces models with lax's own operations, whatever the platform, inside the context.

    Such programs can be exported with a symbolic number of images, and compared with the kernels
    of cv_jax.models.ops. A function that jax.jit has traced before stays as it was.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def by_platform(*args: Any, cpu: Callable, default: Callable) -> Any:
    """Calls `lax.platform_dependent`; inside `plain_lax`, calls `default` alone."""
    if _PLAIN.get():
        return default(*args)
    return lax.platform_dependent(*args, cpu=cpu, default=default)
