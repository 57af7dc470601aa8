"""Augmentations: exact properties, and references in slow NumPy or Pillow."""

import functools
import itertools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cv_jax.augment import colour
from cv_jax.augment import geometry as augment
from cv_jax.augment.chain import AUGMENTATIONS, make_augment
from cv_jax.augment.warp import _bilinear
from cv_jax.config.calls import parse
from cv_jax.config.errors import UserError
from cv_jax.data.fields import Field, image_field, labels_field
from cv_jax.learn.inputs import check_augmented, make_view
from cv_jax.learn.losses import cross_entropy
from tests.conftest import ROOT, random_dataset

KEY = jax.random.key(0)
ONE_OF_EACH = {
    "flip": "flip",
    "alternating_flip": "alternating_flip",
    "crop": "crop(2)",
    "affine": "affine(20, (0.8, 1.2), 2, 10, mode='zero')",
    "rotate": "rotate(30)",
    "scale": "scale(0.7, 1.3)",
    "translate": "translate(2)",
    "rot90": "rot90",
    "random_crop": "random_crop(8)",
    "random_resized_crop": "random_resized_crop",
    "cutout": "cutout(4)",
    "random_erasing": "random_erasing(0.9)",
    "color_jitter": "color_jitter(0.4, 0.4, 0.4, 0.1, p=0.9)",
    "grayscale": "grayscale(0.5)",
    "stain_jitter": "stain_jitter(0.1)",
    "randaugment": "randaugment",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "mixup_or_cutmix": "mixup_or_cutmix",
}
TEXTS = list(ONE_OF_EACH.values())
# Compiling is most of what these tests do, and level 1 takes half the time of the default.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
MIXING = ("mixup", "cutmix", "mixup_or_cutmix")


def make_batch(*shape, seed=0, image=None):
    """A batch of random images of `shape` (or of `image`), labelled 0, 1, 2, 3, 4, 0, 1, ..."""
    rng = np.random.default_rng(seed)
    image = rng.random(shape) if image is None else image
    b = len(image)
    return {
        "image": jnp.asarray(image, jnp.float32),
        "label": jnp.asarray(np.eye(5)[np.arange(b) % 5], jnp.float32),
        "rows": {
            "index": jnp.arange(b, dtype=jnp.int32),
            "epoch": jnp.full(b, 3, jnp.int32),
            "coin": jnp.asarray(rng.integers(2**32, size=b), jnp.uint32),
        },
    }


def shape_for(text, shape):
    """`shape`, and square images for the op that needs them."""
    return (*shape[:2], shape[1], shape[3]) if text == "rot90" else shape


@functools.cache
def jitted(text):
    return jit(make_augment(text))


def images(text, batch, key=KEY):
    """The images that `text` makes of `batch`, for NumPy."""
    return np.asarray(jitted(text)(key, batch)["image"])


def ramps(b, h, w):
    """Images whose two channels hold each pixel's row and column."""
    grid = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    return np.broadcast_to(grid, (b, h, w, 2)).astype(np.float32)


def assert_unrelated(*draws):
    """Asserts that every two of `draws`, each some thousand numbers, are uncorrelated."""
    np.testing.assert_allclose(np.corrcoef(draws), np.eye(len(draws)), atol=0.1)


# --- What holds for every op ---


def test_every_op_is_tested_here():
    assert ONE_OF_EACH.keys() == AUGMENTATIONS.keys()


