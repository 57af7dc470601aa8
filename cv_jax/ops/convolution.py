"""Two-dimensional convolution whose gradients are fast on the CPU, too.

XLA's CPU compiler hands a convolution to its fast kernel only in the layout of a forward pass
(b h w c with h w i o), and outside of the entry computation, as in a loop over steps, it does not
bring others into that layout: a gradient there ran 100 times slower than the forward pass. So on
the CPU both gradients are written out here. The input's is a convolution in the forward layout;
the filter's is a sum over small groups of images, each one matrix product that stays in cache
(5 times faster than XLA's own where that is at its best). Elsewhere lax differentiates.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from cv_jax.ops import winograd
from cv_jax.ops.groups import sum_groups

Padding = tuple[tuple[int, int], tuple[int, int]]

# Bytes of the shifted views of one group of images. More than a core's L2 cache holds: the views
# are read once, and a product of more rows is a faster one. Measured from 0.5 to 8 MB on n94.
_GROUP_BYTES = 1 << 21


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    """y[b, h, w, o] = sum over i j c of x[b, h s + i - p, w s + j - p, c] kernel[i, j, c, o].

    Args:
        x: (b, h, w, c).
        kernel: (kh, kw, c, o), of the dtype of x.
        strides: of h and w.
        padding: zeros ((above, below), (left, right)).

    Returns:
        (b, h', w', o).
    """
    plain = partial(_plain, strides=strides, padding=padding)
    if not winograd.pays(x.shape, kernel.shape, strides, padding, x.dtype):
        return plain(x, kernel)
    fast = partial(winograd.convolution, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=fast, default=plain)


def _plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(x, kernel, strides, padding):
    return conv(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, g):
    plain = partial(_plain_gradients, strides=strides, padding=padding)
    written_out = partial(_cpu_gradients, strides=strides, padding=padding)
    return lax.platform_dependent(*saved, g, cpu=written_out, default=plain)


conv.defvjp(_forward, _backward)


def _plain_gradients(x, kernel, g, strides, padding):
    return jax.vjp(lambda x, kernel: _plain(x, kernel, strides, padding), x, kernel)[1](g)


def _cpu_gradients(x, kernel, g, strides, padding):
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
    """The gradient with respect to x of size (h, w), (b, h, w, c), of an output gradient g."""
    pads = []
    for axis in range(2):
        k, s, before = kernel.shape[axis], strides[axis], padding[axis][0]
        spread = (g.shape[1 + axis] - 1) * s + 1  # g with s - 1 zeros between its rows
        pads.append((k - 1 - before, size[axis] + before - spread))
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)  # kh kw o c
    if winograd.pays(g.shape, flipped.shape, strides, pads, g.dtype):
        return winograd.convolution(g, flipped, tuple(pads))
    # XLA would fold what pads g, such as pooling's gradient, into the convolution's own padding,
    # and lose its fast kernel to that.
    g = lax.optimization_barrier(g)
    return lax.conv_general_dilated(
        g,
        flipped,
        (1, 1),
        pads,
        lhs_dilation=strides,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def filter_gradient(
    x: jax.Array,
    g: jax.Array,
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """The gradient with respect to a kernel of size (kh, kw), (kh, kw, c, o), summed in float32.

    For a group of images, the kh kw shifted views of x side by side, times g, is one product.
    """
    c = x.shape[3]
    oh, ow, o = g.shape[1:]
    kh, kw = size
    if winograd.pays(x.shape, (kh, kw, c, o), strides, padding, x.dtype):
        return winograd.filter_gradient(x, g, padding)

    def product(x, g):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        rows, columns = (oh - 1) * strides[0] + 1, (ow - 1) * strides[1] + 1
        views = [
            x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
            for i in range(kh)
            for j in range(kw)
        ]
        views = jnp.concatenate(views, axis=-1).reshape(-1, kh * kw * c)
        return lax.dot_general(
            views,
            g.reshape(-1, o),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    most = _GROUP_BYTES // (oh * ow * kh * kw * c * x.dtype.itemsize)
    return sum_groups(product, x, g, most).reshape(kh, kw, c, o).astype(x.dtype)
