"""config.init_from of files with the names of torchvision and timm, in numbers and in messages."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.learn import initial
from cv_jax.learn.foreign import FAMILIES, translate
from cv_jax.learn.initial import take_over
from cv_jax.learn.inputs import make_denormalize, make_normalize
from cv_jax.models import build_model
from cv_jax.models.convnext import ConvNeXt
from cv_jax.models.ops import plain_lax
from cv_jax.models.resnet import ResNet
from cv_jax.models.vit import resample_positions
from cv_jax.tasks import build_task
from tests.conftest import random_dataset

F32 = jnp.dtype("float32")
VIT = "vit(width=8, depth=2, heads=2, patch=4, pool='token', positions='learned')"


def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def batch_norm(name, c):
    averages = {f"{name}.running_mean": (c,), f"{name}.running_var": (c,)}
    return {**layer(name, c), **averages, f"{name}.num_batches_tracked": ()}


def resnet_names(depths, bottleneck, classes):
    """Names and shapes of torchvision's ResNets."""
    found = {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64)}
    before = 64
    for i, depth in enumerate(depths):
        width, after = 64 * 2**i, (256 if bottleneck else 64) * 2**i
        sizes = [(width, 1), (width, 3), (after, 1)] if bottleneck else [(width, 3), (width, 3)]
        for j in range(depth):
            block, c = f"layer{i + 1}.{j}", before
            for k, (o, size) in enumerate(sizes, start=1):
                found[f"{block}.conv{k}.weight"] = (o, c, size, size)
                found |= batch_norm(f"{block}.bn{k}", o)
                c = o
            if j == 0 and (bottleneck or i > 0):
                found[f"{block}.downsample.0.weight"] = (after, before, 1, 1)
                found |= batch_norm(f"{block}.downsample.1", after)
            before = after
    return {**found, **layer("fc", classes, before)}


def vit_names(c, depth, patch, length, classes):
    """Names and shapes of timm's ViTs with a class token."""
    found = {"cls_token": (1, 1, c), "pos_embed": (1, length, c)}
    found |= layer("patch_embed.proj", c, 3, patch, patch)
    for i in range(depth):
        found |= {**layer(f"blocks.{i}.norm1", c), **layer(f"blocks.{i}.norm2", c)}
        found |= layer(f"blocks.{i}.attn.qkv", 3 * c, c) | layer(f"blocks.{i}.attn.proj", c, c)
        found |= layer(f"blocks.{i}.mlp.fc1", 4 * c, c) | layer(f"blocks.{i}.mlp.fc2", c, 4 * c)
    return {**found, **layer("norm", c), **layer("head", classes, c)}


def convnext_names(depths, widths, classes):
    """Names and shapes of timm's ConvNeXts."""
    found = {**layer("stem.0", widths[0], 3, 4, 4), **layer("stem.1", widths[0])}
    for i, (depth, c) in enumerate(zip(depths, widths, strict=True)):
        if i > 0:
            found |= layer(f"stages.{i}.downsample.0", widths[i - 1])
            found |= layer(f"stages.{i}.downsample.1", c, widths[i - 1], 2, 2)
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}"
            found |= {f"{block}.gamma": (c,), **layer(f"{block}.conv_dw", c, 1, 7, 7)}
            found |= {**layer(f"{block}.norm", c), **layer(f"{block}.mlp.fc1", 4 * c, c)}
            found |= layer(f"{block}.mlp.fc2", c, 4 * c)
    return {**found, **layer("head.norm", c), **layer("head.fc", classes, c)}


def random_arrays(names):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}


def shapes_of(model, size):
    image = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))


def never(name):
    return False


@pytest.fixture
def write(tmp_path):
    """(arrays, metadata) -> the name of a safetensors file."""
    save_file = pytest.importorskip("safetensors.numpy").save_file

    def written(arrays, metadata=None):
        initial._read.cache_clear()  # a test may write the file again
        save_file(arrays, tmp_path / "net.safetensors", metadata)
        return str(tmp_path / "net.safetensors")

    return written


@pytest.mark.parametrize(
    ("model", "size", "names", "count"),
    [  # the numbers of arrays are those of torchvision 0.28 and timm 1.0
        ("resnet18(stem='imagenet')", 64, resnet_names((2, 2, 2, 2), False, 1000), 122),
        ("resnet50(stem='imagenet')", 64, resnet_names((3, 4, 6, 3), True, 1000), 320),
        (
            "vit_s16(pool='token', positions='learned')",
            224,
            vit_names(384, 12, 16, 197, 1000),
            152,
        ),
        ("convnext_t", 64, convnext_names((3, 3, 9, 3), (96, 192, 384, 768), 1000), 182),
    ],
    ids=["resnet18", "resnet50", "vit_s16", "convnext_t"],
)
def test_every_name_has_its_place_in_our_network(model, size, names, count):
    assert len(names) == count
    zero = np.zeros((), np.float32)
    family, found = translate({name: np.broadcast_to(zero, s) for name, s in names.items()})
    wanted = flatten_dict(shapes_of(build_model(model, 1000, F32), size), sep="/")
    assert {p: x.shape for p, x in found.items()} == {p: x.shape for p, x in wanted.items()}
    assert FAMILIES[family].model.partition("(")[0][:3] == model[:3]


