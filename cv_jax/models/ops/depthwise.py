"""Depthwise convolution: each channel with a filter of its own, the size of the image is kept.

    y[h, w, c] = sum over i j of x[h + i - p, w + j - p, c] k[i, j, c]        p = (size - 1) / 2

In a loop over steps, XLA's own gradients of it are 240 times slower on the CPU (8 images of 28x28,
192 channels, 7x7 taps). Here the shifted views of a group of images that stays in cache are
multiplied and added in float32, one row of the kernel after the other: all rows at once would be as
fast, and take five times as long to compile.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from cv_jax.models.ops.groups import map_groups, sum_groups
from cv_jax.models.ops.padding import pad
from cv_jax.models.ops.platforms import by_platform

_GROUP_BYTES = 1 << 20  # of a group of images


@jax.custom_vjp
def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x (b, h, w, c) with a kernel (size, size, c) of odd size: (b, h, w, c)."""
    return by_platform(x, kernel, cpu=_shifted_convolution, default=_plain)


def _plain(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


def _backward(saved, g):
    return by_platform(*saved, g, cpu=_shifted_gradients, default=_plain_gradients)


depthwise_conv.defvjp(lambda x, kernel: (depthwise_conv(x, kernel), (x, kernel)), _backward)


def _plain_gradients(x, kernel, g):
    return jax.vjp(_plain, x, kernel)[1](g)


def _shifted_convolution(x, kernel):
    def convolve(x):
        padded = _padded(x, len(kernel))

        def add_row(i, y):
            return y + sum(
                view * taps
                for view, taps in zip(_views(padded, i, x.shape), kernel[i], strict=True)
            )

        start = jnp.zeros(x.shape, jnp.float32)
        return lax.fori_loop(0, len(kernel), add_row, start).astype(x.dtype)

    kernel = kernel.astype(jnp.float32)[:, :, None, None, None]
    return map_groups(convolve, x, _most_images(x))


def _shifted_gradients(x, kernel, g):
    g = lax.optimization_barrier(g)

    def product(x, g):
        padded, g = _padded(x, len(kernel)), g.astype(jnp.float32)

        def of_row(i):
            return jnp.stack([(view * g).sum((0, 1, 2)) for view in _views(padded, i, x.shape)])

        return lax.map(of_row, jnp.arange(len(kernel)))

    return (
        _shifted_convolution(g, kernel[::-1, ::-1]),
        sum_groups(product, x, g, _most_images(x)).astype(kernel.dtype),
    )


def _padded(x: jax.Array, size: int) -> jax.Array:
    around = ((size // 2, size // 2),) * 2
    return lax.optimization_barrier(pad(x.astype(jnp.float32), around))


def _views(padded: jax.Array, i: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    """Returns what row i of the kernel sees of an image of `shape`, one array for each column."""
    _, h, w, _ = shape
    row = lax.dynamic_slice_in_dim(padded, i, h, axis=1)
    return [lax.slice_in_dim(row, j, j + w, axis=2) for j in range(padded.shape[2] - w + 1)]


def _most_images(x: jax.Array) -> int:
    return _GROUP_BYTES // (4 * math.prod(x.shape[1:]))
