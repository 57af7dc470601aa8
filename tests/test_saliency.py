"""What explains an answer is the gradient of its logit, and in the order of the layers."""

import jax
import numpy as np
import pytest

from cv_jax.tasks.classification.saliency import by_depth, explain

WEIGHT = np.float32([[1, 2], [-3, 4]])[..., None] * np.float32([1, -2, 0.5])  # h w c


def _predict(state, image, tta):
    """Logits sum(w x^2) and a constant, which is the answer of "mirror" alone."""
    first = (state[None] * image**2).sum((1, 2, 3))
    second = 1e9 if tta == "mirror" else -1e9
    return jax.numpy.stack([first, 0 * first + second + image[:, 0, 0, 0]], -1), {"x": image}


explain_jitted = jax.jit(explain, static_argnums=(0, 3))


def test_the_saliency_is_the_largest_slope_over_the_channels():
    image = np.random.default_rng(0).random((2, 2, 3), np.float32)
    explained = explain_jitted(_predict, WEIGHT, image, "none")
    want = np.abs(2 * WEIGHT * image).max(-1)  # d/dx w x^2
    np.testing.assert_allclose(explained.saliency, want, rtol=1e-6)
    assert explained.probabilities.tolist() == pytest.approx([1, 0])
    np.testing.assert_array_equal(explained.features["x"], image)


def test_it_is_that_of_the_class_that_all_views_answer():
    image = np.ones((2, 2, 3), np.float32)
    explained = explain_jitted(_predict, WEIGHT, image, "mirror")
    assert explained.probabilities.tolist() == pytest.approx([0, 1])
    assert explained.saliency.tolist() == [[1, 0], [0, 0]]


def test_layers_are_in_order_though_jax_sorts_their_names():
    shapes = {"group1": (4, 4, 2), "group2": (2, 2, 8), "pooled": (8,), "stem": (4, 4, 2)}
    features = {name: np.zeros(shape) for name, shape in shapes.items()}
    assert list(by_depth(features)) == ["stem", "group1", "group2", "pooled"]
