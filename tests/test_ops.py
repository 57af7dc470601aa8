"""Kernels against plain lax: values and gradients, over shapes that nobody chose by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from cv_jax.ops import conv, max_pool
from cv_jax.ops.convolution import _GROUP_BYTES, _group_size

TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}


def _plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32), dtype)


def _assert_close(got, want, dtype):
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    scale = np.abs(want).max() + 1e-6
    np.testing.assert_allclose(got / scale, want / scale, atol=TOLERANCE[dtype])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3, *[st.integers(1, 5)] * 2),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_convolution_and_its_gradients(sizes, kernel, strides, padding, dtype):
    b, h, w, c, o = sizes
    h, w = max(h, kernel[0]), max(w, kernel[1])
    x, weight = _random((b, h, w, c), dtype), _random((*kernel, c, o), dtype, seed=1)
    y, vjp = jax.vjp(lambda x, k: conv(x, k, strides, padding), x, weight)
    want, want_vjp = jax.vjp(lambda x, k: _plain(x, k, strides, padding), x, weight)
    _assert_close(y, want, dtype)
    g = _random(y.shape, dtype, seed=2)
    for got, plain in zip(vjp(g), want_vjp(g), strict=True):
        assert got.dtype == plain.dtype
        _assert_close(got, plain, dtype)


def test_groups_of_images_add_up(monkeypatch):
    x, weight = _random((6, 5, 5, 2), "float32"), _random((3, 3, 2, 4), "float32", seed=1)
    padding = ((1, 1), (1, 1))

    def gradient(x, weight):
        return jax.grad(lambda k: (conv(x, k, (1, 1), padding) ** 2).sum())(weight)

    whole = gradient(x, weight)
    monkeypatch.setattr("cv_jax.ops.convolution._GROUP_BYTES", 2 * 5 * 5 * 9 * 2 * 4)  # two images
    grouped = gradient(x, weight)
    _assert_close(grouped, whole, "float32")
    text = str(jax.make_jaxpr(gradient)(x, weight))
    assert "f32[3,2,5,5,2]" in text  # three groups of two


@pytest.mark.parametrize(("b", "fits", "size"), [(12, 5, 4), (7, 5, 1), (4, 100, 4), (4, 0, 1)])
def test_a_group_divides_the_batch(b, fits, size):
    assert _group_size(b, _GROUP_BYTES // fits if fits else 1 << 30) == size


def test_under_vmap_and_scan():
    x, weight = _random((3, 2, 4, 4, 2), "float32"), _random((3, 3, 3, 2, 2), "float32", seed=1)
    padding = ((1, 1), (1, 1))

    def gradient(convolve, x, weight):
        return jax.grad(lambda k: (convolve(x, k, (1, 1), padding) ** 2).sum())(weight)

    want = jax.vmap(lambda x, k: gradient(_plain, x, k))(x, weight)
    _assert_close(jax.vmap(lambda x, k: gradient(conv, x, k))(x, weight), want, "float32")
    _, scanned = lax.scan(lambda _, xk: (0, gradient(conv, *xk)), 0, (x, weight))
    _assert_close(scanned, want, "float32")


@pytest.mark.parametrize(("h", "w", "size"), [(4, 6, 2), (5, 7, 2), (9, 3, 3)])
def test_pooling_and_its_gradient(h, w, size):
    x = _random((2, h, w, 3), "float32")

    def plain(x):
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, size, size, 1), (1, size, size, 1), "VALID"
        )

    np.testing.assert_array_equal(max_pool(x, size), plain(x))
    g = _random(plain(x).shape, "float32", seed=1)
    got, want = (jax.vjp(pool, x)[1](g)[0] for pool in (lambda x: max_pool(x, size), plain))
    np.testing.assert_array_equal(got, want)
