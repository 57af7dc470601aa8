"""Winograd's 3x3 convolution: fewer products, unless there are few channels.

A tile of m x m outputs takes (m + 2)^2 products a channel instead of 9 m^2 (3.2 times fewer for
m = 3, 4 times for m = 4), and so do both gradients; the input's is a convolution as well.

    y = A^T [(G k G^T) * (B^T x B)] A      of m + 2 by m + 2 inputs x and the 3x3 filter k
    dk = G^T [(A dy A^T) * (B^T x B)] G    summed over tiles

(A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks",
https://arxiv.org/abs/1509.09308). Over the tiles of a group of images, * is a matrix product over
the channels for each of the (m + 2)^2 places. A and B are applied along the rows, then along the
columns; after both, the result is a list of one array for each column of places. All is computed
in float32, with a rounding error of some 1e-6 of the largest value; plain lax has 1e-7.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cv_jax.models.ops.groups import map_groups, sum_groups
from cv_jax.models.ops.padding import Padding, pad

# From here on the products save more than the transforms cost. Measured from 16 to 512 channels.
_LEAST_CHANNELS = 16
_LEAST_TILES = 64  # tiles in a batch: the rows of each product
_LEAST_PRODUCTS = 1e8  # 1 to 2 ms of plain lax; less is not worth 0.25 s more to compile
_GROUP_BYTES = 1 << 24  # of the transformed tiles, input's and output's, of a group of images

# The polynomials are evaluated here and at infinity: these points keep the rounding error small.
_POINTS = {3: (0, 1, -1, 0.5), 4: (0, 1, -1, 2, -0.5)}


def pays(
    shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: Padding,
) -> bool:
    """Returns whether this module suits a convolution of x of `shape` (b, h, w, c)."""
    b, h, w, c = shape
    o = kernel_shape[3]
    size = _output_size(h, w, padding)
    tiling = _tiling(*size)
    return (
        (*kernel_shape[:2], *strides) == (3, 3, 1, 1)
        and min(min(pads) for pads in padding) >= 0  # cropping, as some input gradients do
        and min(c, o) >= _LEAST_CHANNELS
        and min(size) > 2
        and b * size[0] * size[1] * 9 * c * o >= _LEAST_PRODUCTS
        and b * tiling.rows * tiling.columns >= _LEAST_TILES
    )


def convolution(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Convolves x (b, h, w, c) with a kernel (3, 3, c, o): (b, h', w', o).

    h' = h + above + below - 2.
    """
    c, o = kernel.shape[2:]
    h, w = _output_size(*x.shape[1:3], padding)
    tiling = _tiling(h, w)
    weights = _matrices(tiling.m).kernel @ kernel.astype(jnp.float32).reshape(9, c * o)
    weights = [weight.reshape(-1, c, o) for weight in jnp.split(weights, tiling.m + 2)]

    def convolve(x):
        tiles = _input_tiles(x, tiling, padding)
        products = [
            lax.dot_general(tile, weight, (((2,), (1,)), ((0,), (0,))))
            for tile, weight in zip(tiles, weights, strict=True)
        ]
        return _join(products, tiling)[:, :h, :w].astype(x.dtype)

    return map_groups(convolve, x, tiling.most_images(c + o))


def filter_gradient(x: jax.Array, g: jax.Array, padding: Padding) -> jax.Array:
    """Computes the kernel's gradient (3, 3, c, o) from x (b, h, w, c) and an output gradient g."""
    c, o = x.shape[3], g.shape[3]
    tiling = _tiling(*g.shape[1:3])

    def product(x, g):
        products = [
            lax.dot_general(tile, g_tile, (((1,), (1,)), ((0,), (0,))))
            for tile, g_tile in zip(
                _input_tiles(x, tiling, padding), _split(g, tiling), strict=True
            )
        ]
        return jnp.stack(products)

    total = sum_groups(product, x, g, tiling.most_images(c + o))
    total = total.reshape(-1, c * o)
    return (_matrices(tiling.m).kernel.T @ total).reshape(3, 3, c, o).astype(x.dtype)


class _Tiling(NamedTuple):
    """Tiles that cover an image: rows x columns, each of m x m outputs."""

    m: int
    rows: int
    columns: int

    def most_images(self, channels: int) -> int:
        """Returns the largest number of images in a group."""
        places = self.rows * self.columns * (self.m + 2) ** 2
        return _GROUP_BYTES // (4 * places * channels)


def _output_size(h: int, w: int, padding: Padding) -> tuple[int, int]:
    (above, below), (left, right) = padding
    return h + above + below - 2, w + left + right - 2


