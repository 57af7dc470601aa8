"""Accuracy against FLOPs: what is read of a record, printed and drawn."""

import json
import re
import sys

import pytest

from cv_jax.config.errors import UserError
from cv_jax.tools import frontier


def _record(path, mean, std, flops):
    accuracy = {"mean": mean, "std": std, "n": 1 if std is None else 5}
    record = {"test": {"accuracy": accuracy}, "flops": {"training": 1, "total": flops}}
    path.write_text(json.dumps(record))
    return str(path)


def test_points_are_printed_by_cost_and_drawn(tmp_path, monkeypatch, capsys):
    out = tmp_path / "frontier.png"
    records = [
        _record(tmp_path / "long.json", 0.9401, 0.0015, 2.5e14),
        _record(tmp_path / "short.json", 0.885, None, 6.25e13),
    ]
    monkeypatch.setattr(sys, "argv", ["frontier", *records, f"--out={out}"])
    frontier.main()
    rows = ["| short | 0.062 | 88.50 % | 1 |", "| long | 0.250 | 94.01 % ± 0.15 | 5 |"]
    assert capsys.readouterr().out.splitlines() == rows
    assert out.read_bytes().startswith(b"\x89PNG")

    figure = frontier.draw([frontier.read_point(tmp_path / "long.json")], frontier.PUBLIC[:1])
    ours, public = figure.axes[0].get_lines()[0], figure.axes[0].get_lines()[-1]
    assert ours.get_xydata().tolist() == [[pytest.approx(0.25), pytest.approx(94.01)]]
    assert public.get_xydata().tolist() == [[0.29, 94.01]]


def test_a_record_of_a_run_that_has_diverged_has_no_point(tmp_path):
    _record(tmp_path / "x.json", None, None, 1e15)
    with pytest.raises(UserError, match=r"x\.json: a seed diverged"):
        frontier.read_point(tmp_path / "x.json")


def test_a_file_that_is_no_record_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["frontier", str(tmp_path / "x.json"), "--out=y.png"])
    with pytest.raises(SystemExit, match=r"^2$"):
        frontier.main()
    assert re.match(r"frontier: .*x\.json is not a record", capsys.readouterr().err)


def _distance(path, mean):
    numbers = {"mean": mean, "std": 0.5, "n": 3}
    record = {
        **{"headline": "distance", "test": {"distance": numbers}, "flops": {"total": 1e15}},
        "metrics": {"distance": {"unit": "px", "better": "lower", "protocol": ""}},
    }
    path.write_text(json.dumps(record))
    return frontier.read_point(path)


def test_a_headline_has_its_own_axis_and_no_public_accuracies(tmp_path):
    point = _distance(tmp_path / "x.json", 12.0)
    assert frontier._row(point) == "| x | 1.000 | 12.0000 px ± 0.5000 | 3 |"
    (axes,) = frontier.draw([point], frontier.PUBLIC).axes
    assert axes.get_ylabel() == "test distance, px (lower is better)"
    (line, *_) = axes.get_lines()
    assert line.get_xydata().tolist() == [[1.0, 12.0]]
    assert not axes.texts


def test_two_headlines_are_not_one_picture(tmp_path, monkeypatch, capsys):
    _distance(tmp_path / "x.json", 12.0)
    record = _record(tmp_path / "y.json", 0.9, None, 1e15)
    names = [str(tmp_path / "x.json"), record]
    monkeypatch.setattr(sys, "argv", ["frontier", *names, f"--out={tmp_path / 'z.png'}"])
    with pytest.raises(SystemExit, match=r"^2$"):
        frontier.main()
    assert "y.json has the headline accuracy" in capsys.readouterr().err


def test_a_record_without_its_headline_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"test": {"loss": {}}, "flops": {"total": 1}}')
    with pytest.raises(UserError, match=r"x\.json has no accuracy on test"):
        frontier.read_point(tmp_path / "x.json")
