"""Self-supervised learning: views, the teacher, and what is learned without a label."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import train
from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.data.batches import make_batches
from cv_jax.models.ops import plain_lax
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh, replicated
from cv_jax.runtime.startup import jit_once
from cv_jax.tasks import build_task, ssl
from cv_jax.workdir.numbers import means
from tests.test_resume import assert_same_run, run_until

PROJECTOR = "projector=(32, 16)"
METHODS = {
    "simclr": f"simclr({PROJECTOR})",
    "byol": f"byol(momentum=0.5, predictor=(24,), {PROJECTOR})",
    "vicreg": f"vicreg({PROJECTOR})",
    "barlow_twins": f"barlow_twins({PROJECTOR})",
}


def _config(**changes) -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "ssl"
    config.method = METHODS["simclr"]
    config.model = "n94(widths=(8, 8))"
    config.augment = "translate(1)"
    config.batch_size = 50
    config.steps = 40
    config.optim.name = "adamw"
    config.optim.lr = 0.01
    config.optim.lr_batch_size = 0
    config.optim.rules = (("backbone/whiten/kernel", "frozen"), (".*", "base"))
    config.update(changes)
    return config.lock()


@pytest.fixture(scope="module")
def digits():
    return load_dataset(_config().data)


class Training:
    """A training on digits, step by step."""

    def __init__(self, data, **changes):
        config = _config(**changes)
        self.task = build_task(config, data.spec)
        self._keys = derive_keys(0)
        mesh = make_mesh()
        self._batches = make_batches(config, data.train, self._keys.order, mesh)
        self._step = jit_once(self._one_step)
        with plain_lax():
            init = jit_once(self.task.init, out_shardings=replicated(mesh))  # as after a step
            self.state = init(self._keys.init)

    def _one_step(self, state, feed):
        batch = self._batches.pick(feed, state.step)
        key = jax.random.fold_in(self._keys.step, state.step)
        return self.task.train_step(state, batch, key)

    def step(self):
        with plain_lax():
            feed = self._batches.feed(int(self.state.step), 1)
            self.state, metrics = self._step(self.state, feed)
        return means(metrics)

    def accuracy(self, data):
        """Of the nearest neighbours, on test."""
        probe = self.task.evals["final"]
        test = {**data.test, "rows": {"weight": np.ones(len(data.test["label"]), np.float32)}}

        def evaluate(state, image, label):
            learned = probe.fit(probe.embed(state, {"image": image}), label)
            return probe.score(state, learned, test)

        with plain_lax():
            metrics = jit_once(evaluate)(self.state, data.train["image"], data.train["label"])
        assert metrics["accuracy"][1] == len(data.test["label"])
        return means(metrics)["accuracy"]


@pytest.fixture(scope="module")
def byol(digits):
    """BYOL's state before and after a first step and one in the middle, without a warmup."""
    training = Training(digits, method=METHODS["byol"])
    before = jax.device_get(training.state)
    training.step()
    first = jax.device_get(training.state)
    training.state = training.state.replace(step=training.state.step + 9)
    training.step()
    return training, before, first, jax.device_get(training.state)


def _flat(tree):
    return flatten_dict(tree, sep="/")


def test_a_teacher_starts_as_the_network_without_its_predictor(byol):
    _, before, *_ = byol
    teacher, params = before.model_state["teacher"], _flat(before.params)
    own = {path for path in params if not path.startswith("predictor/")}
    assert _flat(teacher["params"]).keys() == own < params.keys()
    assert {path.split("/")[0] for path in params} == {"backbone", "projector", "predictor"}
    assert set(teacher["batch_stats"]) == {"backbone", "projector"}
    for path, array in _flat(teacher["params"]).items():
        np.testing.assert_array_equal(array, params[path], err_msg=path)


def test_a_teacher_follows_by_the_momentum_of_the_schedule(byol):
    _, before, first, later = byol
    # Of 40 steps the first is at 0, and the other, the one after step 10, at a quarter.
    quarter = 1 - 0.5 * (np.cos(np.pi / 4) + 1) / 2
    assert later.step == 11
    for old, new, momentum in ((before, first, 0.5), (first, later, quarter)):
        params = _flat(new.params)
        averaged = _flat(new.model_state["teacher"]["params"])
        for path, teacher in _flat(old.model_state["teacher"]["params"]).items():
            expected = momentum * teacher + (1 - momentum) * params[path]
            np.testing.assert_allclose(averaged[path], expected, rtol=1e-5, atol=1e-7, err_msg=path)
        moved = [path for path in averaged if (averaged[path] != params[path]).any()]
        assert set(moved) == averaged.keys() - {"backbone/whiten/kernel"}  # which is frozen


