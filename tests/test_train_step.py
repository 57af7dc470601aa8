"""The training step: a loss as sum and count, and tasks with an update of their own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cv_jax.config.base import base_config
from cv_jax.learn.losses import Loss, of_examples
from cv_jax.learn.train_step import apply_gradients, gradient_step, make_training
from cv_jax.optim.state import init_state
from tests.conftest import random_dataset


def _object_loss(params, model_state, batch, key):
    """Squares over the objects that count, of which an example has up to three."""
    del key
    values = jnp.square(batch["x"] * params["w"]) * batch["counts"]
    found = Loss(values.sum(), batch["counts"].sum())
    return found, (model_state, {"loss": found[:2]})


def _step(counts):
    x = np.float32([[1, 2, 3], [4, 5, 6]])
    state = init_state({"w": jnp.float32(2)}, {}, optax.sgd(1.0))
    batch = {"x": x, "counts": np.float32(counts)}
    return jax.jit(gradient_step(_object_loss, optax.sgd(1.0)))(state, batch, jax.random.key(0))


def test_the_gradient_is_that_of_the_sum_over_the_count_of_the_whole_batch():
    state, metrics = _step([[1, 1, 0], [0, 0, 1]])
    # loss = w^2 (1 + 4 + 36) / 3, and its slope at w = 2 is 4 * 41 / 3.
    np.testing.assert_allclose(state.params["w"], 2 - 4 * 41 / 3, rtol=1e-6)
    assert metrics["loss"] == (4 * 41, 3)


def test_a_batch_without_anything_that_counts_changes_nothing():
    state, metrics = _step(np.zeros((2, 3)))
    assert state.params["w"] == 2
    assert state.step == 1
    assert metrics["loss"] == (0, 0)


def test_the_loss_of_examples_is_their_mean():
    each = jnp.float32([1, 2, 6])
    assert of_examples(each).mean() == 3
    assert Loss(jnp.float32(0), jnp.float32(0)).mean() == 0


@pytest.fixture
def two_networks():
    """Minimises w (1 update a step) and maximises the same with v (2 updates a step)."""
    config = base_config()
    config.batch_size, config.steps = 10, 8
    config.optim.name, config.optim.lr, config.optim.lr_batch_size = "sgd", 1.0, 0
    config.optim.momentum, config.optim.schedule = 0.0, "linear"
    config.optim.skip_nonfinite = True

    def update(optimizer, stage):
        assert (stage.start, stage.size) == (0, None)

        def step(state, batch, key):
            def loss(params):
                return (params["w"] - params["v"]) * batch["x"].mean()

            for name, sign in (("v", -1), ("v", -1), ("w", 1)):
                grads = jax.grad(lambda params, sign=sign: sign * loss(params))(state.params)
                mine = {k: g if k == name else jnp.zeros_like(g) for k, g in grads.items()}
                params, opt_state = apply_gradients(optimizer.tx, mine, state)
                state = state.replace(params=params, opt_state=opt_state)
            value = loss(state.params)
            one = jnp.float32(1)
            return state.replace(step=state.step + 1), {
                "loss/w": (value, one),
                "loss/v": (-value, one),
            }

        return step

    shapes = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in "wv"}
    training = make_training(config, random_dataset().spec, shapes, update=update)
    state = init_state({"w": jnp.float32(0), "v": jnp.float32(0)}, {}, training.tx)
    return jax.jit(training.train_step), state


def test_a_task_may_update_its_networks_as_it_likes(two_networks):
    step, state = two_networks
    key = jax.random.key(0)
    for i in range(4):
        before = state
        state, metrics = step(state, {"x": jnp.ones(10)}, key)
        rate = 1 - i / 8  # of the step, however many updates it makes
        np.testing.assert_allclose(metrics["lr"][0], rate, rtol=1e-6)
        np.testing.assert_allclose(before.params["w"] - state.params["w"], rate, rtol=1e-5)
        np.testing.assert_allclose(before.params["v"] - state.params["v"], 2 * rate, rtol=1e-5)
    assert metrics["skipped"] == (0, 1)
    after, metrics = step(state, {"x": jnp.full(10, jnp.nan)}, key)
    assert metrics["skipped"] == (1, 1)
    assert after.params == state.params
    assert after.step == 5


@pytest.mark.parametrize(
    ("dtype", "note"),
    [
        ("float32", "dtype   float32"),
        ("bfloat16", "dtype   bfloat16 in the layers of the model; float32 for parameters, .*"),
    ],
)
def test_the_log_says_what_is_computed_in_which_dtype(dtype, note):
    config = base_config()
    config.dtype, config.steps = dtype, 1
    shapes = {"w": jax.ShapeDtypeStruct((), jnp.float32)}
    training = make_training(config, random_dataset().spec, shapes, lambda *arguments: None)
    assert len([line for line in training.notes if re.fullmatch(note, line)]) == 1
