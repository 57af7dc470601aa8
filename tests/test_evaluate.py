"""Every example counts once: masks, sums and views against numpy."""

import itertools
import signal
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import Dataset, DataSpec, image_field, label_field
from cv_jax.data.batches import padded_batches
from cv_jax.data.fields import take
from cv_jax.learn.evaluations import Collected, Probe
from cv_jax.learn.metrics import classification_metrics
from cv_jax.optim.state import TrainState
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.mesh import make_mesh
from cv_jax.runtime.signals import CutShort
from cv_jax.tasks.classification.views import find_tta
from cv_jax.train.evaluator import Evaluator, compute, sum_batches
from cv_jax.workdir.numbers import means
from tests.conftest import random_split

SPLIT = random_split(37, (2, 2, 1), 7)
FIELDS = {"image": image_field((2, 2, 1)), "label": label_field("abcdefg")}
WEIGHT = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)


def _eval_fn(state, batch):
    image = batch["image"].astype(jnp.float32).reshape(-1, 4) / 255
    return classification_metrics(image @ state, batch["label"], batch["rows"]["weight"])


@pytest.mark.parametrize("batch_size", [1, 5, 36, 37, 38, 100])
def test_any_batch_size_gives_the_same_numbers(batch_size):
    batches = list(padded_batches(SPLIT, FIELDS, batch_size))
    assert {len(batch["label"]) for batch in batches} == {batch_size}
    sums = sum_batches(partial(jax.jit(_eval_fn), WEIGHT), batches)

    logits = (SPLIT["image"].reshape(37, 4).astype(np.float64) / 255) @ WEIGHT.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    answer = logits.argmax(1)
    right = answer == SPLIT["label"]
    top5 = (np.argsort(-logits)[:, :5] == SPLIT["label"][:, None]).any(1)
    confusion = np.zeros((7, 7))
    np.add.at(confusion, (SPLIT["label"], answer), 1)

    chex.assert_trees_all_equal(sums["accuracy"], (np.float32(right.sum()), np.float32(37)))
    chex.assert_trees_all_equal(sums["top5"], (np.float32(top5.sum()), np.float32(37)))
    np.testing.assert_array_equal(sums["confusion"][0], confusion)
    np.testing.assert_array_equal(sums["per_class_accuracy"][0], np.diagonal(confusion))
    np.testing.assert_array_equal(sums["per_class_accuracy"][1], np.bincount(SPLIT["label"]))
    loss = -log_probs[np.arange(37), SPLIT["label"]].sum()
    np.testing.assert_allclose(sums["loss"][0], loss, rtol=1e-5)
    confidence = np.exp(log_probs.max(1))
    counts, _ = np.histogram(confidence, 15, (0, 1))
    hits, _ = np.histogram(confidence, 15, (0, 1), weights=right.astype(float))
    total, _ = np.histogram(confidence, 15, (0, 1), weights=confidence)
    np.testing.assert_allclose(sums["calibration"][0], [counts, hits, total], rtol=1e-5)


