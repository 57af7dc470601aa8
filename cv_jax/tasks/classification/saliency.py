"""What a network makes of an image: its answer, the pixels that matter to it, its feature maps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Explanation(NamedTuple):
    """What a network makes of one image, all float32.

    Attributes:
        probabilities: (n,), of the classes.
        saliency: (h, w), see `explain`.
        features: name -> (h, w, c) or (c,); JAX sorts the names, see `by_depth`.
    """

    probabilities: jax.Array
    saliency: jax.Array
    features: dict[str, jax.Array]


def explain(predict: Callable, state: Any, image: jax.Array, tta: str) -> Explanation:
    """The answer to an image as evaluation gives it, and what it comes from.

    The saliency of a pixel is max over its channels of |d l / d x|, where x is the image and l its
    logit of the class that is answered: K. Simonyan et al., https://arxiv.org/abs/1312.6034.

    Args:
        predict: see `tasks.Task`.
        state: that of the network.
        image: (h, w, c) float32 in [0, 1].
        tta: a name of `views.TTA`, by which it answers; saliency and features are those of the
            image as it is.
    """
    logits, features = predict(state, image[None], tta)
    answer = logits[0].argmax()
    slope = jax.grad(lambda x: predict(state, x[None], "none")[0][0, answer])(image)
    return Explanation(
        jax.nn.softmax(logits[0].astype(jnp.float32)),
        jnp.abs(slope).max(-1),
        {name: x[0].astype(jnp.float32) for name, x in features.items()},
    )


def by_depth(features: dict[str, Any]) -> dict[str, Any]:
    """The features in the order of the layers: maps shrink on the way, and "stem" is the first."""

    def depth(name):
        x = features[name]
        return -x[..., 0].size, name != "stem", name

    return {name: features[name] for name in sorted(features, key=depth)}
