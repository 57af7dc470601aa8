"""Kernels against plain lax: values and gradients, over shapes that nobody chose by hand."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cv_jax.models.ops import (
    blocks,
    conv,
    depthwise,
    depthwise_conv,
    max_pool,
    rows,
    winograd,
)
from cv_jax.models.ops.groups import group_sizes, map_groups, sum_groups
from tests.conftest import on_devices

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


SAME = ((1, 1), (1, 1))


# Winograd computes these two, and the input gradient of the strided one.
@pytest.mark.slow
@example((3, 8, 9, 16, 20), (3, 3), (1, 1), SAME, "bfloat16")
@example((3, 8, 9, 16, 20), (3, 3), (2, 2), SAME, "float32")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    # Up to 16 channels row by row, more by views.
    sizes=st.tuples(*[st.integers(1, 9)] * 3, *[st.sampled_from([1, 2, 3, 5, 16, 17, 20])] * 2),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_convolution_and_its_gradients(sizes, kernel, strides, padding, dtype):
    b, h, w, c, o = sizes
    h, w = max(h, kernel[0]), max(w, kernel[1])
    x, weight = _random((b, h, w, c), dtype), _random((*kernel, c, o), dtype, seed=1)
    want, want_vjp = jax.vjp(lambda x, k: _plain(x, k, strides, padding), x, weight)
    g = _random(want.shape, dtype, seed=2)
    with mock.patch.multiple(winograd, _LEAST_PRODUCTS=0, _LEAST_TILES=0):
        y, vjp = jax.vjp(lambda x, k: conv(x, k, strides, padding), x, weight)
        gradients = vjp(g)
    _assert_close(y, want, dtype)
    for got, plain in zip(gradients, want_vjp(g), strict=True):
        assert got.dtype == plain.dtype
        _assert_close(got, plain, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding"),
    [
        ((2, 2), (3, 3), (1, 1), SAME),
        ((1, 1), (3, 3), (1, 1), SAME),
        ((4, 2), (3, 3), (2, 1), ((1, 1), (0, 2))),
        ((2, 3), (4, 5), (3, 2), ((2, 4), (3, 1))),
    ],
)
def test_convolution_of_fewer_pixels_than_taps(size, kernel, strides, padding, dtype):
    assert blocks.pays((3, *size, 20), (*kernel, 20, 18))
    x, weight = _random((3, *size, 20), dtype), _random((*kernel, 20, 18), dtype, seed=1)
    want, want_vjp = jax.vjp(lambda x, k: _plain(x, k, strides, padding), x, weight)
    y, vjp = jax.vjp(lambda x, k: conv(x, k, strides, padding), x, weight)
    _assert_close(y, want, dtype)
    g = _random(want.shape, dtype, seed=2)
    for got, plain in zip(vjp(g), want_vjp(g), strict=True):
        assert got.dtype == plain.dtype
        _assert_close(got, plain, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "o", "bytes_of_an_image"),
    [("convolution", 20, 4 * 5 * 5 * 3 * 3 * 2), ("rows", 4, 4 * 7 * 5 * (3 * 2 + 3 * 4))],
)
def test_groups_of_images_add_up(way, o, bytes_of_an_image, monkeypatch):
    x, weight = _random((6, 5, 5, 2), "float32"), _random((3, 3, 2, o), "float32", seed=1)
    padding = ((1, 1), (1, 1))

    def gradient(x, weight):
        return jax.grad(lambda k: (conv(x, k, (1, 1), padding) ** 2).sum())(weight)

    whole = gradient(x, weight)
    monkeypatch.setattr(f"cv_jax.models.ops.{way}._GROUP_BYTES", 2 * bytes_of_an_image)
    grouped = gradient(x, weight)
    _assert_close(grouped, whole, "float32")
    text = str(jax.make_jaxpr(gradient)(x, weight))
    assert "f32[3,2,5,5,2]" in text  # three groups of two


@pytest.mark.parametrize(
    ("b", "most", "sizes"),
    [
        (12, 5, (4, 0)),
        (14, 6, (2, 0)),
        (7, 5, (5, 2)),
        (13, 5, (5, 3)),
        (4, 100, (4, 0)),
        (4, 0, (1, 0)),
    ],
)
def test_groups_divide_the_batch_or_leave_a_rest(b, most, sizes):
    assert group_sizes(b, most) == sizes


@pytest.mark.parametrize("most", [1, 4, 5, 100])
@pytest.mark.parametrize("b", [12, 13])
def test_groups_give_what_the_whole_batch_does(b, most):
    # Whole numbers, whose sums are exact in any order.
    x, g = (jnp.round(4 * _random((b, n), "float32", seed=n)) for n in (3, 2))
    assert map_groups(lambda x: x * 2, x, most).shape == x.shape
    np.testing.assert_array_equal(map_groups(lambda x: x * 2, x, most), x * 2)
    np.testing.assert_array_equal(sum_groups(lambda x, g: x.T @ g, x, g, most), x.T @ g)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 7),
    size=st.tuples(st.integers(3, 16), st.integers(3, 16)),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_winograd(batch, size, channels, padding, dtype):
    x = _random((batch, *size, channels[0]), dtype)
    kernel = _random((3, 3, *channels), dtype, seed=1)
    want, vjp = jax.vjp(lambda x, k: _plain(x, k, (1, 1), padding), x, kernel)
    g = _random(want.shape, dtype, seed=2)
    got = jax.jit(lambda x, k, g: _winograd(x, k, g, padding))(x, kernel, g)
    for a, b in zip(got, (want, *vjp(g)), strict=True):
        assert a.dtype == b.dtype
        _assert_close(a, b, dtype)


def _winograd(x, kernel, g, padding):
    """y and both gradients, whether it pays or not."""
    back = tuple((2 - before, 2 - after) for before, after in padding)
    return (
        winograd.convolution(x, kernel, padding),
        winograd.convolution(g, kernel[::-1, ::-1].swapaxes(2, 3), back),
        winograd.filter_gradient(x, g, padding),
    )


# One for each way on the CPU; "groups" and "plain" differ in how many images a group may have.
CASES = {
    "winograd": (64, 7, 64, 64, 3),
    "rows": (8, 9, 2, 3, 4),
    "groups": (16, 15, 24, 40, 5),
    "plain": (8, 4, 2, 20, 2),
}


def _case(name):
    b, side, c, o, taps = CASES[name]
    x, kernel = _random((b, side, side, c), "float32"), _random((taps, taps, c, o), "float32", 1)
    by_winograd = winograd.pays(x.shape, kernel.shape, (1, 1), ((1, 1), (1, 1)))
    assert by_winograd == (name == "winograd")
    assert rows.pays(x.shape, kernel.shape, (1, 1)) == (name == "rows")
    return x, kernel


def _gradients(convolve, x, kernel):
    return jax.grad(lambda x, k: (convolve(x, k, (1, 1), ((1, 1), (1, 1))) ** 2).sum(), (0, 1))(
        x, kernel
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_under_vmap_and_scan(name):
    x, kernel = _case(name)
    x, kernel = jnp.stack([x, 2 * x[::-1]]), jnp.stack([kernel, kernel[::-1]])
    want = jax.vmap(lambda x, k: _gradients(_plain, x, k))(x, kernel)
    batched = jax.vmap(lambda x, k: _gradients(conv, x, k))(x, kernel)
    _, scanned = lax.scan(lambda _, xk: (0, _gradients(conv, *xk)), 0, (x, kernel))
    for got in (batched, scanned):
        jax.tree.map(lambda a, b: _assert_close(a, b, "float32"), got, want)


@pytest.mark.slow
def test_sharded_over_the_batch():
    assert on_devices(4, "tests.test_ops", "check_sharded").split() == list(CASES)


def check_sharded():
    mesh = jax.make_mesh((4,), ("data",))
    over_batch, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    shardings = (over_batch, everywhere)
    for name in CASES:
        x, kernel = _case(name)
        step = jax.jit(
            lambda x, k: _gradients(conv, x, k), in_shardings=shardings, out_shardings=shardings
        )
        for got, want in zip(step(x, kernel), _gradients(_plain, x, kernel), strict=True):
            _assert_close(got, want, "float32")
        print(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "size"), [((5, 7, 4, 6), 7), ((3, 2, 5, 1), 3)])
def test_depthwise_convolution_and_its_gradients(shape, size, dtype, monkeypatch):
    monkeypatch.setattr(depthwise, "_GROUP_BYTES", 2 * 4 * 7 * 4 * 6)  # two images, and a rest
    x, g = (_random(shape, dtype, seed) for seed in (0, 1))
    kernel = _random((size, size, shape[3]), dtype, 2)

    def plain(x, kernel):
        one = (1, 1)
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel[:, :, None], one, "SAME", dimension_numbers=numbers,
            feature_group_count=shape[3],
        )  # fmt: skip

    got, want = (
        jax.jit(lambda x, kernel, g, f=f: (f(x, kernel), *jax.vjp(f, x, kernel)[1](g)))
        for f in (depthwise_conv, plain)
    )
    for a, b in zip(got(x, kernel, g), want(x, kernel, g), strict=True):
        assert a.dtype == b.dtype
        _assert_close(a, b, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("h", "w", "size"), [(4, 6, 2), (5, 7, 2), (9, 3, 3)])
def test_pooling_and_its_gradient(h, w, size, dtype):
    x = jnp.round(2 * _random((2, h, w, 3), dtype))  # many windows have their largest value twice

    def plain(x):
        return lax.reduce_window(
            x, jnp.array(-jnp.inf, dtype), lax.max, (1, size, size, 1), (1, size, size, 1), "VALID"
        )

    np.testing.assert_array_equal(max_pool(x, size), plain(x))
    g = _random(plain(x).shape, dtype, seed=1)
    got, want = (jax.vjp(pool, x)[1](g)[0] for pool in (lambda x: max_pool(x, size), plain))
    np.testing.assert_array_equal(got, want)
    batched = jax.vmap(lambda x: jax.grad(lambda x: max_pool(x, size).sum())(x))(x[:, None])
    np.testing.assert_array_equal(batched[:, 0], jax.grad(lambda x: max_pool(x, size).sum())(x))
