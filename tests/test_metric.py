"""Metrics rank, name and show their values as their direction and unit say."""

import math

import numpy as np
import pytest

import train
from cv_jax.tasks import build_task
from cv_jax.train import programs, sweeps
from cv_jax.workdir import result as results
from cv_jax.workdir.metric import (
    Metric,
    headline_of,
    headline_text,
    metric_of,
    metrics_to_json,
)

BAD = (math.nan, math.inf, -math.inf, None)


@pytest.mark.parametrize(("better", "best"), [("higher", 2), ("lower", 1)])
@pytest.mark.parametrize("bad", BAD)
def test_the_best_is_in_the_direction_of_the_metric_and_never_without_a_number(better, best, bad):
    metric = Metric(better=better)
    assert metric.best([bad, -1.0, 3.0, bad]) == best
    assert metric.rank(bad) == -math.inf
    assert metric.best([bad, bad]) == 0


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_fewer_diverged_runs_are_better_than_any_mean(better):
    metric = Metric(better=better)
    two, one = (
        metric.rank_of_runs([5.0, 5.0]),
        metric.rank_of_runs([0.0 if better == "lower" else 9.0, None]),
    )
    none = metric.rank_of_runs([math.nan, math.inf])
    assert two > one > none
    assert metric.rank_of_runs([1.0, 3.0]) == (2, 2.0 if better == "higher" else -2.0)


def test_a_value_is_shown_with_its_unit():
    assert Metric("%").text(0.94286, 0.002) == "94.29 % ± 0.20"
    assert Metric("px", "lower").text(1.25, None) == "1.2500 px"
    assert Metric().text(1.25, 0.5) == "1.2500 ± 0.5000"
    assert {Metric("%").text(bad, 0.1) for bad in BAD} == {"diverged"}
    assert (Metric("%").label("accuracy"), Metric().label("loss")) == ("accuracy, %", "loss")


def test_results_say_what_their_metrics_mean():
    written = metrics_to_json({"ade": Metric("m", "lower", "minimum of 20")}, "ade")
    assert headline_of(written) == "ade"
    assert metric_of(written, "ade") == Metric("m", "lower", "minimum of 20")
    assert metric_of(written, "accuracy") == Metric()  # not listed: a plain number
    result = {**written, "val": None, "test": {"ade": {"mean": 0.5, "std": None}}}
    assert headline_text(result, "test") == "0.5000 m"
    assert headline_text(result, "val") == "no ade"


def test_older_results_are_ranked_by_accuracy():
    assert headline_of({}) == "accuracy"
    names = ("accuracy", "top5", "linear_accuracy", "loss", "feature_rank")
    shares = [name for name in names if metric_of({}, name).unit == "%"]
    assert shares == ["accuracy", "top5", "linear_accuracy"]
    assert [metric_of({}, name).better for name in names[-2:]] == ["lower", "higher"]


@pytest.mark.slow
def test_a_program_is_ranked_by_its_headline(tiny_config, tmp_path, monkeypatch, capsys):
    def by_loss(config, spec):
        task = build_task(config, spec)
        metrics = {**task.metrics, "loss": Metric("nats", "lower", "cross-entropy")}
        return task._replace(headline="loss", metrics=metrics)

    for module in (train, programs, sweeps):
        monkeypatch.setattr(module, "build_task", by_loss)
    with tiny_config.unlocked():
        tiny_config.sweep = (("optim.lr", (0.01, 1e-6)),)
        tiny_config.num_seeds = 2
        tiny_config.keep_checkpoints = 1
    result = train.run(tiny_config, tmp_path)
    results.print_result(result, tmp_path)
    losses = [point["val"]["loss"]["mean"] for point in result["sweep"]]
    assert result["best"] == result["sweep"][int(np.argmin(losses))]["setting"]
    assert result["test"]["accuracy"]["n"] == 2
    out = capsys.readouterr().out
    assert f"optim.lr=0.01: val {losses[0]:.4f} nats" in out
    assert "protocol loss: cross-entropy" in out
    (head,) = (line for line in out.splitlines() if line.startswith("  epoch"))
    assert head.split() == ["epoch", "step", "lr", "loss", "val", "loss", "images/s", "elapsed"]
    assert (tmp_path / "sweep.png").exists()
