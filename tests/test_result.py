"""Statistics against numbers worked out by hand, and JSON that any reader takes."""

import json
import math

import pytest

from cv_jax.errors import UserError
from cv_jax.result import environment, finished_result, summarize, write_environment, write_json
from cv_jax.startup import num_cores


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
    with pytest.raises(UserError, match="NPROC is '3' and was '2' when the run in .* set it as it"):
        write_environment(tmp_path, goes_on=True)
    assert json.loads((tmp_path / "env.json").read_text())["variables"]["NPROC"] == "2"
    monkeypatch.setenv("NPROC", "2")
    write_environment(tmp_path, goes_on=True)
    (tmp_path / "env.json").write_text("{}")  # of older code
    monkeypatch.setenv("NPROC", "3")
    write_environment(tmp_path, goes_on=True)
    assert json.loads((tmp_path / "env.json").read_text())["variables"]["NPROC"] == "3"


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
