"""The fault test in short: four of its events; tests/test_stopping.py has the others."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_a_run_survives_what_disturbs_it():
    chaos = ["-m", "tests.chaos", "--rounds=4", "--epochs=4", "--seed=13"]
    done = subprocess.run([sys.executable, *chaos], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for event in ("SIGKILL", "SIGTERM", "full disk", "damaged checkpoint"):
        assert f"\n{event} " in done.stdout
