"""The input's gradient of a convolution with strides, without the zeros between outputs.

Row u of the padded input is row r = u mod s of block u // s. Blocks of s rows are as far apart as
the outputs, so all rows r of x's gradient are a convolution of g without strides, with every s-th
row of the kernel, flipped. One convolution computes all r, for rows and columns, as channels: a
3x3 kernel with strides of 2 costs 16 products a block of 2x2 pixels, and g spread with zeros 36.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cv_jax.models.ops.padding import Padding, pad


def input_gradient(
    kernel: jax.Array,
    g: jax.Array,
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """Computes the gradient (b, h, w, c) of x of `size` (h, w) from an output gradient g."""
    (b, *g_size, _), c, (s, t) = g.shape, kernel.shape[2], strides
    kernel = _block_kernel(kernel, strides)
    rows, columns = kernel.shape[:2]
    # Blocks of the padded input until the last row and column of x.
    h, w = (
        -(-(side + before) // stride)
        for side, (before, _), stride in zip(size, padding, strides, strict=True)
    )
    g = pad(g, ((rows - 1, h - g_size[0]), (columns - 1, w - g_size[1])))
    blocks = lax.conv_general_dilated(
        g,
        kernel,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = blocks.reshape(b, h, w, s, t, c).swapaxes(2, 3).reshape(b, h * s, w * t, c)
    (above, _), (left, _) = padding
    return x[:, above : above + size[0], left : left + size[1]]


def _block_kernel(kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Returns the kernel from g to blocks: (kh, kw, c, o) -> (ceil(kh/s), ceil(kw/t), o, s t c)."""
    (kh, kw, c, o), (s, t) = kernel.shape, strides
    rows, columns = -(-kh // s), -(-kw // t)
    kernel = jnp.pad(kernel, ((0, rows * s - kh), (0, columns * t - kw), (0, 0), (0, 0)))
    kernel = kernel.reshape(rows, s, columns, t, c, o)[::-1, :, ::-1]
    return kernel.transpose(0, 2, 5, 1, 3, 4).reshape(rows, columns, o, s * t * c)
