"""train.py as a person meets it: whole runs, and every mistake answered by one clear message."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.runtime.signals import Stopped
from cv_jax.train import command
from cv_jax.train.command import run_command
from tests.conftest import ROOT
from tests.mutations import call_train
from tests.test_data import examples_of, features_of, prepare_tiny, random_images, to_tfrecord

pytestmark = pytest.mark.slow


def _first_record(workdir):
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])


TINY = (
    "--config=configs/digits.py:smoke",
    "--config.model=n94(widths=(4,))",
)


def _result(workdir):
    return json.loads((workdir / "result.json").read_text())


def test_a_run_leaves_what_it_should(train_py, tmp_path):
    rules = "--config.optim.rules=(('whiten/kernel', 'frozen'), ('.*', 'base'))"
    done = train_py(*TINY, rules, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "env.json", "metrics.jsonl", "checkpoints", "result.json"}
    assert any(name.startswith("events.out.tfevents") for name in names)

    result = _result(tmp_path)
    assert result["steps"] == 4
    assert result["examples"] == 4 * result["config"]["batch_size"]
    flops = result["flops"]
    assert flops["training"] % result["steps"] == 0
    # Evaluation saw each of 160 examples once. A step costs three forward passes an example, and a
    # little more: an input's gradient covers the odd rows and columns that no pool looks at.
    forward = flops["evaluation"] / (32 + 128)
    assert 2.9 < flops["training"] / result["examples"] / forward < 3.1
    assert flops["total"] == flops["training"] + flops["evaluation"]
    clocks = {"data", "compile", "init", "train", "eval", "save"}
    assert result["seconds"].keys() == result["seconds_count"].keys() == clocks
    for split, count in (("val", 32), ("test", 128)):
        accuracy = result[split]["accuracy"]
        assert result[split]["count"] == count
        assert accuracy["n"] == 1
        assert accuracy["values"] == [accuracy["mean"]]
        assert accuracy["mean"] * count == pytest.approx(round(accuracy["mean"] * count))
        assert len(result[split]["per_class_accuracy"]) == 10
    assert f"accuracy {result['test']['accuracy']['mean']:.4f}" in done.stdout
    assert "\r" not in done.stdout + done.stderr  # no progress bar where nobody watches

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    splits = [json.loads(line)["split"] for line in lines]
    assert splits == ["train", "val", "train", "val", "final_val", "final_test"]


def test_without_a_work_directory_it_is_named_after_config_and_time(tmp_path):
    command = [sys.executable, ROOT / "train.py", f"--config={ROOT / 'configs/digits.py'}:smoke"]
    done = subprocess.run(
        [*command, "--config.model=n94(widths=(4,))"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (workdir,) = (tmp_path / "runs" / "digits-smoke").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", workdir.name)
    assert (workdir / "result.json").exists()
    assert f"workdir runs/digits-smoke/{workdir.name}" in done.stdout


def test_a_longer_run_goes_on_and_says_what_changed(train_py, tmp_path):
    assert train_py(*TINY, f"--workdir={tmp_path}").returncode == 0
    longer = train_py(*TINY, "--config.steps=6", f"--workdir={tmp_path}")
    assert longer.returncode == 0, longer.stderr
    assert "changed config.steps: 4 -> 6" in longer.stdout
    assert "resumes after step 4" in longer.stdout
    assert _result(tmp_path)["steps"] == 6
    change = json.loads((tmp_path / "changes.jsonl").read_text())
    assert change == {"step": 4, "change": "steps: 4 -> 6"}

    shorter = train_py(*TINY, "--config.steps=5", f"--workdir={tmp_path}")
    assert shorter.returncode == 2
    assert "at step 6 already, past the 5 steps" in shorter.stderr

    other = train_py(*TINY, "--config.steps=6", "--config.seed=1", f"--workdir={tmp_path}")
    assert other.returncode == 2
    assert "seed: stored 0, now 1" in other.stderr
    assert _result(tmp_path)["config"]["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/nothing.py"], "There is no config file 'configs/nothing.py'"),
        ([*TINY, "--config.epoch=3"], "Did you mean 'epochs'?"),
        ([*TINY, "--config.model=lennet"], "Did you mean 'lenet'?"),
        ([*TINY, "--config.augment=crop(4)|flop"], "Did you mean 'flip'?"),
        ([*TINY, "--config.optim.name=sdg"], "Did you mean 'sgd'?"),
        ([*TINY, "--config.optim.schedule=cosin"], "Did you mean 'cosine'?"),
        ([*TINY, "--config.task=clasification"], "Did you mean 'classification'?"),
        ([*TINY, "--config.data.name=digit"], "digits"),
        ([*TINY, "--config.log_every=often"], "config.log_every='often' is not a duration"),
        ([*TINY, "--config.batch_size=0"], "config.batch_size=0 must be above 0"),
        ([*TINY, "seed=3"], "'seed=3' is not understood"),
        ([*TINY, "--config.select=hardest(2, of=3)"], "must be a multiple of 3"),
        ([*TINY, "--config.tta=miror"], "Did you mean 'mirror'?"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_a_mistake_gets_one_message_and_no_traceback(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    for name in ("prepare_jax", "raise_when_signalled"):  # this process has its own
        monkeypatch.setattr(command, name, lambda *args: None)
    code, printed = call_train([*arguments, f"--workdir={tmp_path}"])
    assert code == 2
    assert printed.startswith("train.py: ")
    assert message in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []  # the directory is free for the right command


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--wordir=x", "Unknown command line flag 'wordir'"),
        ("--config.batch_size=100000", "the 128 training examples"),
    ],
)
def test_a_process_ends_with_that_message(train_py, tmp_path, argument, message):
    done = train_py(*TINY, argument, f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run(train_py, tmp_path):
    done = train_py(*TINY, "--config.optim.lr=1e30", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert re.search(r"The loss is not finite at step \d \(epoch 0\.\d\d\)\.", done.stderr)
    assert "Traceback" not in done.stderr + done.stdout


@pytest.fixture
def in_this_process(monkeypatch):
    """Leaves signals, JAX's flags and the connection of this process as they are."""
    for name in ("raise_when_signalled", "prepare_jax", "join"):
        monkeypatch.setattr(command, name, lambda *args: None)


