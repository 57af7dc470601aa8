"""The fault test in short: each of its events once."""

import subprocess
import sys

import pytest

from tests.chaos import EVENTS
from tests.conftest import ROOT


@pytest.mark.slow
def test_a_run_survives_each_event():
    chaos = ["-m", "tests.chaos", f"--rounds={len(EVENTS)}", "--epochs=4", "--seed=2"]
    done = subprocess.run([sys.executable, *chaos], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"\n{event} " in done.stdout for event in EVENTS)