def _tiling(h: int, w: int) -> _Tiling:
    """Returns the tiling with the fewest products for h x w outputs."""
    tilings = [_Tiling(m, -(-h // m), -(-w // m)) for m in _POINTS]
    return min(tilings, key=lambda t: t.rows * t.columns * (t.m + 2) ** 2)


def _input_tiles(x: jax.Array, tiling: _Tiling, padding: Padding) -> list[jax.Array]:
    """Computes B^T x B of x's overlapping tiles, (n, h, w, c): m + 2 arrays (m + 2, tiles, c)."""
    m, rows, columns = tiling
    c = x.shape[3]
    pads = tuple(
        (before, m * count + 2 - side - before)
        for count, side, (before, _) in zip((rows, columns), x.shape[1:3], padding, strict=True)
    )
    x = pad(x.astype(jnp.float32), pads)
    taps = [lax.slice_in_dim(x, i, i + m * rows - m + 1, m, 1) for i in range(m + 2)]
    x = _combine(_matrices(m).input, taps)
    taps = [lax.slice_in_dim(x, j, j + m * columns - m + 1, m, 3) for j in range(m + 2)]
    return [tile.reshape(m + 2, -1, c) for tile in _sums(_matrices(m).input, taps)]


def _split(g: jax.Array, tiling: _Tiling) -> list[jax.Array]:
    """Computes A g A^T of the tiles of g, (n, h, w, o): m + 2 arrays (m + 2, tiles, o).

    Tiles are zero beyond the edge of g.
    """
    m, rows, columns = tiling
    n, h, w, o = g.shape
    g = pad(g.astype(jnp.float32), ((0, m * rows - h), (0, m * columns - w)))
    g = g.reshape(n, rows, m, m * columns, o)
    g = _combine(_matrices(m).output.T, [_at(g, i, 2) for i in range(m)])
    g = g.reshape(m + 2, n, rows, columns, m, o)
    sums = _sums(_matrices(m).output.T, [_at(g, j, 4) for j in range(m)])
    return [tile.reshape(m + 2, -1, o) for tile in sums]


def _join(products: list[jax.Array], tiling: _Tiling) -> jax.Array:
    """Computes A^T y A of m + 2 products y (m + 2, tiles, o): (n, m rows, m columns, o)."""
    m, rows, columns = tiling
    o = products[0].shape[2]
    y = _combine(_matrices(m).output, products, axis=2)
    y = y.reshape(m + 2, -1, rows, m * columns, o)
    y = jnp.stack(_sums(_matrices(m).output, [_at(y, j, 0) for j in range(m + 2)]), axis=2)
    return y.reshape(-1, m * rows, m * columns, o)


def _at(x: jax.Array, i: int, axis: int) -> jax.Array:
    return lax.index_in_dim(x, i, axis, keepdims=False)


def _sums(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Multiplies a matrix by the column of `arrays`."""
    return [_sum(row, arrays) for row in matrix.astype(np.float32)]


def _sum(weights: np.ndarray, arrays: Sequence[jax.Array]) -> jax.Array:
    """Adds up the arrays times their weights.

    With operations of lax, and none for a weight of 0, 1 or -1: a network has thousands of them,
    and jax.numpy would take three times as long to trace.
    """
    terms = [
        (weight > 0, array if abs(weight) == 1 else lax.mul(array, abs(weight)))
        for weight, array in zip(weights, arrays, strict=True)
        if weight
    ]
    (is_positive, first), *others = terms
    total = first if is_positive else lax.neg(first)
    for is_positive, term in others:
        total = lax.add(total, term) if is_positive else lax.sub(total, term)
    return total


def _combine(matrix: np.ndarray, arrays: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """Stacks `_sums`. The barrier writes them to memory: else XLA computes them for every use."""
    return lax.optimization_barrier(jnp.stack(_sums(matrix, arrays), axis))


class _Matrices(NamedTuple):
    """The transforms of a tile of m x m outputs."""

    input: np.ndarray  # B^T, (m + 2, m + 2)
    kernel: np.ndarray  # G along rows and columns: (places, column by column; 9) float32
    output: np.ndarray  # A^T, (m, m + 2)


@cache
def _matrices(m: int) -> _Matrices:
    """Computes the transforms by Toom and Cook: evaluate polynomials, multiply, interpolate.

    The correlation of m + 2 inputs with 3 taps is the transpose of the product of polynomials of
    m and 3 coefficients, which m + 2 points determine.
    """

    def evaluation(coefficients):
        powers = np.vander(_POINTS[m], coefficients, increasing=True)
        infinity = np.eye(coefficients)[-1:]  # at infinity only the leading coefficient counts
        return np.concatenate([powers, infinity])

    b = np.linalg.inv(evaluation(m + 2)).T
    b[np.abs(b) < 1e-9] = 0  # zeros up to rounding
    scale = np.abs(b).max(axis=1, keepdims=True)  # moved to G, so that tiles keep x's magnitude
    g = evaluation(3) * scale
    kernel = np.einsum("ra,cb->crab", g, g).reshape(-1, 9).astype(np.float32)
    return _Matrices(b / scale, kernel, evaluation(m).T)
