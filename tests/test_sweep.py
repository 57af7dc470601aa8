"""What can be swept, what cannot and why, and how it is written."""

import jax
import numpy as np
import pytest

from cv_jax.config.command_line import gather_sweeps
from cv_jax.config.errors import UserError
from cv_jax.config.sweep import make_sweep
from cv_jax.data.batches import make_batches
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh
from cv_jax.train.sweeps import check_sweep
from tests.conftest import random_dataset


def _sweep(config, **values):
    config.sweep = tuple((key.replace("__", "."), value) for key, value in values.items())
    sweep = make_sweep(config)
    data, keys = random_dataset(), derive_keys(0)
    batches = make_batches(config, data.train, keys.order, make_mesh())
    check_sweep(sweep, config, data.spec, batches.shapes)
    return sweep


@pytest.fixture
def config(tiny_config):
    tiny_config.batch_size = 10
    return tiny_config


@pytest.mark.slow
def test_a_grid_in_the_order_of_its_keys(config):
    sweep = _sweep(config, optim__lr=(0.1, 0.2, 0.3), label_smoothing=(0.0, 0.5))
    assert sweep.settings[:3] == [
        {"optim.lr": 0.1, "label_smoothing": 0.0},
        {"optim.lr": 0.1, "label_smoothing": 0.5},
        {"optim.lr": 0.2, "label_smoothing": 0.0},
    ]
    (rates,), (smoothing,) = sweep.values.values()
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    np.testing.assert_allclose(smoothing, [0.0, 0.5] * 3)
    put = sweep.apply(config, {"optim.lr": ["lr"], "label_smoothing": ["s"]})
    assert (put.optim.lr, put.label_smoothing) == ("lr", "s")
    assert config.label_smoothing == 0.0


@pytest.mark.slow
def test_the_numbers_of_a_text(config):
    sweep = _sweep(
        config, augment=("rotate(5)|cutout(2, fill=0.5)", "rotate(15)|cutout(2, fill=1.0)")
    )
    degrees, fill = sweep.values["augment"]
    np.testing.assert_array_equal(degrees, [5, 15])
    np.testing.assert_array_equal(fill, [0.5, 1.0])
    rotate, cutout = sweep.apply(config, {"augment": [7, 0.25]}).augment
    assert (rotate.args, cutout.args, cutout.kwargs) == ((7,), (2,), {"fill": 0.25})


def test_nothing_swept_is_one_setting(config):
    assert _sweep(config).settings == [{}]
    assert _sweep(config).values == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("optim__lr", (0.1, 1.0)),
        ("optim__momentum", (0.1, 0.9)),
        ("optim__weight_decay", (0.0, 0.1)),
        ("optim__name", ("adamw(b2=0.9)", "adamw(b2=0.99)")),
        ("optim__schedule", ("cosine(final=0.1)", "cosine(final=0.2)")),
        ("label_smoothing", (0.0, 0.1)),
        ("augment", ("affine(degrees=5.0, shear=1.0)", "affine(degrees=6.0, shear=2.0)")),
        ("augment", ("color_jitter(0.0)|mixup(0.1)", "color_jitter(0.3)|mixup(1.0)")),
    ],
)
def test_numbers_of_the_step_can_be_swept(config, key, values):
    assert len(_sweep(config, **{key: values}).settings) == 2


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("optim__lrr", (1, 2), "no key 'optim.lrr'. Did you mean 'optim.lr'"),
        ("batch_size", (10, 20), "all runs of a program share it"),
        ("data__limit", (10, 20), "all runs of a program share it"),
        ("data__label_seed", (0, 1), "config.data.label_seed cannot be swept: all runs of a"),
        ("init_from", ("a", "b"), "config.init_from cannot be swept: all runs of a program share"),
        ("model", ("lenet", "n94"), "'lenet' is not a number"),
        ("model", ("n94(widths=(8, 8))", "n94(widths=(8, 4))"), "it decides what the program is"),
        ("optim__clip_norm", (0.0, 1.0), "it decides what the program is"),
        ("augment", ("flip", "flip|crop(1)"), "differ in more than numbers"),
        ("optim__warmup", ("1 epoch", "2 epochs"), "'1 epoch' is not understood"),
        ("optim__lr", (0.1,), "two or more values"),
        ("optim__lr", (0.1, 0.1), "all values are equal"),
        ("optim__lr", (0.1, -0.1), "config.optim.lr=-0.1 must be above 0"),
        ("augment", ("flip(0.5)", "flip(1.5)"), "p=1.5 must lie in"),
        ("optim__lr", ({1: 2, "a": 3}, 0.1), "config.optim.lr cannot be swept"),
        ("optim__momentum", (0, 2**31), "2147483648 does not fit into 32 bits"),
    ],
)
def test_what_cannot_be_swept_says_why(config, key, values, message):
    with pytest.raises(UserError) as refused:
        _sweep(config, **{key: values})
    assert message in str(refused.value)


@pytest.fixture
def without_labels(config):
    config.select = config.progressive_resizing = ""
    config.augment = "translate(1)"
    config.optim.rules = ((".*", "base"),)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "methods"),
    [
        ("ssl", ("simclr(0.1, projector=(8,))", "simclr(0.5, projector=(8,))")),
        ("ssl", ("byol(0.9, (8,), (8,))", "byol(0.99, (8,), (8,))")),
        ("autoencoder", ("masked(4, 0.5, 8, (8,))", "masked(4, 0.75, 8, (8,))")),
    ],
)
def test_numbers_of_a_method_can_be_swept(without_labels, task, methods):
    without_labels.task, without_labels.method = task, methods[0]
    assert len(_sweep(without_labels, method=methods).settings) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "methods"),
    [
        ("ssl", ("simclr(projector=(8,))", "simclr(projector=(4,))")),
        ("autoencoder", ("masked(2, latent=8)", "masked(4, latent=8)")),
    ],
)
def test_shapes_of_a_method_cannot_be_swept(without_labels, task, methods):
    without_labels.task, without_labels.method = task, methods[0]
    with pytest.raises(UserError, match=r"method cannot be swept: it decides what the program is"):
        _sweep(without_labels, method=methods)


def test_the_command_line():
    argv = ["train.py", "--config.sweep.optim.lr=(0.1, 0.2)", "--config.seed=3"]
    argv += ["--config.sweep.augment=('flip(0.1)', 'flip(0.2)')"]
    sweeps = "(('optim.lr', (0.1, 0.2)), ('augment', ('flip(0.1)', 'flip(0.2)')))"
    assert gather_sweeps(argv) == ["train.py", "--config.seed=3", f"--config.sweep={sweeps}"]
    assert gather_sweeps(["train.py"]) == ["train.py"]
    for wrong in ("0.1,x", "0.1", "(0.1"):
        with pytest.raises(UserError, match=r'write the values as "\(0\.1, 0\.2\)"'):
            gather_sweeps([f"--config.sweep.optim.lr={wrong}"])


def test_one_value_of_a_sweep_is_traced_as_itself(config):
    """The rate of a traced lr is the one of the number."""
    from cv_jax.optim.optimizers import make_optimizer

    params = {"kernel": jax.ShapeDtypeStruct((2, 2), "float32")}
    config.optim.rules = ((".*", "base"),)

    def rate(lr):
        sweep = make_sweep(config)
        optim = sweep.apply(config, {"optim.lr": [lr]}).optim
        return make_optimizer(optim, params, 10, 10, lambda duration: 0).lr(3)["lr"]

    config.sweep = (("optim.lr", (0.1, 0.2)),)
    np.testing.assert_allclose(jax.jit(rate)(0.3), rate(0.3), rtol=1e-6)
