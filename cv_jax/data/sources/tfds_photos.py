"""Lists the encoded images of a prepared TFDS data set. Imports TFDS, which is slow."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import trange

from cv_jax.config.errors import UserError, first_line
from cv_jax.data.cache import cached
from cv_jax.data.dataset import Stored
from cv_jax.data.fields import label_field, mask_field, take
from cv_jax.data.read_image import read_facts
from cv_jax.data.read_mask import mask_numbers
from cv_jax.data.sources.listing import VAL_IS_TEST, Listing, Masks
from cv_jax.data.sources.objects import Annotation, box_columns
from cv_jax.data.sources.tfds_reader import known_splits, open_builder, open_prepared, read_split
from cv_jax.data.sources.tfrecord import record_spans


def list_prepared(directory: Path) -> Listing:
    """Lists the records of a data set; the splits are those of `tfds_reader.read_prepared`.

    With train alone, such as colorectal_histology, a fifth of the images becomes test.

    Args:
        directory: .../NAME[/CONFIG]/VERSION, with files in the format array_record or tfrecord.

    Raises:
        UserError: as `tfds_reader.open_prepared`.
    """
    prepared = open_prepared(directory, train_alone=True)
    info = prepared.builder.info
    records, split = _records(
        prepared.builder, prepared.splits, prepared.image_key, prepared.label_key
    )
    label = label_field(info.features[prepared.label_key].names)
    return Listing(
        name=info.full_name,
        root=directory,
        identity="",
        source=records,
        fields={"label": label},
        columns={"label": np.full(len(records), -1, np.int32)},
        split=split,
    )


def list_prepared_objects(directory: Path) -> Listing:
    """Lists the records of a data set with boxes in the feature `objects`, such as coco/2017.

    The splits are those of `tfds_reader.read_prepared`, but validation is test where TFDS's test
    has no boxes (coco, voc/2012). The boxes are read once, and kept in the cache. They are TFDS's
    shares of the sides, times the size of the image. TFDS's boxes of VOC begin one pixel late: TFDS
    takes the corners, which are counted from 1, as they are.

    Raises:
        UserError: the directory or a record is damaged, or no box can be learned from.
    """
    builder = open_builder(directory)
    splits = known_splits(builder.info)
    found = cached(directory, lambda _: _read_objects(directory, builder, splits), "boxes")
    notes = list(found.notes)
    if "val" in splits and found.val is None:
        splits = {"train": "train", "test": splits["val"]}
        notes.append(VAL_IS_TEST)
    records, split = _records(builder, splits, "image")
    parts = [getattr(found, name) for name in splits]
    return Listing(
        name=builder.info.full_name,
        root=directory,
        identity="",
        source=records,
        fields=found.fields,
        columns={name: np.concatenate([part[name] for part in parts]) for name in found.fields},
        split=split,
        notes=tuple(notes),
    )


def list_prepared_masks(directory: Path, key: str, names: Sequence[str], first: int) -> Listing:
    """Lists the records of a data set with a mask in the feature `key`, as PNG of one channel.

    The splits are those of `tfds_reader.read_prepared`.

    Args:
        directory: as `list_prepared`.
        key: the feature.
        names: the classes.
        first: the value of the first class in the masks.

    Raises:
        UserError: as `tfds_reader.open_prepared`.
    """
    builder = open_builder(directory)
    splits = known_splits(builder.info)
    records, split = _records(builder, splits, "image")
    masks, _ = _records(builder, splits, key)
    return Listing(
        name=builder.info.full_name,
        root=directory,
        identity="",
        source=records,
        fields={"mask": mask_field(names)},
        columns={},
        split=split,
        masks=Masks(masks, mask_numbers(len(names), first=first)),
    )


def _read_objects(
    directory: Path, builder: tfds.core.DatasetBuilder, splits: dict[str, str]
) -> Stored:
    """Returns the boxes of the splits, without images; val is None where it serves as test."""
    info = builder.info
    features = tfds.features.FeaturesDict({key: info.features[key] for key in ("image", "objects")})
    classes = info.features["objects"].feature["label"].names
    annotations = []
    for split, name in splits.items():
        records = read_split(builder, name)
        where = f"{info.full_name}, split {name}"
        count = info.splits[name].num_examples
        for i in trange(count, desc=f"Reading {where}", disable=not sys.stderr.isatty()):
            source = f"{where}, record {i}"
            annotations.append(_annotation(features, records, classes, source, split))
    found = {split: [one for one in annotations if one.split == split] for split in splits}
    if "val" in found and not any(one.labels for one in found["test"]):
        found = {"train": found["train"], "test": found["val"]}
    annotations = [one for part in found.values() for one in part]
    fields, columns, notes = box_columns(directory, annotations, classes)
    ends = np.cumsum([0, *map(len, found.values())])
    parts = {name: take(columns, slice(*ends[i : i + 2])) for i, name in enumerate(found)}
    return Stored(fields, **{"val": None, **parts}, notes=tuple(notes))


def _annotation(
    features: tfds.features.FeaturesDict,
    records: Iterator[bytes],
    classes: list[str],
    source: str,
    split: str,
) -> Annotation:
    skip = {"image": tfds.decode.SkipDecoding()}
    try:
        found = features.deserialize_example_np(next(records), decoders=skip)
        objects = found["objects"]
        labels = [classes[label] if label >= 0 else "" for label in objects["label"]]
    except Exception as error:  # from files or protos
        ends = isinstance(error, StopIteration)
        reason = "missing" if ends else f"damaged ({first_line(error)})"
        raise UserError(f"{source} is {reason}: prepare the data set again.") from error
    try:
        size = read_facts(found["image"]).size
    except UserError:  # the image is left out when it is read
        size = (1, 1)
    h, w = size
    boxes = np.float64(objects["bbox"]).reshape(-1, 4)[:, [1, 0, 3, 2]] * [w, h, w, h]
    flags = {
        name: np.asarray(objects.get(f"is_{name}", np.zeros(len(boxes))), bool)
        for name in ("difficult", "crowd")
    }
    return Annotation("", source, size, boxes, labels, split=split, **flags)


def _records(
    builder: tfds.core.DatasetBuilder, splits: dict[str, str], image_key: str, label_key: str = ""
) -> tuple["Records", np.ndarray]:
    """Returns the records of {our split: TFDS's split}, and our split of each."""
    info = builder.info
    sizes = {name: info.splits[name].num_examples for name in splits.values()}
    keys = [image_key, label_key] if label_key else [image_key]
    records = Records(
        data_set=info.full_name,
        names=np.repeat(list(sizes), list(sizes.values())),
        numbers=np.concatenate([np.arange(size) for size in sizes.values()]),
        read_record={name: _reader(builder, name) for name in sizes},
        features=tfds.features.FeaturesDict({key: info.features[key] for key in keys}),
        image_key=image_key,
        label_key=label_key,
    )
    return records, np.repeat(list(splits), list(sizes.values()))


class Records(NamedTuple):
    """Records of several splits, one after another.

    Attributes:
        data_set: its full name.
        names: (m,) TFDS's name of each record's split.
        numbers: (m,) its position in that split.
        read_record: {TFDS's name of a split: position -> the serialized example}.
        features: the features to parse: the image, and the label if there is one.
        image_key, label_key: their names; label_key is "" without labels.
    """

    data_set: str
    names: np.ndarray
    numbers: np.ndarray
    read_record: dict[str, Callable[[int], bytes]]
    features: tfds.features.FeaturesDict
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, position: int) -> bytes:
        return self.example(position)[0]

    def example(self, position: int) -> tuple[bytes, dict[str, Any]]:
        skip = {self.image_key: tfds.decode.SkipDecoding()}
        try:
            record = self.read_record[self.names[position]](int(self.numbers[position]))
            found = self.features.deserialize_example_np(record, decoders=skip)
        except Exception as error:  # from files or protos
            raise UserError(f"it is damaged ({first_line(error)})") from error
        if not self.label_key:
            return found[self.image_key], {}
        label = int(found[self.label_key])
        if not 0 <= label < self.features[self.label_key].num_classes:
            raise UserError(f"it has the label {label}, which is no class")
        return found[self.image_key], {"label": label}

    def name(self, position: int) -> str:
        return f"{self.data_set}, split {self.names[position]}, record {self.numbers[position]}"


def _reader(builder: tfds.core.DatasetBuilder, split: str) -> Callable[[int], bytes]:
    """Returns a function that reads the record at a position of a split."""
    if builder.info.file_format.value == "array_record":
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return builder.as_data_source(split, deserialize_method=raw).__getitem__
    files = [Path(file.filename) for file in builder.info.splits[split].file_instructions]
    spans = [(file, *span) for file in files for span in record_spans(file)]

    def read(position):
        file, start, end = spans[position]
        with file.open("rb") as data:
            data.seek(start)
            return data.read(end - start)

    return read
