"""Data sets: digits, what TFDS has prepared in either format, val, statistics, and the cache."""

import io
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.data.cache import cached
from cv_jax.data.dataset import (
    Split,
    Stored,
    histogram,
    hold_out,
    limit_labels,
    mean_and_std,
    spec_from_json,
    spec_to_json,
    stratified,
)
from cv_jax.data.load import OWN
from cv_jax.data.sources.location import find_prepared, tfds_data_dir
from cv_jax.data.sources.tfrecord import crc32c, read_records
from cv_jax.data.typical import Typical, measure, score
from tests.conftest import random_dataset, random_split


@pytest.fixture(autouse=True)
def no_tensorflow():
    """Nothing here imports TensorFlow, also where it is installed."""
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CV_JAX_CACHE", str(tmp_path / "cache"))


def config_of(name, directory="", **leaves):
    config = base_config().data
    config.update(name=name, dir=str(directory), **leaves)
    return config


# ---- preparing a small data set, as TFDS or its user would


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    file.seek(0)
    return file


class TinyBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares the examples it is given, in their order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, features, splits, supervised_keys=None, name="tiny", **kwargs):
        self.name = name
        self._given = features, splits, supervised_keys
        super().__init__(**kwargs)

    def _info(self):
        features, _, keys = self._given
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=keys,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: enumerate(examples) for split, examples in self._given[1].items()}

    def _generate_examples(self):
        raise NotImplementedError


def prepare_tiny(data_dir, features, splits, supervised_keys=None):
    builder = TinyBuilder(features, splits, supervised_keys, data_dir=data_dir)
    builder.download_and_prepare(file_format="array_record")
    return builder.data_path


def features_of(shape=(6, 5, 3), names=("ant", "bee", "cat")):
    return {
        "label": tfds.features.ClassLabel(names=names),
        "image": tfds.features.Image(shape=shape),
    }


def random_images(count, shape=(6, 5, 3)):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def examples_of(images, labels):
    return [{"image": png(i), "label": n} for i, n in zip(images, labels, strict=True)]


def tiny_splits(shape=(6, 5, 3)):
    return {
        "train": examples_of(random_images(7, shape), [0, 1, 2, 0, 1, 2, 0]),
        "test": examples_of(random_images(3, shape), [2, 1, 0]),
    }


