"""What a data set is: examples in three splits, and facts about their fields."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.fields import Examples, Field, num_examples
from cv_jax.data.typical import Typical, typical_from_json, typical_to_json

# Train images that a model may look at for its data-dependent initialisation.
SAMPLE_SIZE = 5000
SPLITS = ("train", "val", "test")


class DataSpec(NamedTuple):
    """Facts about a data set, for models, augmentation, tasks and the log.

    Attributes:
        name: `config.data.name`.
        fields: what each array of an example means, by name.
        num_train, num_val, num_test: examples in each split.
        sample: the first min(5000, num_train) examples of train.
        num_unlabelled: examples of train whose field `labelled` is False.
        typical: statistics of the training images; None where they were not measured.
    """

    name: str
    fields: dict[str, Field]
    num_train: int
    num_val: int
    num_test: int
    sample: Examples
    num_unlabelled: int = 0
    typical: Typical | None = None

    @property
    def num_labelled(self) -> int:
        """Examples of train whose label is known."""
        return self.num_train - self.num_unlabelled

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the field `image`.

        Raises:
            UserError: there is no such field.
        """
        if "image" not in self.fields:
            raise UserError(f"The data set {self.name!r} has no images, only {self.summary}.")
        return self.fields["image"].shape

    @property
    def summary(self) -> str:
        """The shapes of an example in words, such as "32x32x3, 10 classes"."""
        return ", ".join(
            f"{len(field.names)} classes"
            if field.kind == "label"
            else ("" if field.kind == "image" else f"{name} ") + "x".join(map(str, field.shape))
            for name, field in self.fields.items()
            if field.shape or field.kind == "label"
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the field `label`; () without that field."""
        return self.fields["label"].names if "label" in self.fields else ()

    @property
    def num_classes(self) -> int:
        """How many classes the field `label` has; 0 without that field."""
        return len(self.class_names)


def spec_to_json(spec: DataSpec) -> dict[str, Any]:
    """Returns the facts as JSON values, without the sample."""
    fields = {name: field_to_json(field) for name, field in spec.fields.items()}
    typical = typical_to_json(spec.typical) if spec.typical else None
    return {**spec._asdict(), "fields": fields, "sample": None, "typical": typical}


def field_to_json(field: Field) -> dict[str, Any]:
    """Returns a field as JSON values."""
    arrays = {
        name: array.tolist()
        for name in ("mean", "std")
        if (array := getattr(field, name)) is not None
    }
    return {**field._asdict(), **arrays}


def spec_from_json(values: Mapping[str, Any]) -> DataSpec:
    """Returns the spec that `spec_to_json` was given; its sample is one example of padding.

    Values that older code wrote, of one image and one label, are understood, too.

    Raises:
        KeyError, TypeError, ValueError: the values are not those of a spec.
    """
    values = dict(values)
    if "fields" not in values:
        values = _from_image_and_label(values)
    fields = {name: field_from_json(field) for name, field in values["fields"].items()}
    typical = values.get("typical")
    if typical is not None:
        typical = typical_from_json(typical, fields["image"].shape[-1])
    sample = {  # takes no memory, whatever the shape
        name: np.broadcast_to(np.asarray(field.fill, field.dtype), (1, *field.shape))
        for name, field in fields.items()
    }
    return DataSpec(**{**values, "fields": fields, "sample": sample, "typical": typical})


def _from_image_and_label(values: dict[str, Any]) -> dict[str, Any]:
    facts = {name: values.pop(name) for name in ("image_shape", "class_names", "mean", "std")}
    image = Field(facts["image_shape"], "uint8", "image", mean=facts["mean"], std=facts["std"])
    label = Field((), "int32", "label", fill=-1, names=facts["class_names"])
    return {**values, "fields": {"image": image._asdict(), "label": label._asdict()}}


def field_from_json(values: dict[str, Any]) -> Field:
    """Returns the field that `field_to_json` was given."""
    field = Field(**{**values, "shape": tuple(values["shape"]), "names": tuple(values["names"])})
    np.dtype(field.dtype)
    return field._replace(
        mean=None if field.mean is None else np.float32(field.mean),
        std=None if field.std is None else np.float32(field.std),
    )


def padding(fields: Mapping[str, Field], count: int) -> Examples:
    """Returns `count` examples of nothing but fill values."""
    return {
        name: np.full((count, *field.shape), field.fill, field.dtype)
        for name, field in fields.items()
    }


def example_shapes(fields: Mapping[str, Field], *leading: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of examples with these leading axes, such as a batch size."""
    return {
        name: jax.ShapeDtypeStruct((*leading, *field.shape), field.dtype)
        for name, field in fields.items()
    }


class Dataset(NamedTuple):
    """Three splits in host memory, memory-mapped where they come from the cache, and their spec.

    Attributes:
        spec: facts about them.
        train, val, test: arrays by the names of `spec.fields`.
        notes: lines that the log shows at the start.
    """

    spec: DataSpec
    train: Examples
    val: Examples
    test: Examples
    notes: tuple[str, ...] = ()


class Stored(NamedTuple):
    """A data set as its source has it, before val is held out of train.

    Attributes:
        fields: what each array of an example means, by name; see `data.fields`.
        train, test: {name of a field: (m, ...) array}.
        val: the official val split; None where there is none.
        histograms: {name of an image field: (256, c) int64}, how often each channel of train has
            each value. Mean and std of train without val follow from it without another look at
            every pixel. `check_stored` counts where a source has none.
    """

    fields: dict[str, Field]
    train: Examples
    test: Examples
    val: Examples | None = None
    histograms: dict[str, np.ndarray] | None = None


def data_fingerprint(data: Dataset) -> dict[str, int]:
    """Returns checksums of a data set, by which processes agree that they read the same one."""
    return {
        f"data set ({split}, CRC-32 of the field {name})": zlib.crc32(np.ascontiguousarray(array))
        for split in SPLITS
        for name, array in getattr(data, split).items()
    }


def counts(train: Examples, val: Examples, test: Examples) -> dict[str, int]:
    """Returns the numbers of examples as `DataSpec` names them."""
    return {
        f"num_{name}": num_examples(split)
        for name, split in zip(SPLITS, (train, val, test), strict=True)
    }
