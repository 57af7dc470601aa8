"""Steps that are not finite: skipped where the config says so, counted, and too many of them."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from cv_jax.augment.chain import AUGMENTATIONS
from cv_jax.config.errors import UserError
from cv_jax.config.plan import Chunk
from cv_jax.data.dataset import example_shapes
from cv_jax.learn.losses import of_examples
from cv_jax.learn.train_step import gradient_step, keep_if_finite
from cv_jax.models import MODELS
from cv_jax.optim.optimizers import average_params
from cv_jax.optim.state import RUN_AXES, init_state
from cv_jax.runtime.signals import Stopped
from cv_jax.tasks import build_task
from cv_jax.train.flops import step_flops
from cv_jax.workdir import directory
from cv_jax.workdir.log import Log
from tests.conftest import random_dataset
from tests.test_log import _records, make_log  # noqa: F401
from tests.test_resume import _StopWhen, assert_same_run

# ---- the step


def _loss(params, model_state, batch, key):
    losses = jnp.square(batch["x"] * params["w"][None]).sum(axis=1)
    count = jnp.float32(len(losses))
    model_state = {"mean": batch["statistic"].mean()}
    return of_examples(losses), (
        model_state,
        {"loss": (losses.sum(), count), "zero": (losses[0] * 0, count)},
    )


def _batch(**changes):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    return {"x": x, "statistic": x[0], "rows": {"index": np.arange(4)}, **changes}


# What is not finite in a step with each: all; the optimizer's state alone; statistics alone.
BAD = {
    "loss": _batch(x=np.float32([[1, 2, math.inf]] * 4)),
    "optimizer": _batch(x=np.full((4, 3), 3e18, np.float32)),  # the square of a gradient of 2e37
    "statistics": _batch(statistic=np.float32([1, math.nan, 3])),
}


@pytest.fixture
def steps():
    """(train_step, the one that skips, a state): of Adam with averaged parameters."""
    tx = optax.chain(optax.adam(0.1), average_params(0.9))
    step = gradient_step(_loss, tx, select=lambda batch, last_loss: batch)

    def skipping(state, batch, key):
        return keep_if_finite(state, *step(state, batch, key))

    state = init_state({"w": jnp.ones(3)}, {"mean": jnp.float32(0)}, tx, last_loss_of=4)
    with jax.numpy_dtype_promotion("standard"):  # of optax's bias correction
        yield step, jax.jit(skipping), state


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(steps, kind):
    step, skipping, state = steps
    state, metrics = skipping(state, _batch(), jax.random.key(0))
    assert metrics["skipped"] == (0, 1)
    after, metrics = skipping(state, BAD[kind], jax.random.key(1))
    chex.assert_trees_all_equal(after, state.replace(step=jnp.int32(2)))
    assert metrics == {"loss": (0, 0), "zero": (0, 0), "skipped": (1, 1)}
    # What it prevents.
    bad, _ = step(state, BAD[kind], jax.random.key(1))
    numbers = (bad.params, bad.opt_state, bad.model_state)
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(numbers))


def test_every_loss_is_looked_at_and_a_step_without_examples_is_not_skipped(steps):
    _, _, state = steps

    def step(state, batch, key):
        del key
        new = state.replace(step=state.step + 1)
        return new, {"loss/a": (batch["a"], batch["n"]), "loss/b": (batch["b"], batch["n"])}

    @jax.jit
    def skipping(state, batch, key):
        return keep_if_finite(state, *step(state, batch, key))

    def metrics(a, b, n):
        batch = {"a": jnp.float32(a), "b": jnp.float32(b), "n": jnp.float32(n)}
        return skipping(state, batch, jax.random.key(0))[1]

    assert metrics(1, math.inf, 4) == {"loss/a": (0, 0), "loss/b": (0, 0), "skipped": (1, 1)}
    assert metrics(1, 2, 4) == {"loss/a": (1, 4), "loss/b": (2, 4), "skipped": (0, 1)}
    assert metrics(0, 0, 0) == {"loss/a": (0, 0), "loss/b": (0, 0), "skipped": (0, 1)}


def test_the_step_after_it_goes_on_from_the_state_before_it(steps):
    step, skipping, state = steps
    good = _batch()
    skipped, _ = skipping(state, BAD["loss"], jax.random.key(0))
    after, metrics = skipping(skipped, good, jax.random.key(1))
    expected, plain = jax.jit(step)(state.replace(step=jnp.int32(1)), good, jax.random.key(1))
    chex.assert_trees_all_equal(after, expected)
    assert metrics == {**plain, "skipped": (0, 1)}
    assert after.step == 2


def test_of_two_runs_only_the_one_with_the_bad_batch_skips(steps):
    _, skipping, state = steps
    good, bad = _batch(), BAD["loss"]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), good, bad)
    keys = jax.random.split(jax.random.key(0))
    mapped = jax.vmap(skipping, (None, 0, 0), (RUN_AXES, 0))
    states, metrics = mapped(state, both, keys)
    assert metrics["skipped"][0].tolist() == [0, 1]
    assert metrics["loss"][1].tolist() == [4, 0]
    np.testing.assert_array_equal(states.params["w"][1], state.params["w"])
    assert (states.params["w"][0] != state.params["w"]).all()


# ---- the log


def _metrics(*runs):
    """Of a chunk, from the losses of each run; None is a skipped step."""
    skipped = np.array([[loss is None for loss in run] for run in runs], np.float64)
    loss = np.array([[loss or 0.0 for loss in run] for run in runs])
    return {"loss": (loss, 1 - skipped), "skipped": (skipped, np.ones_like(loss))}


def test_a_row_tells_how_many_were_skipped_and_means_the_others(make_log, tmp_path, capsys):  # noqa: F811
    with make_log(names=("seed=0", "seed=1")) as log:
        log.train(Chunk(0, 3, True, False, False), _metrics([4.0, None, 2.0], [4.0, 3.0, 2.0]))
        log.row()
        log.train(Chunk(3, 4, True, False, False), _metrics([None], [None]))
        log.row()
    out = capsys.readouterr().out
    assert "1 of 6 steps up to step 3 skipped: not finite" in out
    assert "2 of 2 steps up to step 4 skipped: not finite" in out
    assert "nan" not in out
    first, second = _records(tmp_path)
    assert first["runs"]["loss"] == [3.0, 3.0]
    assert first["runs"]["skipped"] == [pytest.approx(1 / 3), 0.0]
    assert first["values"]["skipped"] == pytest.approx(1 / 6)
    assert second["values"]["skipped"] == 1.0
    assert "loss" not in second["values"]


def test_a_step_without_examples_is_neither_skipped_nor_diverged(make_log, capsys):  # noqa: F811
    nothing = np.zeros((1, 12))
    with make_log() as log:
        metrics = {"loss": (nothing, nothing), "skipped": (nothing, nothing + 1)}
        log.train(Chunk(0, 12, True, False, False), metrics)
    assert "skipped" not in capsys.readouterr().out


def test_ten_skipped_steps_in_a_row_stop_the_program(make_log):  # noqa: F811
    with make_log() as log:
        log.train(Chunk(0, 11, True, False, False), _metrics([1.0, None, 1.0, *[None] * 8]))
        log.train(Chunk(11, 12, True, False, False), _metrics([None]))
        message = r"The steps from 4 to 13 \(epoch 1\.86\) were all skipped.*checkpoints are kept"
        with pytest.raises(UserError, match=message):
            log.train(Chunk(12, 13, True, False, False), _metrics([None]))


def test_one_run_that_skips_all_leaves_the_others_alone(make_log, tmp_path):  # noqa: F811
    with make_log(names=("lr=1", "lr=9")) as log:
        log.train(Chunk(0, 12, True, False, False), _metrics([2.0] * 12, [None] * 12))
    (record,) = _records(tmp_path)
    assert record["runs"] == {"loss": [2.0, None], "skipped": [0.0, 1.0]}
    assert record["values"]["loss"] == 2.0


# ---- whole runs


class _Linear(nn.Module):
    """Compiles in no time, and has statistics."""

    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes)(x), {"pooled": x}


@pytest.fixture
def poisoned(monkeypatch, tiny_config):
    """A config of 3 epochs of 5 steps, one of which overflows in each epoch."""

    def poison():
        def op(key, batch):
            bad = jnp.where(batch["rows"]["index"] == 8, 3e38, 0)[:, None, None, None]
            return {**batch, "image": batch["image"] + bad}

        return op

    monkeypatch.setitem(AUGMENTATIONS, "poison", poison)
    monkeypatch.setitem(MODELS, "linear", _Linear)
    with tiny_config.unlocked():
        tiny_config.augment = "poison|mixup(0.2)"
        tiny_config.progressive_resizing = tiny_config.select = ""
        tiny_config.model = "linear"
        tiny_config.optim.rules = ((".*", "base"),)
        tiny_config.log_every = "1 step"
        tiny_config.optim.skip_nonfinite = True
        tiny_config.data.num_val = 0
    return tiny_config


@pytest.mark.slow
def test_runs_go_on_without_their_bad_steps_also_when_they_are_stopped(
    poisoned, tmp_path, monkeypatch
):
    with poisoned.unlocked():
        poisoned.num_seeds = 2
        poisoned.seeds.mode = "batched"
    whole, stopping = tmp_path / "whole", tmp_path / "stopping"
    train.run(poisoned, whole)
    skipped = np.array([r["runs"]["skipped"] for r in _records(whole) if r["split"] == "train"])
    assert skipped.reshape(3, 5, 2).sum(axis=1).tolist() == [[1, 1]] * 3  # by epoch and run
    assert (skipped[:, 0] != skipped[:, 1]).any()

    class Watched(Log):
        seen = 0

        def train(self, chunk, metrics):
            super().train(chunk, metrics)
            type(self).seen = chunk.end

    bad = 6 + int(skipped[5:, 0].argmax())  # in the second epoch
    with monkeypatch.context() as patch:
        patch.setattr(directory, "Log", Watched)
        patch.setattr(train, "StopRequest", lambda: _StopWhen(lambda: Watched.seen >= bad))
        with pytest.raises(Stopped):
            train.run(poisoned, stopping)
    train.run(poisoned, stopping)
    assert_same_run(whole, stopping)


def test_skipping_costs_no_flops(poisoned):
    flops = []
    for poisoned.optim.skip_nonfinite in (True, False):
        task = build_task(poisoned, random_dataset().spec)
        batch = example_shapes(random_dataset().spec.fields, 8)
        batch["rows"] = {"index": jax.ShapeDtypeStruct((8,), jnp.int32)}
        flops.append(step_flops(task, batch, 0))
    assert flops[0] == flops[1] > 0


@pytest.mark.slow
def test_a_stopped_run_may_begin_to_skip(poisoned, tmp_path, capsys):
    with poisoned.unlocked():
        poisoned.optim.skip_nonfinite = False
        poisoned.checkpoint_every = "3 steps"
    with pytest.raises(UserError, match=r"not finite at step 4 .*config\.optim\.skip_nonfinite"):
        train.run(poisoned, tmp_path)
    poisoned.optim.skip_nonfinite = True
    train.run(poisoned, tmp_path)
    out = capsys.readouterr().out
    assert "changed config.optim.skip_nonfinite: False -> True" in out
    assert out.count("1 of 1 steps up to step") == 3
