"""A run that is stopped and taken up again ends, to the bit, where an uninterrupted one ends."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from cv_jax.data.sources import photos
from cv_jax.runtime.signals import Stopped, StopRequest
from cv_jax.train import evaluator
from cv_jax.workdir import directory
from cv_jax.workdir.log import Log
from tests.conftest import ROOT, digits_folder

pytestmark = pytest.mark.slow


def final_arrays(workdir):
    """All arrays of the newest checkpoint, by path."""
    manager = ocp.CheckpointManager((workdir / "checkpoints").absolute())
    step = manager.latest_step()
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    manager.close()
    leaves = jax.tree.leaves_with_path(restored["state"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(one, other):
    """Equal to the bit, apart from what was measured: seconds and images a second."""
    a, b = final_arrays(one), final_arrays(other)
    assert a.keys() == b.keys()
    assert len(a) > 20
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    a, b = (json.loads((workdir / "result.json").read_text()) for workdir in (one, other))
    assert {**a, "seconds": None} == {**b, "seconds": None}
    assert _logged(one) == _logged(other)


def _logged(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["values"].pop("images_per_second", None)
    return records


class _StopWhen(StopRequest):
    """A StopRequest that comes when a condition is met."""

    def __init__(self, condition):
        super().__init__()
        self._condition = condition

    def __call__(self):
        return signal.SIGTERM if self._condition() else 0


def run_until(step, config, workdir):
    """Runs a training that is asked to stop after the given step."""

    class Watched(Log):
        seen = 0

        def train(self, chunk, metrics):
            super().train(chunk, metrics)
            type(self).seen = chunk.end

    with (
        mock.patch.object(directory, "Log", Watched),
        mock.patch.object(train, "StopRequest", partial(_StopWhen, lambda: Watched.seen >= step)),
        pytest.raises(Stopped) as stopped,
    ):
        train.run(config, workdir)
    assert stopped.value.exit_code == 143


@pytest.mark.parametrize("several", [False, True], ids=["one run", "four runs from files"])
def test_stop_in_the_middle_of_an_epoch_and_go_on(several, tiny_config, tmp_path, monkeypatch):
    if several:
        tiny_config.num_seeds = 2
        tiny_config.sweep = (("optim.lr", (0.01, 0.02)),)
        # Each image is decoded and cropped in every epoch, later by other numbers of threads.
        tiny_config.data.name, tiny_config.data.crop = "folder", "random_resized(0.5)"
        tiny_config.data.dir = str(digits_folder(tmp_path / "digits"))
        tiny_config.data.size = 8
    whole, stopping = tmp_path / "whole", tmp_path / "stopping"
    train.run(tiny_config, whole)
    # Meanwhile, the system's clock runs backwards.
    now = itertools.count(2_000_000_000, -100)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(time, "time_ns", lambda: next(now) * 10**9)
    monkeypatch.setattr(photos, "num_cores", lambda: 3)
    for step in (6,) if several else (1, 6, 13):  # 5 steps an epoch; checkpoints are due every 4
        run_until(step, tiny_config, stopping)
    monkeypatch.undo()
    train.run(tiny_config, stopping)
    assert_same_run(whole, stopping)


def stop_in_evaluation(after, config, workdir):
    """Runs a training until so many batches are evaluated. Returns the step where it stops."""
    num_batches, original = 0, evaluator.compute

    def compute(*args):
        nonlocal num_batches
        for result in original(*args):
            num_batches += 1
            yield result

    with (
        mock.patch.object(evaluator, "compute", compute),
        mock.patch.object(train, "StopRequest", partial(_StopWhen, lambda: num_batches >= after)),
        pytest.raises(Stopped, match="SIGTERM after step") as stopped,
    ):
        train.run(config, workdir)
    assert num_batches == after
    return int(str(stopped.value).split()[-1])


def _kept(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def _val_is_due(workdir, step):
    progress = json.loads((workdir / f"checkpoints/{step}/progress/metadata").read_text())
    return progress["progress"].get("val_is_due", False)


def test_stop_in_the_middle_of_an_evaluation_and_go_on(tiny_config, tmp_path):
    for name in ("augment", "progressive_resizing", "select"):
        tiny_config[name] = ""  # which take most of the compiling
    tiny_config.eval_batch_size = 16  # val has 4 batches; it is evaluated after 5, 10 and 15 steps
    tiny_config.checkpoint_every = "5 steps"
    tiny_config.keep_checkpoints = 1
    whole, stopping = tmp_path / "whole", tmp_path / "stopping"
    train.run(tiny_config, whole)
    assert stop_in_evaluation(2, tiny_config, stopping) == 5
    assert _val_is_due(stopping, 5)
    assert stop_in_evaluation(4, tiny_config, stopping) == 5  # it is made, but not saved
    assert stop_in_evaluation(4 + 4 + 2, tiny_config, stopping) == 15  # the last step
    assert _val_is_due(stopping, 15)
    assert stop_in_evaluation(4 + 2, tiny_config, stopping) == 15  # the final evaluation
    train.run(tiny_config, stopping)
    assert_same_run(whole, stopping)
    assert _kept(whole) == _kept(stopping)


def test_a_run_is_stopped_after_a_step_that_it_has_saved(tiny_config, tmp_path, monkeypatch):
    looks = itertools.count()  # the signal comes just after the first look
    monkeypatch.setattr(train, "StopRequest", lambda: _StopWhen(lambda: next(looks)))
    with pytest.raises(Stopped) as stopped:
        train.run(tiny_config, tmp_path)
    step = str(stopped.value).removeprefix("SIGTERM after step ")
    assert (tmp_path / "checkpoints" / step).is_dir()


def command(workdir, epochs=6):
    return [
        sys.executable,
        "train.py",
        "--config=configs/digits.py",
        f"--config.epochs={epochs}",
        "--config.checkpoint_every=3 steps",
        "--config.log_every=2 steps",
        "--config.model=n94(widths=(8, 8))",
        f"--workdir={workdir}",
    ]


def _start(workdir, epochs=6):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(workdir, epochs), cwd=ROOT, env=environment, **pipes)


def _wait_for_checkpoint(process, workdir, beyond):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        names = [p.name for p in (workdir / "checkpoints").glob("*")]
        if any(name.isdigit() and int(name) > beyond for name in names):
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint beyond {beyond}: {process.communicate()[0]}")


def test_a_signal_saves_and_says_how_to_go_on(tmp_path):
    process = _start(tmp_path, epochs=200)  # long enough not to end by itself meanwhile
    _wait_for_checkpoint(process, tmp_path, beyond=0)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    step = int(output.partition("Stopped by SIGINT after step ")[2].split(".")[0])
    assert f"--workdir={tmp_path}" in output
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
