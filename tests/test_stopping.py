"""Signals end a run in order, and a work directory has one owner at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from cv_jax.config.errors import UserError
from cv_jax.runtime.signals import (
    CutShort,
    Stopped,
    StopRequest,
    answer_signals_during,
    is_busy,
    raise_when_signalled,
)
from cv_jax.workdir.lock import Lock
from tests.conftest import ROOT


@pytest.fixture
def handlers():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_the_first_signal_asks_and_the_second_stops():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_elsewhere_a_signal_is_raised_and_the_second_kills(handlers, signum):
    raise_when_signalled()
    with pytest.raises(Stopped, match=signum.name) as stopped:
        signal.raise_signal(signum)
    assert stopped.value.exit_code == 128 + signum
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class _SignalledInItsEnd:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_a_destructor_is_not_lost(handlers):
    raise_when_signalled()
    with pytest.raises(Stopped, match="SIGTERM"):  # noqa: PT012 (it comes a moment later)
        _SignalledInItsEnd()
        time.sleep(60)


def test_a_signal_is_answered_while_another_thread_works(handlers):
    raise_when_signalled()
    go_on = threading.Event()

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        go_on.wait()

    with pytest.raises(Stopped, match="SIGTERM"):
        answer_signals_during(work)
    assert is_busy()
    go_on.set()
    while is_busy():
        time.sleep(0.01)


def test_a_stop_request_ends_the_wait_unless_it_must_be_agreed(monkeypatch):
    looks, go_on = [], threading.Event()

    def stop():
        looks.append(len(looks))
        return signal.SIGTERM if len(looks) == 3 else 0

    with pytest.raises(CutShort):
        answer_signals_during(go_on.wait, stop)
    go_on.set()
    assert looks == [0, 1, 2]
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert answer_signals_during(lambda: time.sleep(0.2) or "done", stop) == "done"
    assert len(looks) == 3


def test_an_error_of_another_thread_is_raised():
    with pytest.raises(UserError, match="too large"):
        answer_signals_during(partial(_raise, UserError("too large")))


def _raise(error):
    raise error


@pytest.mark.slow
def test_sigterm_while_it_compiles(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={tmp_path}"]
    cold = {**os.environ, "JAX_PLATFORMS": "cpu", "CV_JAX_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=cold, **pipes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "env.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert "Stopped by SIGTERM. To go on:" in output
    assert "Traceback" not in output


def test_a_directory_has_one_owner(tmp_path):
    file = Lock(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*another --workdir"):
        Lock(tmp_path / "run")
    file.close()
    Lock(tmp_path / "run").close()


def test_a_lock_does_not_outlive_its_owner(tmp_path):
    code = (
        "import pathlib, cv_jax.workdir.lock as l; "
        f"f = l.Lock(pathlib.Path({str(tmp_path)!r})); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    deadline = time.monotonic() + 60
    while not (tmp_path / "lock").exists() or not (tmp_path / "lock").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {owner.pid}"):
        Lock(tmp_path)
    owner.kill()
    owner.communicate()
    Lock(tmp_path).close()


def test_a_directory_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run \(Not a directory\); choose another --workdir"):
        Lock(tmp_path / "file" / "run")
