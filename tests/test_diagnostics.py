"""Diagnostic statistics: against scikit-learn and brute force, and intervals over patients."""

import json
import shutil
import sys

import numpy as np
import pytest
from etils import epath
from scipy.special import softmax
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score, roc_curve

from benchmarks.coverage import coverage
from cv_jax.config.errors import UserError
from cv_jax.learn import diagnostics
from cv_jax.tools import assess, predict
from cv_jax.trained.load import load_trained
from cv_jax.trained.point import Point, read_point, with_point


def drawn(seed, m=200, ties=True):
    rng = np.random.default_rng(seed)
    positive = rng.random(m) < 0.3
    score = rng.normal(size=m) + positive
    return np.round(score, 1) if ties else score, positive


@pytest.mark.parametrize("ties", [True, False])
def test_areas_are_scikit_learns(ties):
    for seed in range(50):
        score, positive = drawn(seed, ties=ties)
        found = diagnostics.levels(score, positive)
        assert diagnostics.auc(found) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
        expected = average_precision_score(positive, score)
        assert diagnostics.precision_area(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("score", "positive", "expected"),
    [
        ([1, 1, 1, 1], [1, 0, 1, 0], 0.5),  # constant scores
        ([1, 2, 3, 4], [1, 1, 0, 0], 0),  # inverted
        ([1, 2, 3, 4], [0, 0, 1, 1], 1),
        ([1, 2, 2, 3], [0, 0, 1, 1], 3.5 / 4),  # one pair of four is tied
        ([1, 2, 3], [1, 1, 1], np.nan),
        ([1, 2, 3], [0, 0, 0], np.nan),
    ],
)
def test_auc_by_hand(score, positive, expected):
    found = diagnostics.levels(np.array(score), np.array(positive, bool))
    np.testing.assert_equal(diagnostics.auc(found), expected)


@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.95, 0.99])
def test_sensitivity_at_a_specificity_is_the_best_of_all_thresholds(specificity):
    for seed in range(20):
        score, positive = drawn(seed)
        false_alarms, hits, thresholds = roc_curve(positive, score, drop_intermediate=False)
        allowed = 1 - false_alarms >= specificity - 1e-12
        found = diagnostics.levels(score, positive)
        got = diagnostics.sensitivity_at(found, specificity)
        assert got == pytest.approx(hits[allowed].max(), abs=1e-12)
        threshold = diagnostics.threshold_at(found, specificity)
        assert threshold == thresholds[allowed].min()
        assert (score >= threshold)[positive].mean() == pytest.approx(got)
        assert (score < threshold)[~positive].mean() >= specificity


def test_no_threshold_is_specific_enough_where_all_negatives_have_the_highest_score():
    found = diagnostics.levels(np.array([2.0, 2.0, 1.0]), np.array([False, False, True]))
    assert diagnostics.threshold_at(found, 0.9) == np.inf
    assert diagnostics.sensitivity_at(found, 0.9) == 0


def test_an_interval_over_examples_is_one_over_groups_of_one():
    score, positive = drawn(0)
    areas = {"auc": diagnostics.auc}
    alone = diagnostics.estimates(areas, score, positive, resamples=100)
    groups = diagnostics.estimates(areas, score, positive, np.arange(200), resamples=100)
    assert alone == groups
    assert alone["auc"].low < alone["auc"].value < alone["auc"].high
    # Copies of every example add no patient: over groups the interval stays, else it shrinks.
    copied = [np.repeat(x, 4) for x in (score, positive, np.arange(200))]
    same = diagnostics.estimates(areas, *copied, resamples=100)
    np.testing.assert_allclose(same["auc"], alone["auc"])
    naive = diagnostics.estimates(areas, *copied[:2], resamples=100)
    width = alone["auc"].high - alone["auc"].low
    assert 0.4 < (naive["auc"].high - naive["auc"].low) / width < 0.6


@pytest.mark.parametrize("group", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_what_cannot_be_estimated_has_no_interval(group):
    one_class = np.ones(4, bool)
    found = diagnostics.estimates(
        {"auc": diagnostics.auc}, np.arange(4.0), one_class, np.array(group), resamples=10
    )
    assert np.isnan(found["auc"]).all()


def test_intervals_over_patients_cover_the_truth_and_those_over_patches_do_not():
    over = coverage(studies=150, patients=30, patches=10, resamples=100)
    assert 0.91 <= over["patients"] <= 0.99  # 0.95, with a standard error of 0.018
    assert over["patches"] < 0.75


def test_the_temperature_is_the_one_that_made_the_logits_overconfident():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (20_000, 4))
    label = np.array([rng.choice(4, p=p) for p in softmax(logits, axis=1)])
    temperature = diagnostics.fit_temperature(3 * logits, label)
    assert temperature == pytest.approx(3, rel=0.05)
    before, after = (softmax(3 * logits / t, axis=1) for t in (1, temperature))
    assert log_loss(label, after) < log_loss(label, before)
    assert diagnostics.calibration_error(after, label) < 0.02
    assert diagnostics.calibration_error(before, label) > 0.1


