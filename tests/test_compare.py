"""A comparison's numbers against those worked out by hand or known from tables."""

import json
import math
import re
import sys

import pytest

from cv_jax.config.errors import UserError
from cv_jax.tools import compare


def _run(values, seeds=None, **config):
    seeds = list(range(len(values))) if seeds is None else seeds
    config = {"seed": seeds[0], "num_seeds": len(seeds), **config}
    return {"config": config, "seeds": seeds, "test": {"accuracy": {"values": values}}, "val": None}


def test_pairs_are_compared_by_their_differences():
    got = compare.difference([0.1, 0.2, 0.3], [0.2, 0.4, 0.6], paired=True)
    # The differences 0.1, 0.2, 0.3 have mean 0.2 and std 0.1; t = 0.2 / (0.1 / sqrt 3) = 3.4641,
    # two-sided p of t with 2 degrees of freedom 0.07418; t(0.975, 2) = 4.302653.
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert got["mean"] == pytest.approx(0.2)
    assert got["p"] == pytest.approx(0.07418, abs=1e-5)
    assert got["ci95"] == pytest.approx([0.2 - half, 0.2 + half], rel=1e-6)
    assert got["test"] == "paired"


def test_others_by_welch():
    # Var 1 of 3 values and var 4 of 3: t = 2 / sqrt(5 / 3), freedom (5/3)^2 / ((1/9 + 16/9) / 2).
    got = compare.difference([0, 1, 2], [1, 3, 5], paired=False)
    freedom = (5 / 3) ** 2 / (17 / 18)
    assert got["mean"] == 2.0
    from scipy import stats

    assert got["p"] == pytest.approx(2 * stats.t.sf(2 / math.sqrt(5 / 3), freedom))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(5 / 3)
    assert got["ci95"] == pytest.approx([2 - half, 2 + half])


@pytest.mark.parametrize(
    ("effect", "paired", "seeds"),  # Cohen 1988, and what G*Power gives
    [(0.5, False, 64), (0.8, False, 26), (0.2, False, 394), (0.5, True, 34), (0.2, True, 199)],
)
def test_the_seeds_to_see_a_difference(effect, paired, seeds):
    assert compare.seeds_to_see(effect, 1.0, paired) == seeds


def test_nothing_is_said_of_chance_where_nothing_is_known():
    for a, b in (([0.5], [0.6]), ([0.5, 0.5], [0.6, 0.6])):
        got = compare.difference(a, b, paired=len(a) > 1)
        assert got["mean"] == pytest.approx(0.1)
        assert (got["p"], got["ci95"], got["seeds_to_see"]) == (None, None, None)
    assert compare.seeds_to_see(1e-9, 1.0, False) is None


def test_runs_are_paired_where_their_seeds_match():
    runs = {
        "a": _run([0.5, 0.6], optim={"lr": 0.1}),
        "b": _run([0.6, 0.8], optim={"lr": 0.2}),
        "c": _run([0.6, 0.8], seeds=[5, 6], optim={"lr": 0.1}),
    }
    report = compare.compare(runs, "test", "accuracy")
    assert [d["test"] for d in report["differences"]] == ["paired", "welch"]
    assert [d["config"] for d in report["differences"]] == [{"optim.lr": (0.1, 0.2)}, {}]
    text = compare.describe(report)
    assert "a  55.00 ± 7.07" in text
    assert "b - a: +15.00 points" in text
    assert "config.optim.lr: 0.1 -> 0.2" in text


def test_a_sweep_is_compared_with_the_values_of_its_best_setting():
    sweep = [["optim.lr", [0.1, 0.3]]]
    runs = {
        "a": _run([0.5, 0.6], optim={"lr": 0.1}, sweep=sweep) | {"best": {"optim.lr": 0.3}},
        "b": _run([0.6, 0.8], optim={"lr": 0.2}, sweep=[]),
    }
    report = compare.compare(runs, "test", "accuracy")
    assert report["differences"][0]["config"]["optim.lr"] == (0.3, 0.2)
    assert report["settings"] == {"a": {"optim.lr": 0.3}, "b": {}}
    text = compare.describe(report)
    assert "best on val of its sweep: optim.lr=0.3" in text
    assert "config.optim.lr: 0.3 -> 0.2" in text


