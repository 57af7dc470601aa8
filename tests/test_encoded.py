"""Images that are decoded when a batch needs them: the same batch whoever decodes it."""

import collections
import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.processes import free_port
from cv_jax.config.errors import UserError
from cv_jax.data.batches import padded_batches, resident_batches, stream_batches
from cv_jax.data.encoded import Decoding, Encoded, Row, read_training
from cv_jax.data.fields import image_field, label_field, num_examples, take
from cv_jax.runtime.mesh import batch_sharding, make_mesh, put
from tests.conftest import ROOT

SHAPE = (4, 4, 3)
KEY = jax.random.key(3)
WORKERS_AND_BATCH_SIZES = ((1, 8), (2, 36), (3, 4), (8, 12))


class Numbers:
    """A source whose image i has the value i in every pixel. Counts what is read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)
        self.reads = collections.Counter()

    def __len__(self):
        return self.count

    def read(self, position):
        self.reads[int(position)] += 1
        if position in self.broken:
            raise UserError("it is damaged")
        return bytes([position])

    def name(self, position):
        return f"image {position}"


def fit(data):
    return np.full(SHAPE, data[0], np.uint8)


def crop(data, generator):
    """Returns the image with random noise, so that equal draws show."""
    return fit(data) + generator.integers(0, 100, SHAPE, np.uint8)


def make_split(source, num_workers=2, random=False, stops=False):
    decoding = Decoding(SHAPE, fit, crop if random else None, stops, num_workers)
    positions = np.arange(len(source))
    image = Encoded(source, decoding, positions, positions.astype(np.uint64))
    return {"image": image, "label": positions.astype(np.int32)}


def batches_of(split, steps, batch_size=8, mesh=None, key=KEY):
    batches = stream_batches(split, batch_size, key, mesh or make_mesh())
    return [jax.device_get(batches.pick(batches.feed(i, 1), np.int32(i))) for i in steps]


def test_a_part_is_a_view_and_decodes_only_what_is_asked_for():
    source = Numbers(20)
    image = make_split(source)["image"]
    part = image[5:15][np.array([7, 1])]
    assert part.shape == (2, *SHAPE)
    assert not source.reads
    assert np.asarray(part)[:, 0, 0, 0].tolist() == [12, 6]
    assert source.reads == {12: 1, 6: 1}
    assert image[3].shape == SHAPE
    assert image[3][0, 0, 0] == 3
    np.testing.assert_array_equal(image[2:4, 1:3], np.asarray(image)[2:4, 1:3])


def test_streamed_batches_are_those_of_the_decoded_images():
    split = make_split(Numbers(37))
    decoded = {name: np.asarray(x) for name, x in split.items()}
    resident = resident_batches(decoded, 8, KEY, make_mesh())
    expected = [jax.device_get(resident.pick(resident.feed(i, 1), np.int32(i))) for i in range(9)]
    for got, wanted in zip(batches_of(split, range(9)), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("num_workers", [1, 3, 8])
def test_random_crops_do_not_depend_on_threads_devices_or_where_a_run_starts(num_workers):
    expected = batches_of(make_split(Numbers(37), 2, random=True), range(9))
    split = make_split(Numbers(37), num_workers, random=True)
    mesh = make_mesh(devices=jax.devices()[:num_workers]) if num_workers != 3 else make_mesh()
    for start in (0, 5):
        for i, got in enumerate(batches_of(split, range(start, 9), mesh=mesh)):
            jax.tree.map(np.testing.assert_array_equal, got, expected[start + i])


def test_crops_differ_by_run_epoch_and_position():
    split = make_split(Numbers(9), random=True)
    rows = [Row(1, 0, 2), Row(1, 0, 2), Row(2, 0, 2), Row(1, 1, 2)]
    one, same, other_run, other_epoch = split["image"].read_training(rows)[0]
    np.testing.assert_array_equal(one, same)
    assert (one != other_run).any()
    assert (one != other_epoch).any()
    noise = split["image"].read_training([Row(1, 0, 2), Row(1, 0, 3)])[0]
    assert (noise[0] - 2 != noise[1] - 3).any()


def test_runs_of_one_program_have_crops_of_their_own():
    split = make_split(Numbers(16), random=True)
    keys = jax.numpy.stack([jax.random.key(3), jax.random.key(7)])
    batches = stream_batches(split, 8, keys, make_mesh(2))
    picked = jax.device_get(jax.vmap(batches.pick, (batches.axes, None))(batches.feed(1, 1), 1))
    for i, seed in enumerate((3, 7)):
        (alone,) = batches_of(split, [1], key=jax.random.key(seed))
        np.testing.assert_array_equal(picked["image"][i], alone["image"])


@pytest.mark.parametrize("batch_size", [5, 8, 37])
def test_every_example_is_read_once_an_epoch(batch_size):
    source = Numbers(37)
    split = make_split(source, 3)
    steps = 37 // batch_size
    stream = stream_batches(split, batch_size, KEY, make_mesh(devices=jax.devices()[:1]), end=steps)
    for i in range(steps):
        stream.feed(i, 1)
    assert set(source.reads.values()) == {1}
    assert source.reads.total() == steps * batch_size


def print_reads() -> None:
    """Prints which images this process decodes in two epochs and in an evaluation."""
    fields = {"image": image_field(SHAPE), "label": label_field([str(i) for i in range(37)])}
    for num_workers, batch_size in WORKERS_AND_BATCH_SIZES:
        source = Numbers(37)
        split = make_split(source, num_workers)
        for epoch in range(2):
            start = epoch * (37 // batch_size)
            end = start + 37 // batch_size
            stream = stream_batches(split, batch_size, KEY, make_mesh(), end=end)
            for i in range(start, end):
                stream.feed(i, 1)
            print(json.dumps(["epoch", source.reads]))
            source.reads.clear()
        for batch in padded_batches(split, fields, batch_size):
            put(batch, batch_sharding(make_mesh()))
        print(json.dumps(["evaluation", source.reads]))


@pytest.mark.parametrize("num_processes", [2, 4])
def test_every_example_is_read_once_by_one_of_several_processes(num_processes):
    port = free_port()
    code = "from cv_jax.runtime.processes import join; join('localhost:{}', {}, {});"
    code += "from tests.test_encoded import print_reads; print_reads()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(port, num_processes, i)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]
    printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes
    asked = itertools.product(WORKERS_AND_BATCH_SIZES, ("epoch", "epoch", "evaluation"))
    for ((_, batch_size), what), lines in zip(asked, zip(*printed, strict=True), strict=True):
        reads = [collections.Counter(json.loads(line)[1]) for line in lines]
        everywhere = sum(reads, collections.Counter())
        count = 37 if what == "evaluation" else 37 // batch_size * batch_size
        assert set(everywhere.values()) == {1}
        assert everywhere.total() == count
        if what == "epoch":
            assert {one.total() for one in reads} == {count // num_processes}


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_evaluation_reads_every_example_once(num_devices):
    source = Numbers(37)
    split = make_split(source, 3)
    fields = {"image": image_field(SHAPE), "label": label_field([str(i) for i in range(37)])}
    sharding = batch_sharding(make_mesh(devices=jax.devices()[:num_devices]))
    seen = []
    for batch in padded_batches(split, fields, 8):
        placed = jax.device_get(put(batch, sharding))
        count = int(placed["rows"]["weight"].sum())
        seen += placed["image"][:count, 0, 0, 0].tolist()
        assert (placed["image"][count:] == 0).all()
    assert seen == list(range(37))
    assert source.reads == dict.fromkeys(range(37), 1)


def test_a_broken_image_is_replaced_by_the_next_one_with_its_label(capsys):
    split = make_split(Numbers(6, broken=[2, 3, 5]))
    got = read_training(split, np.array([2, 1, 5, 2]), key=0, epoch=0)
    assert got["image"][:, 0, 0, 0].tolist() == [4, 1, 0, 4]
    assert got["label"].tolist() == [4, 1, 0, 4]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "cv_jax: image 5 cannot be decoded: it is damaged. image 0 takes its place." in lines
    assert set(split["image"].decoding.broken) == {"image 2", "image 3", "image 5"}


def test_a_broken_image_is_black_in_evaluation(capsys):
    split = make_split(Numbers(6, broken=[2]))
    assert np.asarray(split["image"])[:, 0, 0, 0].tolist() == [0, 1, 0, 3, 4, 5]
    assert "image 2 cannot be decoded: it is damaged. It is evaluated" in capsys.readouterr().err


def test_a_broken_image_can_stop_the_run():
    split = make_split(Numbers(6, broken=[2]), stops=True)
    message = r"image 2 cannot be decoded: it is damaged.*data\.on_error='replace'"
    with pytest.raises(UserError, match=message):
        read_training(split, np.array([1, 2]), key=0, epoch=0)
    stream = stream_batches(split, 6, KEY, make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(UserError, match=message):
        stream.feed(0, 1)


def test_images_that_all_break_end_the_run():
    split = make_split(Numbers(3, broken=[0, 1, 2]))
    with pytest.raises(UserError, match="None of the training images"):
        read_training(split, np.array([1]), key=0, epoch=0)


def test_splits_of_encoded_images_keep_positions_and_digests():
    split = make_split(Numbers(10))
    part = take(split, np.array([4, 2]))
    assert num_examples(part) == 2
    assert part["image"].digests.tolist() == [4, 2]
    assert part["image"].fingerprint() != take(split, np.array([2, 4]))["image"].fingerprint()
