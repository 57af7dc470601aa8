"""Two tasks with another head: several labels an image, and numbers an image.

The images have a bright bar of some columns and one of some rows, in noise. Labels say whether
there is a bar of columns, a bar of rows, both or neither. The targets are the place of the bar of
columns in pixels, and its brightness.
"""

import io
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import Path
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, r2_score

import train
from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import Field, Stored, image_field, label_field, labels_field, values_field
from cv_jax.data.checks import check_stored
from cv_jax.learn.losses import binary_cross_entropy, huber
from cv_jax.learn.ranking import average_precision, average_precisions, micro_f1
from cv_jax.tasks import build_task, multi_label, regression
from cv_jax.trained.load import load_trained, make_predict
from tests.conftest import on_devices, random_dataset

SIDE = 8
NAMES = ("columns", "rows")
TARGETS = ("place", "brightness")


def _bars(count, seed):
    """Images (m, 8, 8, 1) uint8, labels (m, 2), and the targets (m, 2) of the bars of columns."""
    rng = np.random.default_rng(seed)
    labels = rng.random((count, 2)) < (0.6, 0.3)
    place = rng.integers(0, SIDE - 1, (count, 2))
    brightness = rng.uniform(100, 200, count)
    inside = [(p[:, None] <= np.arange(SIDE)) & (np.arange(SIDE) < p[:, None] + 2) for p in place.T]
    columns, rows = (inside[i] & labels[:, i, None] for i in range(2))
    value = np.maximum(columns[:, None] * brightness[:, None, None], rows[:, :, None] * 150)
    image = np.clip(value + rng.normal(20, 10, value.shape), 0, 255).astype(np.uint8)[..., None]
    target = np.stack([place[:, 0] + 1, brightness], axis=1).astype(np.float32)
    return image, labels, target


def load_labels() -> Stored:
    def split(count, seed):
        image, labels, _ = _bars(count, seed)
        return {"image": image, "labels": labels}

    fields = {"image": image_field((SIDE, SIDE, 1)), "labels": labels_field(NAMES)}
    return Stored(fields, split(300, 0), split(100, 1))


def load_targets() -> Stored:
    def split(count, seed):
        image, labels, target = _bars(4 * count, seed)
        chosen = np.flatnonzero(labels[:, 0] & ~labels[:, 1])[:count]  # a bar of columns alone
        return {"image": image[chosen], "target": target[chosen]}

    fields = {"image": image_field((SIDE, SIDE, 1)), "target": values_field(TARGETS, "px")}
    return Stored(fields, split(300, 0), split(100, 1))


class Net(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(32)(x.reshape(x.shape[0], -1))
        pooled = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
        return nn.Dense(self.outputs)(pooled), {"pooled": pooled}


def net(*, num_classes, dtype):
    del dtype
    return Net(num_classes)


def config_of(task, data, **leaves):
    config = base_config()
    config.task, config.data.name, config.model = (
        task,
        f"tests.test_heads:{data}",
        "tests.test_heads:net",
    )
    config.data.num_val, config.batch_size, config.eval_batch_size = 50, 50, 64
    config.optim.name, config.optim.lr, config.optim.lr_batch_size = "adamw", 0.02, 0
    config.epochs, config.augment = 12.0, "mixup(0.2)"
    config.log_every = config.eval_every = config.checkpoint_every = "6 epochs"
    config.update(leaves)
    return config


def labels_config(**leaves):
    return config_of("multi_label", "load_labels", label_smoothing=0.05, tta="mirror", **leaves)


def targets_config(**leaves):
    return config_of("regression", "load_targets", method="huber(2.0)", **leaves)


# --- Losses and metrics, by numbers ---


def test_binary_cross_entropy_is_a_sum_over_classes_with_even_odds_as_smoothing():
    logits, labels = jnp.array([[0.0, 2.0, -1.0]]), jnp.array([[1.0, 0.0, 0.25]])
    shares = 1 / (1 + np.exp(-np.array([0.0, 2.0, -1.0])))
    for smoothing in (0.0, 0.2):
        y = (1 - smoothing) * np.array([1.0, 0.0, 0.25]) + smoothing / 2
        expected = -(y * np.log(shares) + (1 - y) * np.log(1 - shares)).sum()
        found = binary_cross_entropy(logits, labels, smoothing)
        np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_huber_is_the_square_up_to_delta_and_then_goes_on_straight():
    error = jnp.array([[0.5, -1.0], [3.0, -4.0]])
    np.testing.assert_allclose(huber(error, 2.0), [0.625, (8 + 12) / 2], rtol=1e-6)


def test_average_precision_counts_equal_scores_as_one_group():
    score, positive = np.array([0.9, 0.5, 0.5, 0.1]), np.array([False, True, False, True])
    assert average_precision(score, positive) == pytest.approx(0.5 / 3 + 0.5 * 2 / 4)
    assert average_precision(np.zeros(4), positive) == 0.5  # the share of positives
    assert math.isnan(average_precision(score, np.zeros(4, bool)))
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        scores = rng.integers(0, levels, (60, 4)) / levels - 0.5
        labels = rng.random((60, 4)) < 0.3
        expected = [average_precision_score(y, s) for y, s in zip(labels.T, scores.T, strict=True)]
        np.testing.assert_allclose(average_precisions(scores, labels), expected, rtol=1e-12)
        predicted = scores >= 0
        expected = f1_score(labels, predicted, average="micro")
        assert micro_f1(predicted, labels) == pytest.approx(expected)


def test_map_leaves_out_classes_without_a_positive_and_a_diverged_network_has_none():
    labels = np.array([[True, False], [False, False], [True, False]])
    logits = np.array([[2.0, 1.0], [1.0, 5.0], [0.0, -1.0]])
    found = multi_label.numbers(logits, labels)
    assert found["mAP"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 3))
    expected = binary_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.float32(labels))
    assert found["loss"] == pytest.approx(float(expected.mean()), rel=1e-6)
    logits[0, 0] = np.nan
    assert all(math.isnan(x) for x in multi_label.numbers(logits, labels).values())


