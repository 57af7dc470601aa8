"""Computes predictions, features, filters and augmented examples of a trained network."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from cv_jax.data import Examples
from cv_jax.data.encoded import read_training
from cv_jax.data.fields import num_examples
from cv_jax.trained.load import Trained, check_finite_predictions, make_predict

# The features that a report shows: the head's input, and an autoencoder's features.
SHOWN = ("pooled", "latent", "reconstruction")


def predictions(trained: Trained, examples: Examples) -> dict[str, np.ndarray]:
    """Returns the network's predictions for examples, by name.

    Raises:
        UserError: a prediction is not finite.
    """
    found = _of_all(trained, examples, trained.task.predict)
    check_finite_predictions(found)
    return found


def features(trained: Trained, examples: Examples) -> dict[str, np.ndarray]:
    """Returns those features of SHOWN that the network has, as float32."""

    def shown(state, batch):
        found = trained.task.features(state, batch)
        return {name: found[name].astype(jnp.float32) for name in SHOWN if name in found}

    return _of_all(trained, examples, shown) if trained.task.features else {}


def _of_all(trained: Trained, examples: Examples, function: Callable) -> dict[str, np.ndarray]:
    inputs = {name: examples[name] for name in trained.task.inputs}
    program = make_predict(trained, num_examples(inputs), function)
    return jax.device_get(program(inputs))


def first_filters(params: Any, channels: int) -> tuple[str, np.ndarray] | None:
    """Returns the path and filters (k, h, w, c) in [0, 1] of the kernel whose input is the image.

    Each filter is scaled to its own range. None if no kernel has `channels` input channels.
    """
    for path, kernel in flatten_dict(params, sep="/").items():
        if kernel.ndim == 4 and kernel.shape[2] == channels:
            filters = np.moveaxis(np.asarray(kernel, np.float32), -1, 0)
            axes = (1, 2, 3)
            low, high = filters.min(axes, keepdims=True), filters.max(axes, keepdims=True)
            return path, (filters - low) / np.maximum(high - low, 1e-12)
    return None


def augmented(trained: Trained, train: Examples, count: int) -> Examples:
    """Returns the first training examples, augmented as in the first epoch, by field."""
    index = np.arange(min(count, num_examples(train)), dtype=np.int32)
    examples = read_training(train, index, key=0, epoch=0)
    coin = np.random.default_rng(0).integers(0, 2**32, len(index), dtype=np.uint32)
    rows = {"index": index, "epoch": np.zeros_like(index), "coin": coin}
    preview = jax.jit(trained.task.preview)({**examples, "rows": rows}, jax.random.key(0))
    return {name: np.asarray(x) for name, x in preview.items() if name != "rows"}


def embed(features: np.ndarray) -> np.ndarray:
    """Embeds features (m, d) in the plane, (m, 2), by t-SNE, which keeps neighbours close.

    L. van der Maaten and G. Hinton, JMLR 9, 2008. Deterministic.
    """
    from sklearn.manifold import TSNE  # only here: slow to import
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(features) - 1) / 3)
    with threadpool_limits(1):  # with so few points, threads cost more than they save
        return TSNE(perplexity=perplexity, max_iter=500, random_state=0).fit_transform(features)
