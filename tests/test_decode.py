"""Random crops: torchvision's boxes, Pillow's pixels, and the same errors as in evaluation."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image

from cv_jax.config.errors import UserError
from cv_jax.data import decode
from cv_jax.data.decode import Box, draw_box, find_crop, random_crop
from cv_jax.data.read_image import decode_image, read_image
from tests.test_images import encode

SHAPE = (32, 24, 3)


def rng(seed=0):
    return np.random.default_rng(seed)


def photo(width, height, channels=3):
    """Returns an image (height, width, channels) with coloured spots and some noise."""
    small = rng().integers(64, 192, (12, 12, 3), dtype=np.uint8)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    image += rng().integers(-8, 9, image.shape)
    return image.clip(0, 255).astype(np.uint8)[..., :channels].squeeze()


def jpeg(width, height, channels=3, **options):
    return encode(photo(width, height, channels), "JPEG", **{"quality": 90, **options})


def by_pillow(data, shape, seed, shrink=1):
    """Returns the crop of `random_crop` by Pillow; its borders are multiples of `shrink`."""
    image = decode_image(data, shape[2])
    left, top, w, h = draw_box(image.size, rng(seed).random((10, 4)))
    borders = [round(x / shrink) * shrink for x in (left, top, left + w, top + h)]
    size = image.size
    image = image.crop([min(x, most) for x, most in zip(borders, size + size, strict=True)])
    image = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(shape)


def difference(data, shape, seed, shrink=1):
    got = random_crop(data, shape, rng(seed))
    assert (got.shape, got.dtype, got.flags.c_contiguous) == (shape, np.uint8, True)
    return np.abs(got - by_pillow(data, shape, seed, shrink).astype(float)).mean()


# The box


def test_boxes_have_uniform_areas_and_aspects_and_places():
    draws = rng().random((4000, 10, 4))
    boxes = np.array([draw_box((500, 400), draw, (0.08, 0.5)) for draw in draws])
    left, top, w, h = boxes.T
    assert (min(left), min(top), min(w), min(h)) >= (0, 0, 1, 1)
    assert ((left + w <= 500) & (top + h <= 400)).all()
    share, aspect = w * h / 200_000, np.log(w / h) / np.log(4 / 3)
    assert share.min() == pytest.approx(0.08, abs=0.004)
    assert share.max() == pytest.approx(0.5, abs=0.004)
    assert np.abs(aspect).max() == pytest.approx(1, abs=0.03)
    for uniform, low, high in [
        (share, 0.08, 0.5),
        (aspect, -1, 1),
        (left / (500 - w), 0, 1),
        (top / (400 - h), 0, 1),
    ]:  # all of these boxes fit, so that the first try counts
        scaled = (uniform - low) / (high - low)
        assert scaled.mean() == pytest.approx(1 / 2, abs=0.02)  # the standard error is 0.005
        assert scaled.std() == pytest.approx(12**-0.5, abs=0.01)


def test_where_no_box_fits_the_largest_at_the_centre_is_taken():
    draw = rng().random((10, 4))
    assert draw_box((1000, 10), draw) == Box(493, 0, 13, 10)
    assert draw_box((10, 1000), draw) == Box(0, 493, 10, 13)
    assert draw_box((1, 1), draw) == Box(0, 0, 1, 1)
    assert draw_box((10, 10), draw, (1.0, 1.0), (1.0, 1.0)) == Box(0, 0, 10, 10)


def test_the_first_box_that_fits_is_taken():
    draw = np.array([[1, 1, 0, 0], [0.5, 0.5, 0.999, 0.0]])  # 231x173 is wider than the image
    assert draw_box((200, 200), draw) == Box(53, 0, 147, 147)


# The pixels of JPEG files


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (3, {"subsampling": 0}),
        (3, {"subsampling": 1}),
        (3, {"subsampling": 2}),
        (3, {"subsampling": 2, "progressive": True}),
        (3, {"subsampling": 2, "restart_marker_rows": 1}),
        (1, {}),
    ],
)
def test_the_rows_of_the_box_are_those_of_the_whole_file(channels, options):
    data = jpeg(45, 83, channels, **options)
    whole = np.asarray(Image.open(decode.BytesIO(data)).convert("RGB"))
    frame = decode._read_frame(data)
    assert (frame.width, frame.height) == (45, 83)
    for bottom in range(18, 84):
        part = decode._decode_jpeg(data, frame, Box(3, 2, 40, bottom - 2), (40, 90), 3)
        np.testing.assert_array_equal(part, whole[2:bottom, 3:43])


@pytest.mark.parametrize(("scale", "shrink"), [(1, 1), (5, 2), (8, 4), (18, 8)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_pixels_are_close_to_pillows(scale, shrink, subsampling):
    data = jpeg(31 * scale, 37 * scale, subsampling=subsampling)
    image = decode._read_frame(data)
    used = []
    for seed in range(6):
        box = draw_box(image.size, rng(seed).random((10, 4)))
        fits = [s for s in (1, 2, 4, 8) if box.width >= 24 * s and box.height >= 32 * s]
        used.append(max(fits, default=1))
        assert difference(data, SHAPE, seed, used[-1]) < 1
    assert shrink in used


@pytest.mark.parametrize("scale", [0.4, 1.1, 1.5, 2.0, 2.6, 3.7])
def test_resizing_antialiases(scale):
    image = photo(200, 200)
    size = (round(200 / scale), round(150 / scale))
    want = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    assert np.abs(decode._resize(image, size) - want.astype(float)).mean() < 1.2
    flat = np.full((200, 200, 4), 255, np.uint8)
    assert (decode._resize(flat, size) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_exif_turns_the_crop(orientation, channels):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(60, 44, exif=exif)
    assert decode._read_frame(data).turn == decode._TURNS[orientation]
    for seed in range(3):
        assert difference(data, (*SHAPE[:2], channels), seed) < 1


def test_damaged_exif_data_turn_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(90, 60, exif=exif)
    at = data.index(b"Exif\0\0") + 6
    data = data[:at] + b"\xff" * 8 + data[at + 8 :]
    assert decode._read_frame(data).turn == decode._TURNS[1]
    assert difference(data, SHAPE, 0) < 1


# Other files


def _palette():
    image = Image.fromarray(photo(60, 50)).quantize(16)
    return encode(image, "GIF", transparency=3)


ODD = {
    "CMYK": lambda: encode(Image.fromarray(photo(60, 50)).convert("CMYK"), "JPEG"),
    "RGB in JPEG": lambda: jpeg(60, 50, keep_rgb=True),
    "grey": lambda: jpeg(60, 50, 1),
    "bytes after the end": lambda: jpeg(60, 50) + b"\0" * 100,
    "PNG": lambda: encode(photo(60, 50)),
    "alpha": lambda: encode(np.dstack([photo(60, 50), photo(60, 50, 1)])),
    "palette": _palette,
    "16 bits": lambda: encode(photo(60, 50, 1).astype(np.uint16) * 257),
    "one pixel": lambda: jpeg(1, 1),
    "one pixel of PNG": lambda: encode(photo(1, 1)[None, None]),
    "panorama": lambda: jpeg(1000, 10),
    "tower": lambda: jpeg(10, 1000),
}


@pytest.mark.parametrize("kind", ODD)
def test_every_kind_of_file_has_the_colours_of_evaluation(kind):
    data = ODD[kind]()
    for channels in (1, 2, 3, 4):
        for seed in range(3):
            assert difference(data, (32, 32, channels), seed) < 1


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_file_is_an_error_wherever_the_crop_is(progressive):
    data = jpeg(160, 160, progressive=progressive)
    for size in (len(data) // 3, len(data) // 2, len(data) - 100, len(data) - 2):
        part = data[:size]
        with pytest.raises(UserError, match="truncated") as wanted:
            read_image(part, SHAPE)
        for seed in range(5):
            with pytest.raises(UserError) as error:
                random_crop(part, SHAPE, rng(seed))
            assert str(error.value) == str(wanted.value)


@pytest.mark.parametrize("data", [b"", b"no image", jpeg(60, 50)[:20], b"\xff\xd8\xff"])
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(UserError) as wanted:
        read_image(data, SHAPE)
    with pytest.raises(UserError) as error:
        random_crop(data, SHAPE, rng())
    assert str(error.value) == str(wanted.value)


def test_an_image_too_large_is_an_error():
    data = jpeg(60, 50)
    at = decode._read_frame(data).at + 5
    with pytest.raises(UserError, match="more than 50,000,000 pixels"):
        random_crop(data[:at] + b"\xff\xdc\xff\xdc" + data[at + 4 :], SHAPE, rng())


def test_damage_is_an_error_or_decoded():
    data = jpeg(40, 40)
    for seed in range(200):
        damaged = bytearray(data)
        damaged[rng(seed).integers(len(data))] ^= 1 << rng(seed).integers(8)
        try:
            assert random_crop(bytes(damaged), SHAPE, rng(seed)).shape == SHAPE
        except UserError:
            continue


# Randomness, and the config key


def test_the_crop_depends_on_the_generator_alone():
    files = [jpeg(70 + 9 * i, 60) for i in range(4)]

    def crops(_):
        return [random_crop(data, SHAPE, rng(seed)) for data in files for seed in range(4)]

    wanted = crops(0)
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(crops, range(6)):
            np.testing.assert_array_equal(got, wanted)
    assert len({image.tobytes() for image in wanted}) == 16


def test_a_text_names_the_crop():
    data = jpeg(90, 60)
    assert find_crop("") is None
    crop = find_crop("random_resized")(SHAPE)
    np.testing.assert_array_equal(crop(data, rng()), random_crop(data, SHAPE, rng()))
    crop = find_crop("random_resized(0.5, aspect=2.0)")(SHAPE)
    wanted = random_crop(data, SHAPE, rng(), (0.5, 1.0), (0.5, 2.0))
    np.testing.assert_array_equal(crop(data, rng()), wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("centre", r"config\.data\.crop.*random_resized"),
        ("random_resized(0.0)", "area=0.0 must be above 0 and at most 1"),
        ("random_resized(aspect=0.5)", "aspect=0.5 must be from 1 to 100"),
        ("random_resized|random_resized", "names 2 crops: keep one"),
    ],
)
def test_a_wrong_text_is_an_error(text, message):
    with pytest.raises(UserError, match=message):
        find_crop(text)
