"""Explains a prediction: a saliency map of its pixels, and feature maps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cv_jax.learn.inputs import to_unit


def explain(apply: Callable, logits_of: Callable, state: Any, batch: dict) -> dict[str, Any]:
    """Returns the saliency maps and the features of a batch of images.

    The saliency of a pixel is max over its channels of |d l / d x|, where x is the image and l its
    logit of the predicted class: K. Simonyan et al., https://arxiv.org/abs/1312.6034. The predicted
    class uses all test-time views; saliency and features use the unchanged image.

    Args:
        apply: (state, image) -> (logits (b, n), features by name).
        logits_of: (state, image) -> logits (b, n), averaged over the test-time views.
        state: the network's state.
        batch: {"image": (b, h, w, c) uint8, or float32 in [0, 1]}.

    Returns:
        {"saliency": (b, h, w), "features": {name: (b, ...)}}, all float32.
    """
    image = to_unit(batch["image"])
    answer = logits_of(state, image).argmax(-1)

    def chosen(x):  # no image affects another, so the sum keeps their gradients apart
        return jnp.take_along_axis(apply(state, x)[0], answer[:, None], 1).sum()

    features = apply(state, image)[1]
    return {
        "saliency": jnp.abs(jax.grad(chosen)(image)).max(-1),
        "features": {name: x.astype(jnp.float32) for name, x in features.items()},
    }