def test_splits_of_other_image_sizes_have_programs_of_their_own():
    def split(side, dtype):
        return {"image": np.ones((4, side, side, 1), dtype), "label": np.zeros(4, np.int32)}

    data = Dataset(DataSpec("x", FIELDS, 0, 4, 4, {}), {}, split(2, np.uint8), split(3, np.uint8))

    def pixels(own, state, batch):
        return {"pixels": (batch["image"].sum(axis=(1, 2, 3)).sum(), state)}

    state = jnp.float32(1)
    evaluate = Evaluator({"final": pixels}, None, data, base_config(), make_mesh(), Clock())
    assert evaluate("final", state, "val")["pixels"][0] == 4 * 2 * 2
    assert evaluate("final", state, "test")["pixels"][0] == 4 * 3 * 3
    assert evaluate("final", jnp.int32(1), "test")["pixels"][1] == 1  # another type


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("batch_size", [5, 37, 100])
def test_collected_predictions_come_once_each_in_order_without_padding(stream, batch_size):
    """Two runs, whose predictions are the sums of their images' pixels times 1 and times 2."""
    nothing = take(SPLIT, slice(0))
    data = Dataset(DataSpec("x", FIELDS, 0, 37, 0, {}), nothing, SPLIT, nothing)
    seen = []

    def predict(own, state, batch):
        return {"sum": jnp.outer(state.params, batch["image"].sum((1, 2, 3), jnp.float32))}

    def add(fold, predictions, examples):
        seen.append((len(fold), predictions["sum"].shape))
        error = predictions["sum"] - examples["image"].astype(np.float32).sum((1, 2, 3))
        return [*fold, *error]

    def finish(fold):
        return {"largest": np.max(np.abs(fold)), "count": len(fold)}

    config = base_config()
    config.eval_batch_size, config.data.stream = batch_size, stream
    state = TrainState(jnp.int32(0), jnp.float32([1, 2]), {}, ())
    evals = {"final": Collected(predict, list, add, finish)}
    evaluate = Evaluator(evals, None, data, config, make_mesh(), Clock())
    found = means(evaluate("final", state, "val"))
    assert found["count"].tolist() == [37, 37]
    largest = SPLIT["image"].astype(np.float32).sum((1, 2, 3)).max()
    assert found["largest"].tolist() == [0, largest]
    assert seen[-1] == ((35, (2,)) if batch_size == 5 else (0, (37,)))  # no padding
    assert evaluate("final", state, "test") == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_network_that_has_diverged_has_no_accuracy(bad):
    label = jnp.array([0, 1, 1, 0], jnp.int32)  # class 0 is what the argmax of NaN says
    mask = jnp.array([1.0, 1, 1, 0])
    logits = jnp.zeros((4, 6)).at[0, 2].set(bad)
    metrics = classification_metrics(logits, label, mask)
    assert set(metrics) == {
        *("loss", "accuracy", "top5", "per_class_accuracy", "confusion", "calibration")
    }
    for name, (total, _) in metrics.items():
        assert np.isnan(total).all(), name
    assert metrics["accuracy"][1] == 3
    np.testing.assert_array_equal(metrics["per_class_accuracy"][1], [1, 2, 0, 0, 0, 0])
    one_run = means({"accuracy": sum_batches(lambda batch: batch, [metrics])["accuracy"]})
    assert np.isnan(one_run["accuracy"])


def test_top5_is_left_out_where_it_says_nothing():
    metrics = classification_metrics(jnp.zeros((2, 5)), jnp.zeros(2, jnp.int32), jnp.ones(2))
    assert "top5" not in metrics


def test_means_divide_and_leave_nan_where_nothing_was_counted():
    got = means({"loss": (np.float32(6), np.float32(4)), "none": (np.zeros(2), np.array([0, 2.0]))})
    assert got["loss"] == 1.5
    np.testing.assert_array_equal(got["none"], [np.nan, 0])


def _pixel_sum(weights):
    return lambda image: jnp.einsum("bhwc,hw->bc", image, weights)


def test_views_against_numpy():
    rng = np.random.default_rng(1)
    image, weights = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 5, 3), (4, 5)))
    apply = _pixel_sum(weights)
    plain = np.einsum("bhwc,hw->bc", image, weights)
    mirror = (plain + np.einsum("bhwc,hw->bc", image[:, :, ::-1], weights)) / 2
    np.testing.assert_allclose(find_tta("none")(apply, image), plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(find_tta("mirror")(apply, image), mirror, rtol=1e-5, atol=1e-5)

    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    both = [padded[:, :4, :5], padded[:, 2:, 2:]]
    both = [(v, v[:, :, ::-1]) for v in both]
    moved = np.mean([np.einsum("bhwc,hw->bc", v, weights) for pair in both for v in pair], axis=0)
    got = find_tta("mirror_translate")(apply, image)
    np.testing.assert_allclose(got, (mirror + moved) / 2, rtol=1e-4, atol=1e-5)


def test_the_views_of_a_square_are_its_eight_turns_and_mirrorings():
    rng = np.random.default_rng(1)
    image, weights = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 5, 3), (5, 5)))
    turns = [np.rot90(x, k, (1, 2)) for x in (image, image[:, ::-1]) for k in range(4)]
    expected = np.mean([np.einsum("bhwc,hw->bc", x, weights) for x in turns], axis=0)
    got = find_tta("square")(_pixel_sum(weights), image)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="'square' needs square images; these have 4x5 pixels"):
        find_tta("square")(_pixel_sum(weights), image[:, :4])


