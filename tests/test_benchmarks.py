"""The PyTorch twins compute what cv_jax computes; ratios and records say what they should."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import input as input_side
from benchmarks import lenet, machine, photo_loaders, step
from benchmarks.ours import build, check_loss, loop, step_config
from benchmarks.step import Case
from benchmarks.worker import MEAN, STD, random_images
from cv_jax.config.base import base_config
from cv_jax.learn.losses import cross_entropy
from cv_jax.models import build_model
from cv_jax.models.ops import plain_lax
from tests.conftest import random_dataset

BATCH = 8


# The twins


def _assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def _twin(name):
    if name == "lenet":
        from benchmarks.torch_lenet import LeNet

        return LeNet()
    from benchmarks.torch_models import MODELS

    return MODELS[name]()


def _layer(tree, path):
    for key in path.split("."):
        tree = tree[key]
    return tree


def _copy(variables, twin):
    """Copies Flax's variables into the twin, whose modules have the same names."""
    import torch

    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # h w c o -> o c h w; c o -> o c
    left = set(twin.state_dict())
    for path, leaf in jax.tree.leaves_with_path(variables):
        _, *parents, last = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        array = np.asarray(leaf)
        if array.shape == (400, 120):  # LeNet's: flattened from h w c; in PyTorch, from c h w
            array = array.reshape(5, 5, 16, 120).transpose(2, 0, 1, 3).reshape(400, 120)
        name = ".".join([*parents, names.get(last, last)])
        with torch.no_grad():
            target = twin.state_dict()[name]
            target.copy_(torch.tensor(array.transpose(order[array.ndim]).copy()))
        left.remove(name)
    scales = "norm1.weight", "norm2.weight"  # of n94: ones that are not trained
    assert all(name.endswith(("num_batches_tracked", *scales)) for name in left)


@pytest.fixture
def on_plain_lax():
    """The networks are compared here; tests/test_ops.py holds the ops against lax."""
    with plain_lax():
        yield


