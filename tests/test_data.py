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
from cv_jax.data import Field, Stored, image_field, label_field, load_dataset
from cv_jax.data.cache import cached
from cv_jax.data.checks import check_stored
from cv_jax.data.dataset import spec_from_json, spec_to_json
from cv_jax.data.encoded import Encoded
from cv_jax.data.fields import take
from cv_jax.data.load import OWN
from cv_jax.data.sources.location import find_prepared, tfds_data_dir
from cv_jax.data.sources.tfrecord import crc32c, read_records
from cv_jax.data.splits import count_equal, hold_out, limit_examples, limit_labels, stratified
from cv_jax.data.statistics import histogram, mean_and_std
from cv_jax.data.typical import Typical, measure, score
from tests.conftest import random_dataset, random_split

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def no_tensorflow():
    """Nothing here imports TensorFlow, also where it is installed."""
    yield
    assert "tensorflow" not in sys.modules


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
    image = np.concatenate([split["image"] for split in (data.train, data.val, data.test)])
    label = np.concatenate([split["label"] for split in (data.train, data.val, data.test)])
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
    np.testing.assert_array_equal(np.bincount(data.val["label"]), [20] * 10)
    np.testing.assert_array_equal(
        np.bincount(data.test["label"]), [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
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
    train = {"image": image, "label": label}
    fields = {"image": image_field((4, 3, 2)), "label": label_field("abcde")}
    test = {"image": image[:9], "label": label[:9]}
    return Stored(fields, train, test, histograms={"image": histogram(image)})


def test_val_comes_out_of_train_and_both_keep_its_order():
    stored = _stored()
    data = hold_out("x", stored, 20)
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (180, 20, 9)
    np.testing.assert_array_equal(np.bincount(data.val["label"]), [4] * 5)
    position = {image.tobytes(): i for i, image in enumerate(stored.train["image"])}
    train, val = ([position[i.tobytes()] for i in s["image"]] for s in (data.train, data.val))
    assert train == sorted(train)
    assert val == sorted(val)
    assert sorted(train + val) == list(range(200))
    np.testing.assert_array_equal(data.train["label"], stored.train["label"][train])
    np.testing.assert_array_equal(data.val["label"], stored.train["label"][val])


def test_without_val_train_is_untouched():
    stored = _stored()
    data = hold_out("x", stored, 0)
    assert data.train["image"] is stored.train["image"]
    assert data.val["image"].shape == (0, 4, 3, 2)
    assert data.val["label"].shape == (0,)


@pytest.mark.parametrize("num_val", [-2, 200, 10_000])
def test_num_val_must_leave_something_to_train_on(num_val):
    with pytest.raises(UserError, match=rf"config.data.num_val={num_val} .* between 0 and 199"):
        hold_out("x", _stored(), num_val)


def test_mean_and_std_are_those_of_what_remains_of_train():
    stored = _stored(1100)  # more than one chunk
    data = hold_out("x", stored, 100)
    pixels = data.train["image"].astype(np.float64).reshape(-1, 2) / 255
    np.testing.assert_allclose(data.spec.fields["image"].mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.spec.fields["image"].std, pixels.std(0), rtol=1e-6)
    chex.assert_type([data.spec.fields["image"].mean, data.spec.fields["image"].std], np.float32)


def test_mean_and_std_by_hand():
    image = np.array([0, 255, 255, 255], np.uint8).reshape(1, 2, 2, 1)
    mean, std = mean_and_std(histogram(image))
    np.testing.assert_allclose(mean, [0.75])
    np.testing.assert_allclose(std, [np.sqrt(3) / 4], rtol=1e-6)


def test_sample_is_the_first_of_train():
    data = hold_out("x", _stored(6000), 500)
    np.testing.assert_array_equal(data.spec.sample["image"], data.train["image"][:5000])
    assert data.spec.num_classes == 5


def test_limit_takes_some_of_every_class_in_their_order():
    everything = load_dataset(config_of("digits", num_val=200))
    data = load_dataset(config_of("digits", num_val=200, limit=250))
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (250, 200, 250)
    chex.assert_trees_all_equal(data.spec.sample, data.train)
    chex.assert_trees_all_equal(data.spec.fields, everything.spec.fields)
    chex.assert_trees_all_equal(data.val, everything.val)
    assert np.ptp(np.bincount(data.train["label"])) <= 2
    place = {image.tobytes(): i for i, image in enumerate(everything.train["image"])}
    places = [place[image.tobytes()] for image in data.train["image"]]
    assert places == sorted(places)
    np.testing.assert_array_equal(data.train["label"], everything.train["label"][places])


def test_a_limit_of_sorted_examples_has_all_classes():
    image, label = random_images(60, (2, 2, 1)), np.repeat([0, 1, 2], 20)
    fields = {"image": image_field((2, 2, 1)), "label": label_field("abc")}
    train = {"image": image, "label": label}
    data = hold_out("x", check_stored("x", Stored(fields, train, train)), 0)
    limited = limit_examples(data, 9)
    assert np.bincount(limited.train["label"]).tolist() == [3, 3, 3]
    assert np.bincount(limited.test["label"]).tolist() == [3, 3, 3]


# ---- other fields than image and label


def _boxes():
    """12 images of up to two boxes: class 1 is in three of them, 4 have none."""
    box_label = np.full((12, 2), -1, np.int32)
    box_label[:8, 0] = 0
    box_label[:3, 1] = 1
    train = {
        "image": random_images(12, (4, 4, 1)),
        "boxes": np.zeros((12, 2, 4), np.float32),
        "box_label": box_label,
    }
    fields = {
        "image": image_field((4, 4, 1)),
        "boxes": BOXES,
        "box_label": Field((2,), "int32", "box_label", fill=-1, names=("cell", "plate")),
    }
    return Stored(fields, train, take(train, slice(3)))


def test_val_of_boxes_is_stratified_by_the_rarest_class_present():
    data = hold_out("boxes", check_stored("boxes", _boxes()), 4)
    label = data.val["box_label"]  # of 4, 5 and 3 images without boxes, with cells, with a plate
    assert [(label == -1).all(1).sum(), (label == 1).any(1).sum()] == [1, 1]
    assert data.spec.fields["image"].mean.shape == (1,)
    assert data.spec.fields["boxes"].mean is None
    assert data.spec.class_names == ()


def test_a_class_of_a_box_is_checked_and_padding_is_none():
    stored = _boxes()
    stored.train["box_label"][5, 1] = 2
    with pytest.raises(UserError, match=r"train\['box_label'\]\[5, 1\] is 2, but its 2 classes"):
        check_stored("boxes", stored)


def test_groups_are_not_divided():
    stored = _stored(40)
    group = np.repeat(np.arange(8), 5).astype(np.int32)
    fields = {**stored.fields, "group": Field((), "int32", "group")}
    train = {**stored.train, "group": group}
    stored = stored._replace(fields=fields, train=train, test=take(train, slice(9)))
    data = hold_out("x", stored, 7)
    assert data.spec.num_val == 10  # two whole groups
    assert not set(data.val["group"]) & set(data.train["group"])
    with pytest.raises(UserError, match="num_val=39 would hold out all 8 groups"):
        hold_out("x", stored, 39)


def test_the_official_val_is_used_where_it_is_asked_for():
    stored = _stored()
    official = take(stored.train, slice(30, 40))
    data = hold_out("x", stored._replace(val=official), -1)
    chex.assert_trees_all_equal(data.val, official)
    assert (data.spec.num_train, data.spec.num_val) == (200, 10)
    with pytest.raises(UserError, match=r"num_val=-1 asks for the official val split, but x has"):
        hold_out("x", stored, -1)


def test_equal_images_in_two_splits_are_counted():
    data = hold_out("x", _stored(), 20)
    assert count_equal(data._replace(test=data.test, val=data.val)) != []
    test = take(data.train, [0, 1, 1, 5])
    test["image"] = np.concatenate([test["image"][:2], test["image"][:2] ^ 1])
    notes = count_equal(data._replace(test=test))
    assert notes == ["data    2 images of test are also in train"]


def test_a_data_set_may_be_a_function_of_ones_own():
    data = load_dataset(config_of("tests.test_data:_stored"))
    assert data.spec.num_train == 200
    with pytest.raises(UserError, match=r"config\.data\.name='tests\.nothing:load': the module"):
        load_dataset(config_of("tests.nothing:load"))
    with pytest.raises(UserError, match=r"the module 'tests\.test_data' has no function 'nothing'"):
        load_dataset(config_of("tests.test_data:nothing"))


# ---- few labels


def _lopsided():
    """100, 60 and 20 training images of three classes in an order of chance, and 20 of val."""
    label = np.repeat([0, 1, 2], [111, 67, 22]).astype(np.int32)
    label = np.random.default_rng(0).permutation(label)
    image = random_images(200, (4, 3, 1))
    fields = {"image": image_field((4, 3, 1)), "label": label_field(("ant", "bee", "cat"))}
    train = {"image": image, "label": label}
    stored = Stored(fields, train, take(train, slice(9)), histograms={"image": histogram(image)})
    return hold_out("x", stored, 20)


def _limited(per_class=0, fraction=0.0, seed=0, keep=False):
    return limit_labels(_lopsided(), per_class, fraction, seed, keep)


def _places(data):
    """Where in the train of `_lopsided` each image of train stood."""
    place = {image.tobytes(): i for i, image in enumerate(_lopsided().train["image"])}
    return [place[image.tobytes()] for image in data.train["image"]]


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
    label = data.train["label"]
    assert np.bincount(label[label >= 0]).tolist() == expected
    num_unlabelled = 180 - sum(expected) if keep else 0
    assert (label == -1).sum() == data.spec.num_unlabelled == num_unlabelled
    if keep:
        np.testing.assert_array_equal(data.train["labelled"], label >= 0)
        assert data.test["labelled"].all()
    assert data.spec.num_train == len(label) == len(data.train["image"])
    places = _places(data)
    assert places == (list(range(180)) if keep else sorted(places))
    known = label >= 0
    np.testing.assert_array_equal(label[known], whole.train["label"][places][known])
    np.testing.assert_array_equal(data.spec.sample["image"], data.train["image"])
    assert data.train["label"].dtype == whole.train["label"].dtype


def test_all_but_train_is_as_with_all_labels():
    whole, data = _lopsided(), _limited(per_class=2)
    chex.assert_trees_all_equal(data[2:4], whole[2:4])
    assert (data.spec.num_val, data.spec.num_test) == (20, 9)
    np.testing.assert_array_equal(data.spec.fields["image"].mean, whole.spec.fields["image"].mean)
    np.testing.assert_array_equal(data.spec.fields["image"].std, whole.spec.fields["image"].std)
    whole, data = _lopsided(), _limited()
    chex.assert_trees_all_equal(data.train, whole.train)


@pytest.mark.parametrize("amount", [{"per_class": 5}, {"fraction": 0.1}])
def test_the_seed_says_which_labels_are_left(amount):
    first = _places(_limited(**amount))
    assert _places(_limited(**amount)) == first
    known = np.flatnonzero(_limited(**amount, keep=True).train["label"] >= 0)
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
    assert np.bincount(data.train["label"]).tolist() == [3] * 10
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (30, 200, 360)
    kept = load_dataset(config_of("digits", **amount, keep_unlabelled=True))
    assert (kept.spec.num_train, kept.spec.num_unlabelled) == (1237, 1207)
    known = kept.train["label"] >= 0
    np.testing.assert_array_equal(kept.train["image"][known], data.train["image"])
    np.testing.assert_array_equal(kept.train["label"][known], data.train["label"])
    limited = load_dataset(config_of("digits", limit=100, label_fraction=0.5))
    assert limited.spec.num_train == 50


def test_facts_about_data_go_through_json():
    spec = _limited(per_class=2, keep=True).spec
    back = spec_from_json(json.loads(json.dumps(spec_to_json(spec))))
    chex.assert_trees_all_equal(back._replace(sample=0), spec._replace(sample=0))
    assert (back.num_unlabelled, back.num_classes, back.summary) == (174, 3, "4x3x1, 3 classes")
    assert back.sample["label"].tolist() == [-1]


def test_facts_that_older_runs_have_written_are_understood():
    older = {
        **{"name": "x", "image_shape": [4, 3, 1], "class_names": ["ant", "bee"], "sample": None},
        **{"mean": [0.5], "std": [0.25], "num_train": 8, "num_val": 0, "num_test": 2},
    }
    spec = spec_from_json(older)
    assert spec.image_shape == (4, 3, 1)
    assert spec.class_names == ("ant", "bee")
    assert spec.fields["image"].std.tolist() == [0.25]
    assert (spec.num_unlabelled, spec.typical) == (0, None)


# ---- What is unlike


def test_the_score_of_stripes_is_that_computed_by_hand():
    stripes = np.zeros((1, 4, 4, 1), np.uint8)
    stripes[:, :, ::2] = 255  # mean 1/2, std 1/2, in a column steps of 0, in a row of 1
    typical = Typical(np.zeros(4, np.float32), np.float32([1, 1, 1, 2]), 0.0)
    got = score(np.concatenate([stripes, np.zeros_like(stripes)]), typical)
    np.testing.assert_allclose(got, [np.sqrt((1 / 4 + 1 / 4 + 0 + 1 / 4) / 4), 0], rtol=1e-6)


def test_one_of_a_hundred_images_of_val_is_above_the_threshold():
    train, val = (random_split(count, (8, 8, 3), 10)["image"] for count in (300, 200))
    typical = measure(train, val)
    assert (score(val, typical) > typical.threshold).sum() == 2
    assert (score(train, measure(train, val[:0])) > measure(train, val[:0]).threshold).sum() == 3
    flat = np.full((3, 8, 8, 3), 128, np.uint8)
    assert (score(flat, typical) > 3 * typical.threshold).all()


def test_what_is_typical_goes_through_json():
    data = random_dataset((8, 8, 2))
    spec = data.spec._replace(typical=measure(data.train["image"], data.val["image"]))
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
@pytest.mark.parametrize(("channels", "decode"), [(1, "auto"), (3, "auto"), (3, "always")])
def test_prepared_data_is_read_exactly(tmp_path, file_format, channels, decode):
    shape = (6, 5, channels)
    directory = prepare_tiny(tmp_path, features_of(shape), tiny_splits(shape), ("image", "label"))
    if file_format == "tfrecord":
        to_tfrecord(directory)
    data = load_dataset(config_of("tiny", tmp_path, decode=decode))
    assert isinstance(data.train["image"], Encoded) == (decode == "always")
    np.testing.assert_array_equal(data.train["image"], random_images(7, shape))
    np.testing.assert_array_equal(data.test["image"], random_images(3, shape))
    np.testing.assert_array_equal(data.train["label"], [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(data.test["label"], [2, 1, 0])
    assert (data.train["image"].dtype, data.train["label"].dtype) == (np.uint8, np.int32)
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
    np.testing.assert_array_equal(data.train["image"], images)
    np.testing.assert_array_equal(data.train["label"], np.arange(600) % 3)


def test_the_supervised_label_is_taken_among_several(tmp_path):
    features = {**features_of(), "coarse_label": tfds.features.ClassLabel(num_classes=2)}
    splits = tiny_splits()
    for example in splits["train"] + splits["test"]:
        example["coarse_label"] = 1
    for keys in (("image", "label"), None):
        prepare_tiny(tmp_path / str(keys), features, splits, keys)
    data = load_dataset(config_of("tiny", tmp_path / str(("image", "label"))))
    np.testing.assert_array_equal(data.test["label"], [2, 1, 0])
    assert "not an image-classification data set" in _error(tmp_path / "None")


def test_validation_stands_in_for_test(tmp_path):
    splits = tiny_splits()
    splits["validation"] = splits.pop("test")
    prepare_tiny(tmp_path, features_of(), splits)
    data = load_dataset(config_of("tiny", tmp_path))
    np.testing.assert_array_equal(data.test["label"], [2, 1, 0])


def test_tfds_data_dir_comes_after_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    assert tfds_data_dir("/given") == Path("/given")
    assert tfds_data_dir("") == tmp_path / "env"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tfds_data_dir("") == tmp_path / "tensorflow_datasets"
    assert tfds_data_dir("~/data") == tmp_path / "data"
    with pytest.raises(UserError, match=r"home directory ~nobody-here .* set --config.data.dir"):
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
    assert "tiny/1.0.0 is not an image-classification data set" in _error(tmp_path)
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
    assert "tiny/1.0.0, split test, record 1 has the label -1, not one of 0 to 2" in _error(
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
    assert "stored as riegeli. Prepare it as array_record" in _error(tmp_path)


def test_another_shape_in_test_is_refused(tmp_path):
    splits = tiny_splits()
    splits["test"] = examples_of(random_images(2, (4, 5, 3)), [0, 1])
    prepare_tiny(tmp_path, features_of((None, None, 3)), splits)
    assert "test['image'] has the shape (2, 4, 5, 3) and not (m, 6, 5, 3)" in _error(tmp_path)


# ---- what a function of OWN may do wrong


def _own(**changes):
    """A sound data set with these changes; train__label replaces the labels of train."""
    parts = {"fields": {"image": image_field((4, 4, 1)), "label": label_field("abc")}}
    parts |= {split: random_split(m, (4, 4, 1), 3) for split, m in (("train", 6), ("test", 3))}
    for key, value in changes.items():
        name, _, field = key.partition("__")
        parts[name] = {**parts[name], field: value} if field else value
    return Stored(**parts)


def _named(*names):
    return _own(fields__label=Field((), "int32", "label", names=names))


IMAGE, LABEL = random_split(6, (4, 4, 1), num_classes=3).values()
BOXES = Field((2, 4), "float32", "boxes")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "its function returns NoneType: return cv_jax.data.Stored"),
        (_own(fields=()), "fields must be a dict such as"),
        (_own(fields__rows=BOXES), "a field cannot have the name 'rows'"),
        (_own(fields__label=("a", "b")), "fields['label'] must be a cv_jax.data.fields.Field"),
        (_own(fields__a=BOXES._replace(kind="box")), "fields['a'] has the unknown kind 'box'"),
        (_own(fields__label=BOXES), "fields['label'] must be of the kind 'label', not 'boxes'"),
        (_named(), "fields['label'] needs names of its classes"),
        (_own(fields__label=label_field("")._replace(names="abc")), "names='abc' must be a tuple"),
        (_named("a", "b", "a"), "fields['label'].names[2]='a' must be a text, unique"),
        (_named("a", "b", ""), "fields['label'].names[2]='' must be a text"),
        (_named(0, 1, 2), "fields['label'].names[0]=0 must be a text"),
        (
            _own(fields__image=image_field((4, 4))),
            "'image' have the shape (4, 4) and not (h, w, c)",
        ),
        (_own(fields__image=image_field((4, 4, 5))), "(4, 4, 5) and not (h, w, c) with 1 to 4"),
        (_own(test=(IMAGE, LABEL)), "test must be a dict from the names of its fields to NumPy"),
        (_own(train__label=[0] * 6), "train must be a dict from the names"),
        (
            _own(train={"image": IMAGE}),
            "train has the arrays image, but Stored.fields has image, label",
        ),
        (_own(train={"image": IMAGE[:0], "label": LABEL[:0]}), "train has no examples"),
        (_own(val={"image": IMAGE[:0], "label": LABEL[:0]}), "val has no examples"),
        (_own(train__image=IMAGE / 255), "train['image'] is float64 and not uint8: scale it to 0"),
        (
            _own(test__image=IMAGE[:3, ..., 0]),
            "test['image'] has the shape (3, 4, 4) and not (m, 4",
        ),
        (
            _own(test__image=IMAGE[:3, :3]),
            "test['image'] has the shape (3, 3, 4, 1) and not (m, 4, 4",
        ),
        (_own(train__label=LABEL[:5]), "train has 6 of image, 5 of label; each example needs one"),
        (_own(train__label=LABEL / 2), "train['label'] is float64 and not whole numbers"),
        (_own(train__label=np.eye(6, 3, dtype=int)), "train['label'] has the shape (6, 3) and not"),
        (_own(train__label=np.arange(1, 7) % 4), "train['label'][2] is 3, but its 3 classes are"),
        (_own(test__label=np.array([0, -1, -1])), "test['label'][1] is -1, but its 3 classes are"),
        (_own(histograms={"image": histogram(IMAGE)[:, 0]}), "of shape (256,), does not count"),
        (_own(histograms={"image": histogram(IMAGE[:5])}), "of shape (256, 1), does not count"),
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
    assert data.train["label"].dtype == np.int32
    np.testing.assert_array_equal(data.train["label"], LABEL)
    assert data.spec.fields["image"].mean == pytest.approx(IMAGE.mean() / 255)


# ---- the cache


@pytest.fixture
def prepared(tmp_path):
    """A directory to be cached, and what reading it gives."""
    directory = tmp_path / "name" / "1.0.0"
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text("{}")
    return directory, _stored()


def _renamed(stored):
    return stored._replace(fields={**stored.fields, "label": label_field("vwxyz")})


def _never(directory):
    raise AssertionError("read again")


def _entry(tmp_path):
    (entry,) = (tmp_path / "cache" / "data").iterdir()
    return entry


def test_the_second_time_comes_from_the_cache(tmp_path, prepared, capsys):
    directory, stored = prepared
    cached(directory, lambda _: stored)
    again = cached(directory, _never)
    chex.assert_trees_all_equal(again[1:], stored[1:])
    assert again.fields == stored.fields
    assert isinstance(again.train["image"].base, np.memmap)
    assert not again.train["image"].flags.writeable
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
        ("histogram.image.npy", _flip),
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
    chex.assert_trees_all_equal(again[1:], stored[1:])
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
    other = _renamed(stored)
    assert cached(directory, lambda _: other) is other
    assert cached(directory, _never).fields == other.fields
    assert capsys.readouterr().err == ""


def test_a_file_below_a_folder_is_part_of_the_data(prepared):
    directory, stored = prepared
    image = directory / "train" / "cat" / "1.png"
    image.parent.mkdir(parents=True)
    (image.parent / "broken").symlink_to("nowhere")
    image.write_bytes(b"1")
    os.utime(image, (0, 0))
    cached(directory, lambda _: stored)
    assert cached(directory, _never).fields == stored.fields
    os.utime(image, (1, 1))
    assert cached(directory, lambda _: stored) is stored  # as new contents of the same size
    image.rename(image.parent.parent / "1.png")
    assert cached(directory, lambda _: stored) is stored
    cached(directory, _never)


def test_settings_of_the_decoding_have_entries_of_their_own(prepared):
    directory, stored = prepared
    cached(directory, lambda _: stored)
    other = _renamed(stored)
    assert cached(directory, lambda _: other, settings="size=64") is other
    assert cached(directory, _never).fields == stored.fields
    assert cached(directory, _never, settings="size=64").fields == other.fields


def test_two_directories_of_one_version_do_not_share(tmp_path, prepared):
    directory, stored = prepared
    copy = tmp_path / "copy" / "name" / "1.0.0"
    shutil.copytree(directory, copy)  # with the same sizes and times
    cached(directory, lambda _: stored)
    other = _renamed(stored)
    assert cached(copy, lambda _: other) is other
    assert cached(directory, _never).fields == stored.fields
    assert cached(copy, _never).fields == other.fields


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
    np.testing.assert_allclose(data.spec.fields["image"].mean, [0.4914, 0.4822, 0.4465], atol=5e-5)
    np.testing.assert_allclose(data.spec.fields["image"].std, [0.2470, 0.2435, 0.2616], atol=5e-5)
    np.testing.assert_array_equal(np.bincount(data.train["label"]), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(data.test["label"]), [1000] * 10)
    assert data.spec.class_names[6] == "frog"
    again = load_dataset(config_of("cifar10", cifar10_dir))
    assert isinstance(again.train["image"].base, np.memmap)
    val = load_dataset(config_of("cifar10", cifar10_dir, num_val=5000)).val
    np.testing.assert_array_equal(np.bincount(val["label"]), [500] * 10)


def test_a_fifth_of_a_data_set_with_train_alone_becomes_test(tmp_path, own_cache):
    labels = [i % 3 for i in range(30)]
    images = random_images(30)
    prepare_tiny(tmp_path, features_of(), {"train": examples_of(images, labels)})
    config = base_config()
    config.data.update({"name": "tiny", "dir": str(tmp_path), "size": 6})
    data, again = load_dataset(config.data), load_dataset(config.data)
    assert (data.spec.num_train, data.spec.num_test) == (24, 6)
    np.testing.assert_array_equal(np.bincount(data.test["label"]), [2, 2, 2])
    np.testing.assert_array_equal(data.test["image"], again.test["image"])
    assert "data    test is chosen by class, a fifth of the images" in data.notes
    config.data.size = 0
    with pytest.raises(UserError, match=r"config\.data\.size makes a fifth of train test"):
        load_dataset(config.data)
