"""Convolution of images with fewer pixels than the kernel has taps: one matrix product.

An image (h, w, c) is a row of h w c values, and the kernel a matrix of c x o blocks: block (p, q)
is the tap from input pixel p to output pixel q, or zero without such a tap. Taps that only meet
padding are skipped: 2x2 pixels and a 3x3 kernel are 16 products of c x o, not 36.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.models.ops.groups import sum_products
from cv_jax.models.ops.padding import Padding


def pays(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
    """Returns whether this module suits a convolution of x of `x_shape` (b, h, w, c)."""
    return x_shape[1] * x_shape[2] < kernel_shape[0] * kernel_shape[1]


def convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Convolves x (b, h, w, c) with a kernel (kh, kw, c, o): (b, h', w', o)."""
    taps = _taps(x.shape[1:3], kernel.shape[:2], strides, padding)
    y = x.reshape(len(x), -1) @ _matrix(kernel, taps)
    return y.reshape(len(x), *taps.shape[2:4], kernel.shape[3])


def filter_gradient(
    x: jax.Array,
    g: jax.Array,
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """Computes the gradient (kh, kw, c, o) of a kernel of `size` from an output gradient g."""
    taps = _taps(x.shape[1:3], size, strides, padding)
    kernel = jax.ShapeDtypeStruct((*size, x.shape[3], g.shape[3]), jnp.float32)
    product = sum_products(x.reshape(len(x), -1), g.reshape(len(g), -1))
    (gradient,) = jax.linear_transpose(partial(_matrix, taps=taps), kernel)(product)
    return gradient.astype(x.dtype)


def _taps(
    size: tuple[int, int], kernel_size: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> np.ndarray:
    """Returns row and column of the tap between two pixels, (h, w, h', w', 2); -1 without a tap."""
    axes = []
    for side, k, stride, pads in zip(size, kernel_size, strides, padding, strict=True):
        outputs = np.arange((side + sum(pads) - k) // stride + 1)
        tap = np.arange(side)[:, None] + pads[0] - stride * outputs
        axes.append(np.where((tap >= 0) & (tap < k), tap, -1))
    rows, columns = axes
    return np.stack(np.broadcast_arrays(rows[:, None, :, None], columns[:, None, :]), axis=-1)


def _matrix(kernel: jax.Array, taps: np.ndarray) -> jax.Array:
    """Returns the matrix of one block for each pair of pixels, (h w c, h' w' o)."""
    h, w, h_out, w_out, _ = taps.shape
    zero = jnp.zeros(kernel.shape[2:], kernel.dtype)
    return jnp.block(
        [
            [kernel[i, j] if min(i, j) >= 0 else zero for i, j in row]
            for row in taps.reshape(h * w, h_out * w_out, 2)
        ]
    )