@pytest.mark.parametrize("shape", [(5, 7, 10, 3), (1, 9, 6, 1)], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_shapes_dtypes_and_range_stay(text, shape):
    if text == "stain_jitter(0.1)":
        shape = (*shape[:3], 3)  # it needs three channels
    batch = make_batch(*shape_for(text, shape))
    out = jitted(text)(KEY, batch)
    size = (8, 8) if text == "random_crop(8)" else shape_for(text, shape)[1:3]
    chex.assert_trees_all_equal_shapes_and_dtypes(
        out, {**batch, "image": jnp.zeros((shape[0], *size, shape[3]))}
    )
    chex.assert_tree_all_finite(out)
    assert float(out["image"].min()) >= 0
    assert float(out["image"].max()) <= 1 + 1e-6
    chex.assert_trees_all_equal(out["rows"], batch["rows"])
    if text not in MIXING:
        np.testing.assert_array_equal(out["label"], batch["label"])


@pytest.mark.parametrize("text", TEXTS)
def test_the_key_decides(text):
    batch = make_batch(*shape_for(text, (5, 7, 10, 3)))
    chex.assert_trees_all_equal(jitted(text)(KEY, batch), jitted(text)(KEY, batch))
    other = images(text, batch, jax.random.key(1))
    assert np.array_equal(images(text, batch), other) == (text == "alternating_flip")


@pytest.mark.parametrize("text", TEXTS)
def test_examples_do_not_touch_each_other(text):
    batch = make_batch(*shape_for(text, (5, 7, 10, 3)))
    changed = {**batch, "image": batch["image"].at[2].set(1 - batch["image"][2])}
    differs = np.any(images(text, batch) != images(text, changed), axis=(1, 2, 3))
    touched = {1, 2} if text in MIXING else {2}
    assert differs[2]
    assert set(np.flatnonzero(differs)) <= touched


@pytest.mark.parametrize("text", [t for t in TEXTS if t not in ("alternating_flip", *MIXING)])
def test_equal_examples_get_their_own_randomness(text):
    image = np.random.default_rng(0).random(shape_for(text, (1, 7, 10, 3)))
    out = images(text, make_batch(image=np.repeat(image, 5, axis=0)))
    assert len(np.unique(out.reshape(5, -1), axis=0)) > 1


@pytest.mark.parametrize("text", TEXTS)
def test_vmap_inside_scan_gives_the_same(text):
    op = make_augment(text)
    batch = make_batch(*shape_for(text, (5, 7, 10, 3)))
    keys = jax.random.split(KEY, (2, 2))

    def body(carry, keys):
        return carry, jax.vmap(op, in_axes=(0, None))(keys, batch)["image"]

    _, together = jit(lambda keys: jax.lax.scan(body, 0, keys))(keys)
    alone = [[images(text, batch, key) for key in row] for row in keys]
    np.testing.assert_allclose(together, np.array(alone), atol=1e-6)


# --- Values of the code before fields ---

# Made in float32 on a CPU by the code that knew images and labels alone. Of the configs' chains,
# "translate(1)|rotate(10)" is missing: its two resamplings have become one.
STORED = np.load(ROOT / "tests" / "augment_golden.npz")
BY_WHOLE_PIXELS = {"flip", "alternating_flip", "crop", "cutout"}  # no arithmetic, no rounding


@pytest.mark.parametrize("name", STORED.files)
def test_images_and_labels_are_those_of_the_code_before_fields(name):
    text, _, entry = name.partition("/")
    out = jitted(text)(KEY, make_batch(2, 6, 6, 3))[entry or "image"]
    exact = {call.name for call in parse(text)} <= BY_WHOLE_PIXELS
    np.testing.assert_allclose(out, STORED[name], rtol=0, atol=0 if exact else 3e-7)


# --- Composition ---


def test_empty_text_is_the_identity():
    batch = make_batch(2, 4, 4, 1)
    chex.assert_trees_all_equal(make_augment("")(KEY, batch), batch)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (
            lambda batch: batch["image"],
            "'mine' returned float32 (2, 4, 4, 1): return the batch, a dict of image, label, rows",
        ),
        (lambda batch: None, "'mine' returned None: return the batch"),
        (
            lambda batch: {**batch, "image": batch["image"][..., 0]},
            "'mine' returned float32 (2, 4, 4) as the batch's 'image': return float32 "
            "(2, 4, 4, 1).",
        ),
        (
            lambda batch: {**batch, "image": batch["image"].astype(jnp.bfloat16)},
            "'mine' returned bfloat16 (2, 4, 4, 1) as the batch's 'image': return float32",
        ),
        (
            lambda batch: {**batch, "image": jnp.repeat(batch["image"], 3, axis=3)},
            "returned float32 (2, 4, 4, 3) as the batch's 'image': return float32 (2, 4, 4, 1",
        ),
        (
            lambda batch: {**batch, "label": batch["label"].argmax(-1)},
            "returned int32 (2,) as the batch's 'label': return float32 (2, 5).",
        ),
        (
            lambda batch: {k: x for k, x in batch.items() if k != "label"},
            "returned None as the batch's 'label': return float32 (2, 5).",
        ),
    ],
)
def test_what_is_no_batch_is_described_when_it_is_traced(monkeypatch, op, message):
    monkeypatch.setitem(AUGMENTATIONS, "mine", lambda: lambda key, batch: op(batch))
    with pytest.raises(UserError, match=re.escape(message)):
        jax.eval_shape(make_augment("flip|mine"), KEY, make_batch(2, 4, 4, 1))


def test_labels_cannot_be_mixed_where_there_are_none():
    batch = {**make_batch(2, 4, 4, 1), "image": np.zeros((2, 4, 4, 1), np.uint8)}
    for name in MIXING:
        with pytest.raises(UserError, match=f"'{name}' mixes labels, but the task has none"):
            jax.eval_shape(make_view(f"flip|{name}"), batch, KEY)


def test_values_outside_0_to_1_are_refused_by_the_name_of_what_made_them(monkeypatch):
    spec = random_dataset().spec
    sample = spec.sample["image"].astype(np.float32) / 255
    assert check_augmented("flip", {"image": sample}, spec) == []
    note = "augment makes images of 6x7 pixels out of 8x8"
    smaller = {"image": sample[:, :6, :7]}
    assert check_augmented("random_resized_crop((6, 7))", smaller, spec) == [note]

    for factor, values in ((255, r"from 0 to 255"), (math.nan, "from nan to nan")):

        def op(key, batch, factor=factor):
            return {**batch, "image": batch["image"] * factor}

        monkeypatch.setitem(AUGMENTATIONS, "mine", lambda op=op: op)
        message = f"'mine' returned images with values {values}. Clip or scale them"
        with pytest.raises(UserError, match=message):
            check_augmented("flip|mine|crop(1)", {"image": sample * factor}, spec)