def test_class_frequencies_have_the_prevalence_as_precision():
    labels = np.array([[True, False, False], [True, True, False], [False, False, False]])
    found = multi_label.frequencies({"labels": labels}, {"labels": labels})
    assert found["mAP"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))  # the first class everywhere


def test_errors_of_a_regression_are_in_the_unit_of_the_target():
    target = np.array([[1.0, 10], [2, 30], [6, 20]], np.float32)
    predicted = np.array([[1.0, 13], [4, 26], [6, 20]], np.float32)
    found = regression.numbers(TARGETS, predicted, target)
    assert found["mae/place"] == pytest.approx(2 / 3)
    assert found["rmse/brightness"] == pytest.approx(math.sqrt(25 / 3))
    assert found["mae"] == pytest.approx((2 / 3 + 7 / 3) / 2)
    assert found["r2"] == pytest.approx(r2_score(target, predicted))
    assert found["r2/place"] == pytest.approx(1 - 4 / 14)
    one = regression.numbers(("place",), predicted[:, :1], target[:, :1])
    assert one == {kind: pytest.approx(found[f"{kind}/place"]) for kind in ("mae", "rmse", "r2")}
    same = np.full((3, 1), 5, np.float32)
    assert regression.numbers(("place",), same, same)["r2"] == 1
    assert regression.numbers(("place",), same + 1, same)["r2"] == 0
    baseline = regression.mean_of_train(TARGETS, {"target": target}, {"target": target})
    assert baseline["r2"] == pytest.approx(0)
    assert all(math.isnan(x) for x in regression.numbers(TARGETS, target * np.nan, target).values())


def test_a_constant_target_has_the_scale_1():
    scale = regression.scale_of(np.array([[1, 7], [3, 7]], np.float32))
    np.testing.assert_array_equal(scale["mean"], [2, 7])
    np.testing.assert_array_equal(scale["std"], [1, 1])


# --- Data and configs that do not fit ---


def test_a_field_of_labels_is_checked():
    stored = load_labels()
    check_stored("bars", stored)
    for field, message in (
        (labels_field(()), "fields['labels'] needs names of its classes"),
        (labels_field("abc"), "train['labels'] has the shape (300, 2) and not (m, 3)"),
        (
            Field((2,), "int32", "labels", names=("a", "b")),
            "fields['labels'] has the shape (2,) and the dtype int32, but its 2 classes need (2,) "
            "and bool; use labels_field(names)",
        ),
        (values_field(NAMES), "fields['labels'] must be of the kind 'labels', not 'values'"),
    ):
        fields = {**stored.fields, "labels": field}
        with pytest.raises(UserError) as error:
            check_stored("bars", stored._replace(fields=fields))
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "field", "message"),
    [
        ("multi_label", {}, "needs the field 'labels', and the data set 'random' has image, label"),
        ("regression", {}, "needs the field 'target', and the data set 'random' has image, label"),
        (
            "regression",
            {"target": label_field(NAMES)},
            "needs the field 'target' of the kind 'values'",
        ),
        (
            "regression",
            {"target": Field((), "float32", "values")},
            "The target of the data set 'random' has the shape () and not (k,): flatten it",
        ),
    ],
)
def test_data_without_the_field_are_refused(task, field, message):
    spec = random_dataset().spec
    spec = spec._replace(fields={**spec.fields, **field})
    with pytest.raises(UserError) as error:
        build_task(config_of(task, "load_labels", augment=""), spec)
    assert message in str(error.value)


# --- Descriptions ---


def test_descriptions_have_all_probabilities_and_the_unit():
    logits = np.array([0.0, np.log(3), -np.log(3)])
    assert multi_label.describe("abc", {}, {"logits": logits}, None) == {
        "classes": ["b", "a"],
        "probabilities": {
            "b": pytest.approx(0.75),
            "a": pytest.approx(0.5),
            "c": pytest.approx(0.25),
        },
    }
    described = regression.describe(TARGETS, "px", {}, {"target": np.array([3.0, 0.5])}, None)
    assert described == {"target": {"place": 3.0, "brightness": 0.5}, "unit": "px"}


