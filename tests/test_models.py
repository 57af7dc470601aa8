import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cv_jax.config import calls as spec
from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data.batches import make_batches
from cv_jax.models import (
    MODELS,
    build_model,
    compute_dtype,
    layers,
)
from cv_jax.models.convnext import ConvNeXt
from cv_jax.models.n94 import (
    Group,
    identity_init,
    unit_std_init,
    whitening_kernel,
)
from cv_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet
from cv_jax.models.vit import Block, sincos_positions
from cv_jax.models.wide_resnet import PreActivationBlock, WideResNet
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh
from cv_jax.tasks import build_task
from cv_jax.train.programs import try_step
from tests.conftest import random_dataset

# model, image size, classes, published parameter count (frozen ones included)
PUBLISHED = [
    ("convnext_t", 224, 1000, 28_589_128),  # torchvision, timm
    ("lenet", 32, 10, 62_006),  # of the tutorial's program
    ("n94", 32, 10, 1_971_640),  # 1.97M, arXiv 2404.00498
    ("n96", 32, 10, 9_915_704),  # by hand: 9 * 1,100,800 + 312 + 3,072 + 5,120
    ("resnet18", 32, 10, 11_173_962),  # kuangliu/pytorch-cifar
    ("resnet18(stem='imagenet')", 224, 1000, 11_689_512),  # torchvision
    ("resnet50", 32, 10, 23_520_842),  # kuangliu/pytorch-cifar
    ("resnet50(stem='imagenet')", 224, 1000, 25_557_032),  # torchvision
    # By hand: 9 * 216,160 + 2 * 1,408, and a head of 2,570
    ("unet", 32, 10, 1_950_826),
    # timm's vit_tiny_patch16_224, 5,717,416, without class token and 197 learned positions
    ("vit(192, 12, 3)", 224, 1000, 5_717_416 - 192 - 197 * 192),
    # timm's vit_small_patch16_224, 22,050,664, without these; then without the token's position
    ("vit_s16", 224, 1000, 22_050_664 - 384 - 197 * 384),
    ("vit_s16(pool='token', positions='learned')", 224, 1000, 22_050_664 - 384),
    ("wrn28_10", 32, 10, 36_479_194),  # 36.5M, arXiv 1605.07146
]
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def small_models(dtype):
    """One small network of each family, with the least image size it needs."""
    return {
        "lenet": (build_model("lenet", 3, dtype), 16),
        "n94": (build_model("n94(widths=(8, 4))", 3, dtype), 8),
        "n96": (build_model("n96(widths=(8, 4))", 3, dtype), 8),
        "basic": (ResNet((1, 1), False, "cifar", 3, dtype, width=4), 8),
        "bottleneck": (ResNet((1, 1), True, "imagenet", 3, dtype, width=4), 16),
        "wide": (WideResNet(10, 1, 3, dtype), 8),
        "vit": (build_model("vit(16, 2, 2, 4)", 3, dtype), 8),
        "convnext": (ConvNeXt((1, 1), (8, 16), 3, dtype), 8),
    }


def shapes(text, image_shape, num_classes=10, dtype=F32):
    """Shapes and dtypes of (variables, logits, intermediates); computes nothing."""
    model = build_model(text, num_classes, dtype)
    image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    logits, intermediates = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False), variables, image
    )
    return variables, logits, intermediates


def images(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), F32)


def some_variables(model, x):
    """Variables with values drawn by numpy: compiling the initialisers would take seconds."""
    return some_variables_of(model, x, train=False)


