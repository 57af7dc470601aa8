"""A search makes trials, goes on where it was stopped, and says what it cannot use."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from cv_jax.config.errors import UserError
from cv_jax.tools import search
from tests.conftest import ROOT

optuna = pytest.importorskip("optuna")


def test_a_space_is_read_and_drawn_from():
    texts = ["a=uniform(0, 1)", "b=log(0.1, 10)", "c=whole(1, 3)", "d=choice('flip', '')"]
    space = search.read_space(texts)
    fixed = {"a": 0.25, "b": 2.0, "c": 3, "d": ""}
    trial = optuna.trial.FixedTrial(fixed)
    assert {key: suggest(trial, key) for key, suggest in space.items()} == fixed
    assert trial.distributions["b"].log
    with pytest.raises(UserError, match=r"'a': write KEY=uniform\(LOW, HIGH\)"):
        search.read_space(["a"])
    with pytest.raises(UserError, match=r"Unknown --space a 'unifrom'. Did you mean 'uniform'"):
        search.read_space(["a=unifrom(0, 1)"])


SLEEPER = """
import json, pathlib, signal, sys, time
def save(*args):
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
for step, accuracy in enumerate(map(float, sys.argv[2].split(",")), start=1):
    with open(sys.argv[1] + "/metrics.jsonl", "a") as file:
        record = {"step": step, "split": "val", "values": {"accuracy": accuracy}}
        file.write(json.dumps(record) + "\\n")
    time.sleep(0.3)
result = {"val": {"accuracy": {"mean": accuracy, "std": 0.1}}}
pathlib.Path(sys.argv[1], "result.json").write_text(json.dumps(result))
"""


def test_a_trial_is_judged_on_val_and_pruned_there(tmp_path):
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for number, curve in enumerate(("0.5,0.9,0.95", "0.4" + ",0.1" * 100)):
        workdir = tmp_path / str(number)
        command = [sys.executable, "-c", SLEEPER, str(workdir), curve]
        study.optimize(lambda trial, c=command, w=workdir: search.run_trial(trial, c, w), 1)
    good, bad = study.trials
    assert (good.state.name, good.value, good.user_attrs["std"]) == ("COMPLETE", 0.95, 0.1)
    assert bad.state.name == "PRUNED"
    assert (tmp_path / "1" / "saved").exists()
    assert len(bad.intermediate_values) < 50


def test_a_trial_of_which_a_seed_has_diverged_is_not_judged(tmp_path):
    (tmp_path / "result.json").write_text('{"val": {"accuracy": {"mean": null, "std": null}}}')
    records = [
        {"step": 1, "split": "val", "values": {"accuracy": 0.8}, "runs": {"accuracy": [0.9, 0.7]}},
        {"step": 2, "split": "val", "values": {"accuracy": 0.8}, "runs": {"accuracy": [0.8, None]}},
        {"step": 3, "split": "val", "values": {}, "runs": {"accuracy": [None, None]}},
        {"step": 4, "split": "val", "values": {}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert search._val_ranks(tmp_path) == [(1, 0.8), (2, 0.4), (3, 0.0), (4, 0.0)]
    study = optuna.create_study(direction="maximize")
    study.optimize(lambda trial: search.run_trial(trial, ["true"], tmp_path), 1)
    (trial,) = study.trials
    assert (trial.state.name, search._judgement(trial)) == ("PRUNED", "diverged")


TASK = {
    "headline": "distance",
    "metrics": {"distance": {"unit": "px", "better": "lower", "protocol": ""}},
}
LOWER = """
import json, pathlib, sys
folder, distance = pathlib.Path(sys.argv[1]), float(sys.argv[2])
task = json.loads(sys.argv[3])
(folder / "task.json").write_text(json.dumps(task))
record = {"step": 1, "split": "val", "values": {"distance": distance}}
(folder / "metrics.jsonl").write_text(json.dumps(record))
result = {**task, "val": {"distance": {"mean": distance, "std": None}}}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def database(tmp_path):
    """A storage of studies that is closed at the end; newer Pythons warn of one that is not."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    yield storage
    storage.remove_session()
    storage.engine.dispose()


@pytest.mark.slow
def test_less_of_a_distance_wins_the_search(tmp_path, database):
    study = optuna.create_study(direction="maximize", storage=database)
    for number, distance in enumerate((3.0, 0.5, 2.0)):
        workdir = tmp_path / str(number)
        command = [sys.executable, "-c", LOWER, str(workdir), str(distance), json.dumps(TASK)]
        study.optimize(lambda trial, c=command, w=workdir: search.run_trial(trial, c, w), 1)
    assert study.best_trial.number == 1
    assert [search._judgement(trial) for trial in study.trials] == [
        *("val 3.0000 px", "val 0.5000 px", "val 2.0000 px")
    ]


def test_a_seed_that_has_diverged_is_the_worst_in_either_direction(tmp_path, database):
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    records = [
        {"step": 1, "split": "val", "values": {"distance": 3.0}, "runs": {"distance": [2.0, 4.0]}},
        {"step": 2, "split": "val", "values": {"distance": 1.0}, "runs": {"distance": [1.0, None]}},
        {"step": 3, "split": "val", "values": {}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert search._val_ranks(tmp_path) == [(1, -3.0), (2, -math.inf), (3, -math.inf)]
    task = {"headline": "distance", "metrics": {"distance": {"unit": "%", "better": "lower"}}}
    (tmp_path / "task.json").write_text(json.dumps(task))
    assert search._val_ranks(tmp_path) == [(1, -3.0), (2, -1.0), (3, -1.0)]
    # Optuna keeps such a number, and prunes by it.
    study = optuna.create_study(direction="maximize", storage=database)
    trial = study.ask()
    trial.report(-math.inf, 1)
    assert study.trials[0].intermediate_values == {1: -math.inf}


def test_a_result_without_its_headline_is_named(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({**TASK, "val": {"loss": {}}}))
    trial = optuna.create_study().ask()
    with pytest.raises(UserError, match="has no distance on val"):
        search.run_trial(trial, ["true"], tmp_path)


def test_what_train_py_says_is_passed_on(tmp_path):
    failing = [sys.executable, "-c", "print('config.x is wrong'); raise SystemExit(2)"]
    trial = optuna.create_study().ask()
    with pytest.raises(UserError, match=r"exit code 2: config\.x is wrong"):
        search.run_trial(trial, failing, tmp_path)


@pytest.mark.slow
def test_a_search_that_is_stopped_goes_on(tmp_path):
    command = [
        *(sys.executable, "-m", "cv_jax.tools.search", "--config=configs/digits.py:smoke"),
        *(f"--dir={tmp_path}", "--trials=2", "--seeds=2", "--space", "optim.lr=log(0.001, 0.1)"),
        *("--", "--config.model=n94(widths=(4,))"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    long = [*command, "--config.steps=100000"]
    process = subprocess.Popen(long, cwd=ROOT, env=environment, **pipes)
    deadline = time.monotonic() + 120
    first = tmp_path / "trial-0000"
    while not list(first.glob("checkpoints/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Repeat the command to resume" in output
    assert "Stopped by SIGTERM after step" in (first / "console.txt").read_text()

    step = max(int(path.name) for path in first.glob("checkpoints/[0-9]*"))
    short = [*command, f"--config.steps={step + 2}"]
    done = subprocess.run(short, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumes after step {step}" in (first / "console.txt").read_text()
    assert [line[:4] for line in done.stdout.splitlines()[:2]] == ["1/2 ", "2/2 "]
    assert "best on val" in done.stdout
