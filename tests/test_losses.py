"""Losses against their formulas, in float64 numpy."""

import inspect
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cv_jax.learn.losses import (
    barlow_twins,
    byol,
    cross_entropy,
    nt_xent,
    squared_error,
    vicreg,
)
from cv_jax.runtime.mesh import batch_sharding, make_mesh, put
from tests.conftest import on_devices


def reference(logits, label, smoothing):
    logits, label = np.float64(logits), np.float64(label)
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    smooth = (1 - smoothing) * label + smoothing / label.shape[-1]
    return -(smooth * log_softmax).sum(-1)


def soft_batch(b=6, n=5):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (b, n)).astype(np.float32)
    label = rng.dirichlet(np.ones(n), b).astype(np.float32)
    label[: b // 2] = np.eye(n, dtype=np.float32)[rng.integers(0, n, b // 2)]
    return jnp.asarray(logits), jnp.asarray(label)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_cross_entropy_of_hard_and_soft_labels_is_the_formula(smoothing):
    logits, label = soft_batch()
    loss = cross_entropy(logits, label, smoothing)
    chex.assert_shape(loss, (6,))
    np.testing.assert_allclose(loss, reference(logits, label, smoothing), rtol=1e-5)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    label = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    np.testing.assert_allclose(
        cross_entropy(logits, label) / np.log(2), np.array([1.0, 2.0]), rtol=1e-6
    )
    # y' = (0.8, 0.1, 0.1): 0.8 * 1 + 0.2 * 2 bits; and (0.1, 0.45, 0.45): 0.1 * 1 + 0.9 * 2 bits.
    np.testing.assert_allclose(
        cross_entropy(logits, label, 0.3) / np.log(2), np.array([1.2, 1.9]), rtol=1e-6
    )


def test_extreme_logits_stay_finite_and_exact():
    logits = jnp.array([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]])
    label = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(cross_entropy(logits, label), np.float32([0, 2e4]))
    np.testing.assert_allclose(cross_entropy(logits, label, 0.3), np.float32([3e3, 1.7e4]))
    grad = jax.grad(lambda z: cross_entropy(z, label).sum())(logits)
    np.testing.assert_array_equal(grad, np.float32([[0, 0, 0], [-1, 0, 1]]))


def test_gradient_is_softmax_minus_label():
    logits, label = soft_batch()
    check_grads(lambda z: cross_entropy(z, label, 0.1), (logits,), order=2, modes=["rev"])
    grad = jax.grad(lambda z: cross_entropy(z, label, 0.1).sum())(logits)
    expected = jax.nn.softmax(logits) - (0.9 * label + 0.1 / 5)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_half_precision_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 1000), jnp.bfloat16)
    loss = cross_entropy(logits, jax.nn.one_hot(jnp.array([3]), 1000), 0.1)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [np.log(1000)], rtol=1e-6)


def test_smoothing_may_be_traced():
    logits, label = soft_batch()
    smoothing = jnp.array([0.0, 0.2, 0.5])
    losses = jax.jit(jax.vmap(lambda e: cross_entropy(logits, label, e)))(smoothing)
    expected = np.stack([reference(logits, label, e) for e in (0.0, 0.2, 0.5)])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


# --- Without labels ---


def views(b=6, d=5):
    """Some dimensions vary by more than 1, some by less: VICReg's hinge has both sides."""
    rng = np.random.default_rng(1)
    z = rng.normal(0, 1, (b, 2, d)) * np.linspace(0.3, 2, d) + rng.normal(0, 1, (1, 1, d))
    return z.astype(np.float32)


def _unit(vector):
    return vector / np.sqrt((vector**2).sum())


def slow_nt_xent(z, temperature):
    b = len(z)
    flat = [_unit(z[i, v]) for i in range(b) for v in range(2)]
    losses = np.zeros((b, 2))
    for i in range(b):
        for v in range(2):
            this, positive = 2 * i + v, 2 * i + 1 - v
            others = sum(
                np.exp(flat[this] @ flat[k] / temperature) for k in range(2 * b) if k != this
            )
            losses[i, v] = -np.log(np.exp(flat[this] @ flat[positive] / temperature) / others)
    return losses.mean(1)