def some_variables_of(module, *args, **kwargs):
    draw = np.random.default_rng(3)

    def value(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.ones(leaf.shape)
        return jnp.asarray(draw.normal(size=leaf.shape) / math.prod(leaf.shape[:-1]) ** 0.5, F32)

    leaves = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    return jax.tree_util.tree_map_with_path(value, leaves)


def apply(model, variables, x):
    return jax.jit(lambda variables, x: model.apply(variables, x, train=False))(variables, x)


class Call(nn.Module):
    """A module around one layer function, to test it alone."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def test_every_model_is_in_the_table():
    assert {spec.parse(text)[0].name for text, *_ in PUBLISHED} == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "size", "num_classes", "count"), PUBLISHED)
def test_contract_and_published_parameter_count(text, size, num_classes, count):
    variables, logits, features = shapes(text, (2, size, size, 3), num_classes, BF16)
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {F32}
    assert (logits.shape, logits.dtype) == ((2, num_classes), F32)
    assert features["pooled"].shape == (2, variables["params"]["head"]["kernel"].shape[0])
    assert features["group1"].dtype == BF16


@pytest.mark.slow
def test_intermediates_have_the_documented_shapes():
    expected = {
        "lenet": {"group1": (1, 14, 14, 6), "group2": (1, 5, 5, 16), "pooled": (1, 84)},
        "n94": {
            "stem": (1, 31, 31, 24),
            "group1": (1, 15, 15, 64),
            "group2": (1, 7, 7, 256),
            "group3": (1, 3, 3, 256),
            "pooled": (1, 256),
        },
        "resnet50(stem='imagenet')": {
            "stem_conv": (1, 16, 16, 64),
            "stem": (1, 8, 8, 64),
            "group1": (1, 8, 8, 256),
            "group2": (1, 4, 4, 512),
            "group3": (1, 2, 2, 1024),
            "group4": (1, 1, 1, 2048),
            "pooled": (1, 2048),
        },
        "wrn28_10": {
            "stem": (1, 32, 32, 16),
            "group1": (1, 32, 32, 160),
            "group2": (1, 16, 16, 320),
            "group3": (1, 8, 8, 640),
            "pooled": (1, 640),
        },
    }
    for text, features in expected.items():
        _, _, intermediates = shapes(text, (1, 32, 32, 3))
        assert {name: feature.shape for name, feature in intermediates.items()} == features


@pytest.mark.parametrize("family", ["n94", "n96", "basic", "bottleneck", "wide"])
def test_training_moves_the_statistics_by_the_momentum(family):
    model, size = small_models(F32)[family]
    x = images(8, size, size, 3)

    variables = some_variables(model, x)

    @jax.jit
    def updated(statistics):
        now = {**variables, "batch_stats": statistics}
        return model.apply(now, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    start = variables["batch_stats"]
    once = updated(start)
    again = updated(once)
    # s1 = m s0 + (1 - m) batch and s2 = m s1 + (1 - m) batch, so s2 - s1 = m (s1 - s0).
    momentum = 0.6 if family in ("n94", "n96") else 0.9
    moved = jax.tree.map(lambda a, b: b - a, start, once)
    moved_again = jax.tree.map(lambda a, b: b - a, once, again)
    assert min(jnp.abs(leaf).min() for leaf in jax.tree.leaves(moved)) > 0
    chex.assert_trees_all_close(
        moved_again, jax.tree.map(lambda m: momentum * m, moved), atol=1e-6, rtol=1e-3
    )


@pytest.mark.parametrize("family", small_models(F32))
def test_bfloat16_stays_near_float32(family):
    (model, size), (coarse, _) = small_models(F32)[family], small_models(BF16)[family]
    x = images(4, size, size, 3)

    variables = some_variables(model, x)
    logits, features = apply(model, variables, x)
    coarse_logits, coarse_features = apply(coarse, variables, x)
    assert logits.dtype == coarse_logits.dtype == F32
    assert (features["group1"].dtype, coarse_features["group1"].dtype) == (F32, BF16)
    error = jnp.abs(logits - coarse_logits).max() / jnp.abs(logits).max()
    assert 0 < error < 0.03


# Layers


def test_convolution_by_hand():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    variables = {"params": {"c": {"kernel": kernel, "bias": jnp.array([0.5])}}}

    def conv(**settings):
        return Call(lambda x: layers.conv(x, 1, 2, use_bias=True, name="c", **settings))

    # The upper left output: 1 * 0 + 2 * 1 + 3 * 3 + 4 * 4, and the bias.
    expected = [[27.5, 37.5], [57.5, 67.5]]
    np.testing.assert_allclose(conv().apply(variables, x)[0, :, :, 0], expected)
    # Padded by one zero, every second place; the first row: 4 * 0, then 3 * 1 + 4 * 2.
    padded = conv(padding=1, strides=2).apply(variables, x)[0, :, :, 0]
    np.testing.assert_allclose(padded, [[0.5, 11.5], [30.5, 67.5]])


def test_pools():
    x = -jnp.arange(1.0, 17).reshape(1, 4, 4, 1)  # negative: a zero in the padding would win
    np.testing.assert_array_equal(layers.max_pool(x, 2)[0, :, :, 0], [[-1, -3], [-9, -11]])
    padded = layers.max_pool(x, 3, strides=2, padding=1)[0, :, :, 0]
    np.testing.assert_array_equal(padded, [[-1, -2], [-5, -6]])
    assert layers.max_pool(x[:, :3, :3], 2).shape == (1, 1, 1, 1)
    assert layers.global_max_pool(x) == -1
    assert layers.global_avg_pool(x) == -8.5


def test_mean_of_bfloat16_is_taken_in_float32():
    x = jnp.ones((1, 32, 32, 1), jnp.bfloat16).at[0, 0, 0, 0].set(2)
    np.testing.assert_allclose(layers.global_avg_pool(x), [[1 + 1 / 1024]], rtol=1e-6)


def test_gelu_is_exact():
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0], np.float32)
    expected = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, atol=1e-6)


def test_batch_norm_by_hand():
    norm = Call(lambda x: layers.batch_norm(x, True, epsilon=0.25, name="n"))
    x = jnp.array([[1.0], [5.0]])  # mean 3, variance 4
    y, variables = norm.init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, [[-2 / math.sqrt(4.25)], [2 / math.sqrt(4.25)]], rtol=1e-6)
    assert variables["params"]["n"] == {"scale": 1.0, "bias": 0.0}


def test_initial_values_are_uniform_in_one_over_root_fan_in():
    module = Call(lambda x: layers.conv(x, 64, 5, use_bias=True, name="c"))
    params = module.init(jax.random.key(0), jnp.zeros((1, 5, 5, 4)))["params"]["c"]
    for values in params.values():
        assert 0.09 < jnp.abs(values).max() <= 0.1  # fan_in 100
    assert params["kernel"].std() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)


# LeNet


def test_lenet_equals_numpy():
    model = build_model("lenet", 10, F32)
    x = images(2, 18, 20, 1)
    variables = some_variables(model, x)
    logits, _ = apply(model, variables, x)
    p = jax.tree.map(np.asarray, variables["params"])

    def conv_relu_pool(x, kernel, bias):
        h, w = (n - 4 for n in x.shape[1:3])
        y = np.zeros((len(x), h, w, len(bias))) + bias
        for i in range(5):
            for j in range(5):
                y += x[:, i : i + h, j : j + w] @ kernel[i, j]
        y = y[:, : h // 2 * 2, : w // 2 * 2].reshape(len(x), h // 2, 2, w // 2, 2, -1)
        return np.maximum(y, 0).max(axis=(2, 4))

    y = conv_relu_pool(np.asarray(x), **p["conv1"])
    y = conv_relu_pool(y, **p["conv2"]).reshape(2, -1)
    for name in ("dense1", "dense2"):
        y = np.maximum(y @ p[name]["kernel"] + p[name]["bias"], 0)
    np.testing.assert_allclose(logits, y @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-5)


# N94


@pytest.mark.parametrize(
    ("image", "sizes"),
    [
        ((28, 28, 1), [(27, 27), (13, 13), (6, 6), (3, 3)]),
        ((8, 8, 1), [(7, 7), (3, 3), (1, 1), (1, 1)]),
        ((2, 9, 3), [(1, 8), (1, 8), (1, 8), (1, 8)]),
        ((64, 48, 3), [(63, 47), (31, 23), (15, 11), (7, 5)]),
    ],
)
def test_n94_pools_while_there_is_something_to_pool(image, sizes):
    _, _, features = shapes("n94", (1, *image))
    names = ["stem", "group1", "group2", "group3"]
    assert [features[name].shape[1:3] for name in names] == sizes
    assert features["stem"].shape[3] == 8 * image[2]
    assert features["pooled"].shape == (1, 256)


def test_n96_adds_what_enters_its_second_convolution():
    group = Group(6, residual=True)
    x = images(4, 8, 8, 6)
    variables = some_variables(group, x)
    kernel = variables["params"]["conv3"]["kernel"]
    variables["params"]["conv3"]["kernel"] = jnp.zeros_like(kernel)
    y, kept = group.apply(
        variables,
        x,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name in ("norm1", "norm3"),
    )
    norm1, norm3 = (kept["intermediates"][name]["__call__"][0] for name in ("norm1", "norm3"))
    np.testing.assert_array_equal(norm3, np.broadcast_to(norm3[0, 0, 0], norm3.shape))
    np.testing.assert_allclose(y, layers.gelu(layers.gelu(norm1) + norm3), rtol=1e-6)


def test_n94_logits_are_divided_by_the_width():
    model, size = small_models(F32)["n94"]
    x = images(2, size, size, 3)
    variables = some_variables(model, x)
    logits, features = apply(model, variables, x)
    kernel = variables["params"]["head"]["kernel"]
    np.testing.assert_allclose(logits, features["pooled"] @ kernel / 4, atol=1e-6)


def test_whitening_kernel_gets_no_gradient_and_all_else_does():
    model, size = small_models(F32)["n94"]
    x = images(4, size, size, 3)
    variables = some_variables(model, x)

    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, x, train=False)
        return (logits**2).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert jnp.abs(gradient["whiten"].pop("kernel")).max() == 0
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_whitened_patches_have_identity_second_moments():
    x = images(50, 9, 8, 3)
    x = x.at[:, 1:].add(0.9 * x[:, :-1]) @ jnp.array([[1.0, 0.8, 0.5], [0, 1, 0.7], [0, 0, 1]])
    x = np.asarray(x)
    kernel = whitening_kernel(x)
    positive, negative = np.split(kernel, 2, axis=-1)
    np.testing.assert_array_equal(negative, -positive)
    response = sum(
        x[:, dy : 8 + dy, dx : 7 + dx] @ positive[dy, dx] for dy in range(2) for dx in range(2)
    ).reshape(-1, 12)
    np.testing.assert_allclose(response.T @ response / len(response), np.eye(12), atol=0.02)
    norms = np.linalg.norm(positive.reshape(12, 12), axis=0)
    assert (np.diff(norms) > 0).all()  # by decreasing eigenvalue


def test_params_from_images_are_the_whitening_kernel_alone():
    model, size = small_models(F32)["n94"]
    x = np.asarray(images(20, size, size, 3))
    params = model.params_from_images(x)
    assert jax.tree.structure(params) == jax.tree.structure({"whiten": {"kernel": 0}})
    np.testing.assert_array_equal(params["whiten"]["kernel"], whitening_kernel(x))
    initial = some_variables(model, x)["params"]["whiten"]["kernel"]
    chex.assert_equal_shape([params["whiten"]["kernel"], initial])


@pytest.mark.parametrize("features", [3, 8])
def test_identity_filters_pass_their_channels(features):
    kernel = identity_init(jax.random.key(0), (3, 3, 5, features), jnp.float32)
    x = images(1, 6, 6, 5)
    conv = Call(lambda x: layers.conv(x, features, 3, padding=1, name="c"))
    y = conv.apply({"params": {"c": {"kernel": kernel}}}, x)
    passed = min(5, features)
    np.testing.assert_array_equal(y[..., :passed], x[..., :passed])
    assert features <= 5 or jnp.abs(kernel[..., 5:]).min() > 0


def test_head_start_has_unit_deviation_and_no_tails():
    kernel = unit_std_init(jax.random.key(0), (256, 10), jnp.float32)
    assert kernel.std() == pytest.approx(1, abs=1e-5)
    assert jnp.abs(kernel).max() < 1.8  # uniform: sqrt(3)


# Residual networks


def test_strides_start_at_the_first_pixel():
    """Padding is symmetric, as in PyTorch; "SAME" would start at the second."""
    block = PreActivationBlock(3, strides=2)
    x = images(1, 6, 6, 3)
    center = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    params = {
        "norm1": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "norm2": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "conv1": {"kernel": center},
        "conv2": {"kernel": center},
        "shortcut": {"kernel": jnp.zeros((1, 1, 3, 3))},
    }
    statistics = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    variables = {"params": params, "batch_stats": {"norm1": statistics, "norm2": statistics}}
    y = apply(block, variables, x)
    np.testing.assert_allclose(y, nn.relu(x)[:, ::2, ::2] / (1 + 1e-5), rtol=1e-5)


def test_wide_shortcut_is_activated_only_where_the_shape_changes():
    x = images(1, 4, 4, 3)
    for strides, expected in [(1, x), (2, nn.relu(x)[:, ::2, ::2] / math.sqrt(1 + 1e-5))]:
        block = PreActivationBlock(3, strides)
        variables = some_variables(block, x)
        variables["params"]["norm1"]["bias"] = jnp.zeros(3)
        variables["batch_stats"]["norm1"]["mean"] = jnp.zeros(3)
        variables["params"]["conv2"]["kernel"] = jnp.zeros((3, 3, 3, 3))
        if strides == 2:
            variables["params"]["shortcut"]["kernel"] = jnp.eye(3)[None, None]
        y = apply(block, variables, x)
        np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_basic_block_adds_its_input_before_the_last_relu():
    block = BasicBlock(3, strides=1)
    x = images(1, 4, 4, 3)
    variables = some_variables(block, x)
    variables["params"]["norm2"] = {"scale": jnp.zeros(3), "bias": jnp.full(3, 0.5)}
    np.testing.assert_allclose(apply(block, variables, x), nn.relu(x + 0.5), rtol=1e-5)


def test_residual_filters_start_normal_with_two_over_fan_out():
    block = BasicBlock(64, strides=1)
    init = jax.jit(lambda x: block.init(jax.random.key(0), x, train=False))
    kernel = init(images(1, 4, 4, 32))["params"]["conv1"]["kernel"]
    assert kernel.std() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert jnp.abs(kernel).max() > 3 * kernel.std()


@pytest.mark.parametrize("block", [BasicBlock(8, 1, True), BottleneckBlock(2, 1, True)])
def test_a_block_with_a_zero_scale_starts_as_its_shortcut(block):
    x = images(2, 4, 4, 8)
    variables = some_variables(block, x)
    norms = [name for name in variables["params"] if "norm" in name]

    def scales(x):  # all else of the initial values is not compiled
        params = block.init(jax.random.key(0), x, train=False)["params"]
        return {name: params[name]["scale"] for name in norms}

    for name, scale in jax.jit(scales)(x).items():
        np.testing.assert_array_equal(scale, 0 if name == norms[-1] else 1)
        variables["params"][name] = {"scale": scale, "bias": jnp.zeros_like(scale)}
    np.testing.assert_array_equal(apply(block, variables, x), nn.relu(x))


def leaves_by_name(params):
    return list(flatten_dict(params, sep="/").items())


# Vision transformers


def test_fixed_positions_by_the_formula():
    found = sincos_positions(3, 5, 16)
    assert (found.shape, found.dtype) == ((3, 5, 16), F32)
    for y, x in [(0, 0), (2, 4), (1, 3)]:
        for i, frequency in enumerate(10_000 ** -(np.arange(4) / 3)):
            angles = [math.sin(x * frequency), math.cos(x * frequency)]
            angles += [math.sin(y * frequency), math.cos(y * frequency)]
            np.testing.assert_allclose(found[y, x, i::4], angles, atol=1e-6)


def test_a_block_attends_by_the_formula():
    block = Block(heads=2)
    x = images(1, 3, 8)
    variables = some_variables_of(block, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def dense(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return y * p[name]["scale"] + p[name]["bias"]

    y = np.asarray(x[0], np.float64)
    q, k, v = np.split(dense(norm(y, "norm1"), "qkv"), 3, axis=1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weight = np.exp(q[:, part] @ k[:, part].T / 2)  # the root of 4 channels
        heads.append(weight / weight.sum(1, keepdims=True) @ v[:, part])
    y = y + dense(np.concatenate(heads, axis=1), "out")
    hidden = dense(norm(y, "norm2"), "dense1")
    hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    found = jax.jit(block.apply)(variables, x)[0]
    np.testing.assert_allclose(found, y + dense(hidden, "dense2"), atol=1e-5)


@pytest.mark.slow
def test_a_vit_starts_as_big_vision_does():
    model = build_model("vit(64, 1, 4, 4)", 10, F32)
    params = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images(1, 8, 8, 3))
    block = params["params"]["block1"]
    for name, bound in {  # Xavier-uniform; of three joined square kernels
        "qkv": math.sqrt(6 / (64 + 64)),
        "out": math.sqrt(6 / (64 + 64)),
        "dense1": math.sqrt(6 / (64 + 256)),
    }.items():
        kernel = np.abs(block[name]["kernel"])
        assert 0.99 * bound < kernel.max() <= bound * (1 + 1e-6)
        assert not np.any(block[name]["bias"])
    stem = params["params"]["stem"]["kernel"]
    assert stem.std() == pytest.approx(1 / math.sqrt(48), rel=0.05)
    assert not np.any(params["params"]["head"]["kernel"])


def test_positions_and_pool_change_the_arrays():
    plain, token, learned = (
        shapes(f"vit(16, 1, 2, 4{settings})", (1, 8, 12, 3))[0]["params"]
        for settings in ("", ", pool='token'", ", positions='learned'")
    )
    assert token.keys() - plain.keys() == {"token"}
    assert learned.keys() - plain.keys() == {"positions"}
    assert learned["positions"].shape == (2, 3, 16)


def test_a_vit_takes_sides_that_are_multiples_of_its_patch():
    _, _, features = shapes("vit(16, 5, 2, 4)", (2, 8, 12, 1))
    assert list(features) == [f"group{i}" for i in range(1, 6)] + ["pooled", "stem"]
    assert {x.shape for name, x in features.items() if name != "pooled"} == {(2, 2, 3, 16)}
    message = "patches of 16x16 pixels needs images whose sides are multiples of 16, but got 32x40"
    with pytest.raises(UserError, match=message):
        shapes("vit_s16", (1, 32, 40, 3))


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_every_parameter_gets_a_finite_gradient(family):
    model, size = small_models(F32)[family]
    x = images(2, size, size, 3)
    variables = some_variables(model, x)

    def loss(params):
        return (model.apply({"params": params}, x, train=True)[0] ** 2).sum()

    for path, leaf in leaves_by_name(jax.jit(jax.grad(loss))(variables["params"])):
        assert np.isfinite(leaf).all()
        assert np.any(leaf), path


# Layers of patches


def test_convolutions_of_patches_and_of_channels_equal_lax():
    x = images(2, 7, 9, 4)
    zeros, draw = nn.initializers.zeros, np.random.default_rng(1)
    for layer, shape, strides, padding, groups in [
        (layers.patch_conv, (2, 2, 4, 6), (2, 2), "VALID", 1),
        (layers.depthwise_conv, (3, 3, 1, 4), (1, 1), "SAME", 4),
    ]:
        sizes = (6, 2) if groups == 1 else (3,)
        kernel, bias = jnp.asarray(draw.normal(size=shape), F32), jnp.arange(float(shape[-1]))
        y = Call(lambda x, f=layer, s=sizes: f(x, *s, kernel_init=zeros, name="c")).apply(
            {"params": {"c": {"kernel": kernel, "bias": bias}}}, x
        )
        names = ("NHWC", "HWIO", "NHWC")
        expected = jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=names, feature_group_count=groups
        )
        np.testing.assert_allclose(y, expected + bias[None, None, None], atol=1e-5)


# Names and messages


def test_spec_arguments_reach_the_model():
    assert build_model("n94(widths=(32, 64))", 7, BF16).widths == (32, 64)
    assert build_model("resnet18(stem='imagenet')", 7, BF16).stem == "imagenet"
    assert build_model("resnet50", 7, BF16).num_classes == 7
    assert build_model("lenet", 7, BF16).dtype == BF16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n49", "Did you mean 'n96'. There are: convnext_t, lenet, n94, n96, resnet18, resnet50, "),
        ("resnet18(depth=3)", r"'depth'.*Write it as resnet18\(stem: str = 'cifar', zero_scale: "),
        ("resnet50(stem='mnist')", "stem='mnist' must be one of cifar, imagenet"),
        ("n94(widths=(64, 0))", r"widths=\(64, 0\) must be one or more numbers, each from 1"),
        ("n94(widths=64)", r"widths=64 must be tuple\[int, \.\.\.\]"),
        ("vit(width=10)", "width=10 must be a multiple of 4 and of heads=6, and at least 8"),
        ("vit(depth=0)", "depth=0 must be from 1 to 65536"),
        ("vit_s16('max')", "pool='max' must be mean or token"),
        ("vit(positions='none')", "positions='none' must be sincos or learned"),
        ("n94(widths=())", r"widths=\(\) must be one or more numbers, each from 1 to"),
    ],
)
def test_unknown_models_and_arguments_are_explained(text, message):
    with pytest.raises(UserError, match=message):
        build_model(text, 10, F32)


class _Own(nn.Module):
    returns: str

    @nn.compact
    def __call__(self, x, train):
        logits = layers.dense(x.mean((1, 2)), 10 if self.returns != "classes" else 7, name="head")
        return {
            "logits": logits,
            "none": None,
            "classes": (logits, {"pooled": logits}),
            "no pooled": (logits, {"stem": logits}),
            "right": (logits, {"pooled": logits}),
        }[self.returns]


@pytest.mark.parametrize(
    ("returns", "described"),
    [
        ("logits", "float32 (1, 10)"),
        ("none", "None"),
        ("classes", "(float32 (1, 7), {'pooled': float32 (1, 7)})"),
        ("no pooled", "(float32 (1, 10), {'stem': float32 (1, 10)})"),
    ],
)
def test_a_model_that_returns_something_else_is_described(monkeypatch, returns, described):
    monkeypatch.setitem(MODELS, "own", lambda returns, *, num_classes, dtype: _Own(returns))
    data = random_dataset()
    config = base_config()
    config.model = "own('right')"
    build_task(config, data.spec)
    config.model = f"own({returns!r})"
    message = f"_Own.__call__ returned {described} for float32 (1, 8, 8, 1); return logits (1"
    with pytest.raises(UserError, match=re.escape(message)):
        build_task(config, data.spec)
    config.model = "own('right')"  # which has 10 classes where a backbone has none
    config.task, config.method = "ssl", "simclr"
    with pytest.raises(UserError, match=r"return logits \(1, 0\) and a dict"):
        build_task(config, data.spec)
    monkeypatch.setitem(MODELS, "own", lambda *, num_classes, dtype: None)
    with pytest.raises(UserError, match=r"config\.model='own': its function returned None"):
        build_model("own", 10, F32)


@pytest.mark.parametrize(("text", "shape"), [("lenet", (1, 15, 40, 3)), ("n94", (1, 8, 1, 3))])
def test_too_small_images_are_named(text, shape):
    with pytest.raises(UserError, match=f"'{text}' needs images of .* got {shape[1]}x{shape[2]}"):
        shapes(text, shape)


def test_compute_dtype(monkeypatch):
    assert compute_dtype("float32") == compute_dtype("auto") == F32  # tests run on the CPU
    assert compute_dtype("bfloat16") == BF16
    for platform in ("tpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert compute_dtype("auto") == BF16
    with pytest.raises(UserError, match=r"config\.dtype='float16' must be"):
        compute_dtype("float16")


def test_a_model_of_one_size_names_the_flag_that_keeps_it():
    config = base_config()
    config.model, config.batch_size = "lenet", 4
    data = random_dataset((32, 32, 3))
    config.progressive_resizing = "size(20, until=0.5)"
    with pytest.raises(UserError, match=r"one size only: write --config.progressive_resizing=''"):
        build_task(config, data.spec)
    config.progressive_resizing, config.augment = "", "random_resized_crop(24)"
    task = build_task(config, data.spec)
    batches = make_batches(config, data.train, derive_keys(0).order, make_mesh())
    with pytest.raises(UserError, match=r"one size only .*write no augmentation that changes the"):
        try_step(task, batches.shapes, make_mesh())


@pytest.mark.parametrize(
    ("mean", "least", "most"),
    [(1, 0, 1e-4), (10, 0, 1e-3), (100, 5e-3, 5e-2), (1000, 0.3, math.inf)],
)
def test_batch_norm_is_as_exact_as_its_docstring_says(mean, least, most):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.batch_norm(x, True, name="norm", epsilon=1e-12)

    x = np.float32(mean + 0.1 * np.random.default_rng(0).normal(size=(64, 8, 8, 4)))
    y, _ = Norm().init_with_output(jax.random.key(0), x)
    error = np.abs(np.asarray(y, np.float64).std((0, 1, 2)) - 1).max()
    assert least <= error <= most
