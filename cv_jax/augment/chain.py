"""Builds a chain of augmentations from text such as "crop(4)|flip"."""

from collections.abc import Callable

import jax
import numpy as np

from cv_jax.augment.colour import color_jitter, grayscale
from cv_jax.augment.common import Augment, Batch
from cv_jax.augment.geometry import (
    affine,
    alternating_flip,
    crop,
    flip,
    random_resized_crop,
    rotate,
    scale,
    translate,
)
from cv_jax.augment.mixing import cutmix, cutout, mixup
from cv_jax.config import calls as spec
from cv_jax.config.errors import UserError, describe


def make_augment(text: str) -> Augment:
    """Builds the augmentation that a spec such as "crop(4)|alternating_flip|cutout(8)" names.

    The op at position i of the chain gets the key `fold_in(key, i)`; "" is the identity.

    Raises:
        UserError: an unknown op or a bad argument; the message lists what exists.
    """
    names = [call.name for call in spec.parse(text, "config.augment")]
    ops = spec.build(text, AUGMENTATIONS, "config.augment")

    def augment(key: jax.Array, batch: Batch) -> Batch:
        for position, (name, op) in enumerate(zip(names, ops, strict=True)):
            batch = _checked(name, op, jax.random.fold_in(key, position), batch)
        return batch

    return augment


def _checked(name: str, op: Augment, key: jax.Array, batch: Batch) -> Batch:
    """Returns op(key, batch); while it is traced, raises UserError for what is no such batch."""
    try:
        changed = op(key, batch)
    except KeyError as error:
        if error.args != ("label",) or "label" in batch:
            raise
        raise UserError(
            f"config.augment: {name!r} mixes labels, and a task without labels has none: remove it."
        ) from error
    if not isinstance(changed, dict):
        raise UserError(
            f"config.augment: {name!r} returned {describe(changed)} and not the batch, a dict of "
            f"{', '.join(batch)}."
        )
    for entry, before in batch.items():
        if entry == "rows":
            continue
        after, shape = changed.get(entry), before.shape
        if entry == "image" and np.ndim(after) == 4:  # its height and width may change
            shape = (shape[0], *after.shape[1:3], shape[3])
        wanted = jax.ShapeDtypeStruct(shape, before.dtype)
        if describe(after) != describe(wanted):
            raise UserError(
                f"config.augment: {name!r} returned {describe(after)} as the batch's {entry!r}; "
                f"expected is {describe(wanted)}."
            )
    return changed


AUGMENTATIONS: dict[str, Callable[..., Augment]] = {
    op.__name__: op
    for op in (
        flip,
        alternating_flip,
        crop,
        affine,
        rotate,
        scale,
        translate,
        random_resized_crop,
        cutout,
        color_jitter,
        grayscale,
        mixup,
        cutmix,
    )
}
