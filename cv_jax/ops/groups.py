"""A batch in groups of images that stay in cache, one after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def group_size(b: int, most: int) -> int:
    """The largest divisor of b that is at most `most`, at least 1."""
    return next(d for d in range(min(b, max(1, most)), 0, -1) if b % d == 0)


def map_groups(f: Callable, x: jax.Array, most: int) -> jax.Array:
    """f(x) for an f that treats every image (axis 0) alike, at most `most` images at once."""
    b = len(x)
    size = group_size(b, most)
    if size == b:
        return f(x)
    y = lax.map(f, _split(x, size))
    return y.reshape(b, *y.shape[2:])


def sum_groups(f: Callable, x: jax.Array, g: jax.Array, most: int) -> jax.Array:
    """f(x, g) for an f that is a sum over images (axis 0), at most `most` images at once."""
    size = group_size(len(x), most)
    if size == len(x):
        return f(x, g)
    groups = (_split(x, size), _split(g, size))
    total = jax.eval_shape(f, *(a[0] for a in groups))
    zeros = jnp.zeros(total.shape, total.dtype)
    return lax.scan(lambda total, xg: (total + f(*xg), None), zeros, groups)[0]


def _split(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(-1, size, *x.shape[1:])