def test_ops_run_in_order_each_with_its_own_key():
    expected = batch = make_batch(6, 9, 9, 3)
    for position, text in enumerate(["crop(3)", "cutout(3)", "crop(3)"]):
        op = AUGMENTATIONS[text[:-3]](3)
        expected = jit(op)(jax.random.fold_in(KEY, position), expected)
    out = jitted("crop(3) | cutout(3) | crop(3)")(KEY, batch)
    chex.assert_trees_all_equal(out, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crp(4)", "Unknown config.augment 'crp'. Did you mean 'crop'? There are: affine, "),
        ("flip(2)", r"p=2 must lie in [0, 1]"),
        ("alternating_flip(0.5)", "Write it as alternating_flip()."),
        ("crop", "missing a required argument: 'padding'"),
        ("crop(-1)", "padding=-1 must be a whole number of pixels, 0 to 256"),
        ("crop(1.5)", "padding=1.5 must be int"),
        ("crop(4, 'wrap')", """mode='wrap' must be "reflect" or "zero\""""),
        ("rotate(-5)", "degrees=-5 must lie in [0, 360]"),
        ("scale(0, 1)", "scale=(0, 1) must be 0.01 <= low <= high <= 100"),
        ("scale(1.2, 1.1)", "scale=(1.2, 1.1) must be 0.01 <= low <= high <= 100"),
        ("translate(-1)", "translate=-1 must be pixels, 0 to 4096"),
        ("affine(shear=90)", "shear=90 must lie in [0, 90)"),
        ("affine(samples=0)", "samples=0 must be a whole number, 1 to 16"),
        ("affine(mode='wrap')", """mode='wrap' must be "reflect" or "zero\""""),
        (
            "random_resized_crop(0)",
            "size=(0, 0) must be one or two whole numbers of pixels, 1 to 4096",
        ),
        ("random_resized_crop((8,))", "size=(8,) must be int | tuple[int, int] | None"),
        ("random_resized_crop(scale=(0.5, 0.2))", "scale=(0.5, 0.2) must be 0 < low <= high <= 1"),
        ("random_resized_crop(scale=(0, 0.2))", "scale=(0, 0.2) must be 0 < low <= high <= 1"),
        ("random_resized_crop(scale=(0.5, 1.5))", "scale=(0.5, 1.5) must be 0 < low <= high <= 1"),
        ("random_resized_crop(ratio=(2, 1))", "ratio=(2, 1) must be 0.01 <= low <= high <= 100"),
        ("cutout(-1)", "size=-1 must be a whole number of pixels, 0 to 4096"),
        ("cutout(8, 2)", "fill=2 must lie in [0, 1]"),
        ("color_jitter(0.1, 2)", "(0.1, 2, 0.0) must all lie in [0, 1]"),
        ("color_jitter(hue=0.6)", "hue=0.6 must lie in [0, 0.5]"),
        ("color_jitter(p=-0.1)", "p=-0.1 must lie in [0, 1]"),
        ("grayscale(1.1)", "p=1.1 must lie in [0, 1]"),
        ("grayscale(-0.1)", "p=-0.1 must lie in [0, 1]"),
        ("mixup(0)", "alpha=0 must lie in [0.001, 1e6]"),
        ("cutmix(-1)", "alpha=-1 must lie in [0.001, 1e6]"),
        ("mixup_or_cutmix(p=2)", "p=2 must lie in [0, 1]"),
        ("random_erasing(2)", "p=2 must lie in [0, 1]"),
        ("random_erasing(area=(0, 0.3))", "area=(0, 0.3) must be 0 < low <= high <= 1"),
        ("random_erasing(ratio=(2, 1))", "ratio=(2, 1) must be 0.01 <= low <= high <= 100"),
        ("random_erasing(fill='grey')", "fill='grey' must be 'noise' or lie in [0, 1]"),
        ("randaugment(0)", "num_ops=0 must be a whole number, 1 to 14"),
        ("randaugment(2, 11)", "magnitude=11 must lie in [0, 10]"),
        ("randaugment(std=-1)", "std=-1 must lie in [0, 10]"),
        ("randaugment(p=-1)", "p=-1 must lie in [0, 1]"),
    ],
)
def test_bad_arguments_are_named(text, message):
    with pytest.raises(UserError) as error:
        make_augment(text)
    assert message in str(error.value)


# --- Mirror images ---


def test_flip_mirrors_columns():
    batch = make_batch(2, 3, 4, 3)
    np.testing.assert_array_equal(images("flip(1)", batch), batch["image"][:, :, ::-1])
    np.testing.assert_array_equal(images("flip(0)", batch), batch["image"])
    np.testing.assert_array_equal(images("flip(1.0)|flip(1.0)", batch), batch["image"])
    vertical = images("flip(1, vertical=True)", batch)
    np.testing.assert_array_equal(vertical, batch["image"][:, ::-1])


def test_flip_happens_with_probability_p():
    batch = make_batch(4000, 1, 2, 1)
    flipped = np.any(images("flip(0.3)", batch) != batch["image"], axis=(1, 2, 3))
    assert abs(flipped.mean() - 0.3) < 0.03  # four standard deviations


def test_alternating_flip_shows_both_versions_in_successive_epochs():
    batch = make_batch(50, 3, 4, 1)
    rows = batch["rows"]
    coin = rows["coin"].at[:2].set(jnp.array([2**32 - 1, 2**32 - 2], jnp.uint32))
    plain = np.asarray(batch["image"])
    for epoch in range(4):
        rows = {"coin": coin, "epoch": jnp.full(50, epoch, jnp.int32)}
        out = images("alternating_flip", {**batch, "rows": rows})
        odd = (np.asarray(coin).astype(np.int64) + epoch) % 2 == 1
        assert 0 < odd.sum() < 50
        np.testing.assert_array_equal(out[odd], plain[odd][:, :, ::-1])
        np.testing.assert_array_equal(out[~odd], plain[~odd])


# --- Other views of the image ---


@pytest.mark.parametrize(("mode", "pad"), [("reflect", "reflect"), ("zero", "constant")])
@pytest.mark.parametrize(
    ("h", "w", "c", "padding"), [(5, 6, 3, 2), (3, 4, 1, 7), (1, 2, 1, 2), (4, 4, 2, 0)]
)
def test_crop_is_a_window_of_the_padded_image(h, w, c, padding, mode, pad):
    batch = make_batch(30, h, w, c)
    out = images(f"crop({padding}, '{mode}')", batch)
    offsets = list(itertools.product(range(2 * padding + 1), repeat=2))
    width = ((padding, padding), (padding, padding), (0, 0))
    for before, after in zip(np.asarray(batch["image"]), out, strict=True):
        padded = np.pad(before, width, mode=pad)
        assert any(np.array_equal(padded[y : y + h, x : x + w], after) for y, x in offsets)


