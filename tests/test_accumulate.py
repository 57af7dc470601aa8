"""Gradient accumulation: microbatches make the step of the whole batch, in less memory."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.learn.accumulation import cut, join, make_gradient
from cv_jax.learn.losses import of_examples
from cv_jax.learn.train_step import gradient_step
from cv_jax.models.layers import dense
from cv_jax.optim.selection import make_select
from cv_jax.optim.state import init_state
from cv_jax.runtime.mesh import batch_sharding, check_batch_size, make_mesh, replicated
from cv_jax.tasks import build_task
from tests.conftest import on_devices, random_dataset


def test_a_cut_takes_every_nth_row_and_joins_again():
    x = jnp.arange(24).reshape(12, 2)
    parts = cut(x, 3)
    np.testing.assert_array_equal(parts[1, :, 0], [2, 8, 14, 20])
    np.testing.assert_array_equal(join(parts), x)


def _problem(norm=False):
    """Returns the loss, with weights that differ between examples, and all that it takes."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    batch = {
        "x": draw(16, 8),
        "label": rng.integers(0, 4, 16).astype(np.int32),
        "weight": rng.uniform(0.1, 3, 16).astype(np.float32),
        "rows": {"index": rng.permutation(16).astype(np.int32)},
    }
    params = {"first": draw(8, 16), "second": draw(16, 4)}
    model_state = {"average": np.zeros((1, 16), np.float32)} if norm else {}

    def loss(params, model_state, batch, key):
        del key
        x = batch["x"] @ params["first"]
        if norm:
            mean = x.mean(0, keepdims=True)
            x, model_state = x - mean, {"average": 0.9 * model_state["average"] + 0.1 * mean}
        logits = jnp.tanh(x) @ params["second"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        found = of_examples(each, batch["weight"])
        return found, (model_state, {"loss": found[:2]})

    return loss, params, model_state, batch


def _gradient(loss, accumulate, params, model_state, batch):
    gradient = jax.jit(make_gradient(loss, accumulate))
    return gradient(params, model_state, batch, jax.random.key(0))


def _relative_error(got, wanted):
    difference = jax.tree.map(jnp.subtract, got, wanted)
    return float(optax.tree.norm(difference) / optax.tree.norm(wanted))


def test_microbatches_of_different_weight_give_the_gradient_of_the_batch():
    loss, *arguments = _problem()
    grads, found, (_, metrics) = _gradient(loss, 1, *arguments)
    for accumulate in (2, 4):
        parts, of_parts, (_, metrics_of_parts) = _gradient(loss, accumulate, *arguments)
        assert _relative_error(parts, grads) < 1e-6
        chex.assert_trees_all_close(of_parts, found, rtol=1e-6)
        chex.assert_trees_all_close(metrics_of_parts, metrics, rtol=1e-6)


def test_batch_normalisation_sees_one_microbatch_after_the_other():
    loss, params, model_state, batch = _problem(norm=True)
    got, _, (state, _) = _gradient(loss, 2, params, model_state, batch)
    totals, count, wanted = [], 0.0, model_state
    for start in (0, 1):
        rows = jax.tree.map(lambda x, start=start: x[start::2], batch)
        grads, found, (wanted, _) = _gradient(loss, 1, params, wanted, rows)
        totals.append(jax.tree.map(lambda g, count=found.count: g * count, grads))
        count += found.count
    chex.assert_trees_all_close(state, wanted, rtol=1e-6)
    together = jax.tree.map(lambda a, b: (a + b) / count, *totals)
    assert _relative_error(got, together) < 1e-6
    whole, *_ = _gradient(loss, 1, params, model_state, batch)
    assert _relative_error(got, whole) > 1e-3


def test_a_selection_is_cut_and_its_losses_are_remembered():
    loss, params, _, batch = _problem()
    tx = optax.sgd(0.1)
    state = init_state(params, {}, tx, last_loss_of=16)
    state = state.replace(last_loss=jnp.arange(16.0))
    select = make_select("hardest(2, of=4)")
    whole, parts = (
        jax.jit(gradient_step(loss, tx, select, accumulate=n))(state, batch, jax.random.key(0))
        for n in (1, 4)
    )
    chex.assert_trees_all_close(parts, whole, rtol=1e-5)
    assert int((parts[0].last_loss != jnp.arange(16.0)).sum()) == 8


def test_nothing_that_counts_changes_nothing():
    loss, params, _, batch = _problem()
    grads, found, _ = _gradient(loss, 2, params, {}, {**batch, "weight": np.zeros(16, np.float32)})
    assert found.count == 0
    assert optax.tree.norm(grads) == 0


class _Linear(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        pooled = x.reshape(len(x), -1)
        return dense(pooled, 10, name="head"), {"pooled": pooled}


def linear(*, num_classes, dtype):
    return _Linear()


def blend():
    """Mixes each example with another one of the batch: mixup whose shares compile sooner."""

    def op(key, batch):
        share = jax.random.uniform(key, batch["label"].shape[:1])

        def mixed(x):
            mine = share.reshape(-1, *[1] * (x.ndim - 1))
            return mine * x + (1 - mine) * x[::-1]

        return {**batch, "image": mixed(batch["image"]), "label": mixed(batch["label"])}

    return op


def test_what_augmentation_draws_does_not_depend_on_the_microbatches():
    config = base_config()
    config.batch_size, config.model = 8, "tests.test_accumulate:linear"
    config.augment = "tests.test_accumulate:blend"
    config.optim.name, config.optim.momentum, config.steps = "sgd", 0.0, 10
    config.class_weights = "balanced"
    data = random_dataset()
    spec = data.spec._replace(label_counts=tuple(range(1, 11)))
    batch = {name: jnp.asarray(x[:8]) for name, x in data.train.items()}
    batch["rows"] = {name: jnp.arange(8) for name in ("index", "epoch", "coin")}
    state, key = None, jax.random.key(0)
    moves = []
    for config.accumulate in (1, 4):
        task = build_task(config, spec)
        state = state or jax.jit(task.init)(key)
        new, metrics = jax.jit(task.train_step)(state, batch, key)
        moves.append((jax.tree.map(jnp.subtract, new.params, state.params), metrics))
    (whole, metrics), (parts, metrics_of_parts) = moves
    assert _relative_error(parts, whole) < 1e-4  # differences of float32 parameters
    chex.assert_trees_all_close(metrics_of_parts, metrics, rtol=1e-5)
    assert metrics["accuracy"][1] == 8  # weights change the loss alone


def test_a_batch_that_cannot_be_cut_is_named():
    with pytest.raises(
        UserError, match=r"accumulate=5 does not divide the 12 examples that a step"
    ):
        cut(jnp.zeros(12), 5)
    message = r"batch_size=20 .* config\.accumulate=3 microbatches on \d+ devices?; .* that does: 1"
    with pytest.raises(UserError, match=message):
        check_batch_size(20, make_mesh(), 3)
    config = base_config()
    config.task, config.method, config.model = "ssl", "simclr", "n94(widths=(4,))"
    config.accumulate = 2
    with pytest.raises(UserError, match=r"accumulate=2 has no effect on config\.task='ssl'"):
        build_task(config, random_dataset().spec)


@pytest.mark.slow
def test_no_row_moves_between_devices():
    assert on_devices(4, "tests.test_accumulate", "check_divided").split() == ["True", "True"]


def check_divided():
    loss, params, model_state, batch = _problem()
    mesh = make_mesh()
    wanted, *_ = _gradient(loss, 1, params, model_state, batch)
    batch = jax.device_put(batch, batch_sharding(mesh))
    params = jax.device_put(params, replicated(mesh))
    gradient = jax.jit(make_gradient(loss, 4), out_shardings=replicated(mesh))
    program = gradient.lower(params, model_state, batch, jax.random.key(0)).compile()
    moves = ("all-gather", "all-to-all", "collective-permute")
    # Losses `each` are gathered for the log; examples are not.
    lines = [line for line in program.as_text().splitlines() if any(m in line for m in moves)]
    print(not [line for line in lines if "8]" in line.partition("=")[2].split("(")[0]])
    got, *_ = program(params, model_state, batch, jax.random.key(0))
    print(_relative_error(got, wanted) < 1e-6)