def test_ctrl_c_outside_of_the_loop_says_how_to_go_on(in_this_process, capsys):
    def interrupted(config, workdir):
        raise Stopped(signal.SIGINT)

    with pytest.raises(SystemExit) as stopped:
        run_command(interrupted, base_config(), "configs/x.py", "runs/x", (None, None, None))
    assert stopped.value.code == 130
    assert "--workdir=runs/x" in capsys.readouterr().out


def test_a_directory_that_was_made_for_a_mistake_is_removed(
    in_this_process, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    made = []

    def mistaken(config, workdir):
        assert workdir.is_dir()
        made.append(workdir)
        raise UserError("a mistake")

    with pytest.raises(SystemExit) as stopped:
        run_command(mistaken, base_config(), "configs/x.py", None, (None, None, None))
    assert stopped.value.code == 2
    assert "train.py: a mistake" in capsys.readouterr().err
    assert made[0].parent.name == "x"
    assert not made[0].exists()


def test_help_shows_how_to_start(train_py):
    done = train_py("--help")
    assert "python train.py --config=configs/digits.py" in done.stdout
    assert "--workdir" in done.stdout


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_prepared_data_by_its_name_alone_and_without_tensorflow(train_py, tmp_path, file_format):
    images = random_images(40, (8, 8, 3))
    examples = examples_of(images, np.arange(40) % 3)
    data_dir = tmp_path / "data"
    directory = prepare_tiny(
        data_dir, features_of((8, 8, 3)), {"train": examples[:33], "test": examples[33:]}
    )
    if file_format == "tfrecord":
        to_tfrecord(directory)
    trap = tmp_path / "trap" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise AssertionError('TensorFlow was imported')")

    done = train_py(
        *TINY,
        "--config.data.name=tiny",
        "--config.data.num_val=3",
        "--config.batch_size=10",
        f"--workdir={tmp_path / 'run'}",
        TFDS_DATA_DIR=str(data_dir),
        PYTHONPATH=str(trap.parent),
    )
    assert done.returncode == 0, done.stderr
    assert "tiny: 30 train, 3 val, 7 test; 8x8x3, 3 classes" in done.stdout
    result = _result(tmp_path / "run")
    assert result["test"]["count"] == 7
    assert result["test"]["per_class_accuracy"].keys() == {"ant", "bee", "cat"}
