"""What explains a prediction is the gradient of its logit, and in the order of the layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.tasks.classification.saliency import explain
from cv_jax.tools.serve import by_depth

WEIGHT = np.float32([[1, 2], [-3, 4]])[..., None] * np.float32([1, -2, 0.5])  # h w c


def _apply(state, image, answer):
    """Logits sum(w x^2) and another, which depends on one pixel; `answer` is the class."""
    first = (state[None] * image**2).sum((1, 2, 3))
    second = image[:, 0, 0, 0] + (1e9 if answer else -1e9)
    return jnp.stack([first, second], -1), {"x": image}


def _explain(image, by_one_view, by_all):
    apply = partial(_apply, answer=by_one_view)
    program = partial(explain, apply, lambda state, x: _apply(state, x, by_all)[0])
    return jax.jit(program)(WEIGHT, {"image": image})


def test_the_saliency_is_the_largest_slope_over_the_channels():
    image = np.random.default_rng(0).random((3, 2, 2, 3), np.float32)
    explained = _explain(image, 0, 0)
    want = np.abs(2 * WEIGHT * image).max(-1)  # d/dx w x^2
    np.testing.assert_allclose(explained["saliency"], want, rtol=1e-6)
    np.testing.assert_array_equal(explained["features"]["x"], image)


def test_it_is_that_of_the_class_that_all_views_predict():
    explained = _explain(np.ones((1, 2, 2, 3), np.float32), 0, 1)
    assert explained["saliency"].tolist() == [[[1, 0], [0, 0]]]


def test_layers_are_in_order_though_jax_sorts_their_names():
    shapes = {"group1": (4, 4, 2), "group2": (2, 2, 8), "pooled": (8,), "stem": (4, 4, 2)}
    features = {name: np.zeros(shape) for name, shape in shapes.items()}
    assert list(by_depth(features)) == ["stem", "group1", "group2", "pooled"]
