"""Several processes are one program: on the CPU they exchange by gloo."""

import json
import re
import shutil
import signal

import chex
import pytest
from etils.epath import Path

import train
from benchmarks import processes as two
from configs.digits import get_config
from cv_jax.config.errors import UserError
from cv_jax.data.dataset import data_fingerprint
from cv_jax.runtime.processes import (
    LOST,
    Largest,
    assert_equal_on_processes,
    broadcast,
    join,
    leave,
    on_all_processes,
    on_process_0,
)
from cv_jax.train.agreement import of_program
from cv_jax.trained.load import load_trained
from tests.conftest import digits_folder, random_dataset
from tests.test_initial import flat, leave_run, ssl_config

SMALL = ("--config.model=n94(widths=(8,))",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, 0), "--num_processes missing: give all of --coordinator, "),
        ((None, 2, None), "--coordinator and --process_id missing: "),
        (("host", 2, 1), "--coordinator='host' must be HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2 must be between 0 and 1"),
        (("host:1", 2, -1), "--process_id=-1 must be between 0 and 1"),
    ],
)
def test_flags_that_make_no_sense(flags, message):
    with pytest.raises(UserError, match=message):
        join(*flags)


def test_a_process_alone_agrees_with_itself():
    assert broadcast("here") == "here"
    assert on_all_processes(lambda: 1) == on_process_0(lambda: 1) == 1
    assert [Largest()(x) for x in (3, 2)] == [3, 2]
    assert_equal_on_processes(lambda: pytest.fail("read through for nothing"))


def test_facts_name_what_differs(tmp_path):
    config, data = get_config(), random_dataset()
    program, read = of_program(config, tmp_path), data_fingerprint(data)
    config.optim.lr *= 2
    data.val["label"][0] += 1

    def changed(facts, others):
        return [name for name in facts if facts[name] != others[name]]

    assert changed(program, of_program(config, tmp_path)) == ["config.optim.lr"]
    assert changed(read, data_fingerprint(data)) == ["data set (val, CRC-32 of the field label)"]


@pytest.mark.parametrize(("index", "waits"), [(0, [1]), (1, [])])
def test_one_of_several_leaves_without_the_others(index, waits, monkeypatch):
    left, waited = [], []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: index)
    monkeypatch.setattr("os._exit", left.append)
    monkeypatch.setattr("time.sleep", waited.append)
    leave(2)
    assert (left, waited) == ([2], waits)


@pytest.mark.slow
def test_two_processes_train_as_one_stop_together_and_one_goes_on(tmp_path):
    constant = ("--config.optim.schedule=constant", "--config.optim.warmup=0 steps")
    sgd = ("--config.optim.name=sgd", "--config.optim.lr=0.005", "--config.log_every=1 steps")
    # A seed for each process, whose devices share its batches and decode the files of their rows.
    digits = digits_folder(tmp_path / "digits")
    files = ("--config.data.name=folder", f"--config.data.dir={digits}")
    arguments = [*SMALL, *constant, *sgd, *files, "--config.data.decode=always"]
    stopped = two.signalled(tmp_path, 1, *arguments, "--config.num_seeds=2", rows=20, devices=2)
    workdir = tmp_path / "signalled-1"
    assert len(two.losses(workdir)) == stopped["step"]
    assert "Stopped by SIGTERM" in two.printed(workdir, 1)
    assert "workdir /" not in two.printed(workdir, 1)  # the first one has the log

    config = get_config()
    config.model, config.num_seeds = "n94(widths=(8,))", 2
    config.optim.schedule, config.optim.warmup = "constant", "0 steps"
    config.optim.name, config.optim.lr = "sgd", 0.005
    config.log_every, config.checkpoint_every = "1 steps", "never"
    config.steps = stopped["step"] + 5
    train.run(config, tmp_path / "alone")
    config.data.name, config.data.dir, config.data.decode = "folder", str(digits), "always"
    train.run(config, workdir)
    losses, alone = two.losses(workdir), two.losses(tmp_path / "alone")
    assert two.largest_difference(losses[:20], alone[:20]) < 1e-5
    assert two.largest_difference(losses, alone) < 1e-3


@pytest.mark.slow
def test_two_processes_cut_an_evaluation_short_together_and_make_it_later(tmp_path):
    arguments = [*SMALL, "--config.data.num_val=400", "--config.eval_batch_size=2"]
    arguments += ["--config.eval_every=1 steps", "--config.log_every=1 steps"]
    step = two.signalled(tmp_path, 1, *arguments, rows=6)["step"]  # most of the time it evaluates
    workdir = tmp_path / "signalled-1"
    arguments = ["--config=configs/digits.py", *arguments, f"--config.steps={step + 1}"]
    two.finish(workdir, arguments, processes=2)
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    steps = [record["step"] for record in records if record["split"] == "val"]
    assert steps == list(range(1, step + 2))


@pytest.mark.slow
def test_two_processes_start_from_another_run_and_keep_what_is_frozen(tmp_path):
    backbone = flat(leave_run(tmp_path / "first", ssl_config()), "backbone")
    arguments = ["--config=configs/digits.py:smoke", "--config.model=n94(widths=(8, 8))"]
    arguments += [f"--config.init_from={tmp_path}/first:backbone", "--config.init_allow=head/.*"]
    arguments += ["--config.optim.rules=(('head/.*', 'base'), ('.*', 'frozen'))"]
    two.finish(tmp_path / "second", arguments, processes=2)
    assert re.search(r"^loaded +18 +2,440 ", two.printed(tmp_path / "second", 0), re.M)
    shutil.rmtree(tmp_path / "first")
    tuned = load_trained(Path(tmp_path / "second"))
    assert (int(tuned.state.step), tuned.result["steps"]) == (4, 4)
    arrays = flat(tuned.state)
    arrays.pop("params/head/kernel")
    chex.assert_trees_all_equal(arrays, backbone)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(tmp_path):
    workdir = tmp_path / "run"
    with two.start(workdir, two.LONG, processes=2) as running:
        while "Gloo" not in two.printed(workdir, 1):  # they have met
            assert running[1].poll() is None, two.printed(workdir, 1)
        running[1].kill()
        code = running[0].wait(timeout=60)
    said = two.printed(workdir, 0)
    if code == -signal.SIGABRT:  # it waited where only the heartbeat was missing
        assert "another task died" in said
        return
    assert code == LOST, said
    assert "process 0 of 2 has lost another process" in said
    assert "Repeat the command to resume from the last checkpoint." in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("--config.optim.lr=0.5", "Process 1 of 2 has another config.optim.lr than process 0: 0.5"),
        ("--config.data.dir=/nowhere", "config.data.dir"),
    ],
)
def test_processes_of_different_configs_do_not_begin(last, message, tmp_path):
    workdir = tmp_path / "run"
    with two.start(workdir, two.LONG, processes=2, last=(last,)) as running:
        assert [process.wait(timeout=60) for process in running] == [2, 2]
    for i in (0, 1):
        assert message in two.printed(workdir, i)
        assert "Traceback" not in two.printed(workdir, i)
    assert not workdir.exists()
