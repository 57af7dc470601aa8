"""Pads images with zeros, for all convolutions."""

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((above, below), (left, right))


def pad(x: jax.Array, padding: Padding, inside: tuple[int, int] = (1, 1)) -> jax.Array:
    """Pads x (b, h, w, c) with zeros; negative padding crops.

    Rows and columns end up `inside` apart, with zeros between them.
    """
    spec = [(*pads, apart - 1) for pads, apart in zip(padding, inside, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spec, (0, 0, 0)])
