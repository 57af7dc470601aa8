"""Defines a data set: examples in three splits, and a description of their fields."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.encoded import Encoded
from cv_jax.data.fields import IGNORED, Examples, Field, num_examples, take
from cv_jax.data.typical import Typical, typical_from_json, typical_to_json

# Training examples that a model may use for its data-dependent initialisation, and their bytes.
SAMPLE_SIZE = 5000
SAMPLE_BYTES = 2**26
SPLITS = ("train", "val", "test")


class DataSpec(NamedTuple):
    """Facts about a data set, for models, augmentation, tasks and the log.

    Attributes:
        name: the value of `config.data.name`.
        fields: {name: description of this array of an example}.
        num_train, num_val, num_test: number of examples in the split.
        sample: the first examples of train, see `sample_of`.
        num_unlabelled: number of training examples whose field `labelled` is False.
        typical: statistics of the training images; None: not measured.
        eval_crop: share of an image's sides that the centre crop keeps, see
            `read_image.fit_image`.
        label_counts: number of training examples of each class of the field `label`; (): not known.
        pixel_counts: number of pixels of each class of the field `mask`, see `count_pixels`.
    """

    name: str
    fields: dict[str, Field]
    num_train: int
    num_val: int
    num_test: int
    sample: Examples
    num_unlabelled: int = 0
    typical: Typical | None = None
    eval_crop: float = 1.0
    label_counts: tuple[int, ...] = ()
    pixel_counts: tuple[int, ...] = ()

    @property
    def num_labelled(self) -> int:
        """Returns the number of training examples whose label is known."""
        return self.num_train - self.num_unlabelled

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Returns (h, w, c) of the field `image`.

        Raises:
            UserError: the data set has no field `image`.
        """
        if "image" not in self.fields:
            raise UserError(f"The data set {self.name!r} has no images, only {self.summary}.")
        return self.fields["image"].shape

    @property
    def summary(self) -> str:
        """Returns the shapes of an example in words, such as "32x32x3, 10 classes"."""
        return ", ".join(
            f"{'mask of ' * (field.kind == 'mask')}{len(field.names)} classes"
            if field.kind in ("label", "mask")
            else ("" if field.kind == "image" else f"{name} ") + "x".join(map(str, field.shape))
            for name, field in self.fields.items()
            if field.shape or field.kind == "label"
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the class names of the field `label`; () without this field."""
        return self.fields["label"].names if "label" in self.fields else ()

    @property
    def num_classes(self) -> int:
        """Returns the number of classes of the field `label`; 0 without this field."""
        return len(self.class_names)


def spec_to_json(spec: DataSpec) -> dict[str, Any]:
    """Returns a spec as JSON values, without its sample."""
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
    """Returns the spec from the values of `spec_to_json`; its sample is one example of padding.

    Also reads the older format, of one image and one label.

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
    sample = {  # takes no memory, for any shape
        name: np.broadcast_to(np.asarray(field.fill, field.dtype), (1, *field.shape))
        for name, field in fields.items()
    }
    # older code did not count
    counted = {name: tuple(values.get(name, ())) for name in ("label_counts", "pixel_counts")}
    return DataSpec(
        **{
            **values,
            "fields": fields,
            "sample": sample,
            "typical": typical,
            **counted,
        }
    )


def _from_image_and_label(values: dict[str, Any]) -> dict[str, Any]:
    facts = {name: values.pop(name) for name in ("image_shape", "class_names", "mean", "std")}
    image = Field(facts["image_shape"], "uint8", "image", mean=facts["mean"], std=facts["std"])
    label = Field((), "int32", "label", fill=-1, names=facts["class_names"])
    return {**values, "fields": {"image": image._asdict(), "label": label._asdict()}}


def field_from_json(values: dict[str, Any]) -> Field:
    """Returns the field from the values of `field_to_json`."""
    field = Field(**{**values, "shape": tuple(values["shape"]), "names": tuple(values["names"])})
    np.dtype(field.dtype)
    return field._replace(
        mean=None if field.mean is None else np.float32(field.mean),
        std=None if field.std is None else np.float32(field.std),
    )


def padding(fields: Mapping[str, Field], count: int) -> Examples:
    """Returns `count` examples whose fields have their fill values."""
    return {
        name: np.full((count, *field.shape), field.fill, field.dtype)
        for name, field in fields.items()
    }


def example_shapes(fields: Mapping[str, Field], *leading: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of examples with the axes `leading` in front, such as a batch size."""
    return {
        name: jax.ShapeDtypeStruct((*leading, *field.shape), field.dtype)
        for name, field in fields.items()
    }


class Dataset(NamedTuple):
    """Three splits in host memory (memory-mapped if read from the cache), and their spec.

    Attributes:
        spec: facts about the data set.
        train, val, test: {field: (m, ...) array}, for the names of `spec.fields`. Images may be
            `encoded.Encoded`, which looks like an array and decodes what is read.
        notes: lines that the log shows at the start.
    """

    spec: DataSpec
    train: Examples
    val: Examples
    test: Examples
    notes: tuple[str, ...] = ()


class Stored(NamedTuple):
    """A data set as its source returns it, before val is held out of train.

    Attributes:
        fields: {name: description of this array of an example}; see `data.fields`.
        train, test: {field: (m, ...) array}; images may be `encoded.Encoded`.
        val: the official val split, {field: (m, ...) array}; None: the source has no val split.
        histograms: {image field: (256, c) int64}, how often each channel of train has each value.
            Mean and std of train without val follow from it without reading every pixel again.
            None: `check_stored` computes the histograms. Of images that stay encoded it may count
            a sample.
        notes: lines that the log shows at the start.
    """

    fields: dict[str, Field]
    train: Examples
    test: Examples
    val: Examples | None = None
    histograms: dict[str, np.ndarray] | None = None
    notes: tuple[str, ...] = ()


def data_fingerprint(data: Dataset) -> dict[str, int]:
    """Returns checksums of a data set; processes compare them to check that their data is equal."""
    return {
        f"data set ({split}, CRC-32 of the field {name})": (
            array.fingerprint()
            if isinstance(array, Encoded)
            else zlib.crc32(np.ascontiguousarray(array))
        )
        for split in SPLITS
        for name, array in getattr(data, split).items()
    }


def sample_of(examples: Examples) -> Examples:
    """Returns the first 5,000 examples, or as many as have 64 MB.

    Of examples that are sorted by class, the choice is evenly spaced.
    """
    count = num_examples(examples)
    of_one = sum(x.nbytes for x in examples.values()) // max(1, count)
    size = min(count, SAMPLE_SIZE, max(1, SAMPLE_BYTES // max(1, of_one)))
    label = examples.get("label", np.zeros(count))
    if size < count and label[0] < label[-1] and (np.diff(label) >= 0).all():
        return take(examples, np.arange(size) * count // size)
    return take(examples, slice(size))


def count_labels(train: Examples, fields: Mapping[str, Field]) -> tuple[int, ...]:
    """Returns the number of examples of each class of the field `label`; () without this field.

    Examples without a label, of value -1, do not count.
    """
    if "label" not in fields:
        return ()
    label = np.asarray(train["label"])
    return tuple(np.bincount(label[label >= 0], minlength=len(fields["label"].names)).tolist())


def count_pixels(train: Examples, fields: Mapping[str, Field]) -> tuple[int, ...]:
    """Returns the number of pixels of each class in the masks of train; () without masks.

    Of masks that are decoded when needed, `some_masks` are counted, and every class once more: a
    class that they lack may be in others.
    """
    if "mask" not in fields:
        return ()
    masks = some_masks(train["mask"])
    parts = (masks[i : i + 100].ravel() for i in range(0, len(masks), 100))
    found = sum(np.bincount(part, minlength=IGNORED) for part in parts)
    found = found[: len(fields["mask"].names)] + isinstance(train["mask"], Encoded)
    return tuple(found.tolist())


def some_masks(masks: Any) -> np.ndarray:
    """Returns masks (m, h, w): all of an array, or else 200, evenly spaced."""
    if not isinstance(masks, Encoded):
        return masks
    count = min(len(masks), 200)
    return np.asarray(masks[np.arange(count) * len(masks) // count])


def counts(train: Examples, val: Examples, test: Examples) -> dict[str, int]:
    """Returns the number of examples of each split, by the attribute names of `DataSpec`."""
    return {
        f"num_{name}": num_examples(split)
        for name, split in zip(SPLITS, (train, val, test), strict=True)
    }