def test_the_calibration_error_by_hand():
    shares = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [1.0, 0.0]])
    label = np.array([0, 1, 1, 0])
    # Bins of 0.9: confidence 0.9, accuracy 1/2; of 0.6: 0.6, 1; of 1: 1, 1
    expected = (2 * 0.4 + 0.4 + 0) / 4
    assert diagnostics.calibration_error(shares, label) == pytest.approx(expected)


def test_a_point_divides_logits_and_says_what_is_positive():
    logits = np.array([2.0, 1.0, 0.0])
    shares = dict(zip("abc", softmax(logits), strict=True))
    point = Point("seed=0", 7, "none", "b", temperature=2.0, threshold=0.3)
    found = with_point({"class": "a", "probabilities": shares}, point)
    np.testing.assert_allclose(list(found["probabilities"].values()), softmax(logits / 2))
    assert found["positive"] == (softmax(logits / 2)[1] >= 0.3)
    assert not with_point(found, point._replace(threshold=0.9))["positive"]


@pytest.fixture
def run_tool(digits_run, tmp_path, monkeypatch, capsys):
    """Runs a tool on a copy of a work directory; returns exit code, stdout and stderr."""
    workdir = epath.Path(tmp_path / "run")
    shutil.copytree(digits_run, workdir)

    def run(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, f"--workdir={workdir}", *arguments])
        try:
            tool.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    run.workdir = workdir
    return run


@pytest.mark.slow
def test_a_network_is_assessed_and_predict_uses_its_point(run_tool, tmp_path):
    code, out, _ = run_tool(assess, "--positive=8", "--specificity=0.9")
    assert code == 0
    values = json.loads((run_tool.workdir / "assessment.json").read_text())
    assert values["test"]["images"] == 360
    assert values["test"]["auc"]["value"] > 0.99
    assert values["val"]["point_specificity"] >= 0.9
    assert values["test"]["loss_after"] < values["test"]["loss_before"]
    assert f"AUC {values['test']['auc']['value']:.4f} (" in out
    trained = load_trained(run_tool.workdir)
    point = read_point(run_tool.workdir, trained)
    assert point.positive == "8"
    assert read_point(run_tool.workdir, trained._replace(name="seed=1")) is None
    assert read_point(run_tool.workdir, trained._replace(tta="mirror")) is None

    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    monkey = run_tool(predict, str(tmp_path / "a.png"), "--json")
    said = json.loads(monkey[1])
    assert said["positive"] == (said["probabilities"].get("8", 0) >= point.threshold)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--positive=9a"], "--positive='9a' is not a class. Did you mean '9'? There are: 0, 1,"),
        (["--positive=9", "--specificity=1"], "--specificity=1.0 must lie between 0 and 1"),
    ],
)
def test_a_mistake_gets_a_sentence(run_tool, arguments, says):
    code, _, err = run_tool(assess, *arguments)
    assert code == 2
    assert says in err


def test_images_that_look_alike_have_one_hash():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (20, 32, 32, 3), np.uint8)
    brighter = np.uint8(images * 1.1 + 5)
    hashes = assess._hashes(images)
    assert len(np.unique(hashes)) == 20
    same = hashes == assess._hashes(brighter)
    assert same.mean() >= 0.9
    assert not np.isin(assess._hashes(images[:, :, ::-1]), hashes).any()


def test_plain_images_are_not_alike():
    plain = np.full((2, 16, 16, 3), 255, np.uint8)
    hashes = assess._hashes(plain)
    assert hashes.tolist() == [0, 0]
    assert assess._num_like(hashes, hashes) == 0
    assert assess._num_like(np.uint64([0, 5, 6]), np.uint64([0, 5])) == 1


def test_a_task_without_classes_is_refused():
    class Other:
        config = type("Config", (), {"task": "regression"})

    with pytest.raises(UserError, match="predicts no class"):
        assess._find_class(Other, ("a",), "a")
