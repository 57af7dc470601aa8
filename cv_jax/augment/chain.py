"""Builds a chain of augmentations from text such as "crop(4)|flip"."""

from collections.abc import Callable

import jax
import numpy as np

from cv_jax.augment.colour import color_jitter, grayscale, stain_jitter
from cv_jax.augment.common import (
    IMAGE_AND_LABEL,
    SPATIAL_AXES,
    Augment,
    Batch,
    Fields,
    image_size,
)
from cv_jax.augment.geometry import (
    Motion,
    affine,
    alternating_flip,
    crop,
    flip,
    move,
    random_crop,
    random_resized_crop,
    rot90,
    rotate,
    scale,
    translate,
)
from cv_jax.augment.mixing import cutmix, cutout, mixup, mixup_or_cutmix, random_erasing
from cv_jax.augment.randaugment import randaugment
from cv_jax.augment.warp import MIN_AREA
from cv_jax.config import calls as spec
from cv_jax.config.errors import UserError, describe
from cv_jax.data.fields import has_kind


def make_augment(text: str, fields: Fields | None = None, min_area: float = MIN_AREA) -> Augment:
    """Builds the augmentation that a spec such as "crop(4)|alternating_flip|cutout(8)" names.

    The op at position i of the chain gets the key `fold_in(key, i)`; "" is the identity.
    Neighbouring motions such as "scale(0.8, 1.2)|rotate(10)" multiply their matrices and resample
    the images once.

    Args:
        text: the spec.
        fields: the batch's fields, passed to each op with a parameter `fields`; None: image and
            label.
        min_area: the smallest share of a box that must stay inside the image; each op drops a box
            with less.

    Raises:
        UserError: an op is unknown (the message lists all), an argument is wrong, or an op cannot
            change one of the fields.
    """
    fields = IMAGE_AND_LABEL if fields is None else fields
    _check_fields(fields)
    names = [call.name for call in spec.parse(text, "config.augment")]
    context = {"fields": fields, "min_area": min_area}
    ops = spec.build(text, AUGMENTATIONS, "config.augment", **context)
    groups = _groups(ops)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        for group in groups:
            keys = [jax.random.fold_in(key, position) for position in group]
            name = "|".join(names[position] for position in group)
            batch = _checked(name, [ops[position] for position in group], keys, batch, fields)
        return batch

    return augment


def _check_fields(fields: Fields) -> None:
    boxes = [name for name, field in fields.items() if field.kind == "boxes"]
    if len(boxes) > 1:
        raise UserError(
            f"The data set has boxes in the fields {', '.join(boxes)}: put them into one field."
        )
    if boxes and not has_kind(fields, *SPATIAL_AXES):
        raise UserError(f"The field {boxes[0]!r} has boxes without an image: add the image.")


def _groups(ops: list[Augment]) -> list[list[int]]:
    """Groups the positions of the ops: neighbouring motions of one mode are in one group."""
    groups = []
    for position, op in enumerate(ops):
        before = ops[position - 1] if position else None
        both = isinstance(before, Motion) and isinstance(op, Motion)
        if both and before.mode == op.mode:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def _checked(
    name: str, ops: list[Augment], keys: list[jax.Array], batch: Batch, fields: Fields
) -> Batch:
    """Applies an op, or neighbouring motions; raises UserError if the result is not such a batch.

    The check runs while the op is traced. The batch's `rows` are unchanged.
    """
    try:
        changed = ops[0](keys[0], batch) if len(ops) == 1 else move(ops, keys, batch)
    except KeyError as error:
        if error.args != ("label",) or "label" in batch:
            raise
        raise UserError(
            f"config.augment: {name!r} mixes labels, but the task has none: remove it."
        ) from error
    if not isinstance(changed, dict):
        raise UserError(
            f"config.augment: {name!r} returned {describe(changed)}: return the batch, a dict of "
            f"{', '.join(batch)}."
        )
    rows = {entry: batch[entry] for entry in ("rows",) if entry in batch}
    for entry, before in batch.items():
        if entry not in rows:
            _check_entry(name, entry, before, changed.get(entry), fields)
    try:
        image_size(changed, fields)
    except UserError as error:
        raise UserError(f"config.augment: {name!r} resized only some fields. {error}") from error
    return {**changed, **rows}


def _check_entry(
    name: str, entry: str, before: jax.Array, after: jax.Array | None, fields: Fields
) -> None:
    """Raises UserError if the dtype or an axis other than height and width has changed."""
    shape = list(before.shape)
    if entry in fields and np.ndim(after) == len(shape):
        for axis in SPATIAL_AXES.get(fields[entry].kind, ()):
            shape[axis] = after.shape[axis]
    wanted = jax.ShapeDtypeStruct(tuple(shape), before.dtype)
    if describe(after) != describe(wanted):
        raise UserError(
            f"config.augment: {name!r} returned {describe(after)} as the batch's {entry!r}: "
            f"return {describe(wanted)}."
        )


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
        rot90,
        random_crop,
        random_resized_crop,
        cutout,
        random_erasing,
        color_jitter,
        grayscale,
        stain_jitter,
        randaugment,
        mixup,
        cutmix,
        mixup_or_cutmix,
    )
}
