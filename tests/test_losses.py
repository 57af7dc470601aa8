"""Losses against their formulas, in float64 numpy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cv_jax.losses import cross_entropy


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