def slow_byol(q, z):
    losses = []
    for (q1, q2), (z1, z2) in zip(q, z, strict=True):
        one, other = _unit(q1) - _unit(z2), _unit(q2) - _unit(z1)
        losses.append((one**2).sum() + (other**2).sum())
    return np.array(losses)


def slow_vicreg(z, invariance, variance, covariance):
    b, _, d = z.shape
    losses = np.zeros(b)
    for i in range(b):
        losses[i] = invariance * sum((z[i, 0, k] - z[i, 1, k]) ** 2 for k in range(d)) / d
    for v in range(2):
        for i in range(d):
            std = np.sqrt(np.var(z[:, v, i], ddof=1) + 1e-4)
            losses += variance * max(0, 1 - std) / (2 * d)
            for j in range(d):
                if i != j:
                    losses += covariance * np.cov(z[:, v, i], z[:, v, j])[0, 1] ** 2 / d
    return losses


def slow_barlow_twins(z, redundancy):
    b, _, d = z.shape
    loss = 0.0
    for i in range(d):
        for j in range(d):
            one, other = z[:, 0, i], z[:, 1, j]
            c = ((one - one.mean()) * (other - other.mean())).mean()
            c /= np.sqrt(one.var() + 1e-5) * np.sqrt(other.var() + 1e-5)
            loss += (1 - c) ** 2 if i == j else redundancy * c**2
    return np.full(b, loss)


def slow_squared_error(drawn, image, weight):
    b, h, w, c = image.shape
    losses = np.zeros(b)
    for i, y, x, channel in np.ndindex(b, h, w, c):
        difference = drawn[i, y, x, channel] - image[i, y, x, channel]
        losses[i] += weight[i, y, x, 0] * difference**2 / (h * w * c)
    return losses


def _images(b=3):
    rng = np.random.default_rng(2)
    drawn, image = rng.normal(0, 1, (2, b, 4, 5, 2)).astype(np.float32)
    return drawn, image, rng.uniform(0, 2, (b, 4, 5, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("loss", "slow", "settings"),
    [
        (nt_xent, slow_nt_xent, (0.5,)),
        (nt_xent, slow_nt_xent, (0.07,)),
        (vicreg, slow_vicreg, (25.0, 25.0, 1.0)),
        (vicreg, slow_vicreg, (1.0, 0.0, 0.0)),
        (vicreg, slow_vicreg, (0.0, 1.0, 0.0)),
        (vicreg, slow_vicreg, (0.0, 0.0, 1.0)),
        (barlow_twins, slow_barlow_twins, (5e-3,)),
        (barlow_twins, slow_barlow_twins, (1.0,)),
    ],
)
def test_losses_of_views_are_their_formulas(loss, slow, settings):
    z = views()
    got = jax.jit(loss)(z, *settings)  # the settings are traced
    chex.assert_shape(got, (6,))
    np.testing.assert_allclose(got, slow(np.float64(z), *settings), rtol=1e-5)


def test_settings_that_are_not_given_are_those_of_the_papers():
    defaults = [inspect.signature(f).parameters for f in (nt_xent, vicreg, barlow_twins)]
    assert [[p.default for p in list(f.values())[1:]] for f in defaults] == [
        [0.5],
        [25.0, 25.0, 1.0],
        [5e-3],
    ]


def test_byol_is_its_formula():
    q, z = views(), views()[::-1] + np.float32(0.1)
    np.testing.assert_allclose(byol(q, z), slow_byol(np.float64(q), np.float64(z)), rtol=1e-5)


def test_squared_error_is_its_formula():
    images = _images()
    got = squared_error(*images)
    chex.assert_shape(got, (3,))
    np.testing.assert_allclose(got, slow_squared_error(*map(np.float64, images)), rtol=1e-5)


def test_nt_xent_by_hand():
    # Two images at right angles, both views the same but for their length. A view's similarity is
    # 1 to its other view, and 0 to two more: -log(e^(1/t) / (e^(1/t) + 2)).
    z = jnp.array([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 0.5], [0.0, 2.0]]])
    for temperature in (1.0, 0.5):
        e = np.exp(1 / temperature)
        expected = np.full(2, np.log((e + 2) / e))
        np.testing.assert_allclose(jax.jit(nt_xent)(z, temperature), expected, rtol=1e-5)
    # A single image has nothing to be mistaken for.
    np.testing.assert_allclose(jax.jit(nt_xent)(views(b=1)), np.zeros(1), atol=1e-6)


