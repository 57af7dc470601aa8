"""Detection: targets, loss, decoding, average precision beside pycocotools, and whole trainings."""

import contextlib
import io
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import train
from configs.shapes import get_config
from cv_jax.config.errors import UserError
from cv_jax.data import image_field
from cv_jax.data.load import load_dataset
from cv_jax.data.sources.shapes import load_shapes
from cv_jax.models import build_model, layers
from cv_jax.models.detector import STRIDE, Detector
from cv_jax.tasks import build_task
from cv_jax.tasks.detection import centres, scores
from cv_jax.tasks.detection.average_precision import (
    OVERLAPS,
    Image,
    average_precision,
    match_coco,
    match_voc,
    of_class,
    overlaps,
)
from cv_jax.tasks.detection.panels import mistakes
from cv_jax.tools.export import command as export
from cv_jax.tools.export.card import photograph
from cv_jax.tools.export.formats import read as read_format
from cv_jax.trained.load import load_trained, make_predict
from cv_jax.trained.words import in_text
from tests.conftest import on_devices, random_dataset

# Average precision


def image(boxes, found, ranks, difficult=(), crowd=()):
    """An image of one class; scores fall with the rank."""
    boxes = np.array(boxes, float).reshape(-1, 4)
    of = [np.isin(np.arange(len(boxes)), which) for which in (difficult, crowd)]
    order = np.argsort(ranks)
    found = np.array(found, float).reshape(-1, 4)[order]
    return Image(boxes, of[0] | of[1], of[1], found, 1 / (1.0 + np.array(ranks, float)[order]))


A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]


def voc(images, how="area"):
    return float(average_precision(match_voc(images), how))


def test_overlap_of_inclusive_corners_has_no_extra_pixel():
    # VOC's [1, 1, 10, 10] and [1, 1, 10, 11] are 10x10 and 10x11 pixels.
    assert overlaps(np.array([[0, 0, 10, 10.0]]), np.array([[0, 0, 10, 11.0]])) == 100 / 110
    assert overlaps(np.array([A], float), np.array([B, A], float)).tolist() == [[0, 1]]
    half = np.array([[0, 0, 5, 10.0]])
    assert overlaps(half, np.array([A], float), np.array([True])) == 1  # inside a crowd


def test_difficult_objects_count_neither_way():
    one = image([A, B], [A, B], [0, 1], difficult=[1])
    matches = match_voc([one])
    assert matches.num_objects == 1
    assert voc([one]) == 1
    first = image([A, B], [A, B], [1, 0], difficult=[1])  # the detection of the difficult one leads
    assert voc([first]) == 1
    assert match_voc([first]).wrong.tolist() == [False, False]


@pytest.mark.parametrize(("how", "expected"), [("eleven", 6 / 11), ("area", 0.5)])
def test_half_of_the_objects_at_full_precision(how, expected):
    assert voc([image([A, B], [A], [0])], how) == pytest.approx(expected, abs=1e-12)


def test_a_recall_of_three_tenths_reaches_three_tenths():
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(10)]
    assert voc([image(boxes, boxes[:3], [0, 1, 2])], "eleven") == pytest.approx(4 / 11)


def test_an_image_without_detections_counts():
    assert voc([image([A], [A], [0]), image([B], [], [])]) == 0.5


def test_classes_without_objects_or_without_detections():
    assert np.isnan(voc([image([], [A], [0])]))
    assert voc([image([A], [], [])]) == 0
    objects = {
        "boxes": np.array([[A, B]], np.float32),
        "box_label": np.array([[0, -1]], np.int32),
        "difficult": np.zeros((1, 2), bool),
        "crowd": np.zeros((1, 2), bool),
    }
    found = {
        "boxes": np.array([[A, B]], np.float32),
        "scores": np.array([[0.9, 0.8]], np.float32),
        "classes": np.array([[0, 1]], np.int32),
    }
    numbers = scores.numbers(("a", "b"), objects, found)
    assert numbers["AP50"] == numbers["AP"] == numbers["AP75"] == numbers["AP50_eleven"] == 1
    assert np.isnan(numbers["AP50/b"])
    found["scores"][0, 0] = np.nan
    assert np.isnan(scores.numbers(("a", "b"), objects, found)["AP50"])


