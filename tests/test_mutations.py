"""Some mutated configs: each trains, or is refused in one paragraph."""

import pytest

from tests import mutations
from tests.conftest import ROOT

# Of libraries: elsewhere they are no errors.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def test_a_mutated_config_trains_or_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")  # what a process has cannot change
    counts, offenders = mutations.run(examples=8, chosen_seed=0)
    assert not offenders, offenders
    assert counts["trained"]
    assert counts["refused"]
