"""RandAugment: each operation against Pillow, all operations of an example, and their draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cv_jax.augment import randaugment
from cv_jax.augment.randaugment import OPS, Draws
from cv_jax.data.fields import Field, image_field, points_field

KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
H, W = 30, 40
COUNT = 12


def _photographs():
    """Smooth images of a part of the 256 values, with noise."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (COUNT, 5, 5, 3), dtype=np.uint8)
    large = [Image.fromarray(x).resize((W, H), Image.Resampling.BICUBIC) for x in small]
    low, high = rng.uniform(0, 60, (COUNT, 1, 1, 1)), rng.uniform(120, 255, (COUNT, 1, 1, 1))
    image = low + (high - low) * np.stack([np.asarray(x) for x in large]) / 255
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


PHOTOGRAPHS = _photographs()


@functools.cache
def compiled(increasing=True):
    return jit(lambda batch, draws: randaugment.apply(batch, draws, increasing))


def operated(*ops, image=PHOTOGRAPHS, increasing=True):
    """The images, 0 to 255, after operations (name, level, sign)."""
    ops = [*ops, *[("identity", 0, 1)] * (2 - len(ops))]  # one program for all tests
    names, levels, signs = zip(*ops, strict=True)
    rows = ([OPS.index(name) for name in names], levels, signs)
    kinds = (jnp.int32, jnp.float32, jnp.float32)
    draws = (
        jnp.tile(jnp.asarray(row, kind)[None], (len(image), 1))
        for row, kind in zip(rows, kinds, strict=True)
    )
    batch = {"image": jnp.asarray(image, jnp.float32) / 255}
    return 255 * np.asarray(compiled(increasing)(batch, Draws(*draws))["image"])


def by_pillow(change, image=PHOTOGRAPHS):
    return np.stack([np.asarray(change(Image.fromarray(x))) for x in image]).astype(np.float32)


# --- One operation ---


def posterize(image, bits):
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.9, 1.0])
def test_solarize_posterize_and_equalize_are_pillows(level):
    threshold, bits = int(level * 256), int(level * 4)
    for increasing in (True, False):
        at = 256 - threshold if increasing else threshold
        kept = 4 - bits if increasing else bits
        for name, change in (
            ("identity", lambda image: image),
            ("equalize", ImageOps.equalize),
            ("solarize", lambda image, at=at: ImageOps.solarize(image, at)),
            ("posterize", lambda image, kept=kept: posterize(image, kept)),
        ):
            out = operated((name, level, 1), increasing=increasing)
            np.testing.assert_allclose(out, by_pillow(change), atol=1e-4, err_msg=name)