def test_a_second_detection_of_an_object_is_wrong_for_voc_and_may_find_another_for_coco():
    # The second detection overlaps A most, and B enough.
    boxes, found = [[0, 0, 10, 10], [0, 0, 10, 14]], [[0, 0, 10, 10], [0, 0, 10, 11]]
    one = image(boxes, found, [0, 1])
    assert match_voc([one]).wrong.tolist() == [False, True]
    assert match_coco([one]).right[0].tolist() == [True, True]


def drawn(seed, num_images=8, num_classes=3, ties=False):
    """Random objects and detections near them, without equal scores, as fields and for COCO."""
    rng = np.random.default_rng(seed)
    o, d = 6, 9
    low = rng.integers(0, 60, (num_images, o, 2))
    boxes = np.concatenate([low, low + rng.integers(4, 40, (num_images, o, 2))], axis=2)
    label = rng.integers(-1, num_classes, (num_images, o))
    crowd = (rng.random((num_images, o)) < 0.15) & (label >= 0)
    near = boxes[:, rng.integers(0, o, d)] + rng.integers(-4, 5, (num_images, d, 4))
    near[..., 2:] = np.maximum(near[..., 2:], near[..., :2] + 1)
    order = rng.permutation(num_images * d).reshape(num_images, d)
    objects = {
        "boxes": np.where(label[..., None] >= 0, boxes, 0).astype(np.float32),
        "box_label": label.astype(np.int32),
        "difficult": np.zeros_like(crowd),
        "crowd": crowd,
    }
    found = {
        "boxes": near.astype(np.float32),
        "scores": ((order + 1) / (num_images * d + 1)).astype(np.float32),
        "classes": rng.integers(0, num_classes, (num_images, d)).astype(np.int32),
    }
    return objects, found