@pytest.mark.parametrize("mode", ["reflect", "zero"])
def test_both_ways_to_crop_give_the_same(mode):
    image = make_batch(9, 4, 5, 2)["image"]
    corner = jnp.array([(y, x) for y in range(3) for x in range(3)])
    ways = (augment._crop_by_gather, augment._crop_by_choice)
    gathered, chosen = (jax.jit(way, static_argnums=(2, 3))(image, corner, 1, mode) for way in ways)
    np.testing.assert_array_equal(gathered, chosen)


def test_crop_offsets_are_equally_frequent():
    shifts = images("crop(1)", make_batch(image=ramps(4500, 5, 5)))[:, 2, 2].astype(int)
    _, counts = np.unique(shifts, axis=0, return_counts=True)
    assert len(counts) == 9
    assert np.all(abs(counts - 500) < 90)  # four standard deviations


def slow_affine(image, degrees, scale, shear, down, right, mode):
    """One image, pixel by pixel, with the forward map inverted numerically."""
    h, w, c = image.shape
    t, s = np.deg2rad(degrees), np.tan(np.deg2rad(shear))
    turn = np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])  # of (right, down)
    back = np.linalg.inv(turn @ np.array([[1, s], [0, 1]]) * scale)
    margin = 40
    padded = np.pad(
        image.astype(np.float64),
        ((margin, margin), (margin, margin), (0, 0)),
        mode="constant" if mode == "zero" else "reflect",
    )
    out = np.zeros((h, w, c))
    for row, col in itertools.product(range(h), range(w)):
        x, y = back @ np.array([col - (w - 1) / 2 - right, row - (h - 1) / 2 - down])
        y, x = y + (h - 1) / 2 + margin, x + (w - 1) / 2 + margin
        top, left = int(np.floor(y)), int(np.floor(x))
        for r, q in itertools.product((top, top + 1), (left, left + 1)):
            out[row, col] += (1 - abs(y - r)) * (1 - abs(x - q)) * padded[r, q]
    return out


@functools.partial(jit, static_argnames="mode")
def affine_with(image, amounts, mode):
    source = augment._affine_source(amounts, image.shape[1:3])
    return jax.vmap(functools.partial(_bilinear, mode=mode))(image, *source)


def fixed_affine(image, degrees=0.0, scale=1.0, shear=0.0, down=0.0, right=0.0, mode="reflect"):
    """What `affine` makes of images when the amounts are given, each a number or (b,)."""
    amounts = np.broadcast_arrays(degrees, scale, shear, down, right, np.zeros(len(image)))[:5]
    amounts = np.stack(amounts, axis=1).astype(np.float32)
    return np.asarray(affine_with(image.astype(np.float32), amounts, mode=mode))


@pytest.mark.parametrize("mode", ["reflect", "zero"])
@pytest.mark.parametrize("shape", [(8, 7, 10, 3), (8, 9, 4, 1)], ids=str)
def test_affine_equals_the_slow_reference(shape, mode):
    rng = np.random.default_rng(0)
    image = rng.random(shape, np.float32)
    low, high = np.array([[-180, 0.6, -30, -4, -4], [180, 1.6, 30, 4, 4]])
    amounts = rng.uniform(low, high, (len(image), 5))
    expected = [slow_affine(i, *a, mode) for i, a in zip(image, amounts, strict=True)]
    out = fixed_affine(image, *amounts.T, mode=mode)
    np.testing.assert_allclose(out, np.array(expected), atol=2e-5)


def test_affine_of_nothing_is_the_identity():
    batch = make_batch(3, 5, 8, 3)
    for text in ("affine", "rotate(0)", "scale(1, 1)", "translate(0, mode='zero')"):
        np.testing.assert_array_equal(images(text, batch), batch["image"])


@pytest.mark.parametrize("size", [6, 7])
def test_a_quarter_turn_is_rot90(size):
    image = np.random.default_rng(0).random((1, size, size, 3), np.float32)
    for mode in ("reflect", "zero"):
        out = fixed_affine(image, degrees=90.0, mode=mode)
        np.testing.assert_allclose(out[0], np.rot90(image[0]), atol=1e-5)


def test_rotation_turns_as_pillow_does():
    smooth = np.sin(ramps(1, 21, 21).sum(-1) / 4 + ramps(1, 21, 21)[..., 0] / 5)
    out = fixed_affine(smooth[..., None], degrees=25.0)[0, ..., 0]
    turned = Image.fromarray(smooth[0]).rotate(25, resample=Image.Resampling.BILINEAR)
    inner = slice(6, 15)
    np.testing.assert_allclose(out[inner, inner], np.asarray(turned)[inner, inner], atol=1e-5)


def test_moving_by_whole_pixels_is_a_roll():
    image = np.random.default_rng(0).random((1, 6, 8, 1), np.float32)
    out = fixed_affine(image, down=2.0, right=-3.0, mode="zero")
    np.testing.assert_array_equal(out[:, 2:, :-3], np.roll(image, (2, -3), (1, 2))[:, 2:, :-3])
    assert not out[:, :2].any()
    assert not out[:, :, -3:].any()


