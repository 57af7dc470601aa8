"""Geometry of all fields: boxes, masks, points, tracks and clips go where the pixels go."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.augment import chain, geometry, resizing, warp
from cv_jax.augment.chain import AUGMENTATIONS, make_augment
from cv_jax.config.errors import UserError
from cv_jax.data.fields import Field, image_field, label_field, points_field

KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})

FIELDS = {
    "image": image_field((12, 12, 3)),
    "clip": Field((2, 12, 12, 3), "uint8", "clip"),
    "mask": Field((12, 12), "uint8", "mask", fill=255),
    "boxes": Field((3, 4), "float32", "boxes", unit="px"),
    "box_label": Field((3,), "int32", "box_label", fill=-1),
    "difficult": Field((3,), "bool", "box_flag"),
    "points": points_field(2),
    "tracks": Field((2, 3, 2), "float32", "tracks"),
    "valid": Field((2, 3), "bool", "valid"),
    "label": label_field(("a", "b")),
}
GEOMETRY = (
    "flip(1)",
    "alternating_flip",
    "crop(3)",
    "rot90",
    "affine(20, (0.7, 1.3), 2, 10)",
    "rotate(45)",
    "scale(0.5, 1.5)",
    "translate(3)",
    "random_resized_crop(12)",
    "rot90|rotate(10)|translate(2)",
    "scale(0.8, 1.2)|random_crop(12)",
    "randaugment(3)",
)
MOVES_WHOLE_PIXELS = ("flip(1)", "alternating_flip", "crop(3)", "rot90")


def make_batch(b=16, h=12, w=12, seed=0, **given):
    """Random examples of all FIELDS: two boxes and one of padding each. Coordinates are eighths."""
    # In eighths, the arithmetic of mirrorings and quarter turns is exact.
    rng = np.random.default_rng(seed)
    corner, sides = (rng.integers(*r, (b, 2, 2)) for r in ((0, 6), (2, 6)))
    boxes = np.zeros((b, 3, 4))
    boxes[:, :2] = np.concatenate([corner, np.minimum(corner + sides, (w, h))], axis=-1)
    batch = {
        "image": jnp.asarray(rng.random((b, h, w, 3)), jnp.float32),
        "clip": jnp.asarray(rng.random((b, 2, h, w, 3)), jnp.float32),
        "mask": jnp.asarray(rng.choice([3, 7], (b, h, w)), jnp.uint8),
        "boxes": jnp.asarray(boxes, jnp.float32),
        "box_label": jnp.tile(jnp.array([[4, 0, -1]], jnp.int32), (b, 1)),
        "difficult": jnp.tile(jnp.array([[True, False, False]]), (b, 1)),
        "points": jnp.asarray(rng.integers(0, 96, (b, 2, 2)) / 8, jnp.float32),
        "tracks": jnp.asarray(rng.integers(0, 96, (b, 2, 3, 2)) / 8, jnp.float32),
        "valid": jnp.ones((b, 2, 3), bool),
        "label": jnp.asarray(np.eye(2)[np.arange(b) % 2], jnp.float32),
        "rows": {
            "index": jnp.arange(b, dtype=jnp.int32),
            "epoch": jnp.full(b, 3, jnp.int32),
            "coin": jnp.asarray(rng.integers(2**32, size=b), jnp.uint32),
        },
    }
    return {**batch, **given}


@functools.cache
def jitted(text, min_area=0.0, names=None):
    """The chain, for the fields of these names; None means all."""
    fields = {name: FIELDS[name] for name in names or FIELDS}
    return jit(make_augment(text, fields, min_area))


@functools.partial(jit, static_argnames=("size", "mode", "min_area", "samples", "names"))
def warped(batch, matrix, size=(12, 12), mode="reflect", min_area=0.0, samples=1, names=None):
    fields = {name: FIELDS[name] for name in names or FIELDS}
    return warp.warp(batch, matrix, size, fields, mode, min_area, samples)


def each(matrix, b):
    """The same matrix for b examples."""
    return jnp.broadcast_to(matrix[None], (b, 3, 3))


def painted(boxes, h=12, w=12):
    """Images (b, h, w, 3) that are 1 in the first box of each example, and 0 elsewhere."""
    image = np.zeros((len(boxes), h, w, 3), np.float32)
    for one, box in zip(image, np.asarray(boxes)[:, 0].astype(int), strict=True):
        one[box[1] : box[3], box[0] : box[2]] = 1
    return jnp.asarray(image)


def box_of_pixels(image):
    """The box around the pixels above 1/2, or None where there is no such pixel."""
    rows, cols = np.nonzero(np.asarray(image)[..., 0] > 0.5)
    if len(rows) == 0:
        return None
    return np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])


# --- Matrices, by numbers ---


def test_a_turned_box_has_the_corners_of_numpys_rot90():
    boxes = jnp.array([[[80.0, 120, 560, 840]]])
    fields = {name: FIELDS[name] for name in ("image", "boxes")}
    batch = {"image": jnp.zeros((1, 960, 640, 1)), "boxes": boxes}
    turn = each(warp.quarter_turn((960, 640)), 1)
    moved = warp.move_coordinates(batch, turn, (640, 960), fields)
    np.testing.assert_array_equal(moved["boxes"], [[[120, 80, 840, 560]]])


def test_a_mirrored_box_has_width_minus_its_columns():
    batch = {"image": jnp.zeros((1, 4, 640, 1)), "boxes": jnp.array([[[0.0, 0, 100, 3]]])}
    fields = {name: FIELDS[name] for name in ("image", "boxes")}
    out = make_augment("flip(1)", fields)(KEY, batch)
    np.testing.assert_array_equal(out["boxes"], [[[540, 0, 640, 3]]])
    out = make_augment("flip(1, vertical=True)", fields)(KEY, batch)
    np.testing.assert_array_equal(out["boxes"], [[[0, 1, 100, 4]]])


def test_matrices_move_points_as_they_say():
    size = (10, 20)  # the centre is at x = 10, y = 5
    for matrix, point in (
        (warp.translation(3, -1), (15, 5)),
        (warp.rotation(90.0, size), (11, 3)),
        (warp.scaling(2.0, size), (14, 7)),
        (warp.shearing(45.0, size), (13, 6)),
        (warp.mirror(size), (8, 6)),
        (warp.quarter_turn(size), (6, 8)),
        (warp.resize(size, (5, 40)), (24, 3)),
        (warp.compose(warp.translation(1, 0), warp.resize((1, 1), (1, 2))), (26, 6)),
    ):
        moved = np.asarray(matrix) @ [12, 6, 1]
        np.testing.assert_allclose(moved, [*point, 1], atol=1e-5)


@pytest.mark.slow
def test_the_matrix_of_affine_reads_the_pixels_that_affine_reads():
    amounts = jnp.array([[20.0, 0.7, 10, 2, -3], [-170, 1.4, -20, -1, 4]])
    matrix = geometry._affine_matrix(amounts, (9, 14))
    for one, y, x in zip(matrix, *geometry._affine_source(amounts, (9, 14)), strict=True):
        rows, cols = warp._source(one, (9, 14))
        np.testing.assert_allclose(rows, y, atol=1e-5)
        np.testing.assert_allclose(cols, x, atol=1e-5)


# --- All fields move alike ---


def test_four_quarter_turns_are_the_identity_to_the_bit():
    batch = make_batch(4, 12, 10)
    once = out = batch
    for count in range(4):
        h, w = out["image"].shape[1:3]
        out = warped(out, each(warp.quarter_turn((h, w)), 4), size=(w, h))
        once = out if count == 0 else once
    chex.assert_trees_all_equal(out, batch)
    np.testing.assert_array_equal(once["image"], np.rot90(batch["image"], axes=(1, 2)))
    np.testing.assert_array_equal(once["mask"], np.rot90(batch["mask"], axes=(1, 2)))
    np.testing.assert_array_equal(once["clip"], np.rot90(batch["clip"], axes=(2, 3)))


def test_two_mirrorings_are_the_identity_to_the_bit():
    batch = make_batch(4, 12, 10)
    out = jitted("flip(1)|flip(1)")(KEY, batch)
    chex.assert_trees_all_equal(out, batch)
    once = jitted("flip(1)")(KEY, batch)
    for name, axis in (("image", 2), ("mask", 2), ("clip", 3)):
        np.testing.assert_array_equal(once[name], np.flip(batch[name], axis))
    np.testing.assert_array_equal(once["points"][..., 0], 10 - batch["points"][..., 0])
    np.testing.assert_array_equal(once["tracks"][..., 1], batch["tracks"][..., 1])


@pytest.mark.parametrize("text", MOVES_WHOLE_PIXELS)
def test_a_painted_box_stays_its_box(text):
    boxes = make_batch()["boxes"]
    batch = make_batch(image=painted(boxes))
    out = jitted(text)(KEY, batch)
    assert np.any(out["boxes"] != boxes)
    for image, box, label in zip(out["image"], out["boxes"], out["box_label"], strict=True):
        seen = box_of_pixels(image)
        assert (seen is None) == (label[0] == -1)
        np.testing.assert_array_equal(box[0], 0 if seen is None else seen)


@pytest.mark.parametrize(
    ("motion", "error"),
    [
        (warp.translation(-2, 3), 0),
        (warp.scaling(2.0, (12, 12)), 0.5),
        (warp.compose(warp.scaling(0.6, (12, 12)), warp.translation(0.7, 0.2)), 1),
    ],
    ids=["whole pixels", "scale 2", "any"],
)
def test_a_painted_box_stays_its_box_under_a_matrix(motion, error):
    boxes = make_batch()["boxes"]
    out = warped(make_batch(image=painted(boxes)), each(motion, 16), min_area=0.3)
    kept = 0
    for image, box, label in zip(out["image"], out["boxes"], out["box_label"], strict=True):
        if label[0] != -1:
            kept += 1
            np.testing.assert_allclose(box[0], box_of_pixels(image), atol=error)
    assert kept > 6


def test_a_box_of_a_random_resized_crop_is_where_its_pixels_are():
    boxes = make_batch()["boxes"]
    text = "random_resized_crop(24, (0.5, 1))"
    out = jitted(text, 0.3)(KEY, make_batch(image=painted(boxes)))
    assert out["mask"].shape == (16, 24, 24)
    assert out["clip"].shape == (16, 2, 24, 24, 3)
    found = [
        np.asarray(box[0]) - box_of_pixels(image)
        for image, box, label in zip(out["image"], out["boxes"], out["box_label"], strict=True)
        if label[0] != -1
    ]
    assert len(found) > 6
    assert np.max(np.abs(found)) <= 1


def test_points_and_tracks_move_with_a_spot_of_light():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(14, 18, (2, 16, 1, 1))
    rows, cols = np.arange(32).reshape(1, -1, 1) + 0.5, np.arange(32).reshape(1, 1, -1) + 0.5
    spot = np.exp(-((cols - x) ** 2 + (rows - y) ** 2) / (2 * 1.5**2))[..., None]
    point = np.concatenate([x, y], axis=-1)  # (b, 1, 2)
    batch = {
        "image": jnp.asarray(spot, jnp.float32),
        "points": jnp.asarray(point, jnp.float32),
        "tracks": jnp.asarray(point[:, None], jnp.float32),
        "rows": make_batch()["rows"],
    }
    names = ("image", "points", "tracks")
    for text in (*MOVES_WHOLE_PIXELS, "affine(180, (0.9, 1.2), 3, 20, 'zero')", "rotate(9)|rot90"):
        out = jitted(text, names=names)(KEY, batch)
        light = np.asarray(out["image"], np.float64)[..., 0]
        light /= light.sum((1, 2), keepdims=True)
        centre = np.stack([(light * cols).sum((1, 2)), (light * rows).sum((1, 2))], axis=-1)
        np.testing.assert_allclose(out["points"][:, 0], centre, atol=0.05)
        np.testing.assert_array_equal(out["points"], out["tracks"][:, 0])


# Not RandAugment, which counts the pixels of all frames of a clip.
@pytest.mark.parametrize("text", [*GEOMETRY[:-1], "cutout(5)", "color_jitter(0.4, 0.4, 0.4, 0.1)"])
def test_all_frames_of_a_clip_change_as_the_image_does(text):
    image = make_batch()["image"]
    batch = make_batch(clip=jnp.stack([image, image], axis=1))
    out = jitted(text)(KEY, batch)
    assert np.any(out["image"] != image)
    for frame in (0, 1):
        np.testing.assert_allclose(out["clip"][:, frame], out["image"], atol=1e-6)
    chex.assert_trees_all_equal(out["rows"], batch["rows"])
    np.testing.assert_array_equal(out["label"], batch["label"])


def test_clips_mix_as_images_do():
    names = ("image", "clip", "label")
    image = make_batch()["image"]
    batch = make_batch(clip=jnp.stack([image, image], axis=1))
    for text in ("mixup", "cutmix", "random_erasing(1)", "grayscale(0.5)"):
        out = jitted(text, names=names)(KEY, batch)
        assert np.any(out["image"] != image)
        np.testing.assert_allclose(out["clip"][:, 1], out["image"], atol=1e-6)


# --- Masks ---


@pytest.mark.parametrize("text", [*GEOMETRY, "cutout(5)"])
def test_no_label_appears_in_a_mask(text):
    out = jitted(text)(KEY, make_batch())
    assert out["mask"].dtype == jnp.uint8
    assert set(np.unique(out["mask"])) <= {3, 7, 255}


def test_pixels_from_outside_are_ignored_and_never_those_of_the_other_border():
    batch = make_batch(2)
    out = warped(batch, each(warp.translation(2, 1), 2))
    expected = np.full((2, 12, 12), 255)
    expected[:, 1:, 2:] = batch["mask"][:, :-1, :-2]
    np.testing.assert_array_equal(out["mask"], expected)
    assert not np.any(out["image"][:, :, :2])
    turned = warped(batch, each(warp.rotation(45.0, (12, 12)), 2))["mask"]
    corners = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
    assert all(np.all(turned[:, row, col] == 255) for row, col in corners)


def test_a_crop_moves_a_mask_by_the_pixels_that_it_moves_the_image():
    mask = make_batch()["mask"]
    image = mask[..., None].repeat(3, axis=-1).astype(jnp.float32)  # above 0 inside
    shown = np.asarray(jitted("crop(3)")(KEY, make_batch(image=image))["image"])[..., 0]
    out = jitted("crop(3)")(KEY, make_batch())
    inside = shown > 0
    np.testing.assert_array_equal(out["mask"], np.where(inside, shown, 255))
    assert 0.5 < inside.mean() < 0.9


def test_both_ways_to_crop_a_mask_give_the_same(monkeypatch):
    batch = make_batch()
    gathered = jitted("crop(3)")(KEY, batch)

    def by_choice(image, corner, **ways):
        return ways["default"](image, corner)

    monkeypatch.setattr(jax.lax, "platform_dependent", by_choice)
    chosen = jit(make_augment("crop(3)", FIELDS, 0.0))(KEY, batch)
    chex.assert_trees_all_equal(chosen, gathered)


@pytest.mark.slow
def test_objects_have_no_mirror_image():
    names = {"reflect": ("image",), "zero": ("image", "boxes")}
    batch = {name: make_batch()[name] + 1 for name in ("image", "boxes")}  # no value is 0
    for text in ("crop(3)", "translate(3)", "scale(0.5, 0.6)"):
        for mode, fields in names.items():
            out = jitted(text, names=fields)(KEY, batch)
            assert np.any(out["image"] == 0) == (mode == "zero")


@pytest.mark.slow
def test_cutout_hides_mask_and_boxes():
    batch = make_batch(200, image=jnp.zeros((200, 12, 12, 3)))
    out = jitted("cutout(6, 1.0)", 0.3)(KEY, batch)
    hidden = np.asarray(out["image"][..., 0] == 1)
    np.testing.assert_array_equal(out["mask"], np.where(hidden, 255, batch["mask"]))
    kept = 0
    for i in range(200):
        x0, y0, x1, y1 = np.asarray(batch["boxes"][i, 0], int)
        seen = 1 - hidden[i, y0:y1, x0:x1].mean()
        kept += seen >= 0.3
        assert (out["box_label"][i, 0] != -1) == (seen >= 0.3)
        np.testing.assert_array_equal(out["boxes"][i, 0], [x0, y0, x1, y1] if seen >= 0.3 else 0)
    assert 100 < kept < 190
    np.testing.assert_array_equal(out["box_label"][:, 2], -1)


# --- Boxes that are lost ---


@pytest.mark.parametrize(("min_area", "shift", "kept"), [(0.3, -7, True), (0.3, -7.25, False)])
def test_a_box_is_kept_at_exactly_its_least_area(min_area, shift, kept):
    boxes = jnp.array([[[0, 0, 10, 10], [2, 2, 12, 12], [0, 0, 0, 0]]], jnp.float32)
    batch = make_batch(1, boxes=boxes)
    out = warped(batch, each(warp.translation(shift, 0), 1), min_area=min_area)
    np.testing.assert_array_equal(out["box_label"][0], [4 if kept else -1, 0, -1])
    np.testing.assert_array_equal(out["difficult"][0], [kept, False, False])
    first = [0, 0, 10 + shift, 10] if kept else [0, 0, 0, 0]
    np.testing.assert_array_equal(out["boxes"][0], [first, [0, 2, 12 + shift, 12], [0] * 4])


def test_a_box_that_is_wholly_inside_is_kept_by_a_least_area_of_one():
    boxes = jnp.tile(jnp.array([[[4.0, 5, 9, 7], [3, 3, 8, 8], [0, 0, 0, 0]]]), (16, 1, 1))
    angles = jnp.linspace(0, 180, 16)
    out = warped(make_batch(boxes=boxes), warp.rotation(angles, (12, 12)), min_area=1.0)
    np.testing.assert_array_equal(out["box_label"], make_batch()["box_label"])


@pytest.mark.parametrize("text", [*GEOMETRY, "cutout(9)"])
def test_every_box_that_is_left_has_an_area_and_lies_inside(text):
    out = jitted(text)(KEY, make_batch())
    boxes, label = np.asarray(out["boxes"]), np.asarray(out["box_label"])
    there = label != -1
    assert there[:, :2].any()
    assert np.all(boxes[there][:, :2] < boxes[there][:, 2:])
    assert boxes.min() >= 0
    assert boxes.max() <= 12
    assert not np.any(boxes[~there])
    assert not np.any(np.asarray(out["difficult"])[~there])
    assert not there[:, 2].any()


@pytest.mark.parametrize("text", [*GEOMETRY, "cutout(5)"])
def test_examples_without_objects_stay_so(text):
    empty = {
        "boxes": jnp.zeros((16, 3, 4)),
        "box_label": jnp.full((16, 3), -1, jnp.int32),
        "difficult": jnp.zeros((16, 3), bool),
    }
    out = jitted(text)(KEY, make_batch(**empty))
    chex.assert_tree_all_finite({name: x for name, x in out.items() if name != "rows"})
    chex.assert_trees_all_equal({name: out[name] for name in empty}, empty)


# --- One resampling ---


@pytest.mark.slow
def test_neighbouring_motions_are_one_warp_by_the_product():
    batch = make_batch()
    motions = [AUGMENTATIONS["rotate"](20.0), AUGMENTATIONS["scale"](0.8, 1.3)]
    drawn = [op.draw(jax.random.fold_in(KEY, i), 16, (12, 12))[0] for i, op in enumerate(motions)]
    expected = warped(batch, warp.compose(*drawn))
    out = jitted("rotate(20)|scale(0.8, 1.3)")(KEY, batch)
    chex.assert_trees_all_close(out, expected, atol=1e-5)
    # One after the other, coordinates are the same and pixels blurred twice.
    twice = warped(warped(batch, drawn[0]), drawn[1])
    np.testing.assert_allclose(out["points"], twice["points"], atol=1e-5)
    assert np.abs(out["image"] - twice["image"]).max() > 0.05


def test_a_random_crop_is_a_part_of_the_image_with_all_its_fields():
    batch = make_batch(64)
    out = jitted("random_crop((7, 5))")(KEY, batch)
    assert out["image"].shape == (64, 7, 5, 3)
    assert out["mask"].shape == (64, 7, 5)
    corners = np.asarray(batch["points"][:, 0] - out["points"][:, 0]).astype(int)
    np.testing.assert_array_equal(corners.min(0), [0, 0])
    np.testing.assert_array_equal(corners.max(0), [7, 5])
    for i, (x, y) in enumerate(corners):
        for name in ("image", "mask"):
            expected = np.asarray(batch[name])[i, y : y + 7, x : x + 5]
            np.testing.assert_allclose(out[name][i], expected, atol=1e-6)


def test_a_random_crop_larger_than_the_image_puts_it_anywhere_inside():
    batch = make_batch(64)
    out = jitted("random_crop(14)")(KEY, batch)
    places = np.asarray(out["points"][:, 0] - batch["points"][:, 0]).astype(int)
    assert {0, 1, 2} == set(places.ravel().tolist())
    for i, (x, y) in enumerate(places):
        inside = np.zeros((14, 14), bool)
        inside[y : y + 12, x : x + 12] = True
        assert (np.asarray(out["mask"][i])[~inside] == 255).all()
        np.testing.assert_array_equal(out["mask"][i][inside].reshape(12, 12), batch["mask"][i])


def test_a_random_crop_after_a_motion_is_one_resampling():
    text = "scale(0.8, 1.3)|random_crop(7)"
    ops = [AUGMENTATIONS["scale"](0.8, 1.3), AUGMENTATIONS["random_crop"](7)]
    batch = make_batch()
    drawn = [op.draw(jax.random.fold_in(KEY, i), 16, (12, 12))[0] for i, op in enumerate(ops)]
    expected = warped(batch, warp.compose(*drawn), (7, 7))
    out = jit(make_augment(text, FIELDS, 0.0))(KEY, batch)
    chex.assert_trees_all_close(out, expected, atol=1e-5)


@pytest.mark.parametrize("size", ["0", "(3, 0)", "9999999"])
def test_a_size_of_no_pixels_is_refused(size):
    with pytest.raises(UserError, match="must be one or two whole numbers of pixels"):
        make_augment(f"random_crop({size})", FIELDS)


def test_only_neighbouring_motions_of_the_same_mode_are_multiplied():
    text = "translate(1)|rotate(10)|flip|scale(1, 2)|rot90|rotate(5, mode='zero')|cutout(2)"
    ops = [AUGMENTATIONS[call.name](*call.args, **call.kwargs) for call in chain.spec.parse(text)]
    assert chain._groups(ops) == [[0, 1], [2], [3, 4], [5], [6]]
    # With boxes, nothing is mirrored, so that all of them have the same mode.
    ops = chain.spec.build(text, AUGMENTATIONS, "", fields=FIELDS)
    assert chain._groups(ops) == [[0, 1], [2], [3, 4, 5], [6]]


@pytest.mark.slow
def test_samples_smooth_what_shrinks():
    image = jnp.zeros((1, 12, 12, 3)).at[:, :, ::2].set(1)  # stripes of one pixel
    batch = make_batch(1, image=image)
    matrix = each(warp.resize((12, 12), (3, 3)), 1)
    plain, smooth = (
        warped(batch, warp.compose(matrix, each(warp.translation(0.125, 0), 1)), (3, 3), samples=n)
        for n in (1, 4)
    )
    np.testing.assert_array_equal(plain["image"], 0)  # every pixel falls between two stripes
    np.testing.assert_allclose(smooth["image"][:, :, 1:], 0.5, atol=1e-6)
    np.testing.assert_array_equal(smooth["mask"], plain["mask"])
    out = jitted("scale(0.25, 0.25, samples=4)", names=("image",))(KEY, batch)
    np.testing.assert_allclose(out["image"], 0.5, atol=0.13)


@pytest.mark.slow
def test_warp_is_traced_once_and_maps_over_runs():
    @jit
    @chex.assert_max_traces(1)
    def moved(batch, matrix):
        return warp.warp(batch, matrix, (12, 12), FIELDS)

    batch = make_batch(4)
    matrices = warp.rotation(jnp.array([[10.0, 20, 30, 40], [50, 60, 70, 80]]), (12, 12))
    alone = [moved(batch, matrix) for matrix in matrices]
    together = jit(jax.vmap(lambda m: warp.warp(batch, m, (12, 12), FIELDS)))(matrices)
    chex.assert_trees_all_close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone), atol=1e-5)


# --- Progressive resizing ---


def test_resizing_scales_all_fields():
    batch = make_batch(2)
    out = jit(lambda batch: resizing.resize(batch, 6, FIELDS))(batch)
    for name in ("boxes", "points", "tracks"):
        np.testing.assert_array_equal(out[name], batch[name] / 2)
    np.testing.assert_array_equal(out["mask"], batch["mask"][:, 1::2, 1::2])
    image = jit(lambda image: resizing.resize_images(image, 6))(batch["image"])
    np.testing.assert_array_equal(out["image"], image)
    frame = jit(lambda image: resizing.resize_images(image, 6))(batch["clip"][:, 1])
    np.testing.assert_allclose(out["clip"][:, 1], frame, atol=1e-6)
    for name in ("box_label", "difficult", "valid", "label", "rows"):
        chex.assert_trees_all_equal(out[name], batch[name])
    assert resizing.resize(batch, None, FIELDS) is batch
    with pytest.raises(UserError, match="13 pixels a side are more than the images' 12x12"):
        resizing.resize(batch, 13, FIELDS)


# --- What cannot be ---


def test_fields_that_cannot_be_mixed_are_named():
    for text in ("mixup", "cutmix"):
        with pytest.raises(UserError, match=f"'{text}': .* cannot mix mask, boxes, box_label, "):
            make_augment(text, FIELDS)
        with pytest.raises(UserError, match=f"'{text}': it mixes labels, but the task has none"):
            make_augment(text, {"image": FIELDS["image"]})


def test_fields_that_geometry_cannot_move_are_named():
    with pytest.raises(UserError, match="boxes in the fields boxes, more: put them into one"):
        make_augment("flip", {**FIELDS, "more": FIELDS["boxes"]})
    with pytest.raises(UserError, match="'boxes' has boxes without an image: add the image"):
        make_augment("flip", {"boxes": FIELDS["boxes"]})
    with pytest.raises(UserError, match="'rot90' needs square images; these have 12x10 pixels"):
        jax.eval_shape(make_augment("rot90", FIELDS), KEY, make_batch(2, 12, 10))
    message = "different sizes: image 12x12, clip 12x12, mask 6x6"
    batch = make_batch(2, mask=jnp.zeros((2, 6, 6), jnp.uint8))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(make_augment("flip", FIELDS), KEY, batch)
    with pytest.raises(UserError, match="needs examples with an image, a clip or a mask"):
        make_augment("random_resized_crop", {"tracks": FIELDS["tracks"]})


def test_an_op_of_the_users_own_is_given_the_fields_and_checked(monkeypatch):
    given = []

    def mine(*, fields):
        given.append(fields)
        return lambda key, batch: {"image": batch["image"][:, ::2, ::2], "label": batch["label"]}

    monkeypatch.setitem(AUGMENTATIONS, "mine", mine)
    batch = {name: make_batch(2)[name] for name in ("image", "label", "rows")}
    out = make_augment("mine", {"image": FIELDS["image"], "label": FIELDS["label"]})(KEY, batch)
    assert [*given[0]] == ["image", "label"]
    assert out["image"].shape == (2, 6, 6, 3)
    chex.assert_trees_all_equal(out["rows"], batch["rows"])

    def half(*, fields):
        return lambda key, batch: {**batch, "image": batch["image"][:, ::2, ::2]}

    monkeypatch.setitem(AUGMENTATIONS, "half", half)
    message = re.escape("'half' resized only some fields. The images, clips and masks")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(make_augment("half", FIELDS), KEY, make_batch(2))


def test_tracks_without_an_image_turn_about_the_origin():
    tracks = make_batch()["tracks"]
    out = jitted("rotate(180)", names=("tracks",))(KEY, {"tracks": tracks})["tracks"]
    complex_before, complex_after = (np.asarray(x) @ [1, 1j] for x in (tracks, out))
    turn = complex_after / np.where(complex_before == 0, 1, complex_before)
    np.testing.assert_allclose(abs(turn)[complex_before != 0], 1, atol=1e-5)
    angles = [np.unique(np.round(t[b != 0], 4)) for t, b in zip(turn, complex_before, strict=True)]
    assert {len(a) for a in angles} == {1}
    assert len(np.unique([a[0] for a in angles])) == 16
