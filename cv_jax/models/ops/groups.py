"""Splits a batch into groups of images that stay in cache, computed one after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def group_sizes(b: int, most: int) -> tuple[int, int]:
    """Returns (size, rest): b images are groups of `size` <= max(1, `most`), and a last of `rest`.

    The size is the largest divisor of b, without a rest, if at least a quarter of the largest
    allowed size.
    """
    most = min(b, max(1, most))
    divisor = next(d for d in range(most, 0, -1) if b % d == 0)
    return (divisor, 0) if 4 * divisor >= most else (most, b % most)


def map_groups(f: Callable, x: jax.Array, most: int) -> jax.Array:
    """Computes f(x), at most `most` images (axis 0) at once, for an f of each image alone."""
    size, rest = group_sizes(len(x), most)
    if size == len(x):
        return f(x)
    groups, last = _split(x, size, rest)
    y = lax.map(f, groups)
    y = y.reshape(-1, *y.shape[2:])
    return jnp.concatenate([y, f(last)]) if rest else y


def sum_groups(f: Callable, x: jax.Array, g: jax.Array, most: int) -> jax.Array:
    """Computes f(x, g), at most `most` images (axis 0) at once, for an f that sums over images."""
    size, rest = group_sizes(len(x), most)
    if size == len(x):
        return f(x, g)
    (groups, last), (g_groups, g_last) = (_split(a, size, rest) for a in (x, g))
    if rest:
        start = f(last, g_last)
    else:
        total = jax.eval_shape(f, groups[0], g_groups[0])
        start = jnp.zeros(total.shape, total.dtype)
    return lax.scan(lambda total, xg: (total + f(*xg), None), start, (groups, g_groups))[0]


def sum_products(x: jax.Array, g: jax.Array) -> jax.Array:
    """Computes x^T g in float32, (..., c) and (..., o) -> (c, o), summed over the other axes."""
    return lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        g.reshape(-1, g.shape[-1]),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _split(x: jax.Array, size: int, rest: int) -> tuple[jax.Array, jax.Array]:
    count = len(x) - rest
    return x[:count].reshape(-1, size, *x.shape[1:]), x[count:]