def test_affine_draws_are_uniform_in_their_ranges():
    # On ramps, interpolation is exact: the centre and its neighbours tell where they came from.
    batch = make_batch(image=ramps(4000, 11, 11))

    def slopes(text):
        out = images(text, batch)
        return out[:, 5, 5] - 5, out[:, 6, 5] - out[:, 5, 5], out[:, 5, 6] - out[:, 5, 5]

    def assert_uniform(draws, low, high):
        span = high - low
        assert draws.min() > low - 1e-3
        assert draws.max() < high + 1e-3
        np.testing.assert_allclose(draws.mean(), (low + high) / 2, atol=0.02 * span)
        np.testing.assert_allclose(draws.std(), span / 12**0.5, rtol=0.05)

    center, down, right = slopes("affine(20, (0.8, 1.3), 2)")
    scale = 1 / np.hypot(*right.T)
    angle = np.arctan2(right[:, 0], right[:, 1])
    assert_uniform(np.rad2deg(angle), -20, 20)
    assert_uniform(scale, 0.8, 1.3)
    back = np.einsum("bij,bj->bi", np.linalg.inv(np.stack([down, right], axis=-1)), -center)
    assert_uniform(back[:, 0], -2, 2)
    assert_uniform(back[:, 1], -2, 2)
    assert_unrelated(angle, scale, *back.T)
    _, down, _ = slopes("affine(shear=30)")
    assert_uniform(np.rad2deg(np.arctan(-down[:, 1])), -30, 30)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("rotate(30)", "affine(degrees=30)"),
        ("scale(0.7, 1.3)", "affine(scale=(0.7, 1.3))"),
        ("translate(2)", "affine(translate=2)"),
    ],
)
def test_short_names_are_affine(text, same):
    batch = make_batch(5, 7, 10, 3)
    np.testing.assert_array_equal(images(text, batch), images(same, batch))


@pytest.mark.parametrize("size", [(6, 9), (3, 4), (15, 5)], ids=str)
def test_resized_boxes_equal_pillows(size):
    rng = np.random.default_rng(0)
    image = rng.random((4, 12, 10, 1), np.float32)
    corner = rng.uniform(0, 4, (4, 2)).astype(np.float32)
    extent = rng.uniform(3, 6, (4, 2)).astype(np.float32)
    out = jit(augment._resize_boxes, static_argnums=3)(image, corner, extent, size)
    assert out.shape == (4, *size, 1)
    for i in range(4):
        (y, x), (h, w) = corner[i].tolist(), extent[i].tolist()
        expected = Image.fromarray(image[i, ..., 0]).resize(
            size[::-1], Image.Resampling.BILINEAR, box=(x, y, x + w, y + h)
        )
        np.testing.assert_allclose(out[i, ..., 0], np.asarray(expected), atol=1e-5)


box_shapes = jit(augment._box_shapes, static_argnums=(1, 2, 3, 4, 5))


def test_boxes_have_uniform_area_and_log_uniform_ratio():
    shapes = box_shapes(KEY, 4000, 30, 20, (0.1, 0.3), (0.5, 2.0))
    height, width = np.asarray(shapes).T
    area, log_ratio = height * width / 600, np.log2(width / height)
    for draws, low, high in ((area, 0.1, 0.3), (log_ratio, -1, 1)):
        assert low - 1e-4 < draws.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < draws.max() < high + 1e-4
        np.testing.assert_allclose(draws.mean(), (low + high) / 2, atol=0.02 * (high - low))
    assert_unrelated(area, log_ratio)


def test_boxes_that_do_not_fit_are_drawn_again_or_replaced_by_the_largest():
    height, width = np.asarray(box_shapes(KEY, 2000, 8, 8, (0.5, 1.0), (0.75, 4 / 3))).T
    assert max(height.max(), width.max()) <= 8
    assert (height * width).min() > 31.9
    wide = box_shapes(KEY, 3, 6, 60, (0.9, 1.0), (0.75, 4 / 3))
    np.testing.assert_allclose(wide, [[6, 8]] * 3, rtol=1e-6)
    tall = box_shapes(KEY, 3, 60, 6, (0.9, 1.0), (0.75, 4 / 3))
    np.testing.assert_allclose(tall, [[8, 6]] * 3, rtol=1e-6)


