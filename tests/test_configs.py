"""Every config makes a task, some train, and every leaf is read by somebody."""

import ast
import importlib.util
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import train
from cv_jax.config.base import base_config, flatten
from cv_jax.data.batches import make_batches
from cv_jax.data.load import load_dataset
from cv_jax.data.sources.photos import PHOTO_KEYS
from cv_jax.data.splits import limit_examples
from cv_jax.models import build_model
from cv_jax.models.layers import conv, dense
from cv_jax.models.ops import plain_lax
from cv_jax.optim.optimizers import make_optimizer
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh
from cv_jax.tasks import build_task
from cv_jax.train import agreement
from cv_jax.train.flops import evaluation_flops, step_flops
from cv_jax.train.programs import try_step
from cv_jax.workdir import directory
from tests.conftest import ROOT, random_dataset

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _load(path: Path, arg: str = "") -> ml_collections.ConfigDict:
    module = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location(path.stem, path)
    )
    spec.loader.exec_module(module)
    return module.get_config(arg)


class _Watched(ml_collections.ConfigDict):
    """A config that notes which of its leaves are read."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if not isinstance(value, ml_collections.ConfigDict):
            self.__dict__["read"].add(self.__dict__["prefix"] + key)
        return value


def _watch(config, read, prefix=""):
    watched = _Watched()
    watched.__dict__.update(read=read, prefix=prefix)
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            value = _watch(value, read, f"{prefix}{key}.")
        watched[key] = value
    return watched.lock()


def _smoke(path):
    """The config, of two steps on a few random images, and those images."""
    config = _load(path, "smoke")
    config.epochs, config.steps = 1.0, 0
    config.batch_size = 16 if config.select else 4
    config.eval_batch_size, config.data.limit = 8, 2 * config.batch_size
    config.init_from = ""  # of a run that is not here
    if config.task in ("detection", "segmentation"):
        data = base_config().data
        data.name, data.num_val = "shapes", 8
        return config, limit_examples(load_dataset(data), config.data.limit)
    # A Wide ResNet takes images of any size.
    image_shape = {"digits": (8, 8, 1), "cifar100": (8, 8, 3)}.get(config.data.name, (32, 32, 3))
    num_classes = 100 if config.data.name == "cifar100" else 10
    return config, limit_examples(random_dataset(image_shape, num_classes), config.data.limit)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_makes_a_task(path):
    config, data = _smoke(path)
    read: set[str] = set()
    with plain_lax():  # traced in half of the time; to compile all of them would take minutes
        task = build_task(_watch(config, read), data.spec)
        batches = make_batches(config, data.train, derive_keys(0).order, make_mesh())
        try_step(task, batches.shapes, make_mesh())
        table = next(note for note in task.notes if note.startswith("rule "))
        # Of its own model every rule decides something: a letter wrong in one shows here.
        unused = [row.split()[0] for row in table.splitlines() if row.split()[2] == "0"]
        assert set(unused) <= {".*"}
        assert step_flops(task, batches.shapes, len(task.stages) - 1) > 0
        assert evaluation_flops(task, data.spec, 8) > 0
    groups = {key for key in flatten(config) if key.startswith("optim.groups.")}
    assert groups - read == set()


class _Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        pooled = conv(x, 4, 3, name="conv").mean((1, 2))
        return dense(pooled, 10, name="head"), {"pooled": pooled}


@pytest.mark.parametrize("model", ["lenet", "resnet18", "tiny"])
def test_every_config_has_rules_for_other_models(model):
    module = _Tiny() if model == "tiny" else build_model(model, 10, jnp.float32)
    image = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(partial(module.init, train=False), jax.random.key(0), image)["params"]
    for path in CONFIGS:
        config = _load(path)
        backbone = params if config.task == "classification" else {"backbone": params}
        optimizer = make_optimizer(config.optim, backbone, 100, config.batch_size, lambda text: 0)
        assert not optimizer.frozen or path.stem == "cifar10_linear"
        rows = [row.split()[:3] for row in optimizer.report.splitlines()[1:]]
        assert sum(int(arrays) for _, _, arrays in rows) == len(jax.tree.leaves(params))
        assert ["whiten/.*", "frozen", "0"] in rows or path.stem != "digits"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "cifar10_lenet", "cifar10_linear"])
def test_a_config_trains_and_every_leaf_is_read(name, tmp_path, monkeypatch):
    config, data = _smoke(ROOT / "configs" / f"{name}.py")
    read: set[str] = set()
    results = []

    def load(config_data):  # reads what load_dataset does, and needs no data
        assert config_data.name
        assert config_data.dir == ""
        labels = config_data.labels_per_class, config_data.label_fraction, config_data.label_seed
        assert min(config_data.num_val, config_data.limit, *labels) >= 0
        assert not config_data.keep_unlabelled
        assert all(config_data[key] == default for key, default in PHOTO_KEYS.items())
        assert (config_data.workers, config_data.on_error) == (0, "replace")
        assert config_data.val_fraction == 0
        return data

    monkeypatch.setattr(agreement, "load_dataset", load)
    # These look at the config as a whole, which is not what reading a leaf means.
    monkeypatch.setattr(train, "check", lambda config: None)
    monkeypatch.setattr(directory, "adopt_workdir", lambda workdir, config: [])
    monkeypatch.setattr(directory, "write_result", lambda *arguments: results.append(arguments))
    with plain_lax():
        train.run(_watch(config, read), tmp_path)

    assert flatten(config).keys() - read == set()
    _, _, _, _, steps, sums, flops, *_ = results[0]
    assert steps == 2
    assert flops["training"] > 0
    assert flops["evaluation"] > 0
    assert sums["test"]["accuracy"][1].tolist() == [config.data.limit]
    assert np.isfinite(sums["test"]["loss"][0])


def test_a_config_without_argument_is_whole_and_smoke_is_short():
    for path in CONFIGS:
        few_labels = path.stem in ("cifar10_few_labels", "cifar10_finetune")
        assert _load(path).steps == (300 if few_labels else 0)
        assert _load(path, "smoke").steps == 4
        assert path.stem in _load_docstring(path)


def _load_docstring(path):
    return ast.get_docstring(ast.parse(path.read_text()))
