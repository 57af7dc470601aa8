"""An exported network predicts what it predicted in its run, and its file says what it is."""

import argparse
import io
import json
import pickle
import re
import sys
import zipfile
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import Path
from jax import export, lax
from PIL import Image

from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.data.read_image import read_image
from cv_jax.models.ops import plain_lax
from cv_jax.tasks.classification import describe
from cv_jax.tasks.classification.views import find_tta
from cv_jax.tools.export import command as tool
from cv_jax.tools.export.card import make_card, photograph, to_markdown
from cv_jax.tools.export.formats import FORMATS, check_packages, read
from cv_jax.trained.load import load_trained, variables
from tests.conftest import random_dataset
from tests.test_images import encode

NAMES = sorted(FORMATS)


def _need(name):
    for package in FORMATS[name].packages:
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def trained(digits_run):
    return load_trained(Path(digits_run), "seed=1", "mirror")


@pytest.fixture(scope="module")
def files(digits_run, trained, tmp_path_factory):
    """Format -> a file of the network of seed 1, made once and not to be changed."""
    made = {}

    def file(name):
        _need(name)
        if name not in made:
            made[name] = Path(tmp_path_factory.mktemp(name)) / f"model.{name}"
            tool.write(Path(digits_run), trained, name, made[name])
        return made[name]

    return file


@pytest.fixture(scope="module")
def own(trained):
    """The test split, and the network's own logits of it."""
    test = load_dataset(trained.config.data).test
    return test, np.asarray(tool.own_predict(trained)({"image": test["image"]})["logits"])