def test_byol_by_hand_and_its_bounds():
    q = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    np.testing.assert_allclose(byol(q, q[:, ::-1]), [0], atol=1e-6)  # each says the other's
    np.testing.assert_allclose(byol(q, q), [4], rtol=1e-6)  # at right angles
    np.testing.assert_allclose(byol(q, -5 * q[:, ::-1]), [8], rtol=1e-6)  # the opposite
    rng = np.random.default_rng(3)
    losses = byol(*rng.normal(0, 10, (2, 500, 2, 2)).astype(np.float32))
    assert 0 <= losses.min() < 0.1
    assert 7.9 < losses.max() <= 8


def test_byol_gives_its_targets_no_gradient():
    q, z = jnp.asarray(views()), jnp.asarray(views()[::-1])
    of_q, of_z = jax.grad(lambda *args: byol(*args).sum(), argnums=(0, 1))(q, z)
    np.testing.assert_array_equal(of_z, np.zeros_like(z))
    assert np.abs(of_q).min() > 0


@pytest.mark.parametrize("loss", [nt_xent, vicreg, barlow_twins, byol])
def test_gradients_of_losses_of_views(loss):
    z = jnp.asarray(views(b=4, d=3))
    target = jnp.asarray(views(b=4, d=3)[::-1])

    @jax.jit
    def mean(z):
        return (byol(z, target) if loss is byol else loss(z)).mean()

    check_grads(mean, (z,), order=1, modes=["rev"], rtol=0.02, atol=0.02)
    value_and_grad = jax.jit(jax.value_and_grad(mean))
    for collapsed in (np.zeros_like(z), np.ones_like(z)):
        value, grad = value_and_grad(collapsed)
        assert jnp.isfinite(value)
        assert jnp.isfinite(grad).all()


def test_half_precision_is_computed_in_float32():
    half = jnp.asarray(views(), jnp.bfloat16)
    whole = half.astype(jnp.float32)
    drawn, image, weight = _images()
    drawn = jnp.asarray(drawn, jnp.bfloat16)

    @jax.jit
    def losses(z, drawn):
        return (
            *(loss(z) for loss in (nt_xent, vicreg, barlow_twins)),
            byol(z, z[::-1]),
            squared_error(drawn, image, weight),
        )

    of_half, of_whole = losses(half, drawn), losses(whole, drawn.astype(jnp.float32))
    assert {loss.dtype for loss in of_half} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_close(of_half, of_whole, rtol=1e-6)


@pytest.mark.slow
def test_losses_are_the_same_where_eight_devices_share_the_batch():
    there = json.loads(on_devices(8, "tests.test_losses", "print_shared_losses"))
    here = _losses_and_gradients(views(b=16), _images(b=16))
    assert there.keys() == here.keys()
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def print_shared_losses():
    layout = batch_sharding(make_mesh())
    z, images = put((views(b=16), _images(b=16)), layout)
    assert {shard.data.shape for shard in z.addressable_shards} == {(2, 2, 5)}
    values = _losses_and_gradients(z, images)
    print(json.dumps(jax.tree.map(lambda x: np.asarray(x).tolist(), values)))


@jax.jit
def _losses_and_gradients(z, images):
    """Of each loss by its name: (b,), and that of the mean's gradient."""
    losses = {
        "nt_xent": nt_xent,
        "byol": lambda z: byol(z, z[::-1]),
        "vicreg": vicreg,
        "barlow_twins": barlow_twins,
    }
    values = {"squared_error": squared_error(*images)}
    for name, loss in losses.items():
        values[name] = loss(z)
        values[f"gradient of {name}"] = jax.grad(lambda z, loss=loss: loss(z).mean())(z)
    return values
