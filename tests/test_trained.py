"""A network out of a work directory answers as the evaluation of its run did."""

import json
import shutil

import numpy as np
import pytest
from etils.epath import Path

from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.learn import stored
from cv_jax.trained.load import check_finite_predictions, load_trained, make_predict
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
    predict = make_predict(network, 360)
    predictions = predict({"image": test["image"]})
    accuracy = (np.asarray(predictions["logits"]).argmax(-1) == test["label"]).mean()
    assert accuracy == pytest.approx(network.result["test"]["accuracy"]["values"][position])
    features = make_predict(network, 5, network.task.features)({"image": test["image"][:5]})
    assert features["pooled"].shape == (5, 32)
    assert network.spec.class_names == tuple("0123456789")


def test_pixels_may_be_numbers_from_0_to_1(digits_run):
    network = load_trained(Path(digits_run))
    image = np.arange(0, 256, 4, dtype=np.uint8).reshape(1, 8, 8, 1)
    whole = network.task.predict(network.state, {"image": image})
    scaled = network.task.predict(network.state, {"image": image.astype(np.float32) / 255})
    np.testing.assert_array_equal(whole["logits"], scaled["logits"])


def test_it_answers_over_the_views_that_are_asked_for(digits_run):
    image = np.arange(0, 256, 4, dtype=np.uint8).reshape(1, 8, 8, 1)
    plain, mirrored = (load_trained(Path(digits_run), tta=tta) for tta in ("none", "mirror"))
    of = [
        network.task.predict(network.state, {"image": x})["logits"]
        for network, x in ((plain, image), (plain, image[:, :, ::-1]), (mirrored, image))
    ]
    np.testing.assert_allclose(of[2], (of[0] + of[1]) / 2, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"config\.tta='miror' is unknown"):
        load_trained(Path(digits_run), tta="miror")


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

    def read(workdir):
        state = read_newest(workdir)
        state["params"]["head"]["kernel"][1, 0] = np.nan
        return state

    monkeypatch.setattr(stored, "read_newest", read)


def test_a_network_that_has_diverged_is_refused(digits_run, diverged):
    assert load_trained(Path(digits_run)).name == "seed=0"
    with pytest.raises(UserError) as refused:
        load_trained(Path(digits_run), "seed=1")
    assert str(refused.value).startswith(
        f"{digits_run}: the network of seed=1 has diverged, params/head/kernel is not finite. "
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_not_finite_are_refused(bad):
    check_finite_predictions({"logits": np.zeros((2, 3)), "class": np.array([1, 2])})
    with pytest.raises(UserError, match="predicts logits that are not finite"):
        check_finite_predictions({"logits": np.array([[0.0, 1.0], [0.5, bad]])})


def test_mistakes_are_named(copy):
    with pytest.raises(UserError, match=r"no run 'seed=7'.*There are: seed=0, seed=1"):
        load_trained(copy, "seed=7")
    with pytest.raises(UserError, match=r"nothing/config\.json is not there"):
        load_trained(copy.parent / "nothing")
    facts = json.loads((copy / "data.json").read_text())
    for broken in (
        "{",
        json.dumps({**facts, "fields": {"image": {**facts["fields"]["image"], "mean": "grey"}}}),
        "{}",
        "[]",
    ):
        (copy / "data.json").write_text(broken)
        with pytest.raises(UserError, match=r"data\.json (is damaged|cannot be read)"):
            load_trained(copy)