def test_random_resized_crop_places_boxes_all_over_the_image():
    h, w, size = 14, 10, 12
    out = images(f"random_resized_crop({size}, (0.2, 0.25))", make_batch(image=ramps(2000, h, w)))
    assert out.shape == (2000, size, size, 2)
    # The boxes grow, so ramps stay ramps away from the border of the image.
    step = out[:, 7, 7] - out[:, 6, 6]
    middle = (out[:, 6, 6] + out[:, 5, 5]) / 2 + 0.5
    corner, room = middle - step * size / 2, np.array([h, w]) - step * size
    share = corner / room
    assert share.min() > -1e-3
    assert share.max() < 1 + 1e-3
    np.testing.assert_allclose(share.mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(share.std(0), 12**-0.5, rtol=0.05)
    assert_unrelated(*share.T)


def test_random_resized_crop_of_everything_is_the_identity():
    batch = make_batch(3, 8, 8, 3)
    out = images("random_resized_crop(None, (1, 1), (1, 1))", batch)
    np.testing.assert_allclose(out, batch["image"], atol=1e-6)


# --- Parts hidden, colours changed ---


def patches(h, w, height, width):
    """Every mask that a patch whose centre lies in the image can leave, (h * w, h, w)."""
    masks = np.zeros((h, w, h, w), bool)
    for y, x in itertools.product(range(h), range(w)):
        top, left = y - height // 2, x - width // 2
        masks[y, x, max(0, top) : top + height, max(0, left) : left + width] = True
    return masks.reshape(h * w, h, w)


@pytest.mark.parametrize("size", [2, 3])
def test_cutout_hides_every_clipped_square_equally_often(size):
    h, w = 5, 4
    out = images(f"cutout({size}, fill=0.25)", make_batch(image=np.ones((8000, h, w, 3))))
    assert set(np.unique(out)) == {0.25, 1.0}
    hidden = out[..., 0] == 0.25
    np.testing.assert_array_equal(out == 0.25, np.repeat(hidden[..., None], 3, axis=-1))
    found, counts = np.unique(hidden.reshape(8000, -1), axis=0, return_counts=True)
    expected = np.unique(patches(h, w, size, size).reshape(h * w, -1), axis=0)
    np.testing.assert_array_equal(found, expected)
    assert np.all(abs(counts - 400) < 80)  # four standard deviations


def test_cutout_keeps_the_rest_and_may_hide_nothing_or_all():
    batch = make_batch(20, 7, 10, 3)
    before, out = np.asarray(batch["image"]), images("cutout(4)", batch)
    hidden = out == 0.5
    np.testing.assert_array_equal(out[~hidden], before[~hidden])
    np.testing.assert_array_equal(images("cutout(0)", batch), before)
    assert np.all(images("cutout(40)", batch) == 0.5)


def test_random_erasing_hides_whole_boxes_of_the_drawn_areas_and_shapes():
    h, w = 30, 40
    batch = make_batch(image=np.ones((4000, h, w, 1)))
    hidden = images("random_erasing(0.5, (0.1, 0.2), (0.5, 2), 0.25)", batch)[..., 0] == 0.25
    erased = hidden.any((1, 2))
    assert abs(erased.mean() - 0.5) < 0.032  # four standard deviations
    rows, cols = hidden[erased].any(2), hidden[erased].any(1)
    height, width = rows.sum(1), cols.sum(1)
    np.testing.assert_array_equal(hidden[erased].sum((1, 2)), height * width)  # whole boxes
    area, log_ratio = height * width / (h * w), np.log2(width / height)
    np.testing.assert_allclose([area.min(), area.max()], [0.1, 0.2], atol=0.012)  # whole pixels
    np.testing.assert_allclose([log_ratio.min(), log_ratio.max()], [-1, 1], atol=0.15)
    np.testing.assert_allclose([area.mean(), log_ratio.mean()], [0.15, 0], atol=0.05)
    for side, extent, first in ((h, height, rows.argmax(1)), (w, width, cols.argmax(1))):
        place = first / (side - extent)
        assert place.min() == 0
        assert place.max() == 1
        np.testing.assert_allclose(place.mean(), 0.5, atol=0.03)


def test_random_erasing_fills_with_noise_or_nothing_where_no_box_fits():
    batch = make_batch(50, 20, 20, 3)
    before, out = np.asarray(batch["image"]), images("random_erasing(1, (0.3, 0.4))", batch)
    share = (out != before).mean((1, 2, 3))
    assert 0.25 < share.min() < share.max() < 0.45
    noise = out[out != before]
    np.testing.assert_allclose([noise.mean(), noise.std()], [0.5, 12**-0.5], atol=0.01)
    wide = make_batch(9, 4, 80, 1)
    out = images("random_erasing(1, (0.9, 0.9), (1, 1))", wide)
    np.testing.assert_array_equal(out, wide["image"])


def slow_grey(image):
    """The grey image of one with 1 or 3 channels."""
    return image if image.shape[-1] == 1 else image @ np.array([[0.299], [0.587], [0.114]])


def slow_jitter(image, brightness, contrast, saturation):
    """One image, in double precision."""
    image = np.clip(brightness * image, 0, 1)
    mean = slow_grey(image).mean()
    image = np.clip(mean + contrast * (image - mean), 0, 1)
    grey = slow_grey(image)
    return np.clip(grey + saturation * (image - grey), 0, 1)


@pytest.mark.parametrize("c", [1, 3])
def test_color_jitter_equals_the_slow_reference(c):
    # Pale images near 0.5, where no factor clips, give away each factor; it does not depend on
    # the other two, so the same key then jitters vivid images by the three known factors.
    shape = (300, 5, 4, c)
    pale = make_batch(image=np.random.default_rng(0).uniform(0.4, 0.6, shape))
    vivid = make_batch(image=np.random.default_rng(1).random(shape))
    before = np.asarray(pale["image"], np.float64)
    grey = slow_grey(before)
    bases = (0, grey.mean(axis=(1, 2, 3), keepdims=True), grey)
    texts = ("color_jitter(0.5)", "color_jitter(0, 0.4)", "color_jitter(0, 0, 0.3)")
    factors = np.ones((3, 300))
    for i, (text, base) in enumerate(zip(texts, bases, strict=True)):
        if c == 1 and i == 2:
            np.testing.assert_array_equal(images(text, pale), pale["image"])
            continue
        reach = (0.5, 0.4, 0.3)[i]
        far, out = before - base, images(text, pale) - base
        factors[i] = (far * out).sum((1, 2, 3)) / (far * far).sum((1, 2, 3))
        np.testing.assert_allclose(out, factors[i][:, None, None, None] * far, atol=1e-6)
        assert 1 - reach - 1e-5 < factors[i].min() < 1 - 0.95 * reach
        assert 1 + 0.95 * reach < factors[i].max() < 1 + reach + 1e-5
        np.testing.assert_allclose(factors[i].mean(), 1, atol=reach / 7)
    out = images("color_jitter(0.5, 0.4, 0.3)", vivid)
    expected = [
        slow_jitter(image, *f)
        for image, f in zip(np.asarray(vivid["image"], np.float64), factors.T, strict=True)
    ]
    np.testing.assert_allclose(out, expected, atol=2e-5)


# Of Y, I and Q, the luma and the colour differences of NTSC, from red, green and blue.
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def slow_hue(image, turns):
    """Images (b, h, w, 3) in double precision, each with I and Q turned by a share of a circle."""
    y, i, q = np.moveaxis(np.asarray(image, np.float64) @ YIQ.T, -1, 0)
    turned = (i + 1j * q) * np.exp(2j * np.pi * np.reshape(turns, (-1, 1, 1)))
    back = np.stack([y, turned.real, turned.imag], -1) @ np.linalg.inv(YIQ).T
    return np.clip(back, 0, 1)


def turns_between(before, after):
    """The turn of I and Q, a share of a circle for each image, from one batch to the other."""
    i, q = np.moveaxis(np.stack([before, after]).astype(np.float64) @ YIQ.T, -1, 0)[1:]
    before, after = i + 1j * q
    return np.angle((after * before.conj()).sum((1, 2))) / (2 * np.pi)


def test_hue_turns_the_colours_as_yiq_does_and_comes_last():
    # Pale images, where nothing clips, give away the turns, which depend on the key alone.
    pale = make_batch(image=np.random.default_rng(0).uniform(0.45, 0.55, (300, 5, 4, 3)))
    vivid = make_batch(300, 5, 4, 3, seed=1)
    out = images("color_jitter(hue=0.3)", pale)
    turns = turns_between(pale["image"], out)
    np.testing.assert_allclose(out, slow_hue(pale["image"], turns), atol=1e-6)
    assert -0.3 - 1e-6 < turns.min() < -0.28
    assert 0.28 < turns.max() < 0.3 + 1e-6
    np.testing.assert_allclose(turns.mean(), 0, atol=0.04)  # four standard deviations
    others = images("color_jitter(0.5, 0.4, 0.3)", vivid)
    out = images("color_jitter(0.5, 0.4, 0.3, 0.3)", vivid)
    np.testing.assert_allclose(out, slow_hue(others, turns), atol=1e-5)
    brightness = images("color_jitter(0.5)", pale).mean((1, 2, 3)) / pale["image"].mean((1, 2, 3))
    assert_unrelated(turns, brightness)


def test_hue_of_no_turn_of_grey_and_of_one_channel():
    image = make_batch(4, 5, 4, 3)["image"]
    np.testing.assert_allclose(colour._turn_hue(image, jnp.float32(0)), image, atol=1e-6)
    grey = make_batch(image=np.tile(np.random.default_rng(0).random((9, 5, 4, 1)), 3))
    np.testing.assert_allclose(images("color_jitter(hue=0.5)", grey), grey["image"], atol=1e-6)
    single = make_batch(4, 5, 4, 1)
    np.testing.assert_array_equal(images("color_jitter(hue=0.5)", single), single["image"])


def test_color_jitter_changes_an_image_with_probability_p():
    batch = make_batch(4000, 1, 2, 3)
    np.testing.assert_array_equal(images("color_jitter(1, 1, 1, 0.5, p=0)", batch), batch["image"])
    every, some = images("color_jitter(0.4)", batch), images("color_jitter(0.4, p=0.5)", batch)
    changed = np.any(some != batch["image"], axis=(1, 2, 3))
    assert abs(changed.mean() - 0.5) < 0.032  # four standard deviations
    np.testing.assert_array_equal(some[changed], every[changed])
    brightness = every.mean((1, 2, 3)) / batch["image"].mean((1, 2, 3))
    assert_unrelated(changed, brightness)


# Of the code before hue and p, from "color_jitter(0.4, 0.3, 0.2)".
GOLDEN = [
    [[0.23295116, 0.34970143, 0.46645173], [0.6324501, 0.7492004, 0.86595064]],
    [[0.13714409, 0.21556015, 0.2939762], [0.35320476, 0.43162084, 0.5100368]],
]


def test_color_jitter_without_hue_and_p_draws_what_it_did_before_they_came():
    batch = make_batch(image=np.tile(np.arange(1, 7).reshape(1, 1, 2, 3) / 8, (2, 1, 1, 1)))
    out = images("color_jitter(0.4, 0.3, 0.2)", batch)
    np.testing.assert_allclose(out[:, 0], np.float32(GOLDEN), rtol=3e-7)  # two bits of rounding


def test_grayscale_takes_the_colour_of_a_share_p():
    batch = make_batch(4000, 1, 2, 3)
    before, out = np.asarray(batch["image"]), images("grayscale(0.3)", batch)
    changed = np.any(out != before, axis=(1, 2, 3))
    assert abs(changed.mean() - 0.3) < 0.03  # four standard deviations
    np.testing.assert_array_equal(out[~changed], before[~changed])
    grey = np.broadcast_to(slow_grey(before[changed].astype(np.float64)), out[changed].shape)
    np.testing.assert_allclose(out[changed], grey, atol=1e-6)
    np.testing.assert_array_equal(images("grayscale(0)", batch), before)
    single = make_batch(4, 5, 4, 1)
    np.testing.assert_array_equal(images("grayscale(1)", single), single["image"])


# --- Two examples in one ---


def test_mixup_mixes_image_and_label_alike_with_the_next_example():
    batch = make_batch(5, 7, 10, 3)
    out = jitted("mixup")(KEY, batch)
    before, label = np.asarray(batch["image"]), np.asarray(out["label"])
    share = np.diag(label)
    np.testing.assert_allclose(label.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.diag(np.roll(label, -1, axis=1)), 1 - share, atol=1e-6)
    assert len(np.unique(share)) == 5
    share = share[:, None, None, None]
    mixed = share * before + (1 - share) * np.roll(before, -1, axis=0)
    np.testing.assert_allclose(out["image"], mixed, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_shares_follow_the_beta_distribution(alpha):
    image = np.tile([0.0, 1.0], 2000).reshape(4000, 1, 1, 1)
    share = abs(images(f"mixup({alpha})", make_batch(image=image)) - image[::-1])
    np.testing.assert_allclose(share.mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(share.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.1)


def test_cutmix_labels_have_exactly_the_area_pasted():
    batch = make_batch(5, 7, 10, 3)
    before = np.asarray(batch["image"])
    for key in jax.random.split(KEY, 20):
        out = jitted("cutmix")(key, batch)
        image, label = np.asarray(out["image"]), np.asarray(out["label"])
        pasted = image == np.roll(before, -1, axis=0)
        np.testing.assert_array_equal(image[~pasted], before[~pasted])
        share = np.float32(pasted.sum(axis=(1, 2, 3)) / pasted[0].size)
        expected = np.diag(1 - share) + np.roll(np.diag(share), 1, axis=1)
        np.testing.assert_allclose(label, expected, rtol=0, atol=2e-7)


def test_cutmix_pastes_a_box_of_the_drawn_area():
    # Beta(1e6, 1e6) is 1/2 to three digits: sides are the image's over the root of 2.
    h, w = 8, 16
    image = np.zeros((2000, h, w, 1))
    image[1::2] = 1
    pasted = images("cutmix(1e6)", make_batch(image=image)) != image
    found = np.unique(pasted.reshape(2000, -1), axis=0)
    expected = np.unique(patches(h, w, 5, 11).reshape(h * w, -1), axis=0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("text", ["mixup", "cutmix"])
def test_an_example_alone_mixes_with_itself(text):
    batch = make_batch(1, 5, 4, 3)
    chex.assert_trees_all_equal(jitted(text)(KEY, batch), batch)


def test_mixup_or_cutmix_is_one_of_both_for_each_example():
    batch = make_batch(400, 7, 10, 3)
    out = jitted("mixup_or_cutmix(0.8, 1.0, p=0.3)")(KEY, batch)
    before, image = np.asarray(batch["image"]), np.asarray(out["image"])
    after = np.roll(before, -1, axis=0)
    own, other = image == before, image == after
    cut = (own | other).all((1, 2, 3))
    assert abs(cut.mean() - 0.3) < 0.1  # four standard deviations
    label = np.asarray(out["label"])
    np.testing.assert_allclose(label.sum(1), 1, rtol=1e-6)
    share = label[np.arange(400), np.arange(400) % 5]
    np.testing.assert_allclose(share[cut], own[cut].mean((1, 2, 3)), atol=1e-6)
    mixed = share[:, None, None, None] * before + (1 - share)[:, None, None, None] * after
    np.testing.assert_allclose(image[~cut], mixed[~cut], atol=1e-6)


def test_labels_are_smoothed_after_they_are_mixed():
    label = np.array([[0.25, 0.75, 0, 0, 0]], np.float32)  # of mixup
    loss = cross_entropy(jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.2, 0.2]])), label, 0.1)
    smooth = np.array([0.245, 0.695, 0.02, 0.02, 0.02])  # 0.9 label + 0.1 / 5
    np.testing.assert_allclose(loss, -(smooth * np.log([0.1, 0.2, 0.3, 0.2, 0.2])).sum(), rtol=1e-5)


