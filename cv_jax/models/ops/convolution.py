"""Two-dimensional convolution with gradients that are also fast on the CPU.

XLA's CPU compiler uses its fast kernel only for convolutions in the layout of a forward pass (b h w
c with h w i o). Outside the entry computation, as in a loop over steps, XLA does not convert other
convolutions to that layout: a gradient there ran 100 times slower than the forward pass. So this
module writes out the CPU's gradients. winograd.py takes 3x3 convolutions, rows.py few channels,
blocks.py few pixels and pointwise.py kernels of one pixel, each with its gradients. For other
convolutions, the input's gradient is a convolution in the forward layout (with strides, strided.py
brings it there). The filter's gradient is a sum over small groups of images, each a matrix product
that stays in cache (5 times faster than XLA's own at its best). On other platforms lax
differentiates: by the TPU compiler's estimate, nothing tried is faster there.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from cv_jax.models.ops import blocks, pointwise, rows, strided, winograd
from cv_jax.models.ops.groups import sum_groups, sum_products
from cv_jax.models.ops.padding import Padding, pad
from cv_jax.models.ops.platforms import by_platform

# Bytes of the shifted views of one group of images. More than a core's L2 cache holds: the views
# are read once, and products of more rows are faster. Measured from 0.5 to 8 MB on n94.
_GROUP_BYTES = 1 << 21


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    """Convolves x with a kernel.

        y[b, h, w, o] = sum over i j c of x[b, h s + i - p, w s + j - p, c] kernel[i, j, c, o]

    Args:
        x: (b, h, w, c).
        kernel: (kh, kw, c, o), of the dtype of x.
        strides: strides along h and w.
        padding: zeros ((above, below), (left, right)).

    Returns:
        (b, h', w', o).
    """
    plain = partial(_plain, strides=strides, padding=padding)
    return by_platform(
        x, kernel, cpu=partial(_cpu_convolution, strides=strides, padding=padding), default=plain
    )


def _plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(x, kernel, strides, padding):
    return conv(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, g):
    plain = partial(_plain_gradients, strides=strides, padding=padding)
    written_out = partial(_cpu_gradients, strides=strides, padding=padding)
    return by_platform(*saved, g, cpu=written_out, default=plain)


conv.defvjp(_forward, _backward)


def _plain_gradients(x, kernel, g, strides, padding):
    return jax.vjp(lambda x, kernel: _plain(x, kernel, strides, padding), x, kernel)[1](g)


def _cpu_convolution(x, kernel, strides, padding):
    if pointwise.pays(kernel.shape, padding):
        return pointwise.convolution(x, kernel, strides)
    if blocks.pays(x.shape, kernel.shape):
        return blocks.convolution(x, kernel, strides, padding)
    if winograd.pays(x.shape, kernel.shape, strides, padding):
        return winograd.convolution(x, kernel, padding)
    if rows.pays(x.shape, kernel.shape, strides):
        return rows.convolution(x, kernel, padding)
    return _plain(x, kernel, strides, padding)


def _cpu_gradients(x, kernel, g, strides, padding):
    # Without the barrier, XLA computes g, such as pooling's gradient, again for each use. It also
    # folds g's padding into the convolution's own, which loses XLA's fast kernel.
    g = lax.optimization_barrier(g)
    return (
        input_gradient(kernel, g, x.shape[1:3], strides, padding),
        filter_gradient(x, g, kernel.shape[:2], strides, padding),
    )


def input_gradient(
    kernel: jax.Array,
    g: jax.Array,
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """Computes the gradient (b, h, w, c) of x of `size` (h, w) from an output gradient g."""
    if pointwise.pays(kernel.shape, padding):
        return pointwise.input_gradient(kernel, g, size, strides)
    if strides != (1, 1) and not blocks.pays((len(g), *size), kernel.shape):
        return strided.input_gradient(kernel, g, size, strides, padding)
    g = pad(g, ((0, 0), (0, 0)), inside=strides)  # outputs that strides skip have gradient 0
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)  # kh kw o c
    pads = tuple(
        (k - 1 - before, side + before - spread)
        for k, (before, _), side, spread in zip(
            kernel.shape[:2], padding, size, g.shape[1:3], strict=True
        )
    )
    return _cpu_convolution(g, flipped, (1, 1), pads)


def filter_gradient(
    x: jax.Array,
    g: jax.Array,
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """Computes the gradient (kh, kw, c, o) of a kernel of `size` (kh, kw), summed in float32.

    For a group of images, one product multiplies the kh kw shifted views of x, side by side, by g.
    """
    (kh, kw), (c, o) = size, (x.shape[3], g.shape[3])
    if pointwise.pays((kh, kw, c, o), padding):
        return pointwise.filter_gradient(x, g, strides)
    if blocks.pays(x.shape, (kh, kw, c, o)):
        return blocks.filter_gradient(x, g, size, strides, padding)
    if winograd.pays(x.shape, (kh, kw, c, o), strides, padding):
        return winograd.filter_gradient(x, g, padding)
    if rows.pays(x.shape, (kh, kw, c, o), strides):
        return rows.filter_gradient(x, g, size, padding)
    height, width = ((n - 1) * s + 1 for n, s in zip(g.shape[1:3], strides, strict=True))

    def product(x, g):
        x = pad(x, padding)
        x = jnp.concatenate([x[:, :, j : j + width : strides[1]] for j in range(kw)], axis=3)
        x = jnp.concatenate([x[:, i : i + height : strides[0]] for i in range(kh)], axis=3)
        return sum_products(x, g)

    most = _GROUP_BYTES // (math.prod(g.shape[1:3]) * kh * kw * c * x.dtype.itemsize)
    return sum_groups(product, x, g, most).reshape(kh, kw, c, o).astype(x.dtype)
