"""A network out of a work directory answers as the evaluation of its run did."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils.epath import Path

from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.trained import load as trained
from cv_jax.trained.load import check_answers, load_trained
from cv_jax.workdir.checkpoints import read_newest

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(digits_run, tmp_path):
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


@pytest.mark.parametrize(("run", "position"), [("", 0), ("seed=1", 1)])
def test_it_is_as_accurate_as_its_result_says(digits_run, run, position):
    network = load_trained(Path(digits_run), run)
    assert network.name == f"seed={position}"
    test = load_dataset(network.config.data).test
    logits, features = jax.jit(network.predict, static_argnums=2)(
        network.state, test["image"], "none"
    )
    accuracy = (np.asarray(logits).argmax(-1) == test["label"]).mean()
    assert accuracy == pytest.approx(network.result["test"]["accuracy"]["values"][position])
    assert features["pooled"].shape == (360, 32)
    assert network.spec.class_names == tuple("0123456789")


def test_pixels_may_be_numbers_from_0_to_1(digits_run):
    network = load_trained(Path(digits_run))
    image = np.arange(0, 256, 4, dtype=np.uint8).reshape(1, 8, 8, 1)
    whole, _ = network.predict(network.state, image, "none")
    scaled, _ = network.predict(network.state, image.astype(np.float32) / 255, "none")
    np.testing.assert_array_equal(whole, scaled)


def test_of_a_damaged_checkpoint_the_one_before_is_read(copy):
    newest = max(int(path.name) for path in (copy / "checkpoints").glob("*"))
    (copy / "checkpoints" / str(newest) / "checksums.json").unlink()
    before = load_trained(copy)
    assert int(before.state.step) < newest
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        load_trained(copy)


@pytest.fixture
def diverged(monkeypatch):
    """Has every checkpoint read with NaN in the parameters of seed=1."""

    def read(workdir, like):
        state = read_newest(workdir, like)
        head = state.params["head"]
        head = head | {"kernel": head["kernel"].at[1, 0].set(np.nan)}
        return state.replace(params=state.params | {"head": head})

    monkeypatch.setattr(trained, "read_newest", read)


def test_a_network_that_has_diverged_is_refused(digits_run, diverged):
    assert load_trained(Path(digits_run)).name == "seed=0"
    with pytest.raises(UserError) as refused:
        load_trained(Path(digits_run), "seed=1")
    assert str(refused.value).startswith(
        f"{digits_run}: the network of seed=1 has diverged, params/head/kernel is not finite; "
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_answers_that_are_not_finite_are_refused(bad):
    check_answers(np.zeros((2, 3)))
    with pytest.raises(UserError, match="answers with numbers that are not finite"):
        check_answers(np.array([[0.0, 1.0], [0.5, bad]]))


def test_mistakes_are_named(copy):
    with pytest.raises(UserError, match=r"no run 'seed=7'.*There are: seed=0, seed=1"):
        load_trained(copy, "seed=7")
    with pytest.raises(UserError, match=r"nothing/config\.json is not there"):
        load_trained(copy.parent / "nothing")
    facts = json.loads((copy / "data.json").read_text())
    for broken in ("{", json.dumps({**facts, "mean": "grey"}), "{}", "[]"):
        (copy / "data.json").write_text(broken)
        with pytest.raises(UserError, match=r"data\.json (is damaged|cannot be read)"):
            load_trained(copy)