def test_layouts_change_by_hand():
    names = {**vit_names(8, 11, 4, 5, 10), **resnet_names((1,), False, 10)}
    theirs = random_arrays(names)
    _, vit = translate({n: theirs[n] for n in vit_names(8, 11, 4, 5, 10)})
    assert vit["params/stem/kernel"][1, 2, 0, 7] == theirs["patch_embed.proj.weight"][7, 0, 1, 2]
    assert vit["params/block11/qkv/kernel"][3, 20] == theirs["blocks.10.attn.qkv.weight"][20, 3]
    positions, token = theirs["pos_embed"][0], theirs["cls_token"][0, 0]
    np.testing.assert_array_equal(vit["params/token"], token + positions[0])
    np.testing.assert_array_equal(vit["params/positions"][1, 0], positions[3])
    _, resnet = translate({n: theirs[n] for n in resnet_names((1,), False, 10)})
    ours = resnet["params/group1_block1/conv2/kernel"]
    assert ours[2, 0, 5, 9] == theirs["layer1.0.conv2.weight"][9, 5, 2, 0]
    ours = resnet["batch_stats/stem_norm/var"]
    np.testing.assert_array_equal(ours, theirs["bn1.running_var"])


def test_positions_without_a_token_and_of_registers():
    names = vit_names(8, 1, 4, 4, 10)
    del names["cls_token"]
    _, found = translate(random_arrays(names))
    assert found["params/positions"].shape == (2, 2, 8)
    _, found = translate(random_arrays({**names, "pos_embed": (1, 7, 8)}))
    assert found["params/pos_embed"].shape == (1, 7, 8)  # left over


def test_positions_are_resampled_to_another_grid():
    ramp = np.stack([*np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")], -1)
    found = resample_positions(np.float32(ramp), 8, 6)
    assert found.shape == (8, 6, 2)
    # Away from the border a ramp stays one, half as steep; centres of pixels correspond.
    np.testing.assert_allclose(found[3:5, 2, 0], [1.25, 1.75], atol=1e-5)
    np.testing.assert_array_equal(resample_positions(np.float32(ramp), 4, 4), ramp)


def says(write, change, allow=never, metadata=None):
    """What a ViT's file is refused with, after a change of its arrays."""
    arrays = random_arrays(vit_names(8, 2, 4, 5, 10))
    change(arrays)
    file = write(arrays, metadata)
    with pytest.raises(UserError) as error:
        take_over(file, shapes_of(build_model(VIT, 10, F32), 8), allow, never)
    message = str(error.value)
    assert message.startswith(f"config.init_from={file!r}: ")
    assert "\n" not in message
    return message


def test_what_does_not_fit_is_named(write):
    missing = says(write, lambda arrays: arrays.pop("blocks.1.mlp.fc1.bias"))
    assert "1 parameter does not fit: block2/dense1/bias is missing in RUN. Choose" in missing
    fits = "the config.model of a ViT of timm, vit_s16(pool='token', positions='learned')"
    assert f"{fits}, or allow the differences" in missing
    extra = says(write, lambda arrays: arrays.update({"fc_norm.weight": np.ones(8)}))
    assert "1 parameter does not fit: fc_norm.weight is only in RUN. Choose" in extra
    wide = says(write, lambda arrays: arrays.update({"head.bias": np.ones(7, np.float32)}))
    assert "head/bias is (7,) in RUN and (10,) here" in wide
    nan = says(write, lambda arrays: arrays["norm.bias"].fill(np.nan))
    assert "norm/bias is not finite" in nan


def test_an_unknown_network_is_refused_by_some_of_its_names(write):
    message = says(write, lambda arrays: arrays.pop("patch_embed.proj.weight"))
    assert (
        "the file's arrays, such as blocks.0.attn.proj.bias, blocks.0.attn.proj.weight, " in message
    )
    assert "are not those of cv_jax.tools.export, a ResNet of torchvision or timm or a V" in message
    # A card says that the file is of cv_jax.tools.export.
    card = json.dumps({"run": "seed=0", "steps": 3})
    message = says(write, lambda arrays: None, metadata={"card": card})
    assert "has no part ''" in message


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_a_pickle_file_is_not_opened(tmp_path, suffix):
    message = r"net\.\w+ is a pickle file, which may execute code; .*torch\.save_file\("
    with pytest.raises(UserError, match=message):
        take_over(f"{tmp_path}/net.{suffix}", {"params": {}}, never, never)


def config_of(file, **leaves):
    config = base_config()
    config.model, config.init_from, config.batch_size = VIT, file, 8
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in leaves.items()})
    return config.lock()