def by_pycocotools(objects, found, num_classes):
    """AP (overlap, class) of the same fields; -1 without objects becomes NaN."""
    images = [{"id": i + 1} for i in range(len(objects["boxes"]))]
    truth, detections = [], []
    for i in range(len(images)):
        for box, label, crowd in zip(
            objects["boxes"][i], objects["box_label"][i], objects["crowd"][i], strict=True
        ):
            if label >= 0:
                x0, y0, x1, y1 = map(float, box)
                of_box = [x0, y0, x1 - x0, y1 - y0]
                area = of_box[2] * of_box[3]
                row = {"id": len(truth) + 1, "image_id": i + 1, "category_id": int(label) + 1}
                truth.append({**row, "bbox": of_box, "area": area, "iscrowd": int(crowd)})
        for box, score, label in zip(
            *(found[k][i] for k in ("boxes", "scores", "classes")), strict=True
        ):
            x0, y0, x1, y1 = map(float, box)
            row = {"image_id": i + 1, "category_id": int(label) + 1, "score": float(score)}
            detections.append({**row, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        categories = [{"id": k + 1, "name": str(k)} for k in range(num_classes)]
        gold.dataset = {"images": images, "annotations": truth, "categories": categories}
        gold.createIndex()
        evaluation = COCOeval(gold, gold.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # overlap, recall, class
    return np.where(precision.max(1) < 0, np.nan, precision.mean(1))


def by_us(objects, found, num_classes):
    each = [match_coco(of_class(k, objects, found)) for k in range(num_classes)]
    return np.stack([average_precision(matches, "coco") for matches in each], axis=1)


def test_coco_is_pycocotools():
    for seed in range(40):
        objects, found = drawn(seed)
        got, want = by_us(objects, found, 3), by_pycocotools(objects, found, 3)
        assert got.shape == want.shape == (len(OVERLAPS), 3)
        np.testing.assert_allclose(got, want, atol=1e-9, err_msg=str(seed))


def test_the_interval_over_images():
    objects, _ = drawn(0, num_images=30)
    objects["crowd"][:] = False
    right = {
        "boxes": objects["boxes"],
        "scores": np.where(objects["box_label"] >= 0, 0.9, 0.1),
        "classes": np.maximum(objects["box_label"], 0),
    }
    assert scores.interval(3, objects, right, resamples=50) == (1, 1)
    half = {**right, "boxes": np.where(np.arange(30)[:, None, None] < 15, right["boxes"], 0)}
    low, high = scores.interval(3, objects, half, resamples=200)
    assert low < scores.numbers("abc", objects, half)["AP50"] < high
    assert 0.2 < high - low < 0.5  # a share of a half in 30 images: 4 * 0.5 / 30^0.5 = 0.37


def test_the_baseline_repeats_the_mean_box():
    boxes = np.array([[[0, 0, 8, 8]], [[0, 0, 8, 8]], [[40, 40, 48, 48]]], np.float32)
    train = {"boxes": boxes, "box_label": np.zeros((3, 1), np.int32)}
    flags = dict.fromkeys(("difficult", "crowd"), np.zeros((3, 1), bool))
    numbers = scores.frequent_places(("a",), 10, train, {**train, **flags})
    # Cells of 4 pixels: the boxes predicted are [2, 2, 10, 10] and [42, 42, 50, 50], too far off.
    assert numbers["AP50"] == 0
    train["boxes"] = boxes + 2  # centres at 6 and 46, the middles of cells
    assert scores.frequent_places(("a",), 10, train, {**train, **flags})["AP50"] > 0.6


# Targets, loss and decoding


def targets(boxes, label, crowd=None, size=(12, 16), num_classes=2):
    boxes, label = jnp.array([boxes], jnp.float32).reshape(1, -1, 4), jnp.array([label], jnp.int32)
    crowd = jnp.zeros(label.shape, bool) if crowd is None else jnp.array([crowd])
    return centres.make_targets(boxes, label, crowd, size, num_classes)


def test_targets_are_one_at_centres_and_belong_to_the_smallest_box():
    large, small = [0, 0, 48, 40], [20, 12, 36, 28]
    found = targets([large, small, [0, 0, 0, 0]], [0, 1, -1])
    heat = found.heat[0]
    assert heat[5, 6, 0] == 1  # pixel (24, 20), places of 4 pixels
    assert heat[5, 7, 1] == 1  # pixel (28, 20)
    assert float(heat.max((0, 1)).sum()) == 2
    assert (heat[..., 1] > 0).sum() == 9  # floor(0.54 / 2 * 16 / 4) = 1 place each way
    assert heat[5, 8, 1] == pytest.approx(np.exp(-0.5 * (1 / 0.5) ** 2))  # std (2 * 1 + 1) / 6
    np.testing.assert_array_equal(found.boxes[0, 5, 7], small)
    np.testing.assert_array_equal(found.boxes[0, 5, 4], large)
    assert found.num_objects[0] == 2
    owned = (np.asarray(found.boxes[0]) == small).all(-1)
    assert found.weight[0][owned].sum() == pytest.approx(1)
    assert float(found.weight.sum()) < 2  # the large box has lost places to the small one


def test_a_crowd_has_no_target_and_no_loss_inside():
    found = targets([[8, 8, 24, 24]], [0], [True])
    assert found.num_objects[0] == 0
    assert float(found.heat.max()) == 0
    assert (~found.counts[0]).sum() == 16
    logits = jnp.zeros((1, 12, 16, 2)).at[0, 3, 3].set(5.0)
    of_heat, _ = centres.losses(logits, jnp.zeros((1, 12, 16, 4)), found)
    everywhere, _ = centres.losses(logits.at[0, 3, 3].set(-5.0), jnp.zeros((1, 12, 16, 4)), found)
    assert of_heat == everywhere


def test_the_losses_by_hand():
    logits, heat = jnp.array([0.0, 0.0, 2.0]), jnp.array([1.0, 0.5, 0.0])
    p = 1 / (1 + np.exp(-2))
    want = [0.25 * np.log(2), 0.5**4 * 0.25 * np.log(2), -(p**2) * np.log(1 - p)]
    np.testing.assert_allclose(centres.focal_loss(logits, heat), want, rtol=1e-6)
    a = jnp.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 1, 1]], jnp.float32)
    b = jnp.array([[0, 0, 10, 10], [5, 0, 15, 10], [3, 0, 4, 1]], jnp.float32)
    # overlap 50 / 150, nothing around; no overlap, half of the four pixels around is empty
    np.testing.assert_allclose(centres.giou_loss(a, b), [0, 2 / 3, 1.5], atol=1e-6)


