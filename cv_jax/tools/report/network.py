"""What a trained network answers, what it sees, and what it was shown in training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from cv_jax.data import DataSpec, Split
from cv_jax.data.batches import padded_batches
from cv_jax.tasks import build_task
from cv_jax.trained.load import GROUP_SIZE, Trained, check_answers


class Answers(NamedTuple):
    """Of m images, without test-time augmentation.

    Attributes:
        answer: (m,) the class with the highest probability.
        confidence: (m,) that probability.
        seen: what the network sees in them, see `look`.
    """

    answer: np.ndarray
    confidence: np.ndarray
    seen: dict[str, np.ndarray]


def ask(trained: Trained, images: np.ndarray) -> Answers:
    """Returns answers of the network for images (m, h, w, c) uint8.

    Raises UserError where they are not finite.
    """

    def apply(state, image):
        logits, features = trained.predict(state, image, "none")
        return {"probability": jax.nn.softmax(logits), **_shown(features)}

    seen = _in_groups(apply, trained.state, images)
    probability = seen.pop("probability")
    check_answers(probability)
    return Answers(probability.argmax(-1), probability.max(-1), seen)


# The features that a report shows: those that the head sees, and what an autoencoder makes.
SHOWN = ("pooled", "latent", "reconstruction")


def look(trained: Trained, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the network sees in images (m, h, w, c) uint8: those of SHOWN that it names."""
    return _in_groups(
        lambda state, image: _shown(trained.features(state, image)), trained.state, images
    )


def _shown(features: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: features[name] for name in SHOWN if name in features}


def _in_groups(function: Callable, state: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """function(state, images) -> {name: (m, ...)}, of a few at a time, as float32."""
    count = len(images)
    split = Split(images, np.zeros(count, np.int32))
    batches = padded_batches(split, min(GROUP_SIZE, count))
    program = jax.jit(function)
    outputs = [jax.device_get(program(state, batch["image"])) for batch in batches]
    return {
        name: np.concatenate([output[name] for output in outputs])[:count].astype(np.float32)
        for name in outputs[0]
    }


def worst_mistakes(answers: Answers, label: np.ndarray, most: int) -> np.ndarray:
    """Positions of the wrong answers, the most confident first."""
    wrong = np.flatnonzero(answers.answer != label)
    return wrong[np.argsort(-answers.confidence[wrong], kind="stable")][:most]


def first_filters(params: Any, channels: int) -> tuple[str, np.ndarray] | None:
    """The convolution kernel that sees the image: its path, and (k, h, w, c) in [0, 1].

    Each filter is scaled by itself, from its lowest value to its highest. None where no array is a
    kernel for so many channels.
    """
    for path, kernel in flatten_dict(params, sep="/").items():
        if kernel.ndim == 4 and kernel.shape[2] == channels:
            filters = np.moveaxis(np.asarray(kernel, np.float32), -1, 0)
            axes = (1, 2, 3)
            low, high = filters.min(axes, keepdims=True), filters.max(axes, keepdims=True)
            return path, (filters - low) / np.maximum(high - low, 1e-12)
    return None


def augmented(
    config: ml_collections.ConfigDict, spec: DataSpec, train: Split, count: int
) -> np.ndarray:
    """The first training images as the first epoch may show them: (count, h, w, c) in [0, 1]."""
    image, label = (np.asarray(array[:count]) for array in train)
    index = np.arange(len(label), dtype=np.int32)
    coin = np.random.default_rng(0).integers(0, 2**32, len(label), dtype=np.uint32)
    batch = {
        "image": image,
        "label": label,
        "index": index,
        "epoch": np.zeros_like(index),
        "coin": coin,
    }
    return np.asarray(jax.jit(build_task(config, spec).preview)(batch, jax.random.key(0)))


def embed(features: np.ndarray) -> np.ndarray:
    """Places features (m, d) on a plane, (m, 2), by t-SNE: near ones stay near.

    L. van der Maaten and G. Hinton, JMLR 9, 2008. The same for the same features.
    """
    from sklearn.manifold import TSNE  # only here: slow to import
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(features) - 1) / 3)
    with threadpool_limits(1):  # for so few, threads cost more than they save
        return TSNE(perplexity=perplexity, max_iter=500, random_state=0).fit_transform(features)