def test_a_classifier_of_other_classes_and_size_starts_from_a_file(write):
    arrays = random_arrays(vit_names(8, 2, 4, 1 + 3 * 3, 1000))
    file = write(arrays)
    spec = random_dataset((8, 16, 3)).spec
    task = build_task(config_of(file, init_anew="head/.*"), spec)
    hint, first, table = task.notes[-3:]
    assert hint.endswith("most such networks expect config.data.normalize_by=half")
    assert first == f"init    {file}, a ViT of timm"
    rows = {row.split()[0]: row.split()[1:3] for row in table.splitlines()[1:]}
    assert rows == {
        "initialised": ["2", "90"],
        "loaded": ["29", "2,160"],
        "resampled": ["1", "64"],
    }

    def some(key):  # the other, random values are not compiled
        params = task.init(key).params
        return params["block1"]["qkv"]["kernel"], params["positions"], params["head"]["kernel"]

    qkv, positions, head = jax.jit(some)(jax.random.key(0))
    np.testing.assert_array_equal(qkv, arrays["blocks.0.attn.qkv.weight"].T)
    assert positions.shape == (2, 4, 8)
    assert not np.any(head)


def test_a_file_becomes_the_backbone_of_a_task_that_has_one(write):
    file = write(random_arrays(vit_names(8, 2, 4, 5, 10)))
    leaves = {"task": "ssl", "method": "simclr(projector=(8,))", "data__normalize_by": "half"}
    allow = "projector/.*|backbone/head/.*"
    task = build_task(config_of(file, init_allow=allow, **leaves), random_dataset((8, 8, 3)).spec)
    loaded, missing, skipped = task.notes[-1].splitlines()[1:]
    assert loaded.split()[1] == "30"
    assert "projector/dense1/kernel" in missing
    assert skipped.split()[3:] == ["backbone/head/bias,", "backbone/head/kernel"]
    assert "inputs  normalised by half: mean 0.5, std 0.5" in task.notes


def test_inputs_are_normalised_as_other_networks_expect():
    image = np.full((1, 1, 1, 3), 0.456 + 0.224, np.float32)
    spec = random_dataset((8, 8, 3)).spec
    found = make_normalize(spec, True, "imagenet")(image)
    np.testing.assert_allclose(found[0, 0, 0], [0.195 / 0.229, 1, 0.274 / 0.225], rtol=1e-5)
    np.testing.assert_allclose(make_denormalize(spec, True, "imagenet")(found), image, rtol=1e-6)
    grey = make_normalize(random_dataset().spec, True, "half")
    np.testing.assert_allclose(grey(np.float32([[[[0], [0.5], [1]]]])).ravel(), [-1, 0, 1])
    with pytest.raises(UserError, match="needs images of 3 channels, but 'random' has 1"):
        make_normalize(random_dataset().spec, True, "imagenet")
    with pytest.raises(UserError, match=r"has no effect with config\.data\.normalize=false"):
        make_normalize(spec, False, "half")


# Networks of PyTorch


def twin_and_ours(name):
    """A small network of torchvision or timm, and ours; 10 classes."""
    if name in ("basic", "bottleneck"):
        models = pytest.importorskip("torchvision").models
        block = getattr(models.resnet, name.capitalize().replace("Basic", "BasicBlock"))
        twin = models.ResNet(block, [1, 2, 1, 1], num_classes=10)
        return twin, ResNet((1, 2, 1, 1), name == "bottleneck", "imagenet", 10, F32)
    timm = pytest.importorskip("timm")
    if name == "vit":
        sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "img_size": 32}
        twin = timm.models.VisionTransformer(**sizes, num_classes=10, dynamic_img_size=True)
        ours = "vit(width=32, depth=2, heads=4, patch=8, pool='token', positions='learned')"
        return twin, build_model(ours, 10, F32)
    twin = timm.models.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 8, 16), num_classes=10)
    return twin, ConvNeXt((1, 2, 1, 1), (8, 16, 8, 16), 10, F32)


def randomize(torch, twin):
    """Draws every array of a network, also scales and running averages, as far from its start."""
    torch.manual_seed(0)
    for name, x in twin.state_dict().items():
        if x.dtype.is_floating_point:
            near_one = x.ndim == 1 and name.endswith(("weight", "var", "gamma"))
            drawn = torch.rand_like(x) + 0.5
            if not near_one:
                drawn = torch.randn_like(x) / max(1, x[0].numel()) ** 0.5
            x.copy_(drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic", "bottleneck", "vit", "convnext"])
def test_logits_are_those_of_torchvision_and_timm(write, name):
    torch = pytest.importorskip("torch")
    twin, model = twin_and_ours(name)
    twin.eval()
    x = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        randomize(torch, twin)
        expected = twin(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    file = write({k: np.ascontiguousarray(v.numpy()) for k, v in twin.state_dict().items()})
    # The ViT's positions are of 32x32 images: both networks resample them.
    taken, _ = take_over(file, shapes_of(model, 64), never, never)
    variables = unflatten_dict(taken, sep="/")
    with plain_lax():  # tests/test_ops.py holds the other lowerings against it
        logits, _ = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
