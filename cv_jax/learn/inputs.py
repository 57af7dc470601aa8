"""Prepares the input of a network: augmented and normalised images in float32."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cv_jax.augment.chain import make_augment
from cv_jax.config import calls as specs
from cv_jax.config.errors import UserError
from cv_jax.data import DataSpec, Field


def to_unit(image: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Converts uint8 0..255 to float32 in [0, 1]; returns float32 images unchanged."""
    if image.dtype == np.float32:
        return image
    return image.astype(np.float32) / np.float32(255)


def make_augmented(text: str, fields: Mapping[str, Field]) -> Callable[[dict, jax.Array], dict]:
    """Returns (batch, key) -> augmented batch.

    Images and clips become float32 in [0, 1], a label one-hot probabilities (b, n), and labels of
    several classes 0 or 1 in float32.

    Args:
        text: the value of `config.augment`, see `augment.make_augment`.
        fields: the fields of the batch.
    """
    augment = make_augment(text, fields)

    def augmented(batch, key):
        batch = {**batch, **{name: _prepared(batch[name], field) for name, field in fields.items()}}
        # The barrier keeps the compiler from augmenting again for each reader of a pixel.
        return jax.lax.optimization_barrier(augment(key, batch))

    return augmented


def _prepared(x: jax.Array, field: Field) -> jax.Array:
    if field.kind in ("image", "clip"):
        return to_unit(x)
    if field.kind == "labels":
        return x.astype(np.float32)
    return jax.nn.one_hot(x, len(field.names)) if field.kind == "label" else x


def make_view(text: str) -> Callable[[dict, jax.Array], jax.Array]:
    """Returns (batch, key) -> augmented images in [0, 1], for tasks that use only the image.

    Args:
        text: the value of `config.augment`, see `augment.make_augment`.
    """
    augment = make_augment(text)

    def view(batch, key):
        batch = {"image": to_unit(batch["image"]), "rows": batch["rows"]}
        return jax.lax.optimization_barrier(augment(key, batch)["image"])

    return view


def check_augmented(text: str, examples: dict, spec: DataSpec) -> list[str]:
    """Checks the augmented images of the first batch; returns a note if their size changed.

    Args:
        text: the value of `config.augment`.
        examples: the augmented batch, by field.
        spec: describes the data set.

    Raises:
        UserError: a value is not finite or lies outside [0, 1]. The message names the first
            augmentation at fault, found by applying the chain step by step to `spec.sample`.
    """
    if "image" not in examples:
        return []
    images = to_unit(np.asarray(examples["image"]))
    if not _in_unit(images):
        calls = specs.parse(text, "config.augment")
        image = to_unit(spec.sample["image"][:16])
        number = np.zeros(len(image), np.int32)
        rows = {"index": number, "epoch": number, "coin": number.astype(np.uint32)}
        batch = {"rows": rows}
        batch["label"] = np.zeros((len(image), spec.num_classes), np.float32)
        name = text
        for count in range(1, len(calls) + 1):
            found = make_augment(calls[:count])(jax.random.key(0), {"image": image, **batch})
            if not _in_unit(found["image"]):
                name, images = calls[count - 1].name, found["image"]
                break
        low, high = np.min(images), np.max(images)
        raise UserError(
            f"config.augment: {name!r} returned images with values from {low:.4g} to {high:.4g}. "
            "Clip or scale them to finite values from 0 to 1; normalisation comes later."
        )
    (h, w), (here_h, here_w) = spec.image_shape[:2], images.shape[1:3]
    same = (h, w) == (here_h, here_w)
    return [] if same else [f"augment makes images of {here_h}x{here_w} pixels out of {h}x{w}"]


def _in_unit(images: Any) -> bool:
    """Returns whether all values are in [0, 1] up to rounding; False for NaN."""
    return bool(np.min(images) >= -1e-3 and np.max(images) <= 1 + 1e-3)


# Mean and standard deviation of each channel in [0, 1], by the name in config.data.normalize_by.
MEAN_AND_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision, most of timm
    "half": (0.5, 0.5),  # [0, 1] becomes [-1, 1]: big_vision, ViTs of timm
}


def make_normalize(spec: DataSpec, normalize: bool, by: str = "train") -> Callable[[Any], Any]:
    """Returns x -> (x - mean) / std per channel, or x -> x.

    The function takes NumPy and JAX arrays, and returns the same kind.

    Args:
        spec: describes the data set.
        normalize: the value of `config.data.normalize`.
        by: the value of `config.data.normalize_by`: "train" or a name of MEAN_AND_STD.

    Raises:
        UserError: `by` does not fit the images, or has no effect.
    """
    if by != "train" and not normalize:
        raise UserError(
            f"config.data.normalize_by={by!r} has no effect with config.data.normalize=false: set "
            "normalize to true, or normalize_by to 'train'."
        )
    if not normalize:
        return lambda image: image
    mean, std = _mean_and_std(spec, by)
    return lambda image: (image - mean) / std


def make_denormalize(spec: DataSpec, normalize: bool, by: str = "train") -> Callable[[Any], Any]:
    """Returns the inverse of the function that `make_normalize` returns for these arguments."""
    if not normalize:
        return lambda image: image
    mean, std = _mean_and_std(spec, by)
    return lambda image: image * std + mean


def _mean_and_std(spec: DataSpec, by: str) -> tuple[np.ndarray, np.ndarray]:
    field = spec.fields["image"]
    channels = field.shape[-1]
    found = (field.mean, field.std) if by == "train" else MEAN_AND_STD[by]
    if by == "imagenet" and channels != 3:
        raise UserError(
            f"config.data.normalize_by='imagenet' needs images of 3 channels, but {spec.name!r} "
            f"has {channels}: set it to 'train' or 'half'."
        )
    mean, std = (np.float32(x) + np.zeros((1, 1, 1, channels), np.float32) for x in found)
    return mean, np.maximum(std, np.float32(1 / 255))  # a constant channel has std 0
