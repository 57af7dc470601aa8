"""A task of another kind in one file: where in an image is the digit?

Nothing outside this file knows of the task: the config names its data, model and task as
"module:function". A digit of 8x8 pixels lies somewhere in an image of 24x24. The target is its
centre, a point that moves with the image. The headline is the median error in pixels, collected
over all test images. Lower is better.

    python train.py --config=tests/test_points.py
"""

import io
import json
import math
import pathlib
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import Path
from PIL import Image

from cv_jax.augment.resizing import resize
from cv_jax.config.base import base_config, choose
from cv_jax.data import Stored, image_field, points_field
from cv_jax.data.sources.digits import load_digits
from cv_jax.learn.evaluations import Collected
from cv_jax.learn.images import draw_image, make_read
from cv_jax.learn.inputs import make_augmented, make_normalize, to_unit
from cv_jax.learn.losses import of_examples
from cv_jax.learn.train_step import make_training
from cv_jax.models import build_model, compute_dtype
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.state import init_state
from cv_jax.tasks import Task
from cv_jax.workdir.metric import Metric

SIDE, DIGIT = 24, 8
ROOT = pathlib.Path(__file__).parent.parent


def get_config(arg=""):
    config = base_config()
    config.task = "tests.test_points:build"
    config.model = "tests.test_points:net(width=8)"
    config.data.name = "tests.test_points:load"
    config.data.num_val = 200
    config.augment = "rotate(10)|translate(2)"
    config.progressive_resizing = "size(16, until=0.3)"
    config.epochs = 6.0
    config.batch_size = 50
    config.optim.name = "adamw"
    config.optim.lr, config.optim.lr_batch_size = 0.02, 0
    config.log_every = config.eval_every = config.checkpoint_every = "2 epochs"
    return choose(config, arg)


# ---- the data


def load() -> Stored:
    """Puts each digit at a random place of a dark image; the point is its centre."""
    digits = load_digits()
    rng = np.random.default_rng(0)

    def place(image):
        corner = rng.integers(0, SIDE - DIGIT + 1, (len(image), 2))  # x y
        canvas = np.zeros((len(image), SIDE, SIDE, 1), np.uint8)
        for one, pixels, (x, y) in zip(canvas, image, corner, strict=True):
            one[y : y + DIGIT, x : x + DIGIT] = pixels
        centre = (corner + DIGIT / 2).astype(np.float32)
        return {"image": canvas, "centre": centre[:, None]}

    return Stored(
        fields={"image": image_field((SIDE, SIDE, 1)), "centre": points_field(1)},
        train=place(digits.train["image"]),
        test=place(digits.test["image"]),
    )


# ---- the model