def test_padding_changes_nothing_and_empty_batches_are_finite():
    key = jax.random.key(0)
    logits, sides = jax.random.normal(key, (1, 12, 16, 2)), jax.random.normal(key, (1, 12, 16, 4))

    def loss(logits, sides, found):
        of_heat, of_boxes = centres.losses(logits, sides, found)
        return (of_heat + of_boxes).sum()

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    boxes = [[4, 4, 30, 30], [10, 2, 24, 40]]
    bare, padded = targets(boxes, [0, 1]), targets([*boxes, *[[0] * 4] * 3], [0, 1, -1, -1, -1])
    chex.assert_trees_all_equal(gradient(logits, sides, bare), gradient(logits, sides, padded))
    empty = gradient(logits, sides, targets([[0] * 4] * 2, [-1, -1]))
    chex.assert_tree_all_finite(empty)
    assert float(jnp.abs(empty[1][1]).max()) == 0


@pytest.mark.parametrize("box", [[8, 8, 24, 32], [0, 0, 64, 48], [50, 30, 64, 48]])
def test_what_the_targets_say_is_decoded(box):
    found = targets([box], [1])
    logits = jnp.where(found.heat > 0, 10 * found.heat, -10)
    h, w = found.heat.shape[1:3]
    y = STRIDE * (np.arange(h)[:, None] + 0.5) * np.ones(w)
    x = STRIDE * (np.arange(w) + 0.5) * np.ones((h, 1))
    x0, y0, x1, y1 = box
    sides = jnp.log(
        jnp.maximum(jnp.stack([x - x0, y - y0, x1 - x, y1 - y], -1), 0.1) / centres.UNIT
    )
    decoded = jax.tree.map(lambda a: np.asarray(a[0]), centres.decode(logits, sides[None], 5))
    np.testing.assert_allclose(decoded["boxes"][0], box, atol=1e-3)
    assert decoded["classes"][0] == 1
    assert decoded["scores"][0] == pytest.approx(1, abs=1e-4)
    assert decoded["scores"][1] < 1e-4  # one peak alone


# Whole runs


class Tiny(nn.Module):
    """A backbone with maps of strides 4 and 8, which is compiled in seconds."""

    @nn.compact
    def __call__(self, x, train):
        features = {}
        for name, size in (("fine", 4), ("coarse", 2)):
            x = layers.patch_conv(x, 32, size, kernel_init=layers.normal_fan_out, name=name)
            x = layers.conv(nn.relu(x), 32, 3, padding=1, name=f"{name}_conv")
            features[name] = x = nn.relu(layers.batch_norm(x, train, name=f"{name}_norm"))
        features["pooled"] = x.mean((1, 2))
        return x[:, 0, 0, :0], features


def tiny(*, num_classes, dtype):
    del num_classes, dtype
    return Tiny()


