"""A profiled run: its trace can be read and holds what was asked for; its result is the same."""

import re
import signal
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from cv_jax.config.errors import UserError
from cv_jax.config.plan import Chunk, Intervals, plan_chunks
from cv_jax.runtime.clock import Clock, Pace
from cv_jax.runtime.signals import Stopped
from cv_jax.train import profile
from cv_jax.train.profile import (
    Profiler,
    format_rate,
    peak_flops,
    roofline,
)
from cv_jax.workdir import directory
from cv_jax.workdir.log import Log

TINY = ("--config=configs/digits.py:smoke", "--config.model=n94(widths=(4,))")  # 4 steps


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(profile, "SIZES", (16, 32))


def _traced_steps(workdir):
    """How many steps the only trace holds: as often as the operations that a step makes once."""
    (path,) = (workdir / "profile").glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    names = Counter(e.name for plane in planes for line in plane.lines for e in line.events)
    return min(count for name, count in names.items() if re.match(r"dot|conv_general", name))


def _final_arrays(workdir):
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore())
        return jax.tree.leaves(manager.restore(manager.latest_step(), args=arguments)["state"])


@pytest.mark.slow
def test_a_profiled_run_ends_in_the_same_bits(tiny_config, tmp_path, capsys):
    plain = train.run(tiny_config, tmp_path / "plain", 0)
    assert "FLOP/s" not in capsys.readouterr().out
    assert not (tmp_path / "plain" / "profile").exists()

    traced = train.run(tiny_config, tmp_path / "traced", 6)  # 8 to 13 of 15, with an evaluation
    assert capsys.readouterr().out.count("profile 6 steps, ") == 1
    for key in ("val", "test", "steps", "flops"):
        assert plain[key] == traced[key], key
    assert plain["seconds"].keys() == traced["seconds"].keys()
    a, b = (_final_arrays(tmp_path / name) for name in ("plain", "traced"))
    assert len(a) > 20
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_restarted_run_traces_its_next_steps(tiny_config, tmp_path, capsys):
    tiny_config.epochs = 1.0
    train.run(tiny_config, tmp_path, 0)
    tiny_config.epochs = 3.0
    train.run(tiny_config, tmp_path, 2)
    output = capsys.readouterr().out
    assert "resumes after step 5" in output
    assert "profile 2 steps, " in output
    assert _traced_steps(tmp_path) == 2


@pytest.mark.slow
def test_a_stop_in_the_middle_closes_the_trace(tiny_config, tmp_path, capsys, monkeypatch):
    class SignalAtStep8(Log):
        def train(self, chunk, metrics):
            super().train(chunk, metrics)
            if chunk.end == 8:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "Log", SignalAtStep8)
        with pytest.raises(Stopped):
            train.run(tiny_config, tmp_path, 4)  # steps 6 to 9; a row is due after 8
    output = capsys.readouterr().out
    assert "cut short" in output
    assert "FLOP/s" not in output
    assert _traced_steps(tmp_path) == 3

    train.run(tiny_config, tmp_path, 4)  # a trace that was left open would refuse another
    assert "profile 4 steps, " in capsys.readouterr().out


@pytest.mark.slow
def test_the_flag_and_what_is_said(train_py, tmp_path):
    for steps in (-1, 3):
        wrong = train_py(*TINY, f"--profile_steps={steps}", f"--workdir={tmp_path}")
        assert wrong.returncode == 2
        assert f"--profile_steps={steps} must be between 0 and 2: this run has 4" in wrong.stderr
        assert "Traceback" not in wrong.stderr + wrong.stdout

    done = train_py(*TINY, "--profile_steps=2", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    rate = r"[\d.]+ [GT]FLOP/s"
    assert re.search(
        rf"^profile 2 steps, \S+ FLOP a step in \S+ s = {rate}, \d+% of the {rate} that a "
        r"matrix product reaches here \(float32\)$",
        done.stdout,
        re.M,
    )
    assert f"xprof --logdir={tmp_path / 'profile'}" in done.stdout
    assert _traced_steps(tmp_path) == 2


class _FakeLog:
    """A log that settles at once and keeps its lines."""

    def __init__(self):
        self.lines, self.pace = [], Pace()
        self.pace.seconds_per_step = 0.05  # 10 steps a dispatch
        self.line = self.lines.append

    def settle(self):
        pass


def test_untraced_steps_are_timed_and_the_clock_counts_steps_alone(monkeypatch, tmp_path):
    now, tracing = 0.0, False

    def spend(seconds):
        nonlocal now
        now += seconds

    def trace(is_on):
        nonlocal tracing
        tracing = is_on
        spend(100.0)

    monkeypatch.setattr("cv_jax.runtime.clock.time.perf_counter", lambda: now)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: trace(True))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: trace(False))
    monkeypatch.setattr(profile, "peak_flops", lambda dtype: spend(1000.0) or 4e9)
    clock, log = Clock(), _FakeLog()
    trainer = SimpleNamespace(dtype="float32", step_flops=lambda: 10**9)
    profiler = Profiler(7, 40, tmp_path, trainer, log, clock)
    chunks: list[Chunk] = []
    with clock("train"), profiler:
        for chunk in plan_chunks(0, Intervals(40, 0, 0, 0), lambda step: 5, profiler.pace):
            with profiler(chunk):
                spend(chunk.num_steps * (3.0 if tracing else 0.5) + (9.0 if not chunk.start else 0))
            chunks.append(chunk)
    assert [chunk.end for chunk in chunks] == [1, 6, 8, 13, 15, 20, 25, 30, 35, 40]
    assert "7 steps, 1.00e+09 FLOP a step in 0.5 s = 2 GFLOP/s, 50%" in log.lines[0]
    assert clock.read()["train"] == 9 + 7 * 3.0 + 33 * 0.5
    assert clock.read()["compile"] == 1200


@pytest.mark.parametrize(("steps", "remaining", "most"), [(-1, 9, 7), (8, 9, 7), (1, 1, 0)])
def test_more_steps_than_the_run_has_are_refused(steps, remaining, most):
    with pytest.raises(UserError, match=f"={steps} must be between 0 and {most}: "):
        Profiler(steps, remaining, None, None, None, None)


def test_as_many_steps_are_timed_as_the_run_has(tmp_path):
    profiler = Profiler(7, 9, tmp_path, None, _FakeLog(), Clock())
    assert profiler.pace() == 1
    with profiler(Chunk(0, 1, False, False, False)):
        pass
    assert profiler.pace() == 1


def test_without_steps_nothing_is_held_up(tmp_path):
    assert Profiler(0, 1, tmp_path, None, _FakeLog(), Clock()).pace() == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_is_measured_in_the_dtype(dtype):
    assert 0 < peak_flops(jnp.dtype(dtype)) < 1e16


def test_rates_are_written_for_a_person(monkeypatch):
    rates = (2.345e9, 999.4e9, 999.6e9, 1.5e14)
    assert [format_rate(rate).removesuffix("FLOP/s") for rate in rates] == [
        "2.35 G",
        "999 G",
        "1 T",
        "150 T",
    ]
    monkeypatch.setattr(profile, "peak_flops", lambda dtype: 165e9)
    assert roofline(354 * 10**9, 2.9, jnp.dtype("float32")) == (
        "3.54e+11 FLOP a step in 2.9 s = 122 GFLOP/s, 74% of the 165 GFLOP/s that a matrix product "
        "reaches here (float32)"
    )