@pytest.mark.usefixtures("on_plain_lax")
@pytest.mark.parametrize(
    ("name", "conv"),
    # A late layer of ResNet-18: below, ReLUs that flip at 0 by rounding move the gradients of both
    # sides by some 0.3 % from what float64 gives, and the third loss with them.
    [("n94", "group2.conv1"), ("resnet18", "group4_block1.conv2"), ("lenet", "conv2")],
)
def test_the_torch_twin_computes_the_same(name, conv):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_models import make_step

    task, _, _ = build(step_config(name, BATCH, "float32"), num_train=BATCH)
    state = jax.jit(task.init)(jax.random.key(0))
    twin = _twin(name)
    _copy({"params": state.params, **state.model_state}, twin)
    trained = sum(p.numel() for p in twin.parameters() if p.requires_grad)
    frozen = 288 if name == "n94" else 0  # the whitening filters
    assert trained == sum(leaf.size for leaf in jax.tree.leaves(state.params)) - frozen

    # Logits in train mode, and the gradient of one layer's filters.
    image, label = random_images(BATCH)
    x = (image.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    model = build_model(name, 10, jnp.dtype("float32"))

    def loss(params):
        (logits, _), _ = model.apply(
            {**state.model_state, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, jax.nn.one_hot(label, 10)).mean(), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(state.params)
    twin_label = torch.from_numpy(label).long()
    twin_logits = twin(torch.from_numpy(x).permute(0, 3, 1, 2))
    torch.nn.functional.cross_entropy(twin_logits, twin_label).backward()
    _assert_close(twin_logits.detach().numpy(), logits)
    twin_gradient = twin.get_submodule(conv).weight.grad.numpy()
    _assert_close(twin_gradient, _layer(gradient, conv)["kernel"].transpose(3, 2, 0, 1))

    # The loss after two steps; the third one shows it.
    _copy({"params": state.params, **state.model_state}, twin)
    twin_step = make_step(twin, "float32", torch.contiguous_format)
    zeros = jnp.zeros(BATCH, jnp.int32)
    batch = {"image": image, "label": label, "index": zeros, "epoch": zeros, "coin": zeros}
    train_step = jax.jit(task.train_step)
    for _ in range(3):
        state, metrics = train_step(state, batch, jax.random.key(0))
        total, count = metrics["loss"]
        got = twin_step(torch.from_numpy(image).permute(0, 3, 1, 2), twin_label)
        rel = 1e-3 if name == "resnet18" else 1e-4
        assert float(got) == pytest.approx(float(total / count), rel=rel)
    if name == "n94":  # whose momentum PyTorch counts the other way round
        mean = state.model_state["batch_stats"]["group1"]["norm1"]["mean"]
        _assert_close(twin.group1.norm1.running_mean.numpy(), mean)


def test_the_tutorials_images_are_normalised():
    torch_lenet = pytest.importorskip("torch") and pytest.importorskip("benchmarks.torch_lenet")
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    got = torch_lenet.normalize(torch_lenet.to_tensor(torch_lenet.Image.fromarray(image)))
    np.testing.assert_allclose(got.numpy(), image.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


# Numbers


def test_a_ratio_is_the_median_over_paired_rounds():
    ratio = machine.paired_ratio([4.0, 9.0, 2.0], [2.0, 3.0, 2.0])
    assert ratio == {"median": 2.0, "rounds": [2.0, 3.0, 1.0]}
    with pytest.raises(ValueError, match="zip"):
        machine.paired_ratio([1.0], [1.0, 2.0])


def _result(case, *seconds, steps=2):
    rows = [{"seconds": s, "peak_bytes": 10 + i, "loss": 3 - i} for i, s in enumerate(seconds)]
    return step.summarize(rows, steps, case)


def test_the_best_of_each_side_meet():
    seconds = {
        "cv_jax-float32": (4.0, 4.0, 4.0),
        "cv_jax-bfloat16": (6.0, 6.0, 6.0),
        "torch-float32": (5.0, 5.0, 5.0),
        "torch-bfloat16-channels_last": (2.0, 3.0, 2.0),
    }
    cases = {variant: Case(variant, 10) for variant in seconds}
    results = {case: _result(case, *seconds[variant]) for variant, case in cases.items()}
    expected = {
        "against": "torch-bfloat16-channels_last/10",
        "median": 0.5,
        "rounds": [0.5, 0.75, 0.5],
    }
    assert step.compare(results)["best_speed"] == {"cv_jax-float32/10": expected}


def test_ratios_are_against_the_best_float32_variant():
    ours, big = Case("cv_jax-float32", 10), Case("cv_jax-float32", 40)
    plain, last = Case("torch-float32", 10), Case("torch-float32-channels_last", 10)
    half = Case("torch-bfloat16", 10)
    results = {
        ours: _result(ours, 2.0, 4.0, 4.0),
        big: _result(big, 4.0, 8.0, 16.0),
        plain: _result(plain, 9.0, 9.0, 9.0),
        last: _result(last, 4.0, 8.0, 6.0),
        half: {"warm_up_seconds": 0.1, "given_up": False},
    }
    assert results[ours] == {
        "seconds_per_step": 2.0,
        "images_per_second": 5.0,
        "peak_bytes": 12,
        "loss": 1,
        "rounds": [1.0, 2.0, 2.0],
    }
    ratios = step.compare(results)
    against = "torch-float32-channels_last/10"
    expected = {"against": against, "median": 2.0, "rounds": [2.0, 2.0, 1.5]}
    assert ratios["speed"] == {"cv_jax-float32/10": expected}
    expected = {"against": "cv_jax-float32/10", "median": 0.5, "rounds": [0.5, 0.5, 1.0]}
    assert ratios["image_cost"] == {"cv_jax-float32/40": expected}
    text = step.report(results, ratios)
    assert f"cv_jax-float32/10 is 2.000 times as fast as {against} (1.500 to 2.000)" in text
    assert "torch-bfloat16/10                  the warm-up step took 0.1 s" in text


def test_the_tutorials_medians():
    def runs(*walls):
        seconds = [{"data": w, "train": 2 * w, "eval": w} for w in walls]
        return [
            {"wall": w, **lenet.per_epoch(s, epochs=4), "accuracy": 0.5}
            for w, s in zip(walls, seconds, strict=True)
        ]

    results = lenet.summarize({"cv_jax": runs(1.0, 2.0, 3.0), "torch": runs(8.0, 4.0, 3.0)})
    assert results["medians"]["torch"] == {
        "wall": 4.0,
        "epoch": 2.0,
        "whole_epoch": 4.0,
        "accuracy": 0.5,
    }
    assert results["speed"]["wall"] == {"median": 2.0, "rounds": [8.0, 2.0, 1.0]}


def test_a_record_says_where_it_comes_from(tmp_path):
    args = step.parse(["--batch_size=4,8", "--rounds=3", f"--out={tmp_path / 'x.json'}"])
    assert args.batch_size == [4, 8]
    assert args.variants == ["cv_jax-float32"]
    machine.save("step", args, {"cases": {}})
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["n"] == 3
    assert record["settings"]["batch_size"] == [4, 8]
    assert record["machine"]["cores"] >= 1
    assert {"cpu", "cpu_flags"} < set(record["machine"])
    assert {"python", "jax", "jaxlib", "flax", "torch"} < set(record["versions"])
    assert {"commit", "dirty", "command", "results"} < set(record)


def test_an_unknown_variant_is_named(capsys):
    with pytest.raises(SystemExit):
        step.parse(["--variants=torch-float32,jax"])
    assert "there is no variant jax" in capsys.readouterr().err


# Programs


@pytest.mark.slow
def test_the_loop_trains_and_gives_the_last_steps_loss():
    task, batches, keys = build(step_config("lenet", BATCH, "float32"), num_train=5 * BATCH)
    init = jax.jit(task.init)
    step_by_step = loop(task.train_step, batches, init(keys.init), keys.step)
    at_once = loop(task.train_step, batches, init(keys.init), keys.step)
    losses = [step_by_step(1)["loss"] for _ in range(7)]  # an epoch has five steps
    assert at_once(7)["loss"] == losses[-1] != losses[0]


@pytest.mark.slow
def test_losses_agree_with_plain_lax(capsys):
    losses = check_loss("n94", batch_size=BATCH, num_steps=2)
    assert max(losses["relative_difference"]) < 1e-4
    assert len(losses["lax"]) == capsys.readouterr().out.count("relative difference") == 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["resident", "stream"])
def test_the_input_side_counts_images(way):
    config = base_config()
    config.augment = "alternating_flip|crop(2)"
    results = input_side.measure(config, random_dataset(), [20], num_images=100, rounds=2)
    assert set(results) == {"resident/20", "stream/20"}
    seconds = results[f"{way}/20"]["rounds"]
    assert len(seconds) == 2
    assert results[f"{way}/20"]["images_per_second"] == pytest.approx(100 / np.mean(seconds))


@pytest.mark.slow
def test_the_first_and_the_cached_start_are_timed():
    config = base_config()
    config.data.limit = 5
    assert set(input_side.time_load(config)) == {"first", "cached"}


def test_no_side_imports_the_other():
    pytest.importorskip("torch")
    code = "import sys, benchmarks.worker, benchmarks.torch_models; print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=machine.ROOT) == b"False\n"


@pytest.mark.slow
def test_workers_answer_in_turn(monkeypatch, private_cache):
    pytest.importorskip("torch")
    monkeypatch.setitem(os.environ, "CV_JAX_CACHE", str(private_cache))
    command = ["--batch_size=2", "--rounds=2", "--steps=2", "--cap=1e9"]
    args = step.parse([*command, "--variants=cv_jax-float32,torch-float32-channels_last"])
    cases = [Case(variant, 2) for variant in args.variants]
    results = step.measure(cases, args)
    assert [len(results[case]["rounds"]) for case in cases] == [2, 2]
    assert list(step.compare(results)["speed"]) == ["cv_jax-float32/2"]


def test_a_slow_worker_is_given_up_and_a_broken_one_named(monkeypatch):
    pytest.importorskip("torch")
    args = step.parse(["--rounds=1", "--limit=0.001", "--variants=torch-float32"])
    case = Case("torch-float32", 100)
    assert step.measure([case], args)[case] == {"warm_up_seconds": 0.001, "given_up": True}
    args.model = "unknown"
    with pytest.raises(step.WorkerEnded, match="torch-float32/100"):
        step.measure([case], args)


def test_our_loader_yields_each_photo_in_its_place(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((9, 8, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.jpg")
    photos = photo_loaders.Photos(str(tmp_path), 4 * photo_loaders.BATCH_SIZE)
    batches = photo_loaders.load_ours(photos, ThreadPoolExecutor)
    means = np.concatenate([batch.mean((1, 2, 3)) for batch in batches])
    np.testing.assert_allclose(means, 80 * (np.arange(len(photos)) % 3), atol=2)