def shapes_config(**leaves):
    config = get_config()
    few = {"steps": 12, "batch_size": 16, "log_every": "4 steps", "eval_batch_size": 32}
    config.update({**few, "model": "tests.test_detection:tiny", **leaves})
    config.data.limit, config.data.num_val = 96, 32
    return config.lock()


def _run(workdir, **leaves):
    return train.run(shapes_config(**leaves), epath.Path(workdir))


@pytest.mark.slow
def test_a_detector_learns_predicts_and_is_exported(tmp_path):
    """A run from its start to the files that others use."""
    workdir = tmp_path / "run"
    result = _run(workdir, steps=120, eval_every="120 steps", checkpoint_every="never")
    assert result["headline"] == "AP50"
    baseline = result["baseline"]["test"]["AP50"]
    assert result["test"]["AP50"]["mean"] > max(0.2, 3 * baseline)
    assert {"AP50/disc", "AP", "AP75", "AP50_eleven"} <= result["test"].keys()

    test = load_shapes().test
    trained = load_trained(epath.Path(workdir))
    (predictions,) = [make_predict(trained, 32)({"image": test["image"][:32]})]
    found = {name: np.asarray(x) for name, x in predictions.items()}
    assert (np.diff(found["scores"]) <= 0).all()
    assert found["boxes"].min() >= 0
    assert found["boxes"].max() <= 64

    # A file of 128x96 pixels: the network sees 64x48, and boxes come back in the file's pixels.
    file = io.BytesIO()
    photo = PIL.Image.fromarray(test["image"][0]).resize((128, 128)).crop((0, 0, 128, 96))
    photo.save(file, "PNG")
    ((example, back),) = trained.task.read(file.getvalue())
    assert example["image"].shape == (64, 64, 3)
    assert example["image"][48:].max() == 0
    code: dict = {}
    exec(photograph((64, 64, 3), whole=True)[1], code)
    file.seek(0)
    np.testing.assert_array_equal(code["read_photo"](file)[0], example["image"])
    one = {"boxes": [[8, 8, 16, 60]], "scores": [0.9], "classes": [1]}
    one = {name: np.array(x) for name, x in one.items()}
    said = trained.task.describe(example, one, back)
    assert said == {"objects": [{"class": "square", "score": 0.9, "box": [16, 16, 32, 96]}]}
    assert trained.task.draw(example, one, back).shape == (192, 256, 3)
    above = trained.task.at_threshold(0.95)["describe"]
    assert above(example, one, back) == {"objects": []}
    assert in_text(said) == "square 90.0 % at (16, 16, 32, 96)"
    shown = [panel.title for panel in trained.task.panels(test, _all(trained, test))]
    assert shown[:2] == ["Detections", "Precision and recall of each class"]

    for name in ("stablehlo", "onnx"):
        path = epath.Path(tmp_path / name)
        export.write(epath.Path(workdir), trained, name, path)
        ours = export.own_predict(trained)
        few = {key: x[:32] for key, x in test.items()}
        report = export.compare(ours, read_format(name, path), few, trained, 16)
        assert report["equal"] == report["of"] == 32


def _all(trained, test):
    found = make_predict(trained, 128)({"image": test["image"]})
    return {name: np.asarray(x) for name, x in found.items()}


def test_mistakes_are_found():
    examples = {
        "boxes": np.array([[A, B]], float),
        "box_label": np.array([[0, 0]]),
        "difficult": np.zeros((1, 2), bool),
        "crowd": np.zeros((1, 2), bool),
    }
    found = {
        "boxes": np.array([[A, C, B]], float),
        "scores": np.array([[0.9, 0.8, 0.2]]),
        "classes": np.array([[0, 0, 0]]),
    }
    missed, wrong = mistakes(examples, found, 0.3)
    assert [(rank, box.tolist()) for rank, _, box, _ in missed] == [(100, B)]
    assert [(rank, box.tolist()) for rank, _, box, _ in wrong] == [(0.8, C)]