def test_labels_of_several_classes_and_values_mix_as_the_image_does():
    fields = {
        "image": image_field((7, 10, 3)),
        "labels": labels_field(("a", "b", "c")),
        "group": Field((), "int32", "group"),
    }
    labels = jnp.asarray(np.eye(3)[np.arange(5) % 3] + np.eye(3)[0], jnp.float32)
    batch = {**make_batch(5, 7, 10, 3), "labels": labels, "group": jnp.arange(5)}
    del batch["label"]
    batch["image"] = batch["image"].at[..., 0].set(labels[:, None, None, 0])  # as the first class
    out = jit(make_augment("mixup_or_cutmix", fields))(KEY, batch)
    mean = out["image"][..., 0].mean((1, 2))
    assert len(np.unique(mean)) == 5
    np.testing.assert_allclose(out["labels"][:, 0], mean, atol=1e-5)
    np.testing.assert_array_equal(out["group"], batch["group"])
    fields = {"image": fields["image"], "target": Field((2,), "float32", "values")}
    batch["target"] = batch.pop("labels")[:, :2]
    out = jit(make_augment("mixup", fields))(KEY, batch)
    np.testing.assert_allclose(out["target"][:, 0], out["image"][:, 0, 0, 0], atol=1e-6)
    for text in ("cutmix", "mixup_or_cutmix"):
        with pytest.raises(UserError, match=f"'{text}': .* cannot mix target: remove it"):
            make_augment(text, fields)


