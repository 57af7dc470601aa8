"""Runs become a record only if nothing but the seed sets them apart."""

import copy
import json
import re
import sys

import pytest

from cv_jax.config.errors import UserError
from cv_jax.tools import collect


def _result(seed, *accuracies):
    values = {"accuracy": list(accuracies), "loss": [1 - a for a in accuracies]}
    scores = {name: {"values": numbers} for name, numbers in values.items()} | {"count": 10}
    num_seeds = len(accuracies)
    return {
        "config": {"seed": seed, "num_seeds": num_seeds, "optim": {"lr": 0.1}},
        "seeds": list(range(seed, seed + num_seeds)),
        "val": None,
        "test": scores,
        "seconds": {"train": 10.0 + seed},
        "steps": 5,
        "epochs": 1.0,
        "examples": 50,
        "flops": {"training": 9e8, "evaluation": 1e8, "total": 1e9},
        "commit": "0123456789",
        "dirty": False,
        "device": "cpu",
    }


def test_seeds_are_put_together():
    record = collect.collect([_result(0, 0.5), _result(1, 0.7)])
    assert record["seeds"] == [0, 1]
    assert record["test"]["accuracy"]["mean"] == pytest.approx(0.6)
    assert record["test"]["accuracy"]["values"] == [0.5, 0.7]
    assert record["seconds"] == {"train": 10.5}
    assert record["flops"]["total"] == 1e9
    assert "val" not in record
    assert collect.row("x", record) == "| x | 60.00 % ± 14.14 | 2 | 10 | cpu | 0123456 |"


def test_programs_of_several_seeds_are_put_together():
    record = collect.collect([_result(0, 0.5), _result(1, 0.7, 0.9)])
    assert record["seeds"] == [0, 1, 2]
    assert record["test"]["accuracy"]["values"] == [0.5, 0.7, 0.9]
    assert record["seconds"]["train"] == pytest.approx((10 + 11) / 3)
    assert record["config"] == {"optim": {"lr": 0.1}}


@pytest.mark.parametrize("key", ["commit", "steps"])
def test_other_code_or_length_is_refused(key):
    other = _result(1, 0.7) | {key: "other"}
    with pytest.raises(UserError, match=f"differ in {key}"):
        collect.collect([_result(0, 0.5), other])


def test_another_config_is_refused():
    other = copy.deepcopy(_result(1, 0.7))
    other["config"]["optim"]["lr"] = 0.2
    with pytest.raises(UserError, match=r"differ in optim\.lr, not only in their seeds"):
        collect.collect([_result(0, 0.5), other])


def test_a_seed_that_has_diverged_is_refused():
    other = _result(1, 0.7)
    other["test"]["accuracy"]["values"] = [None]
    with pytest.raises(UserError, match="seed 1 has diverged, so that accuracy on test is no num"):
        collect.collect([_result(0, 0.5), other])


def test_sweeps_are_put_together_where_they_chose_the_same():
    first, same, other = (
        _result(seed, 0.5) | {"best": {"optim.lr": lr}} for seed, lr in enumerate((0.3, 0.3, 0.2))
    )
    assert collect.collect([first, same])["best"] == {"optim.lr": 0.3}
    with pytest.raises(UserError, match=r"differ in optim\.lr, not only in their seeds"):
        collect.collect([first, other])


def test_the_command_writes_the_record(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}/result.json").write_text(json.dumps(_result(seed, 0.5)))
    runs = [str(tmp_path / "0"), str(tmp_path / "1")]
    monkeypatch.setattr(sys, "argv", ["collect", *runs, f"--out={tmp_path / 'digits.json'}"])
    collect.main()
    assert json.loads((tmp_path / "digits.json").read_text())["seeds"] == [0, 1]
    assert capsys.readouterr().out.startswith("| digits | 50.00 % ± 0.00 | 2 |")

    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path), f"--out={tmp_path / 'x.json'}"])
    with pytest.raises(SystemExit, match=r"^2$"):
        collect.main()
    assert re.match("collect: .*is the run complete", capsys.readouterr().err)


def test_a_record_keeps_the_headline_and_every_metric():
    metrics = {"distance": {"unit": "px", "better": "lower", "protocol": "of three guesses"}}
    first, second = _result(0, 0.5), _result(1, 0.7)
    for result in (first, second):
        distances = [4 * value for value in result["test"]["accuracy"]["values"]]
        result["test"]["distance"] = {"values": distances}
        result |= {"headline": "distance", "metrics": metrics}
    record = collect.collect([first, second])
    assert record["test"].keys() == {"accuracy", "loss", "distance", "count"}
    assert (record["headline"], record["metrics"]) == ("distance", metrics)
    assert collect.row("x", record).startswith("| x | 2.4000 px ± 0.5657 | 2 |")
    del first["test"]["distance"], second["test"]["distance"]
    record = collect.collect([first, second])
    assert collect.row("x", record).startswith("| x | no distance | 2 |")
