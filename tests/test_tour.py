"""The notebook runs from top to bottom, says what is true, and lies here as it came out."""

import re

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

PATH = ROOT / "notebooks" / "tour.ipynb"


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _text(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_notebook_lies_here_as_it_came_out():
    cells = _code(nbformat.read(PATH, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert {output.get("name", "stdout") for output in cell.outputs} <= {"stdout"}
        shows = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        assert shows == len(re.findall(r"^(?:show\(|plt\.show\()", cell.source, re.M)), cell.source
        prints = re.search(r"^ *print\(|train\.run\(", cell.source, re.M)
        assert bool(_text(cell)) == bool(prints), cell.source


def test_the_notebook_is_small_and_names_no_machine():
    text = PATH.read_text()
    assert len(text) < 500_000
    assert not re.search(r"/(?:home|root|tmp|Users|work|private|var)/", text)
    assert nbformat.read(PATH, as_version=4).metadata.kernelspec.name == "python3"


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_is_true(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it writes
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")  # compiles sooner
    notebook = nbformat.read(PATH, as_version=4)
    for cell in _code(notebook):
        cell.outputs = []
    where = {"metadata": {"path": PATH.parent}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()

    said = {cell.id: _text(cell) for cell in _code(notebook)}
    for name in ("result", "predict", "seeds"):
        accuracies = re.findall(r"\b[01]\.\d{4}\b", said[name].partition("mean")[0])
        assert len(accuracies) == {"result": 2, "predict": 1, "seeds": 3}[name]
        assert min(map(float, accuracies)) > 0.9
    by_hand, by_train = (
        np.array(re.findall(r"\d+\.\d+", said[name]), float) for name in ("hand", "same")
    )
    assert len(by_hand) == 6
    np.testing.assert_allclose(by_hand, by_train, rtol=2e-3)
    (first, _) = re.findall(r"\d+e[-+]\d+", said["rounding"])
    assert float(first) < 1e-4
