"""Statistics against numbers worked out by hand, and JSON that any reader takes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from etils.epath import Path

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.runtime.startup import num_cores
from cv_jax.workdir.files import write_json
from cv_jax.workdir.metric import Metric
from cv_jax.workdir.result import (
    best_runs,
    check_data,
    environment,
    examples_word,
    finished_result,
    percent,
    print_result,
    summarize,
    write_data,
    write_environment,
    write_result,
)
from tests.conftest import random_dataset


def test_statistics_of_five_seeds():
    got = summarize([0.1, 0.2, 0.3, 0.4, 0.5])
    # std = sqrt(0.1 / 4); t(0.975, 4) = 2.776445
    half = 2.776445 * math.sqrt(0.025) / math.sqrt(5)
    assert got["mean"] == pytest.approx(0.3)
    assert got["std"] == pytest.approx(math.sqrt(0.025))
    assert got["ci95"] == pytest.approx([0.3 - half, 0.3 + half], rel=1e-6)
    assert got["n"] == 5


def test_one_run_has_no_spread():
    assert summarize([0.5]) == {"mean": 0.5, "std": None, "ci95": None, "n": 1, "values": [0.5]}


def test_the_interval_of_a_share_stays_inside_0_and_1():
    got = summarize([0.99, 1.0, 1.0], share=True)
    # m = 0.996667, s = 0.0057735; t(0.975, 2) = 4.302653; logit(m) = 5.700444. The plain interval
    # would end at 1.0110.
    mean, half = 2.99 / 3, 4.302653 * (0.01 / math.sqrt(3)) / math.sqrt(3)
    center, half = math.log(mean / (1 - mean)), half / (mean * (1 - mean))
    expected = [1 / (1 + math.exp(-(center + sign * half))) for sign in (-1, 1)]
    assert got["ci95"] == pytest.approx(expected, rel=1e-6)
    assert 0 < got["ci95"][0] < mean < got["ci95"][1] < 1
    # Far from 0 and 1, with little spread, it is Student's t.
    narrow = [0.5, 0.5001, 0.4999]
    assert summarize(narrow, True)["ci95"] == pytest.approx(summarize(narrow)["ci95"], abs=1e-7)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [0.7, 0.7], [0.0, 1.0]])
def test_the_interval_of_any_shares_is_finite(values):
    low, high = summarize(values, share=True)["ci95"]
    assert 0 <= low <= np.mean(values) <= high <= 1
    if len(set(values)) == 1:
        assert (low, high) == pytest.approx((values[0], values[0]), abs=1e-12)


def test_a_seed_that_has_diverged_leaves_no_number():
    got = summarize([0.5, math.nan, 0.7], share=True)
    assert math.isnan(got["mean"])
    assert (got["std"], got["ci95"], got["n"]) == (None, None, 3)
    assert percent(got["mean"], got["std"]) == percent(None, None) == "diverged"


def _sums(accuracy):
    """Those of classification, of runs of 10 images and 2 classes with these accuracies."""
    accuracy = np.array(accuracy)
    count = np.full(len(accuracy), 10.0)
    return {
        "accuracy": (10 * accuracy, count),
        "per_class_accuracy": (5 * np.stack([accuracy] * 2, 1), np.full((len(accuracy), 2), 5.0)),
        "confusion": (accuracy[:, None, None] * 10 * np.eye(2), count),
    }


METRICS = {"accuracy": Metric("%", protocol="top-1, views none"), "loss": Metric("", "lower")}


def _written(tmp_path, accuracy, num_seeds=1, sums_of=None, metrics=METRICS, headline="accuracy"):
    config = base_config()
    config.num_seeds, config.batch_size = num_seeds, 10
    settings = [{"optim.lr": lr} for lr in (1e30, 0.1, 0.01)][: len(accuracy) // num_seeds]
    config.sweep = (("optim.lr", tuple(s["optim.lr"] for s in settings)),)
    spec = random_dataset(num_classes=2).spec
    sums = {split: (sums_of or _sums)(accuracy) for split in ("val", "test")}
    result = write_result(
        Path(tmp_path), config, spec, settings, 5, sums, {"training": 1}, {}, metrics, headline
    )
    return result, json.loads((tmp_path / "result.json").read_text())


def test_a_setting_that_has_diverged_is_never_the_best(tmp_path):
    result, written = _written(tmp_path, [math.nan, 0.2, 0.3])
    assert result["best"] == {"optim.lr": 0.01}
    assert written["sweep"][0]["val"]["accuracy"]["values"] == [None]
    assert written["test"]["confusion"] == [[3.0, 0.0], [0.0, 3.0]]
    # Of two seeds, the setting of which fewer have diverged.
    result, written = _written(tmp_path, [math.nan, math.nan, 0.9, math.nan, 0.1, 0.2], 2)
    assert result["best"] == {"optim.lr": 0.01}
    result, written = _written(tmp_path, [math.nan, math.nan, 0.9, math.nan], 2)
    assert result["best"] == {"optim.lr": 0.1}
    assert best_runs(written, 2) == slice(2, 4)
    test = written["test"]
    assert test["accuracy"] == {
        **{"mean": None, "std": None, "ci95": None},
        **{"n": 2, "values": [pytest.approx(0.9), None]},
    }
    assert (test["confusion"], test["count"]) == (None, 37)
    assert set(test["per_class_accuracy"].values()) == {None}


def _distances(values):
    """What an evaluation over all examples at once gives: the value of each run, and ones."""
    return {"distance": (np.array(values), np.ones(len(values)))}


DISTANCE = {"distance": Metric("px", "lower", "nearest of three guesses")}


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_a_headline_of_which_less_is_better_chooses_the_lowest(tmp_path, capsys, worst):
    result, written = _written(tmp_path, [worst, 2.0, 0.5], 1, _distances, DISTANCE, "distance")
    assert result["best"] == {"optim.lr": 0.01}
    assert written["test"]["distance"]["values"] == [0.5]
    assert written["test"]["count"] == 37  # examples, not the count of the pair
    assert (written["headline"], written["metrics"]) == (
        "distance",
        {
            "distance": {
                **{"unit": "px", "better": "lower"},
                "protocol": "nearest of three guesses",
            }
        },
    )
    print_result({**written, "seconds": {}, "flops": {"training": 1, "evaluation": 1}}, tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("val diverged")
    assert out[1:3] == ["optim.lr=0.1: val 2.0000 px", f"optim.lr=0.01: val 0.5000 px{CHOSEN}"]
    assert "protocol distance: nearest of three guesses" in out


CHOSEN = "  <- best on val"


def test_only_a_metric_in_percent_has_the_interval_of_a_share(tmp_path):
    _, of_distance = _written(tmp_path, [0.99, 1.0], 2, _distances, DISTANCE, "distance")
    _, of_share = _written(tmp_path, [0.99, 1.0], 2)
    assert of_share["test"]["accuracy"]["ci95"][1] < 1 < of_distance["test"]["distance"]["ci95"][1]


def test_a_result_without_its_headline_says_so(tmp_path, capsys):
    def without(values):
        return {"other": _distances(values)["distance"]}

    result, _ = _written(tmp_path, [0.3, 0.2], 1, without, DISTANCE, "distance")
    assert result["best"] == {"optim.lr": 1e30}  # nothing ranks: the first
    print_result({**result, "seconds": {}, "flops": {"training": 1, "evaluation": 1}}, tmp_path)
    out = capsys.readouterr().out
    assert "optim.lr=0.1: val no distance" in out
    assert "test    no distance, other 0.3000  (37 images)" in out


def test_a_result_of_older_code_is_printed_as_it_was(tmp_path, capsys):
    def numbers(mean):
        return {"mean": mean, "std": 0.01, "ci95": None, "n": 2, "values": [mean, mean]}

    per_class = {"values": 0.5, "b": None}  # a class may have any name
    split = {"accuracy": numbers(0.9), "loss": numbers(0.3), "per_class_accuracy": per_class}
    result = {
        **{"val": None, "test": {**split, "count": 360}, "seeds": [0, 1]},
        **{"seconds": {"train": 1.0}, "flops": {"training": 1e9, "evaluation": 1e8}},
        **{"examples": 640, "best": {"lr": 1}},
        "sweep": [{"setting": {"lr": 1}, "val": {"accuracy": numbers(0.8)}}],
    }
    print_result(result, tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"lr=1: val 80.00 % ± 1.00{CHOSEN}"
    assert out[1] == "test    accuracy 0.9000 ± 0.0100, loss 0.3000 ± 0.0100  (360 images, 2 seeds)"
    assert not any(line.startswith("protocol") for line in out)


def test_examples_are_images_where_a_field_is_one():
    spec = random_dataset().spec
    assert examples_word(spec) == "images"
    fields = {"track": SimpleNamespace(kind="tracks"), "scene": SimpleNamespace(kind="image")}
    assert examples_word(SimpleNamespace(fields=fields)) == "images"
    del fields["scene"]
    assert examples_word(SimpleNamespace(fields=fields)) == "examples"


def test_nan_is_written_as_null(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.0], "b": float("inf")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.0], "b": None}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_environment_names_versions_and_device():
    got = environment()
    assert got["packages"].keys() >= {"jax", "flax", "optax"}
    assert "cpu" in got["device"]
    assert got["cores"] == num_cores()


def test_a_run_goes_on_with_the_variables_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    write_environment(tmp_path)
    monkeypatch.setenv("NPROC", "3")
    with pytest.raises(
        UserError, match=r"NPROC is '3' and was '2' when the run in .* set it as it"
    ):
        write_environment(tmp_path, goes_on=True)
    assert json.loads((tmp_path / "env.json").read_text())["variables"]["NPROC"] == "2"
    monkeypatch.setenv("NPROC", "2")
    write_environment(tmp_path, goes_on=True)
    (tmp_path / "env.json").write_text("{}")  # of older code
    monkeypatch.setenv("NPROC", "3")
    write_environment(tmp_path, goes_on=True)
    assert json.loads((tmp_path / "env.json").read_text())["variables"]["NPROC"] == "3"


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path):
    data = random_dataset()
    spec = data.spec._replace(label_counts=(7,) * 10)
    check_data(tmp_path, spec)  # nothing is known
    write_data(tmp_path, data._replace(spec=spec))
    check_data(tmp_path, spec)
    check_data(tmp_path, spec._replace(label_counts=()))  # of older code
    image = spec.fields["image"]
    bright = spec.fields | {"image": image._replace(mean=image.mean + 0.01)}
    for other, message in (
        (spec._replace(num_val=22), "the size of val was 23, now 22"),
        (spec._replace(label_counts=(6, 8, *[7] * 8)), r"labels by class was \[7, .*, now \[6, 8"),
        (spec._replace(fields=bright), "mean and std"),
        (random_dataset((9, 8, 1)).spec, r"shape of image was \[8, 8, 1\], now \[9, 8, 1\]"),
    ):
        with pytest.raises(UserError, match=message):
            check_data(tmp_path, other)
    (tmp_path / "data.json").write_text("{")
    check_data(tmp_path, spec._replace(num_val=22))


def test_a_run_is_finished_at_its_last_step_with_a_result(tmp_path):
    assert finished_result(tmp_path, 10, 10) is None
    write_json(tmp_path / "result.json", {"steps": 10})
    assert finished_result(tmp_path, 10, 10) == {"steps": 10}
    assert finished_result(tmp_path, 10, 20) is None
    assert finished_result(tmp_path, 20, 20) is None  # the result is the shorter run's
    with pytest.raises(UserError, match="at step 10 already, past the 5 steps"):
        finished_result(tmp_path, 10, 5)


@pytest.mark.parametrize("damaged", ["", "{", "[1]", "{}", "\x00"])
def test_a_damaged_result_is_measured_again(damaged, tmp_path):
    (tmp_path / "result.json").write_text(damaged)
    assert finished_result(tmp_path, 10, 10) is None
