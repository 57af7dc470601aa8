"""Segmentation: metrics and losses against hand values and scikit-learn, windows, pictures."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

import train
from configs.shapes_masks import get_config
from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import Field, image_field
from cv_jax.data.fields import mask_field
from cv_jax.data.read_image import Back
from cv_jax.data.sources.shapes import load_shapes
from cv_jax.models import build_model
from cv_jax.models.pyramid import double
from cv_jax.models.segmenter import Segmenter
from cv_jax.tasks import build_task
from cv_jax.tasks.segmentation import losses, scores
from cv_jax.tasks.segmentation.panels import make_panels
from cv_jax.tasks.segmentation.pictures import describe, draw, mask_in_file, palette, to_image
from cv_jax.tasks.segmentation.windows import cuts, join, make_read_windows, starts
from cv_jax.tools.export import command as export
from cv_jax.tools.export.formats import read as read_format
from cv_jax.trained.load import load_trained, make_predict
from cv_jax.trained.words import in_text
from tests.conftest import random_dataset
from tests.test_folder import encoded

NAMES = ("sky", "road", "car")
N = len(NAMES)


def random_masks(count, size=(9, 13), seed=0, values=(0, 1, 2, 255)):
    return np.random.default_rng(seed).choice(np.uint8(values), (count, *size))


def values_of(predicted, masks, names=NAMES):
    return scores.numbers(names, scores.count(np.uint8(predicted), np.uint8(masks), len(names)))


# ---- Metrics


def test_the_confusion_matrix_and_iou_are_scikit_learns():
    masks, predicted = random_masks(5), random_masks(5, seed=1, values=(0, 1, 2))
    counts = scores.count(predicted, masks, N)
    true, found = masks[masks != 255], predicted[masks != 255]
    expected = confusion_matrix(true, found, labels=range(N))
    np.testing.assert_array_equal(counts.confusion.sum(0), expected)
    iou = jaccard_score(true, found, labels=range(N), average=None)
    np.testing.assert_allclose(scores.class_iou(counts.confusion.sum(0)), iou, rtol=1e-12)
    assert values_of(predicted, masks)["mIoU"] == pytest.approx(iou.mean(), abs=1e-12)
    right = (true == found).mean()
    assert values_of(predicted, masks)["pixel_accuracy"] == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize(
    ("mask", "predicted", "iou", "mean"),
    [
        ([[0, 1]], [[0, 1]], [1, 1, np.nan], 1),  # absent from both: left out
        ([[0, 1]], [[0, 2]], [1, 0, 0], 1 / 3),  # only predicted, or only there: 0
        ([[0, 255]], [[0, 2]], [1, np.nan, np.nan], 1),  # predicted only where it is ignored
        ([[255, 255]], [[0, 2]], [np.nan] * 3, np.nan),
    ],
)
def test_absent_classes_and_ignored_pixels(mask, predicted, iou, mean):
    found = values_of([predicted], [mask])
    np.testing.assert_equal([found[f"iou/{name}"] for name in NAMES], iou)
    np.testing.assert_allclose(found["mIoU"], mean)


def test_what_is_predicted_for_an_ignored_pixel_changes_nothing():
    masks, predicted = random_masks(3), random_masks(3, seed=1, values=(0, 1, 2))
    other = np.where(masks == 255, (predicted + 1) % 3, predicted)
    assert (other != predicted).any()
    assert values_of(predicted, masks) == values_of(other, masks)


def test_counts_are_summed_before_they_are_divided():
    masks = [[[0, 0, 0, 1]], [[1, 1, 1, 1]]]
    predicted = [[[0, 0, 0, 0]], [[1, 1, 1, 1]]]
    pairs = zip(predicted, masks, strict=True)
    parts = [scores.count(np.uint8([p]), np.uint8([m]), 2) for p, m in pairs]
    means = [scores.numbers(NAMES[:2], part)["mIoU"] for part in parts]
    assert np.mean(means) == pytest.approx((3 / 8 + 1) / 2)
    whole = scores.numbers(NAMES[:2], scores.joined(parts))["mIoU"]
    assert whole == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_more_pixels_than_float32_counts_are_exact():
    confusion = np.zeros((2, 2, 2), np.int64)
    confusion[:, 0, 0] = 2**24
    confusion[0, 0, 1] = 1
    counts = scores.Counts(confusion, np.zeros((2, 2, 4), np.int64))
    assert scores.numbers(NAMES[:2], counts)["pixel_accuracy"] == 2**25 / (2**25 + 1)


def test_a_boundary_that_is_near_enough_counts():
    size = 100, 200  # 0.75 % of the diagonal are 1.7, rounded up 2 pixels
    assert scores.boundary_tolerance(size) == 2

    def split_at(column):
        return np.broadcast_to(np.uint8(np.arange(200) >= column), (1, *size)).copy()

    mask = split_at(100)

    def f1(shift):
        return values_of(split_at(100 + shift), mask)["boundary_f1"]

    # Both classes have a column of boundary, which the shift moves.
    assert [f1(shift) for shift in (-3, -2, 0, 2, 3)] == [0, 1, 1, 1, 0]
    half = mask.copy()
    half[0, :50, 110:] = 1
    half[0, :50, 100:110] = 0  # the boundary of the upper half is off by ten
    counts = scores.count(half, mask, 2).boundary[0, 1]
    assert counts[2] == 100
    assert counts[3] == 52  # of the lower half, and two pixels above
    assert values_of(np.zeros_like(mask), mask, NAMES[:2])["boundary_f1"] == 0
    uniform = np.zeros_like(mask)
    assert np.isnan(scores._mean(np.array([scores._f1(0, 0, 0, 0)])))
    assert np.isnan(values_of(uniform, uniform)["boundary_f1"])


def test_the_interval_covers_what_other_images_would_give():
    masks, predicted = random_masks(40), random_masks(40, seed=1, values=(0, 1, 2))
    counts = scores.count(predicted, masks, N, boundaries=False)
    low, high = scores.interval(counts)
    assert low < scores.numbers(NAMES, counts)["mIoU"] < high
    same = scores.Counts(*(np.repeat(x[:1], 40, 0) for x in counts))
    np.testing.assert_allclose(scores.interval(same), scores.numbers(NAMES, same)["mIoU"])


def test_the_baseline_is_the_most_frequent_class_at_each_place():
    train = {"mask": np.uint8([[[0, 1]], [[0, 2]], [[2, 2]]])}
    test = {"mask": np.uint8([[[0, 2]], [[1, 2]]])}
    found = scores.frequent_classes(NAMES, train, test)
    assert found["iou/sky"] == 1 / 2
    assert found["iou/road"] == 0
    assert found["iou/car"] == 1


def test_a_prediction_that_is_not_finite_has_no_metrics():
    add, finish = scores.fold_of(NAMES, boundaries=False)
    masks = random_masks(2)
    shares = np.full((2, N), 1 / N, np.float32)
    good = add([], {"mask": random_masks(2, values=(0, 1)), "shares": shares}, {"mask": masks})
    assert np.isfinite(finish(good)["mIoU"])
    bad = add(good, {"mask": masks % 3, "shares": shares * np.nan}, {"mask": masks})
    assert np.isnan(list(finish(bad).values())).all()


# ---- Losses


def _logits(masks, seed=2):
    shape = (*masks.shape, N)
    return jnp.asarray(np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32))


@pytest.mark.parametrize("focus", [0, 0.5, 2])
@pytest.mark.parametrize("weights", [None, np.float32([0.5, 1, 3])], ids=["equal", "weighted"])
def test_the_loss_is_its_formula_over_valid_pixels(focus, weights):
    masks = random_masks(2)
    logits = _logits(masks)
    loss = losses.cross_entropy(logits, losses.make_pixels(masks, N, weights), focus)
    p = np.exp(np.float64(logits))
    p /= p.sum(-1, keepdims=True)
    total, count = 0.0, 0.0
    for place in np.argwhere(masks != 255):
        number = masks[tuple(place)]
        w = 1 if weights is None else weights[number]
        total -= w * (1 - p[(*place, number)]) ** focus * np.log(p[(*place, number)])
        count += w
    np.testing.assert_allclose([loss.total, loss.count], [total, count], rtol=1e-5)


def test_dice_is_its_formula_and_0_for_what_is_right():
    masks = random_masks(2)
    pixels = losses.make_pixels(masks, N)
    right = 50 * jax.nn.one_hot(masks, N)
    np.testing.assert_allclose(losses.dice(right, pixels), 0, atol=1e-6)
    logits = _logits(masks)
    p = np.float64(jax.nn.softmax(logits))[masks != 255]
    y = np.eye(N)[masks[masks != 255]]
    expected = np.mean(1 - 2 * (p * y).sum(0) / (p.sum(0) + y.sum(0)))
    np.testing.assert_allclose(losses.dice(logits, pixels), expected, rtol=1e-5)
    # A class that is nowhere does not count.
    two = losses.make_pixels(np.where(masks == 2, 255, masks), N)
    assert losses.dice(logits - 50 * jax.nn.one_hot(2, N)[None, None, None], two) < 1


@pytest.mark.parametrize("focus", [0, 0.5, 2])
def test_a_batch_of_ignored_pixels_has_a_loss_and_gradient_of_0(focus):
    masks = np.full((1, 4, 4), 255, np.uint8)

    def loss(logits):
        pixels = losses.make_pixels(masks, N)
        return losses.cross_entropy(logits, pixels, focus).mean() + losses.dice(logits, pixels)

    value, gradient = jax.value_and_grad(loss)(_logits(masks))
    assert value == 0
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(gradient))


def test_more_ignored_pixels_change_no_loss():
    masks = random_masks(2)
    padded = np.pad(masks, ((0, 1), (0, 3), (0, 0)), constant_values=255)
    logits = _logits(masks)
    pad = ((0, 1), (0, 3), (0, 0), (0, 0))
    for one, other in zip(
        losses.cross_entropy(logits, losses.make_pixels(masks, N))[:2],
        losses.cross_entropy(jnp.pad(logits, pad), losses.make_pixels(padded, N))[:2],
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


# ---- The network


def test_logits_are_interpolated_before_the_largest_is_taken():
    """At the middle between (2, 0) and (0, 1.2) the mean is (1, 0.6), and not a tie."""
    logits = jnp.array([[[[2.0, 0.0], [0.0, 1.2]]]])
    wide = jax.image.resize(logits, (1, 1, 4, 2), "bilinear")[0, 0]
    np.testing.assert_allclose(wide, [[2, 0], [1.5, 0.3], [0.5, 0.9], [0, 1.2]], atol=1e-6)
    model = Segmenter(build_model("resnet18(stem='imagenet', width=4)", 0, jnp.float32), N, 8)
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 12, 3)), False))()
    x = jax.random.normal(jax.random.key(1), (1, 8, 12, 3))
    out, state = model.apply(variables, x, train=False, capture_intermediates=True)
    coarse = state["intermediates"]["logits"]["__call__"][0]
    assert coarse.shape == (1, 2, 3, N)
    chex.assert_trees_all_close(out[0], jax.image.resize(coarse, (1, 8, 12, N), "bilinear"))


@pytest.mark.parametrize("size", [(16, 16), (15, 22)])
def test_a_unet_has_a_feature_for_every_pixel(size):
    model = build_model("unet(width=4, levels=3)", 0, jnp.float32)
    shape = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0],
        jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),
    )
    assert shape[1]["pixels"].shape == (1, *size, 4)
    assert shape[1]["group3"].shape == (1, size[0] // 4, size[1] // 4, 16)


@pytest.mark.parametrize(
    ("here", "there", "index"),
    [
        (3, 6, [0, 0, 1, 1, 2, 2]),
        (3, 5, [0, 0, 1, 1, 2]),
        (3, 7, [0, 0, 1, 1, 2, 2, 2]),
        (4, 4, [0, 1, 2, 3]),
        (5, 6, [0, 1, 2, 2, 3, 4]),  # as of n94, whose maps have 15 and the pyramid 16 places
    ],
)
def test_a_map_is_enlarged_to_its_whole_extent(here, there, index):
    x = jnp.arange(here * 2.0).reshape(1, here, 1, 2)
    out = double(jnp.broadcast_to(x, (1, here, here, 2)), (there, here))
    np.testing.assert_array_equal(out[0, :, 0], x[0, np.array(index), 0])
    assert out.shape == (1, there, here, 2)
    turned = double(jnp.swapaxes(x, 1, 2), (1, there))
    np.testing.assert_array_equal(turned[0, 0], x[0, np.array(index), 0])


# ---- Large images


@pytest.mark.parametrize(
    ("side", "window", "begins"),
    [(64, 64, [0]), (50, 64, [0]), (65, 64, [0, 1]), (160, 64, [0, 32, 64, 96]), (9, 8, [0, 1])],
)
def test_windows_cover_an_image(side, window, begins):
    assert starts(side, window) == begins
    spans = cuts(begins, window, side)
    assert [x for span in spans for x in range(*span)] == list(range(side))
    if window <= side:
        inside = zip(begins, spans, strict=True)
        assert all(b <= x and y <= b + window for b, (x, y) in inside)


def test_windows_and_the_whole_image_give_the_same_classes():
    """The network sees 8 pixels around each; windows of 64 overlap by at least 32."""
    model = Segmenter(build_model("unet(width=4, levels=2)", 0, jnp.float32), N, 8)
    pixels = np.random.default_rng(0).integers(0, 256, (128, 160, 3), np.uint8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    predict = jax.jit(
        lambda image: model.apply(variables, jnp.float32(image) / 255, train=False)[0]
    )
    whole = np.asarray(predict(pixels[None]).argmax(-1)[0])
    assert len(np.unique(whole)) > 1
    read = make_read_windows((64, 64, 3))
    parts = read(encoded(Image.fromarray(pixels), "PNG"))
    assert len(parts) == 3 * 4
    found = []
    for example, back in parts:
        logits = predict(example["image"][None])[0]
        shares = np.asarray(jax.nn.softmax(logits).mean((0, 1)))
        found.append((example, {"mask": np.uint8(logits.argmax(-1)), "shares": shares}, back))
    example, prediction, back = join(found)
    np.testing.assert_array_equal(example["image"], pixels)
    np.testing.assert_array_equal(prediction["mask"], whole)
    assert back.size == (128, 160)


@pytest.mark.parametrize("size", [(40, 50), (40, 150), (150, 40)])
def test_an_image_smaller_than_a_window_is_padded_and_comes_back_whole(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    parts = make_read_windows((64, 64, 3))(encoded(Image.fromarray(pixels), "PNG"))
    predictions = [
        (e, {"mask": e["image"][..., 0], "shares": np.ones(N)}, back) for e, back in parts
    ]
    example, prediction, back = join(predictions)
    np.testing.assert_array_equal(mask_in_file(prediction, back), pixels[..., 0])
    if len(parts) > 1:
        np.testing.assert_array_equal(example["image"], pixels)


# ---- Words and pictures


def test_areas_are_counted_in_the_pixels_of_the_file():
    mask = np.uint8([[0, 1, 255], [0, 1, 255]])
    back = Back((4, 4), np.diag([2.0, 2.0, 1.0]))  # the file's 4x4 became 2x2, with a border
    np.testing.assert_array_equal(mask_in_file({"mask": mask}, back), [[0, 0, 1, 1]] * 4)
    assert describe(NAMES, {}, {"mask": mask}, back) == {
        "areas": [
            {"class": "sky", "share": 0.5, "pixels": 8},
            {"class": "road", "share": 0.5, "pixels": 8},
        ]
    }


def test_the_palette_is_vocs():
    expected = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    np.testing.assert_array_equal(palette(5), expected)
    np.testing.assert_array_equal(palette(256)[[20, 255]], [[0, 64, 128], [224, 224, 192]])
    image = to_image(random_masks(1)[0])
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), random_masks(1)[0])


def test_a_picture_has_the_colours_of_the_classes():
    image = np.full((2, 3, 3), 100, np.uint8)
    picture = draw(NAMES, {"image": image, "mask": np.uint8([[0, 1, 255]] * 2)})
    times = picture.shape[0] // 2
    np.testing.assert_array_equal(picture[0, ::times], [[114, 50, 50], [50, 114, 50], [100] * 3])
    names = ("background", "road", "car")
    picture = draw(names, {"image": image, "mask": np.uint8([[0, 1, 255]] * 2)})
    np.testing.assert_array_equal(picture[0, ::times], [[100] * 3, [50, 114, 50], [100] * 3])
    back = Back((2, 2), np.eye(3))
    assert draw(NAMES, {"image": image}, {"mask": np.zeros((2, 3), np.uint8)}, back).shape[:2] == (
        256,
        256,
    )


def test_the_report_names_the_worst_image_and_what_is_confused():
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[:, 4:] = 1
    predicted = masks.copy()
    predicted[1, 4:] = 2
    examples = {"image": np.zeros((2, 8, 8, 3), np.uint8), "mask": masks}
    panels = {p.title: p for p in make_panels(NAMES)(examples, {"mask": predicted})}
    text = panels["Intersection over union of each class"].text
    assert (
        "sky 100.0 % (50.0 % of the pixels), road 50.0 % (50.0 % of the pixels), car 0.0 %" in text
    )
    assert "predicted, 50.0 % right" in panels["The worst images"].captions[1]
    assert panels["Classes taken for others"].text == "50 % of road as car."
    assert len(panels["Colours of the classes"].pictures) == 3


# ---- The task


def masks_config(**leaves):
    config = get_config()
    few = {"steps": 12, "batch_size": 16, "log_every": "4 steps", "eval_batch_size": 32}
    config.update({**few, "model": "unet(width=4, levels=2)", **leaves})
    config.data.limit, config.data.num_val = 96, 32
    return config.lock()


def _run(workdir, **leaves):
    return train.run(masks_config(**leaves), epath.Path(workdir))


@pytest.mark.slow
def test_a_segmenter_learns_predicts_and_is_exported(tmp_path):
    """A run from its start to the files that others use."""
    workdir = tmp_path / "run"
    leaves = {"model": "unet(width=8, levels=3)", "method": "pixels(dice=1.0)", "steps": 80}
    result = _run(workdir, eval_every="80 steps", checkpoint_every="never", **leaves)
    assert result["headline"] == "mIoU"
    baseline = result["baseline"]["test"]["mIoU"]
    assert baseline == pytest.approx(0.224, abs=0.01)  # all is background
    assert result["test"]["mIoU"]["mean"] > 1.3 * baseline
    assert {"iou/disc", "pixel_accuracy", "boundary_f1"} <= result["test"].keys()

    trained = load_trained(epath.Path(workdir))
    test = {name: x[:32] for name, x in load_shapes().test.items()}
    found = make_predict(trained, 32)({"image": test["image"]})
    np.testing.assert_allclose(np.asarray(found["shares"]).sum(1), 1, rtol=1e-5)

    # A file of 160x96 pixels is seen in windows; its mask has the file's size.
    file = encoded(Image.fromarray(np.concatenate(list(test["image"][:3]), 1)[:, :160]), "PNG")
    parts = trained.task.read(file)
    images = np.stack([example["image"] for example, _ in parts])
    predictions = jax.device_get(make_predict(trained, len(images))({"image": images}))
    rows = [{name: x[i] for name, x in predictions.items()} for i in range(len(parts))]
    whole = trained.task.join([(e, row, b) for (e, b), row in zip(parts, rows, strict=True)])
    assert trained.task.mask(*whole[1:]).size == (160, 64)
    said = trained.task.describe(*whole)
    assert sum(area["pixels"] for area in said["areas"]) == 160 * 64
    assert in_text(said).startswith(f"background {100 * said['areas'][0]['share']:.1f} %")
    assert trained.task.draw(*whole).shape == (128, 320, 3)

    for name in ("stablehlo", "onnx"):
        path = epath.Path(tmp_path / name)
        export.write(epath.Path(workdir), trained, name, path)
        ours = export.own_predict(trained)
        report = export.compare(ours, read_format(name, path), test, trained, 16)
        assert report["equal"] == report["of"] == 32


@pytest.mark.slow
def test_going_on_is_exact_to_the_bit(tmp_path):
    whole = _run(tmp_path / "whole", eval_every="never", checkpoint_every="6 steps")
    _run(tmp_path / "parts", steps=6, eval_every="never", checkpoint_every="6 steps")
    again = _run(tmp_path / "parts", eval_every="never", checkpoint_every="6 steps")
    assert again["test"] == whole["test"]
    a, b = (load_trained(epath.Path(tmp_path / name)) for name in ("whole", "parts"))
    chex.assert_trees_all_equal(a.state.params, b.state.params)


def _spec(names=NAMES, counts=(5, 5, 5), **changes):
    spec = random_dataset().spec
    image = spec.fields["image"]._replace(
        **image_field((8, 8, 3))._asdict()
        | {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)}
    )
    fields = {"image": image, "mask": mask_field(names, (8, 8)), **changes}
    return spec._replace(fields=fields, pixel_counts=counts)


def _config(**leaves):
    config = base_config()
    config.task, config.model = "segmentation", "unet(width=2, levels=2)"
    config.update_from_flattened_dict(leaves)
    return config


@pytest.mark.parametrize(
    ("leaves", "spec", "says"),
    [
        ({"tta": "mirror_translate"}, {}, "choose one of none, mirror"),
        ({"method": "pixels(dice=-1)"}, {}, "dice=-1 must be 0 or more"),
        ({"method": "pixels(focus=99)"}, {}, "focus=99 must lie in"),
        ({"method": "circles"}, {}, "Unknown config.method 'circles'"),
        ({"label_smoothing": 0.1}, {}, "has no effect on config.task='segmentation'"),
        ({"method": "pixels(dice=1.0)", "accumulate": 2}, {}, "one of the whole batch"),
        ({"model": "unet(levels=5)"}, {}, "needs images of at least 16x16 pixels, but got 8x8"),
        ({}, {"counts": (9, 0, 0)}, "have only pixels of the class 'sky'"),
        ({}, {"mask": Field((), "int32", "label", names=NAMES)}, "of the kind 'mask'"),
        ({"model": "lenet", "augment": "circle"}, {}, "circle"),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_one_sentence(leaves, spec, says):
    with pytest.raises(UserError) as error:
        build_task(_config(**leaves), _spec(**spec))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