def test_momentum_rises_to_1():
    steps = np.array([0, 25, 50, 100])
    got = ssl.teacher_momentum(0.9, steps, 100)
    np.testing.assert_allclose(got, [0.9, 1 - 0.05 * (1 + 0.5**0.5), 0.95, 1], rtol=1e-6)


def test_a_teacher_has_no_state_of_an_optimizer(byol):
    _, before, *_ = byol
    trained = [x.size for p, x in _flat(before.params).items() if p != "backbone/whiten/kernel"]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(before.opt_state)]
    assert not any("teacher" in path for path in paths)
    values = sum(x.size for x in jax.tree.leaves(before.opt_state) if x.ndim)
    assert values == 2 * sum(trained)  # Adam's two averages


def test_a_teacher_has_statistics_of_its_own(byol):
    _, before, first, later = byol
    start, one, two = (_flat(s.model_state["teacher"]["batch_stats"]) for s in byol[1:])
    students = _flat(first.model_state["batch_stats"])
    assert len(start) > 4
    for path in start:
        assert (start[path] != one[path]).any(), path
        # Of the same parameters and images they are the same, and later they are not.
        np.testing.assert_allclose(one[path], students[path], rtol=1e-4, atol=1e-6, err_msg=path)
        assert (one[path] != two[path]).any(), path
    students = _flat(later.model_state["batch_stats"])
    assert any(np.abs(two[path] - students[path]).max() > 1e-3 for path in start)
    assert set(before.model_state) == {"batch_stats", "teacher"}


@pytest.mark.slow
def test_the_views_of_an_image_are_drawn_apart_and_kept_together(monkeypatch, digits):
    def difference(z, _):
        return jnp.abs(z[:, 0] - z[:, 1]).max(1)

    monkeypatch.setitem(ssl.METHODS, "look", lambda: ssl.Method((4,), difference))
    small = {"method": "look", "model": "n94(widths=(4,))"}
    # What is not augmented is the same in both views, image for image.
    assert Training(digits, **small, augment="").step()["loss"] == 0
    # One image alone could be moved alike twice, so that the smallest may be 0.
    assert Training(digits, **small, augment="translate(1)").step()["loss"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_loss_and_finds_classes(method, digits, request):
    if method == "byol":  # which is compiled already
        training = request.getfixturevalue("byol")[0]
        training.state = training.state.replace(step=jnp.zeros_like(training.state.step))
    else:
        training = Training(digits, method=METHODS[method])
    losses, count = [], 40
    for _ in range(count):
        metrics = training.step()
        losses.append(metrics["loss"])
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])
    assert metrics["feature_spread"] > 0.2  # 0 and a rank of 1, had they collapsed
    assert metrics["feature_rank"] > 1.2
    assert training.accuracy(digits) > 0.45  # by chance: 0.1


@pytest.mark.slow
def test_byol_goes_on_to_the_bit(tmp_path):
    small = {"method": METHODS["byol"], "model": "n94(widths=(4,))", "steps": 10, "batch_size": 40}
    config = _config(**small, log_every="5 steps", data={"limit": 250, "num_val": 50})
    with plain_lax():
        train.run(config, tmp_path / "whole")
        run_until(5, config, tmp_path / "stopped")
        train.run(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ""}, "config.method '': expected one of barlow_twins, byol, simclr, vicreg."),
        ({"method": "simclrr"}, "Unknown config.method 'simclrr'. Did you mean 'simclr'?"),
        ({"method": "denoise"}, "There are: barlow_twins, byol, simclr, vicreg;"),
        ({"method": "simclr(temperature=0.0)"}, "temperature=0.0 must be above 0"),
        ({"method": "byol(momentum=1.5)"}, "momentum=1.5 must lie in [0, 1]"),
        ({"method": "vicreg(projector=())"}, "widths=() must be one or more numbers"),
        ({"label_smoothing": 0.1}, "config.label_smoothing=0.1 has no effect on config.task='ssl'"),
        ({"select": "hardest(4, of=5)"}, "config.select='hardest(4, of=5)' has no effect on"),
        ({"tta": "mirror"}, "config.tta='mirror' has no effect on"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes, message, digits):
    with pytest.raises(UserError) as refused:
        build_task(_config(**changes), digits.spec)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