def _card(name, path):
    if name == "stablehlo":
        with zipfile.ZipFile(path) as file:
            return json.loads(file.read("card.json"))
    if name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return json.loads(session.get_modelmeta().custom_metadata_map["card"])
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["card"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_predicts_what_the_network_does(files, own, trained, name):
    test, logits = own
    predict = read(name, files(name))
    report = tool.compare(lambda _: {"logits": logits}, predict, test, trained, batch_size=360)
    assert report["equal"] == report["of"] == 360
    assert report["largest_difference"] < 1e-4
    assert report["accuracy"] == (logits.argmax(-1) == test["label"]).mean() > 0.5
    for b in (1, 7):
        some = np.asarray(predict({"image": test["image"][:b]})["logits"])
        assert some.dtype == np.float32
        np.testing.assert_allclose(some, logits[:b], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_it_is_and_how_to_use_it(files, trained, name, monkeypatch):
    path = files(name)
    card = _card(name, path)
    assert card["data"]["fields"]["label"]["names"] == list("0123456789")
    assert card["input"] == "image: (b, 8, 8, 1) uint8, 0 to 255, b >= 1"
    assert card["output"].startswith("logits: (b, 10) float32, in the order of the class names")
    assert card["data"]["num_test"] == 360
    accuracy = trained.result["test"]["accuracy"]
    assert card["test"]["accuracy"] == accuracy["values"][1]
    assert {key: card["test"][key] for key in ("std", "ci95", "n")} == {
        key: accuracy[key] for key in ("std", "ci95", "n")
    }
    assert card["config"]["optim"]["name"] == trained.config.optim.name
    assert card["steps"] == trained.result["steps"]
    assert card["flops"]["training"] == trained.result["flops"]["training"]
    assert (card["tta"], card["test"]["tta"]) == ("mirror", "none")
    assert card["trained_with"]["packages"]["jax"] == card["exported_with"]["packages"]["jax"]
    assert len(card["trained_with"]["commit"]) == 40

    text = path.with_name(path.name + ".md").read_text()
    assert f"{100 * accuracy['mean']:.2f} % ± {100 * accuracy['std']:.2f} over n = 2 seeds" in text
    snippet, photo = re.findall(r"```python\n(.*?)```", text, re.S)
    assert photo.strip() == photograph((8, 8, 1))[1].strip()
    monkeypatch.chdir(path.parent)
    space = {}
    exec(snippet, space)
    assert space["logits"].shape == (7, 10)


@pytest.mark.parametrize(
    ("shape", "share"), [((8, 8, 1), 1), ((32, 32, 3), 1), ((20, 30, 3), 1), ((32, 32, 3), 0.875)]
)
def test_the_code_of_the_card_reads_photographs_as_predict_does(shape, share):
    space = {}
    exec(photograph(shape, share)[1], space)
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for size in ((97, 64, 3), (64, 97, 3), (9, 5, 3), (*shape[:2], 3), (50, 40, 4), (33, 70)):
        image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
        for kind, options in (("PNG", {}), ("JPEG", {"exif": turned}), ("GIF", {})):
            if kind != "JPEG" or len(size) == 3 == size[-1]:
                data = encode(image, kind, **options)
                got = space["read_photo"](io.BytesIO(data))
                np.testing.assert_array_equal(got, read_image(data, shape, share)[None])
    np.testing.assert_allclose(space["softmax"](np.log([[1.0, 3.0]])), [[0.25, 0.75]])
    assert photograph((8, 8, 5)) == ("not possible: a photograph does not have 5 channels", "")


@pytest.mark.slow
def test_stablehlo_takes_one_image_or_more_as_its_card_says(files):
    predict = read("stablehlo", files("stablehlo"))
    with pytest.raises(ValueError, match=r">= 1\b"):
        predict({"image": np.zeros((0, 8, 8, 1), np.uint8)})
    assert "uint8, 0 to 255, b >= 1" in _card("stablehlo", files("stablehlo"))["input"]


@pytest.mark.slow
def test_stablehlo_is_for_three_platforms_and_any_number_of_images(files):
    with zipfile.ZipFile(files("stablehlo")) as file:
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        exported = export.deserialize(bytearray(file.read("network.bin")))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    (image,) = exported.in_avals  # of the dict {"image": ...}
    assert (str(image.shape), image.dtype) == ("(b, 8, 8, 1)", np.uint8)


@pytest.mark.slow
def test_safetensors_are_a_trained_network(files, trained):
    again = load_trained(files("safetensors"))
    assert again.spec.class_names == trained.spec.class_names
    assert (again.name, again.tta) == ("seed=1", "mirror")
    assert again.result == json.loads(json.dumps(trained.result))
    jax.tree.map(np.testing.assert_array_equal, variables(again.state), variables(trained.state))
    assert load_trained(files("safetensors"), "seed=1").name == "seed=1"
    with pytest.raises(UserError, match="holds the run 'seed=1' and not 'seed=0'"):
        load_trained(files("safetensors"), "seed=0")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_or_foreign_file_gets_a_sentence(files, name, tmp_path):
    whole = files(name).read_bytes()
    path = Path(tmp_path) / f"model.{name}"
    for content in (b"", whole[:100], whole[: len(whole) // 2], pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"model\.{name} is damaged, or not"):
            read(name, path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=rf"model\.{name} is damaged, or not"):
        read(name, path)


@pytest.mark.slow
def test_safetensors_of_another_network_get_a_sentence(files, tmp_path):
    from safetensors.numpy import load, save

    data = files("safetensors").read_bytes()
    arrays, card = load(data), _card("safetensors", files("safetensors"))
    path = Path(tmp_path) / "model.safetensors"

    def message(arrays, **changes):
        path.write_bytes(save(arrays, {"card": json.dumps({**card, **changes})}))
        with pytest.raises(UserError) as error:
            load_trained(path)
        return str(error.value)

    some = {name: x for name, x in arrays.items() if "head" not in name}
    assert "its arrays do not fit the network of its config (params/head/" in message(some)
    assert "config.model" in message(arrays, config={**card["config"], "model": "n95"})
    assert "no key 'modle'" in message(arrays, config={**card["config"], "modle": "n94"})
    huge = json.loads(json.dumps(card["data"]))
    huge["fields"]["image"]["shape"] = [2**20, 2**20, 1]
    assert "fields of the shapes" in message(arrays, data=huge)
    own = {**card["config"], "task": "tests.point_task:build"}
    assert "config.task='tests.point_task:build' names code" in message(arrays, config=own)
    path.write_bytes(save(arrays))
    with pytest.raises(UserError, match="not a file of"):
        load_trained(path)
    with pytest.raises(UserError, match="does not exist"):
        load_trained(path.with_name("other.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named(monkeypatch, name):
    package = FORMATS[name].packages[-1]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{package}, which is missing.*pip install -r requirements-e"
    ):
        check_packages(name)


def test_padded_pools_and_strides_become_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from cv_jax.models.layers import max_pool
    from cv_jax.tools.export.onnx_graph import to_onnx

    kernel = np.random.default_rng(0).normal(size=(5, 3, 2, 4)).astype(np.float32)

    def network(x):
        y = lax.conv_general_dilated(
            x, kernel, (2, 1), ((2, 1), (0, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = max_pool(-jnp.abs(y), 3, strides=2, padding=1)
        y = lax.pad(y, jnp.float32(3), ((0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 0)))
        y0 = lax.index_in_dim(y, 0, 3, keepdims=False)
        return y0.reshape(y.shape[0], -1) * lax.rsqrt(y.max((1, 2, 3)) ** 2 + 1)[:, None]

    def function(batch):
        averaged = find_tta("mirror_translate")(network, batch["image"])
        return {"sum": averaged * batch["b"][:, None], "averaged": averaged}

    image = jax.ShapeDtypeStruct(export.symbolic_shape("b, 9, 8, 2"), jnp.float32)
    factor = jax.ShapeDtypeStruct(image.shape[:1], jnp.float32)
    with plain_lax():
        model = to_onnx(function, {"image": image, "b": factor})
    x = np.random.default_rng(1).normal(size=(3, 9, 8, 2)).astype(np.float32)
    batch = {"image": x, "b": np.float32([1, 2, 3])}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    got = dict(zip(("averaged", "sum"), session.run(["averaged", "sum"], batch), strict=True))
    for name, want in function(batch).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="does not support the operation 'sin'"):
        to_onnx(lambda batch: {"sin": jnp.sin(batch["image"])}, {"image": image})


def _arguments(**values):
    defaults = {"format": "stablehlo", "run": "", "tta": None, "out": None, "record": None}
    return argparse.Namespace(**{**defaults, **values})


@pytest.mark.slow
def test_the_tool_compares_what_it_wrote(digits_run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("safetensors")
    out, record = tmp_path / "a" / "b.safetensors", Path(tmp_path) / "record.json"
    arguments = _arguments(
        workdir=str(digits_run), format="safetensors", out=str(out), record=record
    )
    assert tool.run(arguments) == 0
    assert "360 of 360 test predictions equal; largest difference" in capsys.readouterr().out
    entry = json.loads(record.read_text())["safetensors"]
    assert (entry["equal"], entry["of"], entry["bytes"]) == (360, 360, out.stat().st_size)

    def opposite(name, path):
        return lambda batch: {"logits": -np.asarray(read(name, path)(batch)["logits"])}

    monkeypatch.setattr(tool, "read", opposite)
    assert tool.run(arguments) == 1
    assert "differ from the network's" in capsys.readouterr().err
    assert out.exists()


def test_a_logit_that_is_not_finite_is_never_equal():
    data = random_dataset(num_classes=2)
    split = data.test
    task = SimpleNamespace(inputs=("image",), describe=partial(describe, data.spec.class_names))
    network = SimpleNamespace(spec=data.spec, task=task)
    good = np.eye(2, dtype=np.float32)[split["label"]]
    bad = good.copy()
    bad[0] = np.nan  # class 0 by its argmax
    for label in (0, 1):  # of the first image
        some = {**split, "label": np.concatenate([[label], split["label"][1:]])}
        a, b = (lambda _, x=x: {"logits": x} for x in (good, bad))
        report = tool.compare(a, b, some, network, batch_size=37)
        assert (report["equal"], report["of"], report["accuracy"]) == (36, 37, 36 / 37)
        assert np.isnan(report["largest_difference"])
        with pytest.raises(UserError, match="predicts logits that are not finite"):
            tool.compare(b, a, some, network, batch_size=37)


@pytest.mark.slow
def test_a_network_whose_answers_are_not_finite_is_not_exported(digits_run, tmp_path, monkeypatch):
    nothing = {"logits": np.full((1, 10), np.nan)}
    monkeypatch.setattr(tool, "own_predict", lambda trained: lambda batch: nothing)
    out = tmp_path / "b.stablehlo"
    arguments = _arguments(workdir=str(digits_run), out=str(out))
    with pytest.raises(UserError, match="predicts logits that are not finite"):
        tool.run(arguments)
    assert not out.exists()


@pytest.mark.slow
def test_a_card_of_a_sweep_is_of_its_best_setting(digits_run, trained):
    config = trained.config.copy_and_resolve_references()
    config.sweep = (("optim.lr", (0.02, 0.05)),)
    best = {"optim.lr": 0.05}
    sweep = [{"setting": {"optim.lr": lr}} for lr in (0.02, 0.05)]
    result = {**trained.result, "best": best, "sweep": sweep}
    network = trained._replace(config=config, result=result, name="optim.lr=0.05 seed=1")
    card = make_card(Path(digits_run), network)
    assert card["test"]["accuracy"] == trained.result["test"]["accuracy"]["values"][1]
    network = network._replace(name="optim.lr=0.02 seed=1")
    assert make_card(Path(digits_run), network)["test"] is None
    card["test"] |= {"mean": None, "std": None, "ci95": None}
    assert "; other seeds have diverged |" in to_markdown(card, "")


@pytest.mark.slow
def test_a_card_of_a_run_that_goes_on_has_no_accuracy(digits_run, trained):
    for result in (None, {**trained.result, "steps": trained.result["steps"] - 1}):
        card = make_card(Path(digits_run), trained._replace(result=result))
        assert card["test"] is card["result"] is card["flops"]["training"] is None
        assert "not measured" in to_markdown(card, "")
    card["data"]["name"] = "a`<script>|"
    assert "| `a'<script>¦`:" in to_markdown(card, "")
