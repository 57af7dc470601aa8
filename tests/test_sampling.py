"""Balanced sampling: equally many examples of each class, as a function of (seed, epoch)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data.batches import balanced_order, make_batches
from cv_jax.runtime.mesh import make_mesh
from tests.conftest import random_split

SPLIT = random_split(70, (4, 5, 3), 10)
LABEL = np.int32([0] * 50 + [1] * 17 + [3] * 3)  # class 2 has no example
KEY = jax.random.key(7)


def _counts(order, count):
    return np.bincount(np.asarray(order).ravel(), minlength=count)


@pytest.fixture(scope="module")
def order():
    return jax.jit(lambda key, epoch, label: balanced_order(key, epoch, label, 4, 16))


def test_each_class_and_each_of_its_examples_is_drawn_equally_often(order):
    orders = [order(KEY, epoch, LABEL) for epoch in range(8)]
    chex.assert_shape(orders, (4, 16))
    for drawn in orders:
        of_classes = _counts(LABEL[np.asarray(drawn)], 4)
        assert of_classes[2] == 0
        assert sorted(of_classes[[0, 1, 3]]) == [21, 21, 22]
        of_examples = _counts(drawn, 70)
        assert set(of_examples[:50]) == {0, 1}  # 21 or 22 draws of 50 examples
        assert set(of_examples[50:67]) == {1, 2}
        assert set(of_examples[67:]) <= {7, 8}
    # The additional draw and the examples that are left out change from epoch to epoch.
    assert len({int(_counts(LABEL[np.asarray(drawn)], 4).argmax()) for drawn in orders}) == 3
    assert _counts(jnp.stack(orders), 70)[:50].min() > 0


def test_an_order_is_a_function_of_key_and_epoch(order):
    np.testing.assert_array_equal(order(KEY, 3, LABEL), order(KEY, 3, LABEL))
    assert (order(KEY, 3, LABEL) != order(KEY, 4, LABEL)).any()
    assert (order(KEY, 3, LABEL) != order(jax.random.key(8), 3, LABEL)).any()


def test_the_draws_of_all_classes_are_shuffled(order):
    labels = LABEL[np.asarray(order(KEY, 0, LABEL))]
    assert (labels[:, 0] != labels[0, 0]).any()
    assert all(len(set(of_step)) == 3 for of_step in labels.tolist())


def _config(stream=False):
    config = base_config()
    config.batch_size, config.data.sampling, config.data.stream = 16, "balanced", stream
    return config


def _collect(batches, steps, map_runs=lambda pick: pick):
    pick = jax.jit(map_runs(batches.pick))
    return [jax.device_get(pick(batches.feed(step, 1), np.int32(step))) for step in steps]


def test_a_stream_and_several_runs_get_the_same_batches():
    split = {**SPLIT, "label": LABEL}
    steps, keys = (0, 3, 5), jax.numpy.stack([jax.random.key(3), KEY])
    resident = _collect(make_batches(_config(), split, KEY, make_mesh()), steps)
    streamed = make_batches(_config(stream=True), split, KEY, make_mesh())
    chex.assert_trees_all_equal(_collect(streamed, steps), resident)
    for stream in (False, True):
        batches = make_batches(_config(stream), split, keys, make_mesh(2))
        axes = (batches.axes, None)
        together = _collect(batches, steps, lambda pick, axes=axes: jax.vmap(pick, axes))
        second = [jax.tree.map(lambda x: x[1], batch) for batch in together]
        chex.assert_trees_all_equal(second, resident)
    for batch in resident:
        np.testing.assert_array_equal(batch["label"], LABEL[batch["rows"]["index"]])


def test_runs_with_examples_of_their_own_are_balanced_each():
    keys = jax.numpy.stack([KEY, KEY])
    positions = np.int32([np.arange(0, 32), np.arange(38, 70)])  # the first run: class 0 alone
    split = {**SPLIT, "label": LABEL}
    batches = make_batches(_config(), split, keys, make_mesh(2), positions)
    order = np.asarray(batches.feed(0, 1)["order"])
    assert _counts(order[0], 70)[:32].tolist() == [1] * 32
    np.testing.assert_array_equal(np.isin(order[1], positions[1]), True)
    assert sorted(_counts(LABEL[order[1]], 4)) == [0, 10, 11, 11]


def test_examples_without_labels_and_selections_are_refused():
    config = _config()
    image = {"image": SPLIT["image"]}
    unlabelled = {**SPLIT, "label": np.where(LABEL == 1, -1, LABEL)}
    for split, message in ((image, "needs the field 'label'"), (unlabelled, "needs a label for")):
        with pytest.raises(UserError, match=rf"config\.data\.sampling='balanced' {message}"):
            make_batches(config, split, KEY, make_mesh())
    config.select = "hardest(1, of=2)"
    with pytest.raises(UserError, match=r"config\.select='hardest\(1, of=2\)' remembers one loss"):
        make_batches(config, SPLIT, KEY, make_mesh())
