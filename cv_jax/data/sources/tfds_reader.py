"""Reads a prepared TFDS data set into arrays, without TensorFlow. Imports TFDS, which is slow."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import trange

from cv_jax.config.errors import UserError
from cv_jax.data.dataset import Stored
from cv_jax.data.fields import Examples, image_field, label_field
from cv_jax.data.sources.tfrecord import read_records
from cv_jax.data.statistics import histogram

# Records that array_record reads at a time; many times faster than one by one.
_BATCH = 256


def read_prepared(directory: Path) -> Stored:
    """Decodes a data set. TFDS uses OpenCV if it is installed, else Pillow.

    Our test is the split "test", or "validation" if TFDS has no "test". If TFDS has both,
    "validation" is the official val.

    Args:
        directory: .../NAME[/CONFIG]/VERSION, with files in the format array_record or tfrecord.

    Raises:
        UserError: the directory or a record is damaged, or the data set is not image
            classification with uint8 images of one size.
    """
    prepared = open_prepared(directory)
    read = partial(
        _read_split,
        prepared.builder,
        image_key=prepared.image_key,
        label_key=prepared.label_key,
    )
    splits = {name: read(split) for name, split in prepared.splits.items()}
    return Stored(
        fields={
            "image": image_field(splits["train"]["image"].shape[1:]),
            "label": label_field(prepared.builder.info.features[prepared.label_key].names),
        },
        **{"val": None, **splits},
        histograms={"image": histogram(splits["train"]["image"])},
    )


class Prepared(NamedTuple):
    """A prepared data set.

    Attributes:
        builder: TFDS's object that reads it.
        image_key, label_key: names of the features.
        splits: {our split: TFDS's split}.
    """

    builder: tfds.core.DatasetBuilder
    image_key: str
    label_key: str
    splits: dict[str, str]


def open_prepared(directory: Path, train_alone: bool = False) -> Prepared:
    """Opens a data set, without reading a record; see `read_prepared`.

    Args:
        directory: see `read_prepared`.
        train_alone: see `known_splits`.

    Raises:
        UserError: the directory is damaged, or the data set is not image classification with
            uint8 images.
    """
    builder = open_builder(directory)
    image_key, label_key = _supervised(builder.info)
    return Prepared(builder, image_key, label_key, known_splits(builder.info, train_alone))


def open_builder(directory: Path) -> tfds.core.DatasetBuilder:
    """Returns TFDS's object that reads a data set of any kind.

    Raises:
        UserError: the directory is damaged.
    """
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # from JSON, protos or TFDS: all mean that it is damaged
        raise UserError(
            f"{directory} cannot be read as a prepared TFDS data set ({error}). {_again(directory)}"
        ) from error


def known_splits(info: tfds.core.DatasetInfo, train_alone: bool = False) -> dict[str, str]:
    """Returns {our split: TFDS's split}, see `read_prepared`.

    Args:
        info: describes the data set.
        train_alone: whether a data set with train alone has the split "", which is to be divided.

    Raises:
        UserError: TFDS has no train, or neither test nor validation.
    """
    names = info.splits.keys()
    if train_alone and set(names) == {"train"}:
        return {"": "train"}
    test = "test" if "test" in names else "validation"
    for split in ("train", test):
        if split not in names or not info.splits[split].num_examples:
            raise UserError(
                f"{info.full_name} has no examples in a split {split!r}, only in "
                f"{', '.join(sorted(names))}. Choose a data set with train, and test or "
                "validation. For classes, config.data.size makes a fifth of train test."
            )
    splits = {"train": "train", "test": test}
    if test == "test" and "validation" in names:
        splits["val"] = "validation"
    return splits


def _again(directory: Path | str) -> str:
    return f"Remove {directory}, so that it can be prepared again."


def _supervised(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Returns the keys of image and label: TFDS's supervised keys, else the only such features."""
    chosen = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        keys = [key for key, feature in info.features.items() if isinstance(feature, kind)]
        preferred = [key for key in keys if key in (info.supervised_keys or ())]
        chosen.append(preferred or keys)
    image, label = chosen
    if len(image) != 1 or len(label) != 1 or not info.features[label[0]].num_classes:
        raise UserError(
            f"{info.full_name} is not an image-classification data set, with one image and one "
            f"class (its features are {', '.join(info.features)}). Choose another config.data.name."
        )
    if info.features[image[0]].np_dtype != np.uint8:
        raise UserError(
            f"The images of {info.full_name} are {info.features[image[0]].np_dtype}, not uint8. "
            "Choose another config.data.name."
        )
    return image[0], label[0]


def _read_split(
    builder: tfds.core.DatasetBuilder, split: str, image_key: str, label_key: str
) -> Examples:
    info = builder.info
    where = f"{info.full_name}, split {split}"
    # Decodes only these two features of a record.
    wanted = tfds.features.FeaturesDict({k: info.features[k] for k in (image_key, label_key)})
    num_classes = info.features[label_key].num_classes
    num_examples = info.splits[split].num_examples
    records = read_split(builder, split)
    image, label = None, np.empty(num_examples, np.int32)
    for i in trange(num_examples, desc=f"Decoding {where}", disable=not sys.stderr.isatty()):
        try:
            example = wanted.deserialize_example_np(next(records))
        except StopIteration as end:
            raise UserError(f"{where} ends before record {i}. {_again(builder.data_dir)}") from end
        except Exception as error:  # from files, protos or the image decoder
            # OpenCV returns None if it cannot decode, and TFDS fails on the None.
            stumbles = isinstance(error, AttributeError | TypeError)
            reason = "its image cannot be decoded" if stumbles else error
            raise UserError(
                f"{where}, record {i} is damaged: {reason} (in {_file_of(info, split, i)}). "
                f"{_again(builder.data_dir)}"
            ) from error
        pixels, label[i] = example[image_key], example[label_key]
        if image is None:
            image = np.empty((num_examples, *pixels.shape), np.uint8)
        if pixels.shape != image.shape[1:]:
            raise UserError(
                f"The images of {where} differ in size: {image.shape[1:]} at record 0, "
                f"{pixels.shape} at record {i}. Set config.data.size, such as 224."
            )
        if not 0 <= label[i] < num_classes:
            raise UserError(
                f"{where}, record {i} has the label {label[i]}, not one of 0 to {num_classes - 1}: "
                "the split has no labels, or the record is damaged. Choose another data "
                f"set, or: {_again(builder.data_dir)}"
            )
        image[i] = pixels
    return {"image": image, "label": label}


def _file_of(info: tfds.core.DatasetInfo, split: str, record: int) -> str:
    """Returns the name of the file that contains a record of a split."""
    ends = np.cumsum(info.splits[split].shard_lengths)
    file = info.splits[split].filepaths[int(np.searchsorted(ends, record, side="right"))]
    return Path(file).name


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[bytes]:
    """Yields the serialized examples of a split, in order."""
    file_format = builder.info.file_format.value
    if file_format == "array_record":
        return _array_records(builder, split)
    if file_format == "tfrecord":
        files = [Path(file.filename) for file in builder.info.splits[split].file_instructions]
        return (record for file in files for record in read_records(file))
    raise UserError(
        f"{builder.info.full_name} is stored as {file_format}. Prepare it as array_record or "
        "tfrecord."
    )


def _array_records(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[bytes]:
    source = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    for start in range(0, len(source), _BATCH):
        indices = range(start, min(start + _BATCH, len(source)))
        try:
            batch = source.__getitems__(list(indices))
        except RuntimeError:  # one by one, up to the damaged record
            batch = (source[i] for i in indices)
        yield from batch
