"""Stages of a training: which images a step sees, which gradients it makes, and what it costs."""

import signal
from concurrent.futures import Future

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.augment.resizing import Stage, make_stages, resize_images
from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.config.plan import Chunk
from cv_jax.data.batches import make_batches
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh
from cv_jax.tasks import build_task, step_of_stage
from cv_jax.train import trainer as trainer_module
from cv_jax.train.chunks import make_train_chunk
from cv_jax.train.flops import count_flops, step_flops, traced_flops
from cv_jax.train.programs import try_step
from cv_jax.train.runs import make_runs
from cv_jax.train.trainer import Trainer
from tests.conftest import random_dataset


def test_stages_begin_at_their_share_of_the_steps():
    assert make_stages("", 200) == [Stage(0, None)]
    text = "size(20, until=0.3) | size(24, until=0.6)"
    assert make_stages(text, 200) == [Stage(0, 20), Stage(60, 24), Stage(120, None)]
    assert make_stages(text, 5) == [Stage(0, 20), Stage(2, 24), Stage(3, None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size(24, until=0.6)|size(28, until=0.6)", "each `until` must be above the one before"),
        (
            "size(24, until=1)",
            r"until=1 is not between 0 and 1.*size\(pixels: int",
        ),
        ("size(24, until=0)", "until=0 is not between 0 and 1"),
        ("size(0, until=0.5)", "0 is not a number of pixels"),
        ("sise(24, until=0.5)", r"Unknown config\.progressive_resizing 'sise'.*'size'"),
    ],
)
def test_a_wrong_text_is_explained(text, message):
    with pytest.raises(UserError, match=message):
        make_stages(text, 200)


def test_resizing_is_antialiased():
    image = np.zeros((1, 4, 4, 1), np.float32)
    image[0, :, ::2] = 1  # stripes of one pixel: without a filter, a sample would be 0 or 1
    got = np.asarray(resize_images(jnp.asarray(image), 2))
    # A triangle of 4 pixels' width: 1/8 3/8 3/8 1/8, and at the border 3/7 3/7 1/7.
    np.testing.assert_allclose(got[0, :, :, 0], [[4 / 7, 3 / 7]] * 2, atol=1e-6)
    assert resize_images(image, None) is image


def _config():
    config = base_config()
    config.epochs, config.batch_size, config.model = 1.0, 16, "n94(widths=(4,))"
    config.optim.rules = (("whiten/kernel", "frozen"), (".*", "base"))
    return config


@pytest.fixture(scope="module")
def training():
    config, data, keys = _config(), random_dataset(), derive_keys(0)
    config.progressive_resizing = "size(4, until=0.5)"
    staged = build_task(config, data.spec)
    config.progressive_resizing = ""
    whole = build_task(config, data.spec)
    batches = make_batches(config, data.train, keys.order, make_mesh())
    return staged, whole, batches, keys


@pytest.mark.slow
def test_a_step_sees_the_images_of_its_stage(training):
    staged, whole, batches, keys = training
    assert staged.stages[0] == 0
    last = staged.stages[1]
    batch = batches.pick(batches.feed(0, 1), jnp.int32(0))
    state = staged.init(keys.init)
    step, plain = jax.jit(staged.train_step), jax.jit(whole.train_step)
    for number, same in ((last - 1, False), (last, True)):
        at = state.replace(step=jnp.int32(number))
        got, want = (f(at, batch, keys.step)[0].params for f in (step, plain))
        if same:
            chex.assert_trees_all_close(got, want, rtol=1e-5)
        else:
            assert not np.allclose(got["head"]["kernel"], want["head"]["kernel"])
    # In a stage that is known when the step is traced, the same as where it is looked up.
    early = state.replace(step=jnp.int32(last - 1))
    known = step_of_stage(staged, 0)(early, batch, keys.step)
    chex.assert_trees_all_close(known, step(early, batch, keys.step), rtol=1e-5)