def test_an_unknown_view_is_named():
    with pytest.raises(UserError, match=r"config\.tta='miror'.*'mirror'.*mirror_translate"):
        find_tta("miror")


def test_a_confidence_of_1_is_in_the_last_bin():
    logits, label = jnp.array([[100.0, 0], [0, 100]]), jnp.array([0, 0], jnp.int32)
    (counts, hits, total), _ = classification_metrics(logits, label, jnp.ones(2))["calibration"]
    for bins, last in ((counts, 2), (hits, 1), (total, 2)):
        np.testing.assert_array_equal(bins, [0] * 14 + [last])


class _FakeDevice:
    """Computes one batch after the other, each in so many seconds. Notes what happens."""

    def __init__(self, monkeypatch, seconds):
        self._seconds, self._now, self.notes = seconds, 0.0, []
        monkeypatch.setattr("cv_jax.train.evaluator.time.perf_counter", lambda: self._now)
        monkeypatch.setattr("jax.block_until_ready", self._wait)

    def dispatch(self, batch):
        self.notes.append(f"dispatch {batch}")
        return batch

    def _wait(self, result):
        self._now += self._seconds
        self.notes.append(f"wait {result}")
        return result


def test_fast_batches_are_dispatched_ahead_and_slow_ones_are_not(monkeypatch):
    fast = _FakeDevice(monkeypatch, 0.1)
    assert list(compute(fast.dispatch, range(3))) == [0, 1, 2]
    assert fast.notes == [
        *("dispatch 0", "wait 0"),  # nobody knows how long it takes
        *("dispatch 1", "dispatch 2", "wait 1", "wait 2"),
    ]
    slow = _FakeDevice(monkeypatch, 10.0)
    assert list(compute(slow.dispatch, range(3))) == [0, 1, 2]
    assert slow.notes == [f"{act} {i}" for i in range(3) for act in ("dispatch", "wait")]


@pytest.mark.parametrize(("seconds", "done"), [(0.1, [0]), (10.0, [0, 1])])
def test_a_stop_request_cuts_between_two_batches(monkeypatch, seconds, done):
    device, looks = _FakeDevice(monkeypatch, seconds), iter([0, 0, 15])
    results = compute(device.dispatch, range(4), lambda: next(looks))
    assert list(itertools.islice(results, len(done))) == done
    with pytest.raises(CutShort):
        next(results)
    assert sum(note.startswith("dispatch") for note in device.notes) == 2


def _count(own, state, batch):
    weight = batch["rows"]["weight"]
    return {"count": (weight.sum()[None], (weight.sum() / 32)[None])}


def _total(own, state, batch):
    return {"sum": batch["image"].sum((1, 2, 3), jnp.float32)[None]}


_EVALUATIONS = {
    "sums": _count,
    "collected": Collected(
        _total, int, lambda n, own, part: n + len(own["sum"]), lambda n: {"count": n * 32 / 37}
    ),
    "probe": Probe(
        lambda own, state, batch: _total(own, state, batch)["sum"][..., None],
        lambda own, features, label: features.mean(),
        lambda own, state, learned, batch: _count(own, state, batch),
    ),
}


@pytest.mark.parametrize("kind", _EVALUATIONS)
def test_every_kind_of_evaluation_is_cut_short(kind):
    config = base_config()
    config.eval_batch_size = 10
    data = Dataset(DataSpec("x", FIELDS, 37, 37, 37, {}), SPLIT, SPLIT, SPLIT)
    evals = dict.fromkeys(("watch", "final"), _EVALUATIONS[kind])
    signum, looks = 0, []

    def stop():
        looks.append(signum)
        return signum

    evaluate = Evaluator(evals, None, data, config, make_mesh(), Clock(), stop)
    state = TrainState(jnp.int32(0), jnp.float32([1]), {}, ())
    assert evaluate.final(state).keys() == {"val", "test"}
    assert evaluate.watch(state) == {"count": 32}
    assert len(looks) >= 3 * 4  # each batch
    signum = signal.SIGTERM
    assert evaluate.watch(state) is None
    assert evaluate.final(state) is None
