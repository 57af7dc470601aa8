"""What rules freeze is the same function for ever, the averages of its normalisations included."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.config.base import base_config
from cv_jax.data.fields import take
from cv_jax.models import build_model
from cv_jax.models.layers import frozen_statistics
from cv_jax.models.ops import plain_lax
from cv_jax.tasks import build_task
from cv_jax.tasks.ssl import Mlp, Siamese
from tests.conftest import random_dataset

DATA = random_dataset()


def moved(before, after):
    """For each array, whether all of it has changed; a mixture is an error."""
    shares = jax.tree.map(lambda a, b: float(np.mean(a != b)), before, after)
    assert set(jax.tree.leaves(shares)) <= {0.0, 1.0}
    return jax.tree.map(bool, shares)


@pytest.mark.slow
def test_statistics_of_what_is_frozen_stay_and_others_move():
    config = base_config()
    config.model = "n94(widths=(8, 8))"
    config.batch_size = 10
    # All of group1; of group2 the kernels alone, which stops no statistics.
    frozen = "whiten/.*|group1/.*|group2/conv./kernel"
    config.optim.rules = ((frozen, "frozen"), (".*", "base"))
    task = build_task(config.lock(), DATA.spec)

    @jax.jit
    def two_steps(key):
        first = state = task.init(key)
        for i in range(2):
            batch = jax.tree.map(jnp.asarray, take(DATA.train, slice(10 * i, 10 * i + 10)))
            state, _ = task.train_step(state, {**batch, "rows": {}}, key)
        return first, state

    with plain_lax():
        first, last = two_steps(jax.random.key(0))
    assert moved(first.model_state["batch_stats"], last.model_state["batch_stats"]) == {
        f"group{i}": {norm: {"mean": i == 2, "var": i == 2} for norm in ("norm1", "norm2")}
        for i in (1, 2)
    }
    kept, free = {"kernel": False}, {"bias": True}
    names = {"conv1": kept, "conv2": kept}
    assert moved(first.params, last.params) == {
        "whiten": {"kernel": False, "bias": False},
        "group1": {**names, "norm1": {"bias": False}, "norm2": {"bias": False}},
        "group2": {**names, "norm1": free, "norm2": free},
        "head": {"kernel": True},
    }


@pytest.fixture(scope="module")
def in_training():
    """Frozen paths -> (projections, features by name, new statistics) of a network in training.

    It is a backbone, one below another module, with statistics unlike those of the batch. Without
    an argument, what evaluation computes.
    """
    backbone = build_model("n94(widths=(8, 8))", 0, jnp.dtype("float32"))
    model = Siamese(backbone, Mlp((6, 4)), None)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 8, 8, 1)), jnp.float32)
    with plain_lax():
        drawn = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    variables = {**drawn, "batch_stats": jax.tree.map(lambda s: s + 0.5, drawn["batch_stats"])}

    def apply(frozen=None):
        @jax.jit
        def compute(variables):
            with plain_lax(), frozen_statistics(frozen or frozenset()):
                return model.apply(
                    variables,
                    x,
                    train=frozen is not None,
                    mutable=["batch_stats", "intermediates"],
                    capture_intermediates=lambda module, _: "group" in (module.name or ""),
                )

        (z, _), new = compute(variables)
        features = {k: v["__call__"][0] for k, v in new["intermediates"]["backbone"].items()}
        return z, features, new["batch_stats"]

    return apply


NORMS = {f"backbone/group1/norm{i}/bias" for i in (1, 2)}


def test_a_frozen_normalisation_computes_in_training_what_evaluation_does(in_training):
    _, evaluated, before = in_training()
    _, features, after = in_training(NORMS)
    np.testing.assert_allclose(features["group1"], evaluated["group1"], atol=1e-6)
    assert np.abs(features["group2"] - evaluated["group2"]).max() > 0.1
    chex.assert_trees_all_equal(after["backbone"]["group1"], before["backbone"]["group1"])
    assert all(jax.tree.leaves(moved(before["backbone"]["group2"], after["backbone"]["group2"])))
    assert all(jax.tree.leaves(moved(before["projector"], after["projector"])))


def test_a_network_that_is_frozen_as_a_whole_has_no_mode_of_training(in_training):
    z, _, before = in_training()
    every = {f"backbone/group2/norm{i}/bias" for i in (1, 2)} | {"projector/norm1/scale"}
    trained, _, after = in_training(NORMS | every)
    np.testing.assert_allclose(trained, z, atol=1e-6)
    chex.assert_trees_all_equal(after, before)


def test_what_has_no_normalisation_changes_nothing(in_training):
    with_kernels = in_training({"backbone/whiten/kernel", "backbone/group1/conv1/kernel"})
    chex.assert_trees_all_equal(with_kernels, in_training(frozenset()))