class Net(nn.Module):
    """Finds a point as the mean place of a heat map, (b, h, w, c) -> (b, 1, 2) in pixels."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        h, w = x.shape[1:3]
        for _ in range(2):
            x = nn.relu(nn.Conv(self.width, (5, 5), dtype=self.dtype)(x))
        heat = nn.Conv(1, (5, 5), dtype=self.dtype)(x).astype(jnp.float32)
        heat = jax.nn.softmax(heat.reshape(-1, h * w)).reshape(-1, h, w)
        rows = heat.sum(2) @ jnp.arange(h, dtype=jnp.float32)  # of the pixels' upper left corners
        columns = heat.sum(1) @ jnp.arange(w, dtype=jnp.float32)
        return jnp.stack([columns, rows], axis=-1)[:, None]


def net(width: int = 8, *, num_classes: int, dtype: jnp.dtype) -> nn.Module:
    del num_classes
    return Net(width, dtype)


# ---- the task


def build(config, spec):
    model = build_model(config.model, 0, compute_dtype(config.dtype))
    augmented = make_augmented(config.augment, spec.fields)
    normalize = make_normalize(spec, config.data.normalize)

    def draw_variables(key):
        return model.init(key, jnp.zeros((1, *spec.image_shape)), train=False)

    def loss(params, model_state, batch, key, size):
        batch = resize(augmented(batch, key), size, spec.fields)
        found = model.apply({"params": params}, normalize(batch["image"]), train=True)
        scale = SIDE / batch["image"].shape[1]  # errors in pixels of the whole image
        value = of_examples(jnp.square(scale * (found - batch["centre"])).sum((1, 2)))
        return value, (model_state, {"loss": (value.total, value.count)})

    shapes = jax.eval_shape(draw_variables, jax.random.key(0))
    training = make_training(config, spec, shapes["params"], loss)

    def init(key):
        return init_state(draw_variables(key)["params"], {}, training.tx)

    def predict(state, batch):
        image = normalize(to_unit(batch["image"]))
        params = evaluated_params(config.optim, state)
        return {"centre": model.apply({"params": params}, image, train=False)}

    median = Collected(predict, list, add_errors, median_of)
    return Task(
        init=init,
        train_step=training.train_step,
        evals={"watch": median, "final": median},
        metrics={
            "loss": Metric("px²", "lower"),
            "median_error": Metric("px", "lower", "distance of the centres"),
            "within_a_pixel": Metric("%", protocol="distance of the centres below 1 px"),
        },
        headline="median_error",
        preview=augmented,
        notes=training.notes,
        needs=("image", "centre"),
        reads=("progressive_resizing",),
        stages=training.stages,
        predict=predict,
        outputs={"centre": "x and y in pixels of the input"},
        read=make_read(spec),
        describe=describe,
        draw=draw,
        baseline=mean_centre,
    )


def add_errors(errors, predictions, examples):
    apart = predictions["centre"] - examples["centre"]
    return [*errors, *np.linalg.norm(apart[:, 0], axis=-1)]


def median_of(errors):
    return {"median_error": np.median(errors), "within_a_pixel": np.mean(np.array(errors) < 1)}


def describe(example, prediction, back):
    """Returns {"centre": [x, y]} in pixels of the file."""
    x, y = np.float64(prediction["centre"][0])
    matrix = np.eye(3) if back is None else back.matrix
    return {"centre": [float(v) for v in (matrix @ [x, y, 1])[:2]]}


def draw(example, prediction, back):
    """Returns the image with a red pixel at the prediction, else a green one at the centre."""
    picture = draw_image(example).copy()
    points = prediction or example
    if "centre" in points:
        x, y = np.clip(np.asarray(points["centre"])[0].astype(int), 0, len(picture) - 1)
        picture[y, x] = (255, 0, 0) if prediction else (0, 255, 0)
    return picture


def mean_centre(train, examples):
    centre = np.median(train["centre"], axis=0, keepdims=True)
    errors = add_errors([], {"centre": np.broadcast_to(centre, examples["centre"].shape)}, examples)
    return median_of(errors)


# ---- what the commands make of it


def _start(module, *arguments, code=0):
    command = [sys.executable, *module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The work directory of a whole run, by train.py itself."""
    workdir = tmp_path_factory.mktemp("points") / "run"
    out = _start(["train.py"], "--config=tests/test_points.py", f"--workdir={workdir}")
    assert (
        "data    tests.test_points:load: 1,237 train, 200 val, 360 test; 24x24x1, centre 1x2" in out
    )
    return workdir


@pytest.fixture(scope="module")
def result(run):
    return json.loads((run / "result.json").read_text())


@pytest.mark.slow
def test_it_learns_and_says_so_beside_a_baseline(result):
    test = result["test"]
    assert test["median_error"]["mean"] < 0.5 < 5 < result["baseline"]["test"]["median_error"]
    assert test["within_a_pixel"]["mean"] > 0.8
    assert result["headline"] == "median_error"
    assert result["metrics"]["median_error"] == {
        "unit": "px",
        "better": "lower",
        "protocol": "distance of the centres",
    }