# --- Stains ---


def test_stains_change_as_the_formula_says():
    image = np.random.default_rng(0).uniform(0.1, 0.9, (3, 4, 5, 3))
    out = make_augment("stain_jitter(0.2)")(KEY, make_batch(image=image))["image"]
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    before, after = (-np.log(np.float64(x)) @ np.linalg.inv(stains) for x in (image, out))
    inside = ((out > 0) & (out < 1)).all(-1)
    for i in range(3):
        for k in range(3):
            x, y = before[i, ..., k][inside[i]], after[i, ..., k][inside[i]]
            scale, shift = np.polyfit(x, y, 1)
            np.testing.assert_allclose(y, scale * x + shift, atol=1e-4)
            assert abs(scale - 1) <= 0.2 + 1e-3
            assert abs(shift) <= 0.2 + 1e-3
    same = make_augment("stain_jitter(0)")(KEY, make_batch(image=image))["image"]
    np.testing.assert_allclose(same, image, atol=1e-5)
    white = make_augment("stain_jitter(0)")(KEY, make_batch(image=np.ones((1, 2, 2, 3))))["image"]
    np.testing.assert_allclose(white, 1, atol=1e-6)


def test_stains_need_three_channels():
    with pytest.raises(UserError, match="'stain_jitter' needs images of 3 channels; these have 1"):
        make_augment("stain_jitter")(KEY, make_batch(2, 4, 4, 1))
