"""Every mistake in a config is named, and a work directory keeps to its config."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from cv_jax.config import command_line
from cv_jax.config.base import base_config, flatten, smoke
from cv_jax.config.command_line import check_command_line, make_default_workdir, resume_command
from cv_jax.config.errors import UserError
from cv_jax.config.rules import check
from cv_jax.workdir.adopt import MAY_CHANGE, adopt_workdir
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"--config=FILE.*configs/digits\.py"),
        ("--config=configs/digit.py", r"no config file 'configs/digit\.py'.*'configs/digits\.py'"),
        ("--config=configs/digits.py --config.epoch=3", r"no key 'epoch'.*'epochs'"),
        ("--config=configs/digits.py --config.optim.lrr=3", r"'optim\.lrr'.*'optim\.lr'"),
        ("--config=configs/digits.py --config.lr=3", r"no key 'lr'.*'optim\.lr'"),
        ("--config configs/digits.py --config.data.nam=x", r"'data\.nam'.*'data\.name'"),
        ("--config=configs/digits.py:smok", r"'smoke' or none, not 'smok'"),
        ("--config=configs/digits.py --config.seed", r"--config\.seed has no value"),
        ("--config=configs/digits.py --config.seed=abc", r"seed='abc' must be a whole number"),
        ("--config=configs/digits.py --config.num_seeds=two", r"num_seeds='two' must be a whole"),
        ("--config=configs/digits.py --config.data.num_val=1.5", r"num_val='1\.5' must be a whole"),
        ("--config=configs/digits.py --config.optim.lr=nan", r"lr=nan must be a finite number"),
        ("--config=configs/digits.py --config.optim.rules=((", r"rules='\(\(' must be a tuple"),
        ("--config=configs/digits.py --config.data.stream=2", r"stream='2' must be true or false"),
        ("--config=configs/digits.py --config.init_form=x", r"'init_form'.*'init_from'"),
        ("--config=configs/digits.py --config.label_seed=1", r"'label_seed'.*'data\.label_seed'"),
        ("--config=configs/digits.py --config.data.label_fraction=all", r"='all' must be a finite"),
        ("--config=tests/conftest.py", r"tests/conftest\.py builds no config \(KeyError"),
    ],
)
def test_a_mistyped_command_line_names_the_nearest(monkeypatch, line, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        check_command_line(["train.py", *shlex.split(line)])


def test_a_right_command_line_passes(monkeypatch):
    monkeypatch.chdir(ROOT)
    line = "--config=configs/digits.py:smoke --config.optim.lr=0.5 --workdir=x"
    check_command_line(["train.py", *shlex.split(line)])
    check_command_line(["train.py", "--help"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("epochs", 0.0), ("batch_size", -1), ("eval_batch_size", 0), ("label_smoothing", 1.0)],
        *[("seed", -1), ("seed", 2**31), ("data.num_val", -3), ("optim.lr", 0.0)],
        *[("optim.momentum", -0.1), ("optim.weight_decay", -1e-9), ("optim.clip_norm", -1.0)],
        *[("optim.lr", math.inf), ("optim.ema", math.nan), ("optim.lr", 3.5e38)],
        *[("data.labels_per_class", -1), ("data.label_seed", -1)],
        *[("data.label_fraction", -0.1), ("data.label_fraction", 1.5)],
    ],
)
def test_values_out_of_range_name_their_key(key, value):
    config = base_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=re.escape(f"config.{key}={value} must")):
        check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("num_seeds", "two"), ("seed", True), ("optim.lr", "0.1"), ("data.stream", 1)],
        *[("log_every", "often"), ("optim.warmup", "2 hours"), ("optim.rules", (1,))],
        *[("sweep", ("optim.lr", (0.1, 0.2))), ("optim.groups.head", 3), ("optim.lrr", 0.1)],
        *[("data.keep_unlabelled", 1), ("data.labels_per_class", 2.0), ("init_from", 1)],
        *[("init_allow", ("head/.*",)), ("method", None)],
        *[("optim.groups.head.lr", -1.0), ("optim.groups.head.warmup", "often")],
    ],
)
def test_a_config_written_in_python_is_checked_too(key, value):
    config = base_config()
    with config.ignore_type():
        config.optim.groups = {"head": {"lr": 0.1, "warmup": "never"}}
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=re.escape(key)):
        check(config)


def test_what_a_config_may_leave_open():
    config = base_config()
    config.optim.lr = 1  # ml_collections makes it 1.0
    config.optim.groups = {"head": {"lr": 0.3, "warmup": "1 epoch"}}
    config.sweep = (("optim.lr", (1, 2)),)
    check(config)
    check(config.lock())


def test_a_key_that_is_missing_is_named():
    config = base_config()
    del config.optim.ema
    with pytest.raises(UserError, match=r"lacks the key 'optim\.ema'"):
        check(config)


def test_a_work_directory_keeps_to_its_config(tmp_path):
    config = base_config()
    assert adopt_workdir(tmp_path / "a", config) == []
    assert adopt_workdir(tmp_path / "a", config) == []

    config.epochs, config.log_every = 20.0, "7 steps"
    assert adopt_workdir(tmp_path / "a", config) == [
        "epochs: 10.0 -> 20.0",
        "log_every: '1 epoch' -> '7 steps'",
    ]
    assert json.loads((tmp_path / "a/config.json").read_text())["epochs"] == 20.0

    config.optim.lr, config.seed = 0.2, 3
    with pytest.raises(UserError) as error:
        adopt_workdir(tmp_path / "a", config)
    assert "optim.lr: stored 0.1, now 0.2" in str(error.value)
    assert "seed: stored 0, now 3" in str(error.value)
    assert "epochs" not in str(error.value)
    assert json.loads((tmp_path / "a/config.json").read_text())["seed"] == 0


@pytest.mark.parametrize("damaged", [b"", b"{", b"7", b"\xff"])
def test_a_damaged_config_is_named(damaged, tmp_path):
    (tmp_path / "config.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"config\.json is damaged .*Delete it"):
        adopt_workdir(tmp_path, base_config())


def test_what_may_change_exists():
    assert flatten(base_config()).keys() >= MAY_CHANGE
    # They change no number; a run that on_error="stop" has stopped is told to set "replace".
    assert {"data.workers", "data.on_error"} <= MAY_CHANGE


def test_the_way_to_go_on_is_a_command():
    workdir = Path("runs/a b")
    assert resume_command(["train.py", "--config=c.py"], workdir) == (
        "python train.py --config=c.py '--workdir=runs/a b'"
    )
    assert resume_command(["train.py"], None) == "python train.py"
    given = ["train.py", "--workdir", "x"]
    assert resume_command(given, workdir) == "python train.py --workdir x"


def test_runs_of_one_second_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line.time, "strftime", lambda form: "20260101-000000")
    names = [make_default_workdir("configs/digits.py:smoke").name for _ in range(3)]
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]
    assert sorted(path.name for path in Path("runs/digits-smoke").iterdir()) == names

    Path("runs/cifar10").write_text("")
    with pytest.raises(
        UserError, match=r"runs/cifar10/20260101-000000 cannot be created \(.*--workdir"
    ):
        make_default_workdir("configs/cifar10.py")


def test_the_official_val_is_asked_for_by_minus_one():
    config = base_config()
    config.data.num_val = -1
    check(config)
    assert smoke(config).data.num_val == -1
