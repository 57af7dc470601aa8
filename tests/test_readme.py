"""README keeps what it says: its commands and files exist, its examples work."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax import models
from cv_jax.augment.chain import AUGMENTATIONS, make_augment
from cv_jax.data import Split
from cv_jax.data.dataset import Stored, check_stored, hold_out
from cv_jax.models.layers import conv, dense, global_avg_pool
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def _example(name):
    (code,) = [text for kind, text in BLOCKS if kind == "python" and name in text]
    space = {
        "Augment": None,
        "Split": Split,
        "Stored": Stored,
        "conv": conv,
        "dense": dense,
        "global_avg_pool": global_avg_pool,
        "jax": jax,
        "jnp": jnp,
        "nn": nn,
        "np": np,
    }
    exec(code, space)
    return space[name.split()[-1]]


def test_the_quick_start_is_two_commands_that_bring_their_installation():
    commands = BLOCKS[0][1].strip().splitlines()
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)
    assert "pip install --quiet -r requirements.txt && " in commands[0]
    assert "--config=configs/digits.py" in commands[0]
    assert "pip install --quiet -r requirements-dev.txt && " in commands[1]
    assert "pytest" in commands[1]


FILES = set(re.findall(r"\b(?:cv_jax|configs)/[\w/]+\.py", README)) - {"configs/X.py"}


@pytest.mark.parametrize("path", sorted(FILES))
def test_a_file_that_is_named_is_there(path):
    assert (ROOT / path).exists()


def test_every_config_with_a_result_has_its_record():
    rows = re.findall(r"^\| (\w+) \|.* %", README, re.M)
    assert len(rows) >= 3
    for row in rows:
        assert (ROOT / "results" / f"{row}.json").exists()


def test_the_model_example_runs(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", _example("def tiny"))
    model = models.build_model("tiny(4)", num_classes=3, dtype=jnp.float32)
    logits, features = model.init_with_output(
        jax.random.key(0), jnp.ones((2, 5, 5, 3)), train=False
    )[0]
    assert logits.shape == (2, 3)
    assert features["pooled"].shape == (2, 4)


def test_the_data_example_is_a_data_set():
    data = hold_out("stripes", check_stored("stripes", _example("def load_stripes")()), 100)
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (700, 100, 200)
    assert data.spec.mean == pytest.approx(0.5)


def test_the_augmentation_example_inverts(monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "invert", _example("def invert"))
    batch = {"image": jnp.full((100, 1, 1, 1), 0.25)}
    got = make_augment("invert(0.5)")(jax.random.key(0), batch)["image"].ravel()
    assert set(got.tolist()) == {0.25, 0.75}
    assert 30 < (got == 0.75).sum() < 70