@pytest.mark.slow
def test_every_prediction_is_that_of_evaluation_in_pixels_of_the_file(run, result, tmp_path):
    examples = load().test
    for i in range(40):
        image = Image.fromarray(examples["image"][i, ..., 0])
        image.resize((3 * SIDE, 3 * SIDE), Image.Resampling.NEAREST).save(tmp_path / f"{i:02}.png")
    arguments = (f"--workdir={run}", f"--dir={tmp_path}", f"--pictures={tmp_path}/out")
    lines = _start(["-m", "cv_jax.tools.predict"], *arguments, "--json").splitlines()
    found = np.array([json.loads(line)["centre"] for line in lines])
    errors = np.linalg.norm(found - 3 * examples["centre"][:40, 0], axis=1)
    assert np.median(errors) < 3 * 0.6
    picture = np.asarray(Image.open(tmp_path / "out" / "000001-00.png"))
    ((y, x),) = np.argwhere((picture == (255, 0, 0)).all(-1))
    np.testing.assert_allclose([x, y], found[0] / 3, atol=1)
    text = _start(["-m", "cv_jax.tools.predict"], f"--workdir={run}", tmp_path / "00.png")
    assert text.startswith(f"{tmp_path}/00.png: centre [")


@pytest.mark.slow
def test_a_page_and_a_server_show_it(run, tmp_path):
    from cv_jax.tools import serve
    from cv_jax.trained import load_trained

    _start(["-m", "cv_jax.tools.report"], run, f"--out={tmp_path}/report.html")
    html = (tmp_path / "report.html").read_text()
    assert "median error" in html
    assert html.count("centre [") == 48  # 24 pictures, with captions
    trained = load_trained(Path(run))
    file = io.BytesIO()
    Image.fromarray(load().test["image"][0, ..., 0]).save(file, "PNG")
    answer = json.loads(json.dumps(serve.make_answer(trained)(file.getvalue())))
    assert math.dist(answer["prediction"]["centre"], load().test["centre"][0, 0]) < 3
    assert answer["picture"]["shape"] == [SIDE, SIDE, 3]
    assert not {"classes", "saliency", "features"} & answer.keys()
    assert serve.about(trained)["image_shape"] == (SIDE, SIDE, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stablehlo", "safetensors"])
def test_an_exported_file_predicts_the_same(run, tmp_path, name):
    pytest.importorskip("flatbuffers")
    pytest.importorskip("safetensors")
    out = tmp_path / f"m.{name}"
    arguments = (f"--workdir={run}", f"--format={name}", f"--out={out}")
    printed = _start(["-m", "cv_jax.tools.export"], *arguments)
    assert "360 of 360 test predictions equal" in printed
    card = out.with_name(out.name + ".md").read_text()
    assert "centre: (b, 1, 2) float32, x and y in pixels of the input" in card


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_where_the_whole_one_does(result, tmp_path):
    arguments = ("--config=tests/test_points.py", f"--workdir={tmp_path}/run")
    command = [sys.executable, "train.py", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("   2.00"):
            pass
        process.send_signal(signal.SIGTERM)
        assert "--config=tests/test_points.py" in process.communicate()[0]
    assert process.returncode == 143
    _start(["train.py"], *arguments)
    resumed = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {split: resumed[split] for split in ("val", "test")} == {
        split: result[split] for split in ("val", "test")
    }


def evaluations():
    """Prints the errors after a step on the devices that there are."""
    import tempfile

    import train
    from cv_jax.runtime.startup import prepare_jax

    prepare_jax()
    config = get_config()
    config.steps, config.batch_size, config.eval_batch_size, config.data.limit = 1, 48, 64, 150
    config.progressive_resizing = ""
    with tempfile.TemporaryDirectory() as folder:
        result = train.run(config.lock(), Path(folder) / "run")
    print("RESULT", json.dumps([result["val"], result["test"]]))


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_numbers():
    from tests.conftest import on_devices  # not above, since it imports train.py

    found = []
    for count in (1, 2, 8):
        printed = on_devices(count, "tests.test_points", "evaluations")
        found.append(json.loads(printed.partition("RESULT")[2]))
    for other in found[1:]:
        for here, there in zip(found[0], other, strict=True):
            assert there["count"] == here["count"]
            np.testing.assert_allclose(
                there["median_error"]["values"], here["median_error"]["values"], rtol=1e-4
            )