def test_autocontrast_is_pillows_but_for_the_rounding_of_whole_numbers():
    out, expected = operated(("autocontrast", 0.9, 1)), by_pillow(ImageOps.autocontrast)
    low, high = (f(PHOTOGRAPHS.astype(int), axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    whole = (PHOTOGRAPHS - low) * 255 % (high - low) == 0  # Pillow's float64 may be just below
    np.testing.assert_allclose(out[~whole], expected[~whole], atol=1e-4)
    assert 0 < whole.mean() < 0.1
    np.testing.assert_allclose(out[whole], expected[whole], atol=1.001)


@pytest.mark.parametrize(
    ("name", "enhancer", "atol"),
    [
        ("brightness", ImageEnhance.Brightness, 1.001),
        ("contrast", ImageEnhance.Contrast, 1.001),
        ("colour", ImageEnhance.Color, 2),
        ("sharpness", ImageEnhance.Sharpness, 2),
    ],
)
def test_the_factors_are_pillows(name, enhancer, atol):
    for level, sign, increasing, factor in (
        (0.5, 1, True, 1.45),
        (0.5, -1, True, 0.55),
        (1, -1, True, 0.1),
        (1, 1, False, 1.9),
        (0.25, -1, False, 0.55),
    ):
        out = operated((name, level, sign), increasing=increasing)
        expected = by_pillow(lambda image, f=factor: enhancer(image).enhance(f))
        assert np.abs(out - PHOTOGRAPHS).max() > 5
        np.testing.assert_allclose(out, expected, atol=atol)


@pytest.mark.parametrize("sign", [-1, 1])
def test_movements_are_pillows_inside_and_grey_outside(sign):
    def affine(*matrix):
        def change(image, fill):
            kind = Image.Transform.AFFINE
            way = Image.Resampling.BILINEAR
            return image.transform(image.size, kind, matrix, way, fillcolor=(fill,) * 3)

        return change

    def rotate(image, fill):
        return image.rotate(sign * 15, Image.Resampling.BILINEAR, fillcolor=(fill,) * 3)

    for name, change in (
        ("rotate", rotate),
        ("shear_x", affine(1, -sign * 0.15, 0, 0, 1, 0)),
        ("shear_y", affine(1, 0, 0, -sign * 0.15, 1, 0)),
        ("translate_x", affine(1, 0, -sign * 0.225 * W, 0, 1, 0)),
        ("translate_y", affine(1, 0, 0, 0, 1, -sign * 0.225 * H)),
    ):
        out = operated((name, 0.5, sign))
        dark, light = (by_pillow(functools.partial(change, fill=fill)) for fill in (0, 255))
        inside = dark == light
        assert 0.6 < inside.mean() < 0.95
        # Within a pixel of the border Pillow repeats the border and this code blends with grey.
        agree = np.abs(out - dark)[inside] < 1.01
        assert agree.mean() > 0.94
        outside = (dark == 0) & (light == 255)
        assert (np.abs(out[outside] - 127.5) < 1e-3).mean() > 0.7


# --- Several operations ---


def test_tables_are_applied_in_the_order_drawn_each_to_the_image_before():
    first, second = ("solarize", 0.6, 1), ("equalize", 0, 1)
    for ops, change in (
        ((first, second), lambda x: ImageOps.equalize(ImageOps.solarize(x, 256 - 153))),
        ((second, first), lambda x: ImageOps.solarize(ImageOps.equalize(x), 256 - 153)),
        (
            (("brightness", 0.5, -1), second),
            lambda x: ImageOps.equalize(ImageEnhance.Brightness(x).enhance(0.55)),
        ),
    ):
        np.testing.assert_allclose(operated(*ops), by_pillow(change), atol=1e-4)


def test_factors_of_two_draws_are_multiplied():
    # Colours near grey: nothing clips, so that two changes are one of the product.
    image = (PHOTOGRAPHS * 0.1 + 110).astype(np.uint8)
    for name in ("colour", "sharpness"):
        out = operated((name, 0.5, 1), (name, 0.5, -1), image=image)
        once = operated((name, 1 / 9 * (1.45 * 0.55 - 1) / -0.1, -1), image=image)
        np.testing.assert_allclose(out, once, atol=1e-3)


def test_movement_and_colour_come_together():
    out = operated(("solarize", 1, 1), ("translate_x", 0.5, 1))  # by 9 pixels; grey turns to 127
    np.testing.assert_allclose(out[:, :, 9:], 255 - PHOTOGRAPHS[:, :, :-9], atol=1e-4)
    np.testing.assert_allclose(out[:, :, :9], 127, atol=1e-4)


def test_points_and_masks_move_with_the_image():
    fields = {
        "image": image_field((H, W, 3)),
        "points": points_field(1),
        "mask": Field((H, W), "uint8", "mask", fill=255),
    }
    image = np.zeros((64, H, W, 3), np.float32)
    image[:, 14:17, 19:22] = 1
    batch = {
        "image": jnp.asarray(image),
        "points": jnp.tile(jnp.array([[[20.5, 15.5]]]), (64, 1, 1)),
        "mask": jnp.asarray(image[..., 0], jnp.uint8),
    }
    draws = randaugment.draw(KEY, 64, 3, 4.0, 1.0, 1.0)
    moves = [OPS.index(n) for n in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")]
    draws = draws._replace(op=jnp.where(jnp.isin(draws.op, jnp.array(moves)), draws.op, 0))
    out = jit(lambda batch: randaugment.apply(batch, draws, True, fields))(batch)
    light = np.asarray(out["image"])[..., 0] > 0.55  # above the grey outside
    seen = light.sum((1, 2)) > 5
    assert seen.sum() > 40
    rows, cols = np.arange(H)[:, None] + 0.5, np.arange(W)[None] + 0.5
    for i in np.flatnonzero(seen):
        for shown in (light[i], np.asarray(out["mask"][i]) == 1):
            centre = [(shown * at).sum() / shown.sum() for at in (cols, rows)]
            np.testing.assert_allclose(out["points"][i, 0], centre, atol=0.6)
    assert np.abs(out["points"] - batch["points"]).max() > 5


@pytest.mark.parametrize("c", [1, 3])
def test_both_ways_to_count_give_the_same(c):
    levels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 2, 5, 7, c)), jnp.int32)
    ways = (randaugment._by_scatter, randaugment._by_products)
    scattered, multiplied = (np.asarray(jax.jit(way)(levels)) for way in ways)
    np.testing.assert_array_equal(scattered, multiplied)
    for i in range(3):
        for channel in range(c):
            expected = np.bincount(np.asarray(levels[i, ..., channel]).ravel(), minlength=256)
            np.testing.assert_array_equal(scattered[i, channel], expected)


# --- Draws ---


def test_operations_are_drawn_equally_often_and_magnitudes_as_asked():
    draws = randaugment.draw(KEY, 7000, 2, 6.0, 0.5, 1.0)
    counts = np.bincount(np.asarray(draws.op).ravel(), minlength=len(OPS))
    assert np.all(np.abs(counts - 1000) < 125)  # four standard deviations
    assert abs(float(draws.sign.mean())) < 0.035
    np.testing.assert_allclose(draws.level.mean(), 0.6, atol=0.002)
    np.testing.assert_allclose(draws.level.std(), 0.05, rtol=0.03)
    plain = randaugment.draw(KEY, 7000, 2, 6.0, 0.0, 0.5)
    np.testing.assert_allclose(plain.level, 0.6, rtol=1e-6)
    assert abs(float((plain.op == 0).mean()) - (0.5 + 0.5 / 14)) < 0.017
    strong = randaugment.draw(KEY, 7000, 2, 10.0, 2.0, 1.0)
    assert float(strong.level.max()) == 1
