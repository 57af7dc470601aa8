"""Runs and files that older code left: predict, report and init_from read them."""

import json
import tarfile

import numpy as np
import pytest
from etils.epath import Path

import train
from cv_jax.config.errors import UserError
from cv_jax.learn.stored import read_config, read_variables
from cv_jax.tools.report import command as report
from cv_jax.trained import load_trained
from tests.conftest import ROOT

IMAGE = np.arange(0, 256, 4, dtype=np.uint8).reshape(1, 8, 8, 1)
# What commit 9ff8080, which made the run, predicted for IMAGE with the views of the run.
PROBABILITIES = {
    "seed=0": [
        0.09205,
        0.11114,
        0.09501,
        0.09099,
        0.07668,
        0.11138,
        0.10729,
        0.13317,
        0.09072,
        0.09157,
    ],
    "seed=1": [
        0.12391,
        0.08753,
        0.09135,
        0.10415,
        0.09645,
        0.10178,
        0.1082,
        0.0824,
        0.11317,
        0.09106,
    ],
}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A run of configs/digits.py:smoke: two seeds, averaged parameters, n94(widths=(2, 2))."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ROOT / "tests" / "older_run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return Path(folder) / "run"


def _probabilities(network):
    logits = np.asarray(network.task.predict(network.state, {"image": IMAGE})["logits"][0])
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


@pytest.mark.parametrize("run", PROBABILITIES)
def test_an_older_run_predicts_what_it_did(older, run):
    network = load_trained(older, run)
    np.testing.assert_allclose(_probabilities(network), PROBABILITIES[run], atol=2e-5)
    assert network.spec.class_names == tuple("0123456789")
    assert network.spec.fields["label"].fill == -1


def test_an_older_exported_file_predicts_what_it_did(older):
    pytest.importorskip("safetensors")
    network = load_trained(older / "export" / "model.safetensors")
    np.testing.assert_allclose(_probabilities(network), PROBABILITIES["seed=0"], atol=2e-5)
    assert read_variables(older / "export" / "model.safetensors").steps == 4


@pytest.mark.slow
def test_an_older_run_has_a_report(older, tmp_path):
    report.report([str(older)], tmp_path / "report.html", images=50)
    html = (tmp_path / "report.html").read_text()
    assert "10.16" in html  # the accuracy of its result.json in %
    assert "of the first 50 test images" in html


@pytest.mark.slow
def test_resuming_an_older_run_is_refused_in_a_sentence(older):
    config = read_config(older)
    config = config.copy_and_resolve_references()
    before = (older / "result.json").read_text()
    with config.unlocked():
        config.steps = 8
    with pytest.raises(
        UserError, match=r"holds another state than this program's.* env\.json names"
    ):
        train.run(config.lock(), older)
    assert (older / "result.json").read_text() == before
    assert json.loads(before)["test"]["accuracy"]["n"] == 2