def test_a_seed_that_has_diverged_is_named():
    runs = {"a": _run([0.5, None], seeds=[3, 4]), "b": _run([0.5, 0.6])}
    with pytest.raises(UserError, match=r"a: seed 4 has diverged, so that accuracy on test is no"):
        compare.compare(runs, "test", "accuracy")


def test_only_a_share_has_the_interval_of_a_share():
    runs = {"a": _run([0.99, 1.0, 1.0]), "b": _run([0.5, 0.6, 0.7])}
    for run in runs.values():
        run["test"]["loss"] = run["test"]["accuracy"]
    accuracy = compare.compare(runs, "test", "accuracy")["runs"]["a"]
    loss = compare.compare(runs, "test", "loss")["runs"]["a"]
    assert accuracy["ci95"][1] < 1 < loss["ci95"][1]


def _distances(values):
    numbers = {"distance": {"values": values}}
    metrics = {"distance": {"unit": "px", "better": "lower", "protocol": "of three guesses"}}
    return _run(values) | {"test": numbers, "headline": "distance", "metrics": metrics}


def test_less_of_a_distance_is_better():
    runs = {"a": _distances([3.0, 4.0]), "b": _distances([1.0, 1.5]), "c": _distances([9.0, 9.5])}
    report = compare.compare(runs, "test", "distance")
    assert report["order"] == ["b", "a", "c"]
    assert [d["better"] for d in report["differences"]] == [True, False]
    text = compare.describe(report)
    assert text.startswith("distance on test, px (of three guesses)")
    assert re.search(r"^  b  1\.2500 ± .* n = 2  <- best$", text, re.M)
    assert text.count("<- best") == 1
    assert "b - a: -2.2500 px, better" in text
    assert "c - a: +5.7500 px, worse" in text


def test_more_accuracy_is_better_in_results_of_older_code():
    runs = {"a": _run([0.5, 0.6]), "b": _run([0.7, 0.9]), "c": _run([0.5, 0.6])}
    report = compare.compare(runs, "test", "accuracy")
    assert report["order"] == ["b", "a", "c"]
    assert [d["better"] for d in report["differences"]] == [True, None]
    assert "b - a: +25.00 points, better" in compare.describe(report)


def test_the_headline_of_the_first_run_is_compared(tmp_path, monkeypatch, capsys):
    names = []
    for name, values in (("a.json", [1.0, 2.0]), ("b.json", [2.0, 2.5])):
        (tmp_path / name).write_text(json.dumps(_distances(values)))
        names.append(str(tmp_path / name))
    monkeypatch.setattr(sys, "argv", ["compare", *names])
    compare.main()
    assert "distance on test, px" in capsys.readouterr().out


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps(_run([0.5, 0.6])))
    (tmp_path / "b.json").write_text(json.dumps(_run([0.7])))
    out = tmp_path / "out.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [str(tmp_path / "a"), str(tmp_path / "b.json")]
    monkeypatch.setattr(sys, "argv", ["compare", *names, "--out=~/out.json"])
    compare.main()
    assert json.loads(out.read_text())["runs"][names[1]]["n"] == 1
    assert "no test is possible" in capsys.readouterr().out

    for name, message in (("none", "is the run complete"), ("out.json", "neither a result.json")):
        with pytest.raises(UserError, match=message):
            compare.read_run(tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["compare", *names, "--metric=top5"])
    with pytest.raises(SystemExit, match=r"^2$"):
        compare.main()
    assert re.match("compare: .*has no top5 on test", capsys.readouterr().err)
