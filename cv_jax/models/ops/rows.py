"""Convolution of few channels, whose products are narrow and cost less than their copies.

    p[h, w, i] = sum over j c of x[h, w + j, c] kernel[i, j, c]      one matrix product
    y[h, w]    = sum over i of p[h + i, w, i]

A product takes kw columns of x side by side; each row of the kernel gives one result. Compared with
all kh kw views of x, this copies kh times less, and the matrices are less narrow.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cv_jax.models.ops.groups import map_groups, sum_groups, sum_products
from cv_jax.models.ops.padding import Padding, pad

# Measured from 3 to 32 channels; with more, XLA's own kernel is faster.
_MOST_CHANNELS = 16
_GROUP_BYTES = 1 << 21  # of the columns and the products of a group of images


def pays(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], strides: tuple[int, int]) -> bool:
    """Returns whether this module suits a convolution of x of `x_shape` (b, h, w, c)."""
    return tuple(strides) == (1, 1) and max(x_shape[3], kernel_shape[3]) <= _MOST_CHANNELS


def convolution(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Convolves x (b, h, w, c) with a kernel (kh, kw, c, o): (b, h', w', o)."""
    kh, kw, c, o = kernel.shape
    rows = x.shape[1] + sum(padding[0]) - kh + 1
    kernel = kernel.transpose(1, 2, 0, 3).reshape(kw * c, kh * o)

    def convolve(x):
        products = _columns(x, kw, padding) @ kernel
        return sum(products[:, i : i + rows, :, i * o : (i + 1) * o] for i in range(kh))

    return map_groups(convolve, x, _most_images(x.shape, (kh, kw, c, o), padding))


def filter_gradient(
    x: jax.Array, g: jax.Array, size: tuple[int, int], padding: Padding
) -> jax.Array:
    """Computes the gradient (kh, kw, c, o) of a kernel of `size` from an output gradient g."""
    kh, kw = size
    c, o = x.shape[3], g.shape[3]

    def product(x, g):
        columns = _columns(x, kw, padding)
        g = lax.optimization_barrier(pad(g, ((kh - 1, kh - 1), (0, 0))))
        starts = [kh - 1 - i for i in range(kh)]
        shifted = [g[:, start : start + columns.shape[1]] for start in starts]
        products = lax.optimization_barrier(jnp.concatenate(shifted, axis=3))
        return sum_products(columns, products)

    total = sum_groups(product, x, g, _most_images(x.shape, (kh, kw, c, o), padding))
    return total.reshape(kw, c, kh, o).transpose(2, 0, 1, 3).astype(x.dtype)


def _most_images(x_shape, kernel_shape, padding) -> int:
    """Returns the largest number of images in a group."""
    _, h, w, c = x_shape
    kh, kw, _, o = kernel_shape
    pixels = (h + sum(padding[0])) * (w + sum(padding[1]) - kw + 1)
    return _GROUP_BYTES // (4 * pixels * (kw * c + kh * o))


def _columns(x: jax.Array, kw: int, padding: Padding) -> jax.Array:
    """Returns the columns of x side by side, (b, rows, w', kw c).

    The barrier writes them to memory: without it, XLA builds them again for every use.
    """
    x = pad(x, padding)
    columns = x.shape[2] - kw + 1
    return lax.optimization_barrier(
        jnp.concatenate([x[:, :, j : j + columns] for j in range(kw)], axis=3)
    )