def slow_crc32c(data):
    """The definition, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = slow_crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def frame(record):
    length = struct.pack("<Q", len(record))
    return length + masked(length) + record + masked(record)


def to_tfrecord(directory):
    """Turns a data set of array_record files into one of tfrecord files, train in two of them."""
    builder = tfds.builder_from_directory(directory)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    info = json.loads((directory / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        name = split["name"]
        records = [frame(r) for r in builder.as_data_source(name, deserialize_method=raw)]
        shards = [records[:4], records[4:]] if name == "train" else [records]
        split["shardLengths"] = [str(len(shard)) for shard in shards]
        for i, shard in enumerate(shards):
            file = f"tiny-{name}.tfrecord-{i:05}-of-{len(shards):05}"
            (directory / file).write_bytes(b"".join(shard))
        (directory / f"tiny-{name}.array_record-00000-of-00001").unlink()
    (directory / "dataset_info.json").write_text(json.dumps(info))


# ---- digits


def test_digits_are_all_of_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_dataset(config_of("digits", num_val=200))
    assert data.spec.image_shape == (8, 8, 1)
    assert data.spec.class_names == tuple("0123456789")
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (1237, 200, 360)

    def rows(image, label):
        table = np.column_stack([np.reshape(image, (len(label), -1)), label])
        return table[np.lexsort(table.T)]

    original = load_digits()
    image = np.concatenate([split.image for split in data[1:]])
    label = np.concatenate([split.label for split in data[1:]])
    expected = np.array(
        [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    )
    chex.assert_type([image, label], [np.uint8, np.int32])
    np.testing.assert_array_equal(
        rows(image, label),
        rows(np.array(expected)[original.images.astype(int)], original.target),
    )


def test_digits_have_every_class_in_every_split():
    data = load_dataset(config_of("digits", num_val=200))
    np.testing.assert_array_equal(np.bincount(data.val.label), [20] * 10)
    np.testing.assert_array_equal(
        np.bincount(data.test.label), [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    )


# ---- val and statistics


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (7, [4, 2, 1, 0]),  # of shares of 3.5, 2.1, 1.33 and 0.07
        (10, [5, 3, 2, 0]),
        (0, [0, 0, 0, 0]),
        (99, [49, 30, 19, 1]),  # 49.5, 29.7, 18.81, 0.99
    ],
)
def test_stratified_gives_the_largest_remainders_one_more(count, expected):
    label = np.array([0] * 50 + [1] * 30 + [2] * 19 + [5])
    chosen = stratified(label, count)
    assert len(set(chosen)) == count
    assert list(chosen) == sorted(chosen)
    assert [int((label[chosen] == c).sum()) for c in (0, 1, 2, 5)] == expected


def test_stratified_always_picks_the_same():
    assert list(stratified(np.arange(12) % 3, 5)) == [0, 5, 6, 7, 10]


def _stored(num_train=200):
    image = random_images(num_train, (4, 3, 2))
    label = (np.arange(num_train) % 5).astype(np.int32)
    train = Split(image, label)
    return Stored(tuple("abcde"), train, Split(image[:9], label[:9]), histogram(image))


def test_val_comes_out_of_train_and_both_keep_its_order():
    stored = _stored()
    data = hold_out("x", stored, 20)
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (180, 20, 9)
    np.testing.assert_array_equal(np.bincount(data.val.label), [4] * 5)
    position = {image.tobytes(): i for i, image in enumerate(stored.train.image)}
    train, val = ([position[i.tobytes()] for i in s.image] for s in (data.train, data.val))
    assert train == sorted(train)
    assert val == sorted(val)
    assert sorted(train + val) == list(range(200))
    np.testing.assert_array_equal(data.train.label, stored.train.label[train])
    np.testing.assert_array_equal(data.val.label, stored.train.label[val])


def test_without_val_train_is_untouched():
    stored = _stored()
    data = hold_out("x", stored, 0)
    assert data.train.image is stored.train.image
    assert data.val.image.shape == (0, 4, 3, 2)
    assert data.val.label.shape == (0,)


@pytest.mark.parametrize("num_val", [-1, 200, 10_000])
def test_num_val_must_leave_something_to_train_on(num_val):
    with pytest.raises(UserError, match=rf"config.data.num_val={num_val} .* between 0 and 199"):
        hold_out("x", _stored(), num_val)


def test_mean_and_std_are_those_of_what_remains_of_train():
    stored = _stored(1100)  # more than one chunk
    data = hold_out("x", stored, 100)
    pixels = data.train.image.astype(np.float64).reshape(-1, 2) / 255
    np.testing.assert_allclose(data.spec.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.spec.std, pixels.std(0), rtol=1e-6)
    chex.assert_type([data.spec.mean, data.spec.std], np.float32)


def test_mean_and_std_by_hand():
    image = np.array([0, 255, 255, 255], np.uint8).reshape(1, 2, 2, 1)
    mean, std = mean_and_std(histogram(image))
    np.testing.assert_allclose(mean, [0.75])
    np.testing.assert_allclose(std, [np.sqrt(3) / 4], rtol=1e-6)


def test_sample_is_the_first_of_train():
    data = hold_out("x", _stored(6000), 500)
    np.testing.assert_array_equal(data.spec.sample, data.train.image[:5000])
    assert data.spec.num_classes == 5


def test_limit_keeps_the_first_of_every_split():
    everything = load_dataset(config_of("digits", num_val=200))
    data = load_dataset(config_of("digits", num_val=200, limit=250))
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (250, 200, 250)
    np.testing.assert_array_equal(data.spec.sample, everything.train.image[:250])
    np.testing.assert_array_equal(data.spec.mean, everything.spec.mean)
    for ours, whole in zip(data[1:], everything[1:], strict=True):
        np.testing.assert_array_equal(ours.image, whole.image[:250])
        np.testing.assert_array_equal(ours.label, whole.label[:250])


# ---- few labels


def _lopsided():
    """100, 60 and 20 training images of three classes in an order of chance, and 20 of val."""
    label = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [111, 67, 22]))
    image = random_images(200, (4, 3, 1))
    stored = Stored(("ant", "bee", "cat"), Split(image, label), Split(image[:9], label[:9]))
    return hold_out("x", stored._replace(histogram=histogram(image)), 20)


def _limited(per_class=0, fraction=0.0, seed=0, keep=False):
    return limit_labels(_lopsided(), per_class, fraction, seed, keep)


def _places(data):
    """Where in the train of `_lopsided` each image of train stood."""
    place = {image.tobytes(): i for i, image in enumerate(_lopsided().train.image)}
    return [place[image.tobytes()] for image in data.train.image]


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ({"per_class": 1}, [1, 1, 1]),
        ({"per_class": 20}, [20, 20, 20]),
        ({"fraction": 0.1}, [10, 6, 2]),
        ({"fraction": 0.07}, [7, 4, 2]),  # 13 of 180: shares of 7.2, 4.3 and 1.4
        ({"fraction": 1.0}, [100, 60, 20]),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_so_many_labels_of_each_class_are_left(amount, expected, keep):
    whole, data = _lopsided(), _limited(**amount, keep=keep)
    label = data.train.label
    assert np.bincount(label[label >= 0]).tolist() == expected
    num_unlabelled = 180 - sum(expected) if keep else 0
    assert (label == -1).sum() == data.spec.num_unlabelled == num_unlabelled
    assert data.spec.num_train == len(label) == len(data.train.image)
    places = _places(data)
    assert places == (list(range(180)) if keep else sorted(places))
    known = label >= 0
    np.testing.assert_array_equal(label[known], whole.train.label[places][known])
    np.testing.assert_array_equal(data.spec.sample, data.train.image)
    assert data.train.label.dtype == whole.train.label.dtype


def test_all_but_train_is_as_with_all_labels():
    whole, data = _lopsided(), _limited(per_class=2)
    chex.assert_trees_all_equal(data[2:], whole[2:])
    assert (data.spec.num_val, data.spec.num_test) == (20, 9)
    np.testing.assert_array_equal(data.spec.mean, whole.spec.mean)
    np.testing.assert_array_equal(data.spec.std, whole.spec.std)
    whole, data = _lopsided(), _limited()
    chex.assert_trees_all_equal(data.train, whole.train)


@pytest.mark.parametrize("amount", [{"per_class": 5}, {"fraction": 0.1}])
def test_the_seed_says_which_labels_are_left(amount):
    first = _places(_limited(**amount))
    assert _places(_limited(**amount)) == first
    known = np.flatnonzero(_limited(**amount, keep=True).train.label >= 0)
    assert known.tolist() == first
    others = [_places(_limited(**amount, seed=seed)) for seed in (1, 2)]
    assert first != others[0] != others[1] != first


def test_a_subset_for_good():
    assert _places(_limited(per_class=2)) == [9, 77, 80, 149, 160, 170]
    assert _places(_limited(fraction=0.05, seed=3)) == [1, 52, 59, 73, 90, 98, 152, 158, 177]


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"labels_per_class": 140}, "labels_per_class=140: the class '8' has only 139 training"),
        ({"label_fraction": 0.0001}, "config.data.label_fraction=0.0001 leaves none of 1437"),
    ],
)
def test_labels_that_there_are_not_are_named_by_their_key(amount, message):
    with pytest.raises(UserError) as error:
        load_dataset(config_of("digits", **amount))
    assert message in str(error.value)


def test_digits_with_few_labels():
    amount = {"num_val": 200, "label_fraction": 0.5, "labels_per_class": 3, "label_seed": 1}
    data = load_dataset(config_of("digits", **amount))
    assert np.bincount(data.train.label).tolist() == [3] * 10
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (30, 200, 360)
    kept = load_dataset(config_of("digits", **amount, keep_unlabelled=True))
    assert (kept.spec.num_train, kept.spec.num_unlabelled) == (1237, 1207)
    known = kept.train.label >= 0
    np.testing.assert_array_equal(kept.train.image[known], data.train.image)
    np.testing.assert_array_equal(kept.train.label[known], data.train.label)
    limited = load_dataset(config_of("digits", limit=100, label_fraction=0.5))
    assert limited.spec.num_train == 50


def test_facts_about_data_go_through_json_also_those_of_older_runs():
    spec = _limited(per_class=2, keep=True).spec
    values = json.loads(json.dumps(spec_to_json(spec)))
    back = spec_from_json(values)
    chex.assert_trees_all_equal(back._replace(sample=0), spec._replace(sample=0))
    assert (back.num_unlabelled, back.num_classes) == (174, 3)
    del values["num_unlabelled"]  # which runs before there was such a thing lack
    older = spec_from_json(values)
    chex.assert_trees_all_equal(older, back._replace(num_unlabelled=0))


# ---- What is unlike


def test_the_score_of_stripes_is_that_computed_by_hand():
    stripes = np.zeros((1, 4, 4, 1), np.uint8)
    stripes[:, :, ::2] = 255  # mean 1/2, std 1/2, in a column steps of 0, in a row of 1
    typical = Typical(np.zeros(4, np.float32), np.float32([1, 1, 1, 2]), 0.0)
    got = score(np.concatenate([stripes, np.zeros_like(stripes)]), typical)
    np.testing.assert_allclose(got, [np.sqrt((1 / 4 + 1 / 4 + 0 + 1 / 4) / 4), 0], rtol=1e-6)


def test_one_of_a_hundred_images_of_val_is_above_the_threshold():
    train, val = (random_split(count, (8, 8, 3), 10).image for count in (300, 200))
    typical = measure(train, val)
    assert (score(val, typical) > typical.threshold).sum() == 2
    assert (score(train, measure(train, val[:0])) > measure(train, val[:0]).threshold).sum() == 3
    flat = np.full((3, 8, 8, 3), 128, np.uint8)
    assert (score(flat, typical) > 3 * typical.threshold).all()


def test_what_is_typical_goes_through_json():
    data = random_dataset((8, 8, 2))
    spec = data.spec._replace(typical=measure(data.train.image, data.val.image))
    values = json.loads(json.dumps(spec_to_json(spec)))
    chex.assert_trees_all_equal(spec_from_json(values).typical, spec.typical)
    values["typical"]["mean"].pop()
    with pytest.raises(ValueError, match="reshape"):
        spec_from_json(values)


# ---- TFRecord


@pytest.mark.parametrize(
    ("data", "crc"),  # RFC 3720, appendix B.4
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_crc32c_of_the_standard(data, crc):
    assert crc32c([data, b"other"])[0] == crc == slow_crc32c(data)


RECORDS = [b"first", b"", b"third record", bytes(300)]


def test_tfrecord_gives_back_what_was_written(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"".join(map(frame, RECORDS)))
    assert list(read_records(path)) == RECORDS
    monkeypatch.setattr("cv_jax.data.sources.tfrecord._BLOCK", 600)  # two records at a time
    assert list(read_records(path)) == RECORDS
    path.write_bytes(b"")
    assert list(read_records(path)) == []


@pytest.mark.parametrize(
    ("damage", "num_good", "message"),
    [
        (lambda d: d[:-1], 3, "cut off, or has a wrong length, at byte 65"),
        (lambda d: d[:-310], 3, "cut off, or has a wrong length, at byte 65"),
        (lambda d: d[:21] + b"\x01" + d[22:], 1, "a wrong length at byte 21"),
        (lambda d: d[:28] + b"\x01" + d[29:], 1, "wrong length, at byte 21"),
        (lambda d: d[:50] + b"?" + d[51:], 2, "has a record whose checksum does not match"),
        (lambda d: d[:-2] + b"??", 3, "has a record whose checksum does not match"),
    ],
)
def test_tfrecord_damage_is_found_where_it_is(tmp_path, damage, num_good, message):
    path = tmp_path / "file"
    path.write_bytes(damage(b"".join(map(frame, RECORDS))))
    records = read_records(path)
    assert [next(records) for _ in range(num_good)] == RECORDS[:num_good]
    with pytest.raises(ValueError, match=message) as error:
        next(records)
    assert str(path) in str(error.value)


# ---- what TFDS has prepared


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("channels", [1, 3])
def test_prepared_data_is_read_exactly(tmp_path, file_format, channels):
    shape = (6, 5, channels)
    directory = prepare_tiny(tmp_path, features_of(shape), tiny_splits(shape), ("image", "label"))
    if file_format == "tfrecord":
        to_tfrecord(directory)
    data = load_dataset(config_of("tiny", tmp_path))
    np.testing.assert_array_equal(data.train.image, random_images(7, shape))
    np.testing.assert_array_equal(data.test.image, random_images(3, shape))
    np.testing.assert_array_equal(data.train.label, [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(data.test.label, [2, 1, 0])
    chex.assert_type([data.train.image, data.train.label], [np.uint8, np.int32])
    assert data.spec.class_names == ("ant", "bee", "cat")
    assert data.spec.image_shape == shape
    assert data.spec.name == "tiny"


def test_more_records_than_are_read_at_a_time(tmp_path):
    images = random_images(600, (2, 2, 1))
    splits = {
        "train": examples_of(images, np.arange(600) % 3),
        "test": examples_of(images[:1], [0]),
    }
    prepare_tiny(tmp_path, features_of((2, 2, 1)), splits)
    data = load_dataset(config_of("tiny", tmp_path))
    np.testing.assert_array_equal(data.train.image, images)
    np.testing.assert_array_equal(data.train.label, np.arange(600) % 3)


def test_the_supervised_label_is_taken_among_several(tmp_path):
    features = {**features_of(), "coarse_label": tfds.features.ClassLabel(num_classes=2)}
    splits = tiny_splits()
    for example in splits["train"] + splits["test"]:
        example["coarse_label"] = 1
    for keys in (("image", "label"), None):
        prepare_tiny(tmp_path / str(keys), features, splits, keys)
    data = load_dataset(config_of("tiny", tmp_path / str(("image", "label"))))
    np.testing.assert_array_equal(data.test.label, [2, 1, 0])
    assert "not an image-classification data set" in _error(tmp_path / "None")


def test_validation_stands_in_for_test(tmp_path):
    splits = tiny_splits()
    splits["validation"] = splits.pop("test")
    prepare_tiny(tmp_path, features_of(), splits)
    np.testing.assert_array_equal(load_dataset(config_of("tiny", tmp_path)).test.label, [2, 1, 0])


def test_tfds_data_dir_comes_after_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    assert tfds_data_dir("/given") == Path("/given")
    assert tfds_data_dir("") == tmp_path / "env"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tfds_data_dir("") == tmp_path / "tensorflow_datasets"
    assert tfds_data_dir("~/data") == tmp_path / "data"
    with pytest.raises(UserError, match=r"home directory ~nobody-here .* --config.data.dir name"):
        tfds_data_dir("~nobody-here/data")


def test_the_highest_version_is_found(tmp_path):
    for directory in (
        "a/9.0.0",
        "a/10.0.0",
        "a/big/1.0.0",
        "b/one/2.0.0",
        "b/two/3.0.0",
        "c/x/1.0.0",
    ):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "dataset_info.json").touch()
    (tmp_path / "a" / "11.0.0").mkdir()  # not prepared
    (tmp_path / "b" / ".config").mkdir()
    (tmp_path / "b" / ".config" / "metadata.json").write_text('{"default_config_name": "one"}')
    for name, expected in {
        "a": "a/10.0.0",
        "a:9.0.0": "a/9.0.0",
        "a:8.0.0": None,
        "a/big": "a/big/1.0.0",
        "b": "b/one/2.0.0",
        "b/two:3.0.0": "b/two/3.0.0",
        "c": None,
        "d": None,
        "": None,
    }.items():
        assert find_prepared(name, tmp_path) == (expected and tmp_path / expected), name
    assert find_prepared("../a", tmp_path / "b") is None  # though it exists


# ---- what cannot be read


def _error(tmp_path):
    with pytest.raises(UserError) as error:
        load_dataset(config_of("tiny", tmp_path))
    return str(error.value)


def test_a_data_set_without_labels_is_refused(tmp_path):
    features = {"image": tfds.features.Image(shape=(6, 5, 3))}
    splits = {"train": [{"image": png(i)} for i in random_images(3)]}
    prepare_tiny(tmp_path, features, splits)
    assert "tiny/1.0.0 does not say one class for one image" in _error(tmp_path)
    assert "not an image-classification data set" in _error(tmp_path)


def test_images_of_differing_sizes_are_refused(tmp_path):
    splits = tiny_splits()
    splits["train"][5]["image"] = png(random_images(1, (4, 5, 3))[0])
    prepare_tiny(tmp_path, features_of((None, None, 3)), splits)
    assert "split train differ in size: (6, 5, 3) at record 0, (4, 5, 3) at record 5" in _error(
        tmp_path
    )


def test_images_of_16_bits_are_refused(tmp_path):
    features = {**features_of(), "image": tfds.features.Image(shape=(6, 5, 1), dtype=np.uint16)}
    splits = {"train": examples_of(random_images(2, (6, 5, 1)), [0, 1])}
    prepare_tiny(tmp_path, features, splits)
    assert "The images of tiny/1.0.0 are uint16, not uint8" in _error(tmp_path)


def test_a_missing_label_is_named(tmp_path):
    splits = tiny_splits()
    splits["test"][1]["label"] = -1  # how TFDS marks a hidden label
    prepare_tiny(tmp_path, features_of(), splits)
    assert "tiny/1.0.0, split test, record 1 has the label -1, which is none of its 3" in _error(
        tmp_path
    )


@pytest.mark.parametrize("keep", ["train", "test"])
def test_a_missing_split_is_named(tmp_path, keep):
    prepare_tiny(tmp_path, features_of(), {keep: tiny_splits()[keep]})
    missing = {"train": "validation", "test": "train"}[keep]
    message = _error(tmp_path)
    assert f"no examples in a split '{missing}', only in {keep}" in message


def test_an_empty_split_is_named(tmp_path):
    directory = prepare_tiny(tmp_path, features_of(), tiny_splits())
    info = json.loads((directory / "dataset_info.json").read_text())
    next(s for s in info["splits"] if s["name"] == "test")["shardLengths"] = ["0"]
    (directory / "dataset_info.json").write_text(json.dumps(info))
    assert "no examples in a split 'test'" in _error(tmp_path)


def test_a_damaged_array_record_is_named(tmp_path):
    directory = prepare_tiny(tmp_path, features_of(), tiny_splits())
    path = directory / "tiny-train.array_record-00000-of-00001"
    data = path.read_bytes()
    fifth = data.index(png(random_images(7)[4]).getvalue())
    path.write_bytes(data[: fifth + 30] + b"?" + data[fifth + 31 :])
    message = _error(tmp_path)
    assert "tiny/1.0.0, split train, record 4 is damaged" in message
    assert f"(in {path.name}). Remove {directory}" in message
    for kept in (len(data) - 1, len(data) // 2, 10, 0):
        path.write_bytes(data[:kept])
        message = _error(tmp_path)
        assert "record 0 is damaged" in message
        assert f"(in {path.name})" in message
    path.unlink()
    assert str(path) in _error(tmp_path)


def test_a_damaged_tfrecord_is_named(tmp_path):
    directory = prepare_tiny(tmp_path, features_of(), tiny_splits())
    to_tfrecord(directory)
    path = directory / "tiny-train.tfrecord-00001-of-00002"
    data = path.read_bytes()
    path.write_bytes(data[:-30] + b"?" + data[-29:])
    message = _error(tmp_path)
    assert "tiny/1.0.0, split train, record 6 is damaged" in message
    assert f"(in {path.name})" in message
    path.write_bytes(data[:30] + b"?" + data[31:])  # the first record of the second file
    message = _error(tmp_path)
    assert "record 4 is damaged" in message
    assert f"(in {path.name})" in message
    path.write_bytes(data[:-30])
    assert f"record 6 is damaged: {path} is cut off" in _error(tmp_path)
    path.write_bytes(b"")
    assert f"split train ends before record 4. Remove {directory}, so" in _error(tmp_path)


def test_an_image_that_is_none_is_named(tmp_path):
    splits = tiny_splits()
    splits["train"][3]["image"] = io.BytesIO(b"no image")
    prepare_tiny(tmp_path, features_of(), splits)
    message = _error(tmp_path)
    assert "split train, record 3 is damaged" in message
    assert "NoneType" not in message


def test_a_damaged_description_is_named(tmp_path):
    directory = prepare_tiny(tmp_path, features_of(), tiny_splits())
    (directory / "features.json").write_text("{")
    assert f"{directory} cannot be read as a prepared TFDS data set" in _error(tmp_path)


def test_another_file_format_is_refused(tmp_path):
    directory = prepare_tiny(tmp_path, features_of(), tiny_splits())
    info = json.loads((directory / "dataset_info.json").read_text())
    info["fileFormat"] = "riegeli"
    (directory / "dataset_info.json").write_text(json.dumps(info))
    assert "stored as riegeli: only array_record and tfrecord" in _error(tmp_path)


def test_another_shape_in_test_is_refused(tmp_path):
    splits = tiny_splits()
    splits["test"] = examples_of(random_images(2, (4, 5, 3)), [0, 1])
    prepare_tiny(tmp_path, features_of((None, None, 3)), splits)
    assert "the images of train are (6, 5, 3) and those of test (4, 5, 3)" in _error(tmp_path)


# ---- what a function of OWN may do wrong


def _own(**changes):
    """A sound data set with these changes; train__label replaces the labels of train."""
    parts = {"class_names": ("ant", "bee", "cat")}
    parts |= {split: random_split(m, (4, 4, 1), 3) for split, m in (("train", 6), ("test", 3))}
    for key, value in changes.items():
        name, _, field = key.partition("__")
        parts[name] = parts[name]._replace(**{field: value}) if field else value
    return Stored(**parts)


IMAGE, LABEL = random_split(6, (4, 4, 1), num_classes=3)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "its function returns NoneType and not cv_jax.data.dataset.Stored"),
        (_own(class_names=()), "class_names=() must be a tuple of names"),
        (_own(class_names="abc"), "class_names='abc' must be a tuple of names"),
        (_own(class_names=("a", "b", "a")), "class_names[2]='a' must be a text that no other"),
        (_own(class_names=("a", "b", "")), "class_names[2]='' must be a text"),
        (_own(class_names=(0, 1, 2)), "class_names[0]=0 must be a text"),
        (_own(test=(IMAGE, LABEL)), "test must be a Split(image, label) of NumPy arrays"),
        (_own(train__label=[0] * 6), "train must be a Split(image, label) of NumPy arrays"),
        (_own(train=Split(IMAGE[:0], LABEL[:0])), "train has no examples"),
        (_own(test=Split(IMAGE[:0], LABEL[:0])), "test has no examples"),
        (_own(train__image=IMAGE / 255), "train.image is float64 and not uint8: scale it to 0"),
        (_own(test__image=IMAGE[:3, ..., 0]), "test.image has the shape (3, 4, 4) and not (m, h,"),
        (_own(train__image=np.tile(IMAGE, 5)), "(6, 4, 4, 5) and not (m, h, w, c) with 1 to 4"),
        (_own(train__label=LABEL[:5]), "train has 6 images and 5 labels"),
        (_own(train__label=LABEL / 2), "train.label is float64 of shape (6,) and not whole"),
        (_own(train__label=np.eye(6, 3, dtype=int)), "train.label is int64 of shape (6, 3) and"),
        (_own(train__label=np.arange(1, 7) % 4), "train.label[2] is 3, and its 3 class_names"),
        (_own(test__label=np.array([0, -1, -1])), "test.label[1] is -1, and its 3 class_names"),
        (_own(test__image=IMAGE[:3, :3]), "train are (4, 4, 1) and those of test (3, 4, 1)"),
        (_own(histogram=histogram(IMAGE)[:, 0]), "its histogram, of shape (256,), does not"),
        (_own(histogram=histogram(IMAGE[:5])), "its histogram, of shape (256, 1), does not"),
    ],
)
def test_a_mistake_in_a_data_set_of_ones_own_is_explained(stored, message, monkeypatch):
    monkeypatch.setitem(OWN, "own", lambda: stored)
    with pytest.raises(UserError) as error:
        load_dataset(config_of("own"))
    assert str(error.value).startswith("The data set 'own': ")
    assert message in str(error.value)


def test_a_data_set_of_ones_own_needs_no_histogram_and_any_whole_labels(monkeypatch):
    monkeypatch.setitem(OWN, "own", lambda: _own(train__label=LABEL.astype(np.uint8)))
    data = load_dataset(config_of("own"))
    assert data.train.label.dtype == np.int32
    np.testing.assert_array_equal(data.train.label, LABEL)
    assert data.spec.mean == pytest.approx(IMAGE.mean() / 255)


# ---- the cache


@pytest.fixture
def prepared(tmp_path):
    """A directory to be cached, and what reading it gives."""
    directory = tmp_path / "name" / "1.0.0"
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text("{}")
    return directory, _stored()


def _never(directory):
    raise AssertionError("read again")


def _entry(tmp_path):
    (entry,) = (tmp_path / "cache" / "data").iterdir()
    return entry


def test_the_second_time_comes_from_the_cache(tmp_path, prepared, capsys):
    directory, stored = prepared
    cached(directory, lambda _: stored)
    again = cached(directory, _never)
    chex.assert_trees_all_equal(again._replace(class_names=()), stored._replace(class_names=()))
    assert again.class_names == stored.class_names
    assert isinstance(again.train.image.base, np.memmap)
    assert not again.train.image.flags.writeable
    assert _entry(tmp_path).name.startswith("name-1.0.0-")
    assert not list(_entry(tmp_path).glob("*.tmp"))
    assert capsys.readouterr().err == ""


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 40] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train.image.npy", _flip),
        ("test.label.npy", _flip),
        ("histogram.npy", _flip),
        ("train.image.npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("train.label.npy", lambda path: path.write_bytes(b"")),
        ("test.image.npy", lambda path: path.unlink()),
        ("test.image.npy", lambda path: shutil.copy(path.with_name("train.image.npy"), path)),
        ("cache.json", lambda path: path.write_text(path.read_text()[:-9])),
        ("cache.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_cache_is_made_again(tmp_path, prepared, capsys, file, damage):
    directory, stored = prepared
    cached(directory, lambda _: stored)
    damage(_entry(tmp_path) / file)
    again = cached(directory, lambda _: stored)
    chex.assert_trees_all_equal(again._replace(class_names=()), stored._replace(class_names=()))
    message = capsys.readouterr().err
    assert f"the cache {_entry(tmp_path)} is damaged" in message
    assert message.count("\n") == 1
    cached(directory, _never)
    assert capsys.readouterr().err == ""


def test_a_half_written_cache_is_no_cache(tmp_path, prepared, monkeypatch):
    directory, stored = prepared
    save, saved = np.save, []

    def interrupted(file, array):
        save(file, array)
        saved.append(array)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(directory, lambda _: stored)
    monkeypatch.undo()
    monkeypatch.setenv("CV_JAX_CACHE", str(tmp_path / "cache"))
    assert {p.name for p in _entry(tmp_path).iterdir()} == {"train.image.npy", "train.label.npy"}
    assert cached(directory, lambda _: stored) is stored
    cached(directory, _never)


@pytest.mark.parametrize("content", ["{ }", "[]"])  # another size; the same size, later
def test_data_prepared_anew_is_read_anew(prepared, capsys, content):
    directory, stored = prepared
    info = directory / "dataset_info.json"
    os.utime(info, (0, 0))
    cached(directory, lambda _: stored)
    info.write_text(content)
    if content == "{ }":
        os.utime(info, (0, 0))
    other = stored._replace(class_names=tuple("vwxyz"))
    assert cached(directory, lambda _: other) is other
    assert cached(directory, _never).class_names == other.class_names
    assert capsys.readouterr().err == ""


def test_a_file_below_a_folder_is_part_of_the_data(prepared):
    directory, stored = prepared
    image = directory / "train" / "cat" / "1.png"
    image.parent.mkdir(parents=True)
    (image.parent / "broken").symlink_to("nowhere")
    image.write_bytes(b"1")
    os.utime(image, (0, 0))
    cached(directory, lambda _: stored)
    assert cached(directory, _never).class_names == stored.class_names
    os.utime(image, (1, 1))
    assert cached(directory, lambda _: stored) is stored  # as new contents of the same size
    image.rename(image.parent.parent / "1.png")
    assert cached(directory, lambda _: stored) is stored
    cached(directory, _never)


def test_settings_of_the_decoding_have_entries_of_their_own(prepared):
    directory, stored = prepared
    cached(directory, lambda _: stored)
    other = stored._replace(class_names=tuple("vwxyz"))
    assert cached(directory, lambda _: other, settings="size=64") is other
    assert cached(directory, _never).class_names == stored.class_names
    assert cached(directory, _never, settings="size=64").class_names == other.class_names


def test_two_directories_of_one_version_do_not_share(tmp_path, prepared):
    directory, stored = prepared
    copy = tmp_path / "copy" / "name" / "1.0.0"
    shutil.copytree(directory, copy)  # with the same sizes and times
    cached(directory, lambda _: stored)
    other = stored._replace(class_names=tuple("vwxyz"))
    assert cached(copy, lambda _: other) is other
    assert cached(directory, _never).class_names == stored.class_names
    assert cached(copy, _never).class_names == other.class_names


def test_an_unwritable_cache_is_no_cache(tmp_path, prepared, capsys):
    directory, stored = prepared
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert cached(directory, lambda _: stored) is stored
    message = capsys.readouterr().err
    assert "cannot be written" in message
    assert message.count("\n") == 1


# ---- CIFAR-10


@pytest.mark.slow
def test_real_cifar10_has_its_published_statistics(cifar10_dir):
    data = load_dataset(config_of("cifar10", cifar10_dir))
    np.testing.assert_allclose(data.spec.mean, [0.4914, 0.4822, 0.4465], atol=5e-5)
    np.testing.assert_allclose(data.spec.std, [0.2470, 0.2435, 0.2616], atol=5e-5)
    np.testing.assert_array_equal(np.bincount(data.train.label), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(data.test.label), [1000] * 10)
    assert data.spec.class_names[6] == "frog"
    assert isinstance(load_dataset(config_of("cifar10", cifar10_dir)).train.image.base, np.memmap)
    val = load_dataset(config_of("cifar10", cifar10_dir, num_val=5000)).val
    np.testing.assert_array_equal(np.bincount(val.label), [500] * 10)
