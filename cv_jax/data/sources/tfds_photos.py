"""Lists the encoded images of a prepared TFDS data set. Imports TFDS, which is slow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from cv_jax.config.errors import UserError, first_line
from cv_jax.data.fields import label_field
from cv_jax.data.sources.listing import Listing
from cv_jax.data.sources.tfds_reader import open_prepared
from cv_jax.data.sources.tfrecord import record_spans


def list_prepared(directory: Path) -> Listing:
    """Lists the records of a data set; the splits are those of `tfds_reader.read_prepared`.

    Args:
        directory: .../NAME[/CONFIG]/VERSION, with files in the format array_record or tfrecord.

    Raises:
        UserError: as `tfds_reader.open_prepared`.
    """
    prepared = open_prepared(directory)
    info = prepared.builder.info
    sizes = {name: info.splits[name].num_examples for name in prepared.splits.values()}
    records = Records(
        data_set=info.full_name,
        names=np.repeat(list(sizes), list(sizes.values())),
        numbers=np.concatenate([np.arange(size) for size in sizes.values()]),
        read_record={name: _reader(prepared.builder, name) for name in sizes},
        features=tfds.features.FeaturesDict(
            {key: info.features[key] for key in (prepared.image_key, prepared.label_key)}
        ),
        image_key=prepared.image_key,
        label_key=prepared.label_key,
    )
    label = label_field(info.features[prepared.label_key].names)
    return Listing(
        name=info.full_name,
        root=directory,
        identity="",
        source=records,
        fields={"label": label},
        columns={"label": np.full(len(records), -1, np.int32)},
        split=np.repeat(list(prepared.splits), list(sizes.values())),
    )


class Records(NamedTuple):
    """Records of several splits, one after another.

    Attributes:
        data_set: its full name.
        names: (m,) TFDS's name of each record's split.
        numbers: (m,) its position in that split.
        read_record: {TFDS's name of a split: position -> the serialized example}.
        features: the two features to parse.
        image_key, label_key: their names.
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
