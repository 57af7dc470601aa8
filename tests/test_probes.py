"""What frozen features are worth, against brute force in float64 numpy."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import Field
from cv_jax.data.batches import make_batches
from cv_jax.learn.inputs import to_unit
from cv_jax.learn.probes import (
    WATCHED,
    make_probes,
    neighbour_votes,
    ridge,
    spread_and_rank,
)
from cv_jax.optim.state import init_state
from cv_jax.runtime.clock import Clock
from cv_jax.tasks import Task, build_task
from cv_jax.train.evaluator import Evaluator
from cv_jax.train.programs import make_programs
from cv_jax.train.runs import make_runs
from cv_jax.workdir.numbers import means
from tests.conftest import random_dataset


def _features(m, d, seed=0):
    return np.random.default_rng(seed).normal(0.3, 1, (m, d)).astype(np.float32)


def _labels(m, n, seed=0):
    return np.random.default_rng(seed).integers(0, n, m).astype(np.int32)


def _unit(features):
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def slow_votes(query, features, label, n):
    votes = np.zeros((len(query), n))
    for i, q in enumerate(np.float64(query)):
        similarity = [q @ x for x in np.float64(features)]
        nearest = np.argsort(similarity)[::-1][:200]
        for j in nearest:
            votes[i, label[j]] += np.exp(similarity[j] / 0.1)
    return votes / votes.sum(1, keepdims=True)


def slow_ridge(features, label, n):
    features = np.float64(features)
    m, d = features.shape
    x = (features - features.mean(0)) / features.std(0)
    y = np.eye(n)[label]
    w = np.linalg.inv(x.T @ x / m + 0.01 * np.eye(d)) @ x.T @ y / m
    w /= features.std(0)[:, None]
    return w, y.mean(0) - features.mean(0) @ w


def slow_spread_and_rank(features):
    features = np.float64(features)
    d = features.shape[1]
    spread = np.mean([_unit(features)[:, i].std() for i in range(d)]) * np.sqrt(d)
    values = np.linalg.eigvalsh(np.cov(features.T, bias=True))
    return spread, values.sum() ** 2 / (values**2).sum()


@pytest.mark.parametrize("m", [30, 230], ids=["fewer than 200", "more than 200"])
def test_votes_are_those_of_the_nearest_of_all(m):
    query, features, label = _unit(_features(9, 4, seed=1)), _unit(_features(m, 4)), _labels(m, 5)
    votes = neighbour_votes(query, features, jnp.asarray(label), 5)
    np.testing.assert_allclose(votes, slow_votes(query, features, label, 5), rtol=1e-4)
    np.testing.assert_allclose(votes.sum(1), np.ones(9), rtol=1e-5)


def test_ridge_is_its_formula_and_tells_separable_classes_apart():
    label = _labels(60, 3)
    features = _features(60, 7) * np.linspace(0.1, 10, 7, dtype=np.float32)
    weights, bias = ridge(features, label, 3)
    for got, expected in zip((weights, bias), slow_ridge(features, label, 3), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

    features[np.arange(60), label] += 40  # beyond what anything else of an image adds
    weights, bias = ridge(features, label, 3)
    np.testing.assert_array_equal((features @ weights + bias[None]).argmax(1), label)


def test_a_dimension_that_says_nothing_gets_no_weight():
    label, features = _labels(60, 3), _features(60, 3)
    features[:, 1] = 2.5
    weights, bias = ridge(features, label, 3)
    np.testing.assert_allclose(weights[1], np.zeros(3), atol=1e-6)
    w, b = slow_ridge(features[:, [0, 2]], label, 3)
    np.testing.assert_allclose(weights[np.array([0, 2])], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, b, rtol=1e-4)


def test_spread_and_rank_of_what_is_known():
    direction = np.float32([[1, -2, 0.5, 3, 1, 1, 0, 2]])
    spread, rank = spread_and_rank(np.repeat(direction, 50, 0))  # all images are one point
    np.testing.assert_allclose([spread, rank], [0, 1], atol=1e-6)
    spread, rank = spread_and_rank(_features(50, 1) ** 2 * direction)  # or points of one ray
    np.testing.assert_allclose([spread, rank], [0, 1], atol=1e-5)

    isotropic = np.random.default_rng(0).normal(0, 3, (5000, 8)).astype(np.float32)
    spread, rank = spread_and_rank(isotropic)
    np.testing.assert_allclose([spread, rank], [1, 8], rtol=0.02)
    isotropic[:, 2:] *= 1e-3  # two dimensions are left
    np.testing.assert_allclose(spread_and_rank(isotropic)[1], 2, rtol=0.02)

    some = _features(40, 6) @ _features(6, 6, seed=1)
    np.testing.assert_allclose(spread_and_rank(some), slow_spread_and_rank(some), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("select", "hardest(4, of=5)", "''"),
        ("label_smoothing", 0.1, "0.0"),
        ("tta", "mirror", "'none'"),
    ],
)
def test_settings_that_need_labels_are_refused_by_name(key, value, default):
    config = _config(1000)
    config.task, config.method = "ssl", "simclr(projector=(4,))"
    config.model = "n94(widths=(2, 2))"
    spec = random_dataset().spec
    build_task(config, spec)
    config[key] = value
    with pytest.raises(UserError) as refused:
        build_task(config, spec)
    message = str(refused.value)
    assert message == (
        f"config.{key}={value!r} has no effect on config.task='ssl': set it to {default}."
    )


# --- Through the Evaluator ---


class Counted:
    """A linear network of two runs on random images, of which every third has no label."""

    def __init__(self, eval_batch_size=1000, limit=WATCHED):
        data = random_dataset()
        label = data.train["label"].copy()
        label[::3] = -1
        train = {**data.train, "label": label, "labelled": label >= 0}
        labelled = Field((), "bool", "flag")
        spec = data.spec._replace(fields={**data.spec.fields, "labelled": labelled})
        val, test = (
            {**x, "labelled": np.ones(len(x["label"]), bool)} for x in (data.val, data.test)
        )
        self.data = data._replace(spec=spec, train=train, val=val, test=test)
        self.embedded = 0  # batches, of all runs
        probes = dict(make_probes(self._measure, data.spec).evals)
        probes["watch"] = probes["watch"]._replace(limit=limit)
        task = Task(self._init, None, probes, {}, "", None, [])
        config = _config(eval_batch_size)
        runs = make_runs(config)
        batches = make_batches(config, self.data.train, runs.own.keys.order, runs.mesh)
        programs = make_programs(config, data.spec, task, batches, runs)
        self.state = jax.jit(programs.init)(runs.own)
        self._evaluate = Evaluator(programs.evals, runs.own, self.data, config, runs.mesh, Clock())

    def _init(self, key):
        return init_state({"w": jax.random.normal(key, (64, 6))}, {}, optax.identity())

    def _measure(self, state, batch):
        jax.debug.callback(self._count)
        image = to_unit(batch["image"])
        return image.reshape(len(image), -1) @ state.params["w"], {}

    def _count(self):
        self.embedded += 1

    def __call__(self, name, split):
        got = means(self._evaluate(name, self.state, split))
        jax.effects_barrier()
        return got

    def expected(self, split, learned):
        """The metrics of both runs, where only the training images at `learned` are."""
        image, label, _ = getattr(self.data, split).values()
        metrics = []
        for w in np.float64(self.state.params["w"]):

            def embed(image, w=w):
                return (image / 255).reshape(len(image), -1) @ w

            features, known = (
                embed(self.data.train["image"][learned]),
                self.data.train["label"][learned],
            )
            votes = slow_votes(_unit(embed(image)), _unit(features), known, 10)
            weights, bias = slow_ridge(features, known, 10)
            linear = embed(image) @ weights + bias
            spread, rank = slow_spread_and_rank(features)
            metrics.append(
                {
                    "accuracy": (votes.argmax(1) == label).mean(),
                    "linear_accuracy": (linear.argmax(1) == label).mean(),
                    "feature_spread": spread,
                    "feature_rank": rank,
                }
            )
        return {name: [one[name] for one in metrics] for name in metrics[0]}


def _config(eval_batch_size) -> ml_collections.ConfigDict:
    config = base_config()
    config.num_seeds = 2
    config.batch_size = 10
    config.eval_batch_size = eval_batch_size
    return config


def _same(got, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("eval_batch_size", [5, 23, 1000])
def test_a_probe_learns_from_all_labelled_images_whatever_the_batch_size(eval_batch_size):
    network = Counted(eval_batch_size)
    labelled = np.flatnonzero(network.data.train["label"] >= 0)
    assert len(labelled) == 46
    for split in ("val", "test"):
        _same(network("final", split), network.expected(split, labelled))
    # Those without labels would have changed all of it.
    others = network.expected("test", np.arange(70))
    assert others["feature_spread"] != network.expected("test", labelled)["feature_spread"]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [np.nan, 1e30], ids=["not finite", "beyond float32"])
def test_a_run_that_has_diverged_has_no_accuracy_and_the_others_have(scale):
    network = Counted()
    before = network("watch", "val")
    network.state = network.state.replace(
        step=network.state.step + 1,
        params={"w": network.state.params["w"].at[1].multiply(jnp.float32(scale))},
    )
    after = network("watch", "val")
    assert {"accuracy", "linear_accuracy", "confusion", "feature_spread"} <= after.keys()
    for name, values in after.items():
        np.testing.assert_array_equal(values[0], before[name][0], err_msg=name)
        assert np.isnan(values[1]).all(), name


@pytest.mark.slow
def test_a_probe_learns_from_so_many_at_most():
    network = Counted(limit=20)
    labelled = np.flatnonzero(network.data.train["label"] >= 0)
    _same(network("watch", "val"), network.expected("val", labelled[:20]))
    _same(network("final", "val"), network.expected("val", labelled))


@pytest.mark.slow
def test_images_that_are_learned_from_are_embedded_once_a_step_and_nothing_is_changed():
    network = Counted(eval_batch_size=20)
    before = jax.device_get(network.state)
    seen = []
    for name, split in (("watch", "val"), ("watch", "test"), ("watch", "val"), ("final", "val")):
        network(name, split)
        seen.append(network.embedded // 2)
    # 46 labelled images are 3 batches, 23 of val 2, and 37 of test 2.
    assert seen == [3 + 2, 3 + 2 + 2, 3 + 2 + 2 + 2, 3 + 2 + 2 + 2 + 3 + 2]
    after = jax.device_get(network.state)
    jax.tree.map(np.testing.assert_array_equal, before, after)

    step = network.state.step + 1
    w = network.state.params["w"][:, :, ::-1] * 2
    network.state = network.state.replace(step=step, params={"w": w})
    network.embedded = 0
    _same(
        network("final", "val"),
        network.expected("val", np.flatnonzero(network.data.train["label"] >= 0)),
    )
    assert network.embedded // 2 == 3 + 2  # they are others in another step