def evaluations():
    """Prints the numbers after some steps of a detector and a segmenter on the devices here."""
    import tempfile

    from cv_jax.runtime.startup import prepare_jax
    from tests.test_segmentation import masks_config

    prepare_jax()
    found = {}
    for make_config in (shapes_config, masks_config):
        config = make_config(steps=2, eval_every="never", checkpoint_every="never").unlock()
        config.optim.name, config.augment = "sgd", ""  # Adam makes steps of rounding errors
        with tempfile.TemporaryDirectory() as folder:
            found |= train.run(config.lock(), epath.Path(folder) / "run")["test"]
    print("RESULT", json.dumps({k: v["values"] for k, v in found.items() if k != "count"}))


@pytest.mark.slow
def test_one_two_and_eight_devices_give_the_same_numbers():
    one, *others = (
        json.loads(on_devices(count, "tests.test_detection", "evaluations").split("RESULT")[1])
        for count in (1, 2, 8)
    )
    for other in others:
        assert {"AP50", "mIoU", "boundary_f1"} <= one.keys()
        for name, values in one.items():
            np.testing.assert_allclose(other[name], values, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_going_on_is_exact_to_the_bit(tmp_path):
    whole = _run(tmp_path / "whole", eval_every="never", checkpoint_every="6 steps")
    _run(tmp_path / "parts", steps=6, eval_every="never", checkpoint_every="6 steps")
    again = _run(tmp_path / "parts", eval_every="never", checkpoint_every="6 steps")
    assert again["test"]["AP50"] == whole["test"]["AP50"]
    a, b = (load_trained(epath.Path(tmp_path / name)) for name in ("whole", "parts"))
    chex.assert_trees_all_equal(a.state.params, b.state.params)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"tta": "mirror_translate"}, "choose one of none, mirror"),
        ({"method": "centres(count=0)"}, "count=0 must be a whole number"),
        ({"method": "boxes"}, "centres"),
        ({"label_smoothing": 0.1}, "has no effect on config.task='detection'"),
        ({"progressive_resizing": "size(32, until=0.5)"}, "has no effect"),
    ],
)
def test_settings_that_do_not_fit_are_refused(leaves, message):
    config = shapes_config(**leaves)
    with pytest.raises(UserError, match=message):
        build_task(config, load_dataset(config.data).spec)


@pytest.mark.parametrize(
    "model", ["n94(widths=(4, 8, 8))", "convnext_t", "resnet50", "vit(32, 4, 2, patch=4)"]
)
def test_backbones_with_maps_of_any_size(model):
    backbone = build_model(model, 0, jnp.float32)
    detector = Detector(backbone, 3, 8, jnp.float32)
    image = jax.ShapeDtypeStruct((2, 60, 64, 3), jnp.float32)
    (heat, sides, _), _ = jax.eval_shape(
        lambda x: detector.init_with_output(jax.random.key(0), x, train=False), image
    )
    assert (heat.shape, sides.shape) == ((2, 15, 16, 3), (2, 15, 16, 4))


class Pooled(nn.Module):
    def __call__(self, x, train):
        return x[:, 0, 0, :0], {"pooled": x.mean((1, 2))}


def without_maps(*, num_classes, dtype):
    del num_classes, dtype
    return Pooled()


def test_a_backbone_without_maps_is_refused():
    config = shapes_config(model="tests.test_detection:without_maps")
    with pytest.raises(UserError, match="feature maps"):
        build_task(config, load_dataset(config.data).spec)


def test_images_whose_sides_do_not_fit_are_refused():
    config = shapes_config()
    spec = load_dataset(config.data).spec
    fields = {**spec.fields, "image": image_field((62, 64, 3))}
    with pytest.raises(UserError, match="multiples of 4 pixels"):
        build_task(config, spec._replace(fields=fields))
    with pytest.raises(UserError, match="needs the field 'boxes'"):
        build_task(config, random_dataset().spec)
