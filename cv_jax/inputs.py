"""What a network is given: uint8 images as float32, normalised."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cv_jax.augment import make_augment
from cv_jax.data import DataSpec


def to_unit(image: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """uint8 0..255 to float32 in [0, 1]; float32 images are in [0, 1] already."""
    if image.dtype == np.float32:
        return image
    return image.astype(np.float32) / np.float32(255)


def make_view(text: str) -> Callable[[dict, jax.Array], jax.Array]:
    """Returns (batch, key) -> augmented images in [0, 1], for tasks that need no labels.

    `text`: see `augment.make_augment`.
    """
    augment = make_augment(text)

    def view(batch, key):
        image = augment(key, {**batch, "image": to_unit(batch["image"])})["image"]
        # The barrier keeps the compiler from augmenting again for each reader of a pixel.
        return jax.lax.optimization_barrier(image)

    return view


def make_normalize(spec: DataSpec, normalize: bool) -> Callable[[Any], Any]:
    """Returns x -> (x - mean) / std per channel of the training split, or x -> x.

    The images may be NumPy's or JAX's, and are that after it.
    """
    if not normalize:
        return lambda image: image
    mean, std = _mean_and_std(spec)
    return lambda image: (image - mean) / std


def make_denormalize(spec: DataSpec, normalize: bool) -> Callable[[Any], Any]:
    """Returns what `make_normalize` gives for the same arguments, backwards."""
    if not normalize:
        return lambda image: image
    mean, std = _mean_and_std(spec)
    return lambda image: image * std + mean


def _mean_and_std(spec: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    mean, std = (np.float32(x)[None, None, None] for x in (spec.mean, spec.std))
    return mean, np.maximum(std, np.float32(1 / 255))  # of a constant channel: 0
