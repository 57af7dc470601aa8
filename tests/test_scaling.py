"""The table of scaling: how it is made, and that docs/scaling.md has the one of its file."""

import json
import re
import shlex

import pytest

from cv_jax.tools import scaling
from tests.conftest import ROOT

RECORD = json.loads((ROOT / "results/scaling.json").read_text())
DOC = (ROOT / "docs/scaling.md").read_text()


def _row(chips, images_per_chip, seconds):
    estimated = {"step_seconds": seconds, "utilisation": 0.25}
    row = {"chips": chips, "images_per_chip": images_per_chip, "peak_memory_bytes": 1.26e9}
    return {**row, "estimated": estimated}


def test_efficiency_is_beside_one_chip_with_as_many_images():
    rows = [_row(1, 8, 0.004), _row(1, 16, 0.009), _row(64, 8, 0.008), _row(64, 16, 0.01)]
    assert scaling.table(rows).splitlines()[2:] == [
        "| 8 | 1.3 | 4.0 | 2,000 | 25.0% | 50.0% |",
        "| 16 | 1.3 | 9.0 | 1,778 | 25.0% | 90.0% |",
    ]


def test_the_document_has_the_table_of_its_file():
    assert scaling.table(RECORD["rows"]) in DOC
    assert RECORD["commit"][:7] in DOC
    assert RECORD["changed"] is False
    shown = re.search(r"python -m cv_jax.tools.scaling .*?(?=\n```)", DOC, re.S)[0]
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(RECORD["command"])


def test_the_times_in_the_text_follow_from_the_bytes():
    """C = 2 (n - 1) / n * bytes / bandwidth."""
    shown = re.search(r"= ([\d.]+) ms for 8 chips, ([\d.]+) for 64, ([\d.]+) for 256", DOC)
    for row in RECORD["rows"]:
        if row["chips"] > 1:
            seconds = float(shown[(8, 64, 256).index(row["chips"]) + 1]) / 1e3
            assert row["estimated"]["collective_seconds"] == pytest.approx(seconds, abs=5e-6)
