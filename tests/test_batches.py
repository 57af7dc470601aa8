"""Batches are a function of (seed, step), the same from the device and from a stream."""

import chex
import jax
import numpy as np
import pytest

from cv_jax.config.errors import UserError
from cv_jax.data import Field
from cv_jax.data.batches import (
    STREAM_STEPS,
    padded_batches,
    resident_batches,
    stream_batches,
)
from cv_jax.runtime.mesh import make_mesh
from tests.conftest import random_split

SPLIT = random_split(70, (4, 5, 3), 10)
BATCH_SIZE = 16  # 4 steps an epoch, 6 examples left over
KEY = jax.random.key(7)


def _collect(batches, steps):
    pick = jax.jit(batches.pick)
    return [jax.device_get(pick(batches.feed(step, 1), np.int32(step))) for step in steps]


@pytest.fixture(scope="module")
def resident():
    return resident_batches(SPLIT, BATCH_SIZE, KEY, make_mesh())


@pytest.fixture(scope="module")
def two_epochs(resident):
    return _collect(resident, range(8))


def test_an_epoch_shows_each_example_at_most_once(two_epochs):
    for epoch in (two_epochs[:4], two_epochs[4:]):
        index = np.concatenate([batch["rows"]["index"] for batch in epoch])
        assert len(set(index.tolist())) == 64
        assert index.min() >= 0
        assert index.max() < 70
    assert (two_epochs[0]["rows"]["index"] != two_epochs[4]["rows"]["index"]).any()


def test_images_and_labels_are_those_of_the_index(two_epochs):
    for step, batch in enumerate(two_epochs):
        np.testing.assert_array_equal(batch["image"], SPLIT["image"][batch["rows"]["index"]])
        np.testing.assert_array_equal(batch["label"], SPLIT["label"][batch["rows"]["index"]])
        assert batch["rows"]["epoch"].tolist() == [step // 4] * BATCH_SIZE


def test_the_coin_stays_with_the_example_and_differs_between_seeds(two_epochs):
    def coins(batches):
        pairs = [(b["rows"]["index"].tolist(), b["rows"]["coin"].tolist()) for b in batches]
        return {i: c for index, coin in pairs for i, c in zip(index, coin, strict=True)}

    first, second = coins(two_epochs[:4]), coins(two_epochs[4:])
    both = first.keys() & second.keys()
    assert len(both) > 50
    assert all(first[i] == second[i] for i in both)
    other = coins(
        _collect(resident_batches(SPLIT, BATCH_SIZE, jax.random.key(8), make_mesh()), [0])
    )
    assert all(first[i] != other[i] for i in first.keys() & other.keys())
    heads = sum(coin & 1 for coin in first.values())
    assert 16 < heads < 48


def test_a_batch_needs_no_history(resident, two_epochs):
    chex.assert_trees_all_equal(_collect(resident, [6, 2, 5]), [two_epochs[i] for i in (6, 2, 5)])


def test_a_stream_gives_the_same_bits(two_epochs):
    stream = stream_batches(SPLIT, BATCH_SIZE, KEY, make_mesh())
    chex.assert_trees_all_equal(_collect(stream, range(8)), two_epochs)
    feed = stream.feed(5, 3)
    picked = [jax.device_get(stream.pick(feed, np.int32(step))) for step in (5, 6, 7)]
    chex.assert_trees_all_equal(picked, two_epochs[5:])


@pytest.mark.parametrize("stream", [False, True])
def test_several_runs_get_each_their_own_batches(stream):
    seeds = [3, 7]
    keys = jax.numpy.stack([jax.random.key(seed) for seed in seeds])
    if stream:
        batches = stream_batches(SPLIT, BATCH_SIZE, keys, make_mesh(2))
    else:
        batches = resident_batches(SPLIT, BATCH_SIZE, keys, make_mesh(2))
    together = jax.jit(jax.vmap(batches.pick, (batches.axes, None)))
    steps = (2, 3, 4)
    picked = [jax.device_get(together(batches.feed(step, 1), np.int32(step))) for step in steps]
    for i, seed in enumerate(seeds):
        alone = resident_batches(SPLIT, BATCH_SIZE, jax.random.key(seed), make_mesh())
        mine = [jax.tree.map(lambda x, i=i: x[i], batch) for batch in picked]
        chex.assert_trees_all_equal(mine, _collect(alone, steps))


def test_a_streamed_feed_is_divided_by_runs_and_by_examples_but_not_by_steps():
    keys = jax.numpy.stack([jax.random.key(3), jax.random.key(7)])
    spec = jax.sharding.PartitionSpec
    shared = ("data", "fsdp")
    for key, num_runs, expected in (
        (KEY, 1, spec(None, shared)),
        (keys, 2, spec("seed", None, shared)),
    ):
        batches = stream_batches(SPLIT, BATCH_SIZE, key, make_mesh(num_runs))
        feed = batches.feed(0, 1)
        for array in jax.tree.leaves((feed["examples"], feed["index"])):
            assert array.sharding.spec == expected


def test_a_feed_never_crosses_the_end_of_an_epoch(resident):
    assert [resident.limit(step) for step in range(5)] == [4, 3, 2, 1, 4]
    long = stream_batches(SPLIT, 2, KEY, make_mesh())
    assert [long.limit(step) for step in (0, 30, 34)] == [STREAM_STEPS, 2, 1]


def test_shapes_are_those_of_the_batches(resident, two_epochs):
    chex.assert_trees_all_equal_shapes_and_dtypes(resident.shapes, two_epochs[0])


@pytest.mark.parametrize("batch_size", [0, 71])
def test_a_batch_of_nothing_or_larger_than_the_data_is_refused(batch_size):
    with pytest.raises(UserError, match=rf"config\.batch_size={batch_size} .* the 70 training"):
        resident_batches(SPLIT, batch_size, KEY, make_mesh())


@pytest.mark.parametrize("stream", [False, True])
def test_runs_may_have_examples_of_their_own(stream):
    keys = jax.numpy.stack([jax.random.key(3), jax.random.key(3)])
    positions = np.int32([np.arange(0, 64, 2), np.arange(1, 64, 2)])
    make = stream_batches if stream else resident_batches
    batches = make(SPLIT, BATCH_SIZE, keys, make_mesh(2), positions)
    assert batches.limit(0) == 2  # steps of 16 out of 32 examples
    together = jax.jit(jax.vmap(batches.pick, (batches.axes, None)))
    seen = [jax.device_get(together(batches.feed(i, 1), np.int32(i))) for i in range(2)]
    index = np.concatenate([batch["rows"]["index"] for batch in seen], axis=1)
    np.testing.assert_array_equal(np.sort(index, axis=1), positions)
    np.testing.assert_array_equal(index[0] + 1, index[1])  # the same order of other examples
    np.testing.assert_array_equal(seen[0]["label"], SPLIT["label"][seen[0]["rows"]["index"]])


def test_padding_has_the_fill_value_of_its_field_and_no_weight():
    fields = {
        "label": Field((), "int32", "label", fill=-1, names=("a",)),
        "mask": Field((2,), "uint8", "mask", fill=255),
    }
    split = {"label": np.zeros(3, np.int32), "mask": np.ones((3, 2), np.uint8)}
    first, last = padded_batches(split, fields, 2)
    assert first["rows"]["weight"].tolist() == [1, 1]
    assert last["rows"]["weight"].tolist() == [1, 0]
    assert last["label"].tolist() == [0, -1]
    assert last["mask"].tolist() == [[1, 1], [255, 255]]
    assert last["label"].dtype == np.int32