def test_panels_show_the_worst_first():
    examples = load_labels().test
    logits = np.where(examples["labels"], 3.0, -3.0)
    logits[5, 1] *= -2  # the worst; the label is
    precision, mistakes = multi_label.make_panels(NAMES)(examples, {"logits": logits})
    assert "columns 100.0 %" in precision.text
    assert precision.text.index("rows") < precision.text.index("columns")
    known = "true" if examples["labels"][5, 1] else "not true"
    share = "0" if examples["labels"][5, 1] else "100"
    assert mistakes.captions == (f"rows {share}\N{NO-BREAK SPACE}%, {known}",)
    examples = load_targets().test
    found = examples["target"] + np.eye(100, dtype=np.float32)[:, [8, 9]] * [1, 3]
    (panel,) = regression.make_panels(TARGETS, "px")(examples, {"target": found})
    place, brightness = examples["target"][8]
    first = f"place {place:.4g}, brightness {brightness:.4g} → place {place + 1:.4g}, "
    assert panel.captions[0].startswith(first)
    assert "in px" in panel.text


# --- Whole runs ---


def _run(config, workdir):
    return train.run(config.lock(), Path(workdir) / "run"), Path(workdir) / "run"


def _predictions(workdir, image):
    trained = load_trained(workdir)
    return trained, make_predict(trained, len(image))({"image": image})


@pytest.mark.slow
def test_labels_are_learnt_and_predicted_as_evaluated(tmp_path):
    result, workdir = _run(labels_config(), tmp_path)
    assert result["headline"] == "mAP"
    assert result["test"]["mAP"]["mean"] > 0.97
    assert result["test"]["micro_f1"]["mean"] > 0.9
    test = load_labels().test
    baseline = result["baseline"]["test"]
    assert baseline["mAP"] == pytest.approx(test["labels"].mean())
    assert result["test"]["loss"]["mean"] < 0.5 * baseline["loss"]
    trained, found = _predictions(workdir, test["image"])
    for name, value in multi_label.numbers(np.asarray(found["logits"]), test["labels"]).items():
        assert value == pytest.approx(result["test"][name]["mean"], rel=1e-4)
    explained = jax.jit(trained.task.explain)(trained.state, {"image": test["image"][:3]})
    assert explained["saliency"].shape == (3, SIDE, SIDE)


@pytest.mark.slow
def test_targets_are_learnt_and_predicted_in_their_unit(tmp_path):
    result, workdir = _run(targets_config(epochs=30.0), tmp_path)
    test, baseline = result["test"], result["baseline"]["test"]
    assert test["mae/place"]["mean"] < 0.35 < 1 < baseline["mae/place"]
    assert test["mae/brightness"]["mean"] < 13 < 20 < baseline["mae/brightness"]
    assert test["r2"]["mean"] > 0.75 > 0.1 > baseline["r2"]
    assert result["metrics"]["mae"]["unit"] == "px"
    examples = load_targets().test
    trained, found = _predictions(workdir, examples["image"])  # whose spec has no sample
    target = np.asarray(found["target"])
    for name, value in regression.numbers(TARGETS, target, examples["target"]).items():
        assert value == pytest.approx(test[name]["mean"], rel=1e-3)
    train_split = load_targets().train["target"]
    scale = trained.state.model_state["constants"]
    np.testing.assert_allclose(scale["std"], train_split.std(0), rtol=0.1)
    ((example, back),) = trained.task.read(_png(examples["image"][0]))
    described = trained.task.describe(example, {"target": target[0]}, back)
    assert abs(described["target"]["place"] - examples["target"][0, 0]) < 1


def _png(image):
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "PNG")
    return file.getvalue()


def evaluations():
    """Prints the numbers of both tasks after two steps on the devices that there are."""
    import tempfile

    from cv_jax.runtime.startup import prepare_jax

    prepare_jax()
    for make in (labels_config, targets_config):
        config = make(steps=1, augment="")
        config.optim.name = "sgd"  # Adam makes steps of rounding errors
        with tempfile.TemporaryDirectory() as folder:
            result, _ = _run(config, folder)
        print(
            "RESULT",
            json.dumps({k: v["values"] for k, v in result["test"].items() if k != "count"}),
        )


@pytest.mark.slow
def test_one_and_two_devices_give_the_same_numbers():
    one, two = (
        [
            json.loads(line.removeprefix("RESULT"))
            for line in on_devices(count, "tests.test_heads", "evaluations").splitlines()
            if line.startswith("RESULT")
        ]
        for count in (1, 2)
    )
    assert [len(found) for found in one] == [3, 9]
    for here, there in zip(one, two, strict=True):
        for name, values in here.items():
            np.testing.assert_allclose(there[name], values, rtol=1e-4, err_msg=name)
