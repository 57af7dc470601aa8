"""Selection by the last loss: which examples train, and what is remembered of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data.batches import make_batches
from cv_jax.optim.selection import make_select
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import batch_sharding, make_mesh, replicated
from cv_jax.tasks import build_task
from cv_jax.train.flops import step_flops
from tests.conftest import on_devices, random_dataset


@pytest.mark.slow
def test_the_hardest_of_each_group_remain_in_their_order():
    last_loss = jnp.array([0.1, 0.9, 0.5, 0.7, jnp.inf, 0.3, 0.2, 0.4])
    index = jnp.array([0, 1, 2, 7, 6, 5, 4, 3])
    batch = {"rows": {"index": index}, "image": 10 * jnp.stack([index, index], axis=1)}
    got = jax.jit(make_select("hardest(2, of=4)"))(batch, last_loss)
    np.testing.assert_array_equal(got["rows"]["index"], [1, 2, 4, 3])
    np.testing.assert_array_equal(got["image"], [[10, 10], [20, 20], [40, 40], [30, 30]])
    # Of examples that were never seen, and so of any that are equal, the first ones.
    fresh = make_select("hardest(3, of=8)")(batch, jnp.full(8, jnp.inf))
    np.testing.assert_array_equal(fresh["rows"]["index"], [0, 1, 2])


@pytest.mark.slow
def test_what_is_selected_stays_divided_over_the_devices():
    assert on_devices(4, "tests.test_selection", "check_divided").split() == ["image", "index"]


def check_divided():
    mesh = make_mesh()
    batch = {"rows": {"index": jnp.arange(64)[::-1]}, "image": jnp.ones((64, 8, 8, 3))}
    batch = jax.device_put(batch, batch_sharding(mesh))
    last_loss = jax.device_put(jnp.arange(64.0) % 7, replicated(mesh))
    chosen = jax.jit(make_select("hardest(5, of=8)"))(batch, last_loss)
    for name, values in {"image": chosen["image"], **chosen["rows"]}.items():
        for shard in values.addressable_shards:
            chex.assert_shape(shard.data, (len(values) // 4, *values.shape[1:]))
        print(name)


def test_no_selection_and_wrong_ones():
    assert make_select("") is None
    with pytest.raises(
        UserError, match=r"keep=5 must be from 1 to of=4.*hardest\(keep: int, \*, of: int"
    ):
        make_select("hardest(5, of=4)")
    batch = {"rows": {"index": jnp.arange(6)}}
    with pytest.raises(UserError, match=r"config\.batch_size=6 must be a multiple of 4"):
        make_select("hardest(2, of=4)")(batch, jnp.zeros(6))


@pytest.fixture(scope="module")
def training():
    config = base_config()
    config.epochs, config.batch_size, config.model = 2.0, 16, "lenet"
    data, keys = random_dataset((32, 32, 3)), derive_keys(0)
    batches = make_batches(config, data.train, keys.order, make_mesh())
    whole = build_task(config, data.spec)
    config.select = "hardest(1, of=4)"
    return build_task(config, data.spec), whole, batches, keys


@pytest.mark.slow
def test_a_step_trains_on_the_hardest_and_remembers_their_losses(training):
    task, whole, batches, keys = training
    state = jax.jit(task.init)(keys.init)
    assert np.isinf(state.last_loss).all()
    assert state.last_loss.shape == (70,)
    batch = batches.pick(batches.feed(0, 1), jnp.int32(0))
    index = np.asarray(batch["rows"]["index"]).reshape(4, 4)
    hard = index[[0, 1, 2, 3], [3, 1, 0, 2]]
    known = np.full(70, 2.0, np.float32)
    known[hard] = 3.0
    state = state.replace(last_loss=jnp.asarray(known))
    after, metrics = jax.jit(task.train_step)(state, batch, keys.step)

    # The same step on these four alone.
    four = jax.tree.map(lambda x: x[np.isin(index.ravel(), hard)], batch)
    alone, of_four = jax.jit(whole.train_step)(state.replace(last_loss=None), four, keys.step)
    chosen = jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), after.params, alone.params)
    assert all(jax.tree.leaves(chosen))
    assert metrics["accuracy"][1] == 4
    remembered = np.asarray(after.last_loss)
    assert np.isclose(remembered[hard].sum(), of_four["loss"][0], rtol=1e-5)
    rest = np.setdiff1d(np.arange(70), hard)
    np.testing.assert_array_equal(remembered[rest], 2.0)


@pytest.mark.slow
def test_what_is_left_out_costs_nothing(training):
    task, whole, batches, _ = training
    costs = [step_flops(t, batches.shapes, 0) for t in (task, whole)]
    assert costs[0] == costs[1] / 4
