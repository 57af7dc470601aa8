"""Chunks: what is due when, and that the way steps fall into dispatches changes no bit."""

import time
from functools import partial

import chex
import jax
import numpy as np
import pytest

from cv_jax.config.base import base_config
from cv_jax.config.plan import Intervals, make_intervals, plan_chunks
from cv_jax.data.batches import make_batches
from cv_jax.models.ops import plain_lax
from cv_jax.runtime.clock import SLOW_SECONDS, Clock, Pace
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh, replicated
from cv_jax.tasks import build_task
from cv_jax.train.chunks import make_train_chunk
from cv_jax.train.runs import make_runs
from cv_jax.train.trainer import Trainer
from tests.conftest import random_dataset


def _plan(start, intervals, limit=100, pace=100):
    chunks = plan_chunks(start, intervals, lambda step: limit, lambda: pace)
    return [(c.start, c.end, f"{'L' * c.logs}{'E' * c.evals}{'S' * c.saves}") for c in chunks]


def test_a_chunk_has_the_steps_from_its_start_to_its_end():
    first, second = plan_chunks(0, Intervals(10, 0, 7, 0), lambda step: 100, lambda: 100)
    assert (first.num_steps, second.num_steps) == (7, 3)


def test_chunks_end_where_something_is_due():
    assert _plan(0, Intervals(total=10, log=4, eval=5, save=0)) == [
        (0, 4, "L"),
        (4, 5, "E"),
        (5, 8, "L"),
        (8, 10, "LES"),
    ]
    assert _plan(7, Intervals(total=10, log=0, eval=0, save=3)) == [(7, 9, "S"), (9, 10, "LS")]
    assert _plan(10, Intervals(10, 1, 1, 1)) == []


def test_batches_and_pace_bound_a_chunk():
    assert _plan(0, Intervals(5, 0, 0, 0), limit=3) == [(0, 3, ""), (3, 5, "LS")]
    assert _plan(0, Intervals(5, 0, 0, 0), pace=2) == [(0, 2, ""), (2, 4, ""), (4, 5, "LS")]


def test_intervals_are_steps():
    config = base_config()
    config.epochs, config.batch_size = 2.5, 16
    config.log_every, config.eval_every, config.checkpoint_every = "7 steps", "0.5 epochs", "never"
    assert make_intervals(config, num_train=70, num_val=5) == Intervals(10, 7, 2, 0)
    assert make_intervals(config, num_train=70, num_val=0).eval == 0


def small_config():
    config = base_config()
    config.epochs, config.batch_size, config.model = 3.0, 16, "n94(widths=(4,))"
    config.augment = "crop(1)|mixup(0.2)"
    config.optim.rules = (("whiten/kernel", "frozen"), (".*", "base"))
    return config


@pytest.fixture(scope="module")
def training():
    config = small_config()
    data = random_dataset()
    task = build_task(config, data.spec)
    keys = derive_keys(0)
    streamed = config.copy_and_resolve_references()
    streamed.data.stream = True
    batches = {
        name: make_batches(c, data.train, keys.order, make_mesh())
        for name, c in (("resident", config), ("stream", streamed))
    }
    return task, keys, batches


def _init(task, keys):
    return jax.jit(task.init, out_shardings=replicated(make_mesh()))(keys.init)


def _run(training, chunks, way="resident"):
    task, keys, batches = training
    state = _init(task, keys)
    train_chunk = jax.jit(make_train_chunk(task.train_step, batches[way]), donate_argnums=0)
    losses, step = [], 0
    for num_steps in chunks:
        feed = batches[way].feed(step, num_steps)
        state, metrics = train_chunk(state, feed, keys.step, np.int32(num_steps))
        losses += np.asarray(metrics["loss"][0])[:num_steps].tolist()
        step += num_steps
    assert train_chunk._cache_size() == 1  # a second compilation would be a bug
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def reference(training):
    return _run(training, [4, 4, 2])


@pytest.mark.slow
def test_the_state_depends_on_the_steps_alone(training, reference):
    chex.assert_trees_all_equal(_run(training, [1, 2, 1, 3, 1, 2]), reference)
    assert reference[0].step == 10


def test_a_stream_trains_to_the_same_bits(training, reference):
    chex.assert_trees_all_equal(_run(training, [4, 4, 2], way="stream"), reference)


@pytest.mark.slow
def test_all_but_the_frozen_parameters_move(training, reference):
    task, keys, _ = training
    state, _ = reference
    before = task.init(keys.init).params
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, before)
    assert not moved["whiten"].pop("kernel")
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_a_run_traces_its_step_once():
    config = small_config()
    data = random_dataset()
    task = build_task(config, data.spec)
    task = task._replace(train_step=chex.assert_max_traces(task.train_step, n=1))
    with plain_lax():
        trainer = Trainer(config, data, task, make_runs(config), Clock())  # tries it
        trainer.init()
        trainer.compile(0)


def test_streams_of_randomness_are_apart():
    keys = [jax.random.key_data(key).tolist() for seed in (0, 1) for key in derive_keys(seed)]
    assert len({tuple(key) for key in keys}) == 6


def test_the_clock_counts_one_thing_at_a_time():
    clock = Clock()
    with clock("train"):
        time.sleep(0.02)
        with clock("eval"):
            time.sleep(0.1)
    read = clock.read()
    assert read["eval"] >= 0.1
    assert 0.02 <= read["train"] < read["eval"]
    clock.add({"train": 5.0})
    assert clock.read()["train"] >= 5.02


def test_pace_fills_half_a_second():
    pace = Pace(partial(next, iter([0.0, 2.0, 2.1])))
    assert pace() == 1
    assert pace.finished(4) == 2.0
    assert pace() == 1
    assert pace.finished(10) == pytest.approx(0.1)
    assert pace() in (49, 50)


def test_a_step_is_slow_above_the_limit_or_before_it_is_measured():
    pace = Pace()
    assert pace.is_slow
    for seconds, is_slow in ((0.001, False), (SLOW_SECONDS, False), (1.01 * SLOW_SECONDS, True)):
        pace.seconds_per_step = seconds
        assert pace.is_slow is is_slow, seconds