@pytest.mark.slow
def test_the_steps_of_a_stage_are_compiled_while_those_before_it_run(training, monkeypatch):
    staged, _, batches, keys = training
    config = _config()
    config.progressive_resizing = "size(4, until=0.5)"
    trainer = Trainer(config, random_dataset(), staged, make_runs(config), Clock())
    border = staged.stages[1]
    assert (trainer.limit(0), trainer.limit(border)) == (border, batches.limit(border))
    state = trainer.init()
    trainer.compile(0)
    begun = []
    monkeypatch.setattr(trainer_module, "call_in_thread", lambda f: begun.append(f) or Future())
    for start in range(border):
        state, _ = trainer(state, Chunk(start, start + 1, *[False] * 4))
        trainer.compile(start + 1, stop=lambda: signal.SIGTERM)  # ends the wait for the next stage
    (compile_next,) = begun
    trainer._coming.set_result(compile_next())
    trainer.compile(border)
    state, _ = trainer(state, Chunk(border, border + 1, *[False] * 4))

    @jax.jit
    def step(state, feed):
        key = jax.random.fold_in(keys.step, state.step)
        return staged.train_step(state, batches.pick(feed, state.step), key)[0]

    expected = staged.init(keys.init)
    for start in range(border + 1):
        expected = step(expected, batches.feed(start, 1))
    got = jax.tree.map(lambda x: x[0], state.params)
    chex.assert_trees_all_close(got, expected.params, rtol=1e-4, atol=1e-6)
    assert int(state.step) == border + 1


@pytest.mark.slow
def test_a_training_costs_what_its_steps_cost(training):
    staged, whole, batches, keys = training
    state = jax.eval_shape(staged.init, keys.init)
    early, late = (step_flops(staged, batches.shapes, stage) for stage in (0, 1))
    full = count_flops(whole.train_step, state, batches.shapes, keys.step)
    assert 0 < early < 0.6 * full
    assert late == full
    traced = try_step(staged, batches.shapes, make_mesh())  # on the CPU's kernels
    assert traced_flops(traced) == early


@pytest.mark.slow
def test_what_trains_no_more_costs_no_gradient(monkeypatch):
    config = base_config()
    config.epochs, config.batch_size, config.model = 1.5, 16, "n94(widths=(4,))"
    config.optim.rules = ((r"group1/.*", "early"), ("whiten/kernel", "frozen"), (".*", "base"))
    config.optim.groups = {"early": {"schedule": "linear(until=0.5)", "weight_decay": 0.1}}
    data, keys = random_dataset(), derive_keys(0)
    batches = make_batches(config, data.train, keys.order, make_mesh())

    def build():
        task = build_task(config, data.spec)
        return task, jax.jit(task.init)(keys.init)

    def trained(task, state):
        train_chunk = jax.jit(make_train_chunk(task.train_step, batches), donate_argnums=0)
        for start, num_steps in ((0, 4), (4, 2)):  # an epoch has four steps
            feed = batches.feed(start, num_steps)
            state, _ = train_chunk(state, feed, keys.step, np.int32(num_steps))
        return state

    task, state = build()
    assert task.stages == (0, 3)
    early, late = (step_flops(task, batches.shapes, stage) for stage in (0, 1))
    assert late < 0.8 * early
    stopped = trained(task, state)

    monkeypatch.setattr(jax.lax, "stop_gradient", lambda p: p)
    task, state = build()
    chex.assert_trees_all_close(stopped.params, trained(task, state).params, rtol=1e-5)


def test_a_warm_up_longer_than_the_training_is_said():
    config = base_config()
    config.epochs, config.batch_size, config.model = 1.0, 16, "n94(widths=(4,))"
    config.optim.groups = {"slow": {"warmup": "2 epochs"}}
    config.optim.rules = ((".*/bias", "slow"), (".*", "base"))

    def warned():
        notes = build_task(config, random_dataset().spec).notes
        return [note for note in notes if note.startswith("warmup")]

    config.optim.warmup = "3 steps"  # the last of 4 steps has the peak
    text = "steps and the training 4: the learning rate never reaches its peak"
    assert warned() == [f"warmup  config.optim.groups.slow.warmup is 8 {text}"]
    config.optim.warmup = "4 steps"
    assert warned()[0] == f"warmup  config.optim.warmup is 4 {text}"
