"""Image files of every kind become the array that evaluation would have seen."""

import os
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from cv_jax.config.errors import UserError
from cv_jax.data.read_image import (
    MAX_BYTES,
    MAX_PIXELS,
    fit_image,
    read_bytes,
    read_image,
)

RED = (200, 30, 60)


def encode(image, kind="PNG", **options):
    """The content of a file: `image` is Pillow's or an array."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file := BytesIO(), kind, **options)
    return file.getvalue()


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_an_image_of_the_right_size_keeps_every_pixel(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = _noise(8, 6, 3)
    np.testing.assert_array_equal(read_image(encode(image, kind, **options), (8, 6, 3)), image)


def test_the_middle_of_a_larger_image_is_taken_after_shrinking_it():
    image = np.zeros((16, 64, 3), np.uint8)
    image[:, 24:40] = RED  # the middle quarter, all that remains of a square
    got = read_image(encode(image), (8, 8, 3))
    assert got.shape == (8, 8, 3)
    assert (got[:, 2:6] == RED).all()


def test_a_smaller_image_is_enlarged():
    got = read_image(encode(np.full((2, 3, 3), RED, np.uint8)), (8, 8, 3))
    np.testing.assert_array_equal(got, np.full((8, 8, 3), RED))


def test_exif_turns_the_image():
    upright = _noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    stored = np.rot90(upright)  # counter-clockwise
    got = read_image(encode(np.ascontiguousarray(stored), exif=exif), (8, 8, 3))
    np.testing.assert_array_equal(got, upright)


@pytest.mark.parametrize(
    "exif", [b"garbage", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff1"]
)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_damaged_exif_block_leaves_the_pixels(kind, options, exif):
    image = _noise(8, 6, 3)
    file = encode(image, kind, exif=exif, **options)
    np.testing.assert_array_equal(read_image(file, (8, 6, 3)), image)


def test_two_and_four_channels_have_alpha_for_the_last():
    image = _noise(8, 6, 4)
    np.testing.assert_array_equal(read_image(encode(image), (8, 6, 4)), image)
    np.testing.assert_array_equal(read_image(encode(image[..., :2]), (8, 6, 2)), image[..., :2])
    opaque = np.full((2, 3, 3), RED, np.uint8)
    assert (read_image(encode(opaque), (8, 8, 4)) == (*RED, 255)).all()
    assert (read_image(encode(opaque[..., 0]), (8, 8, 2)) == (RED[0], 255)).all()


def test_what_is_transparent_is_white():
    image = np.zeros((2, 2, 4), np.uint8)
    image[0] = (*RED, 255)
    image[1] = (*RED, 0)  # its hidden colour does not show
    got = read_image(encode(image), (2, 2, 3))
    assert got[0].tolist() == [list(RED)] * 2
    assert got[1].tolist() == [[255] * 3] * 2
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([*RED, 0, 0, 0])
    assert (read_image(encode(palette, "GIF", transparency=0), (2, 2, 3)) == 255).all()


def test_grey_and_colour_become_each_other():
    grey = np.full((2, 2), 77, np.uint8)
    assert (read_image(encode(grey), (2, 2, 3)) == 77).all()
    colour = np.full((2, 2, 3), RED, np.uint8)
    luma = round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
    assert (read_image(encode(colour), (2, 2, 1)) == luma).all()


def test_more_than_8_bits_are_scaled_and_not_cut_off():
    assert (read_image(encode(np.full((2, 2), 257 * 99, np.uint16)), (2, 2, 1)) == 99).all()
    assert (read_image(encode(np.full((2, 2), 0.4, np.float32), "TIFF"), (2, 2, 1)) == 102).all()
    with pytest.raises(UserError, match="not all between 0 and 1"):
        read_image(encode(np.full((2, 2), 7, np.float32), "TIFF"), (2, 2, 1))


def test_what_pillow_does_not_know_opencv_opens():
    _, data = cv2.imencode(".hdr", np.full((2, 2, 3), (0.25, 0.5, 1.0), np.float32))
    got = read_image(data.tobytes(), (2, 2, 3))
    assert abs(got.astype(int) - (255, 128, 64)).max() <= 1  # RGB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (encode(_noise(4, 4, 3), "EPS"), "not an image"),  # a program, which would be run
        (encode(_noise(40, 40, 3))[:-300], "damaged"),
        (encode(_noise(40, 40, 3), "JPEG")[:200], "damaged"),
        (
            encode(Image.new("1", (MAX_PIXELS // 10, 11))),
            "more than 50,000,000 pixels: 5000000 x 11",
        ),
        (encode(Image.new("1", (MAX_PIXELS // 10, 100))), "more than 50,000,000 pixels"),
    ],
    ids=["empty", "text", "EPS", "half a PNG", "half a JPEG", "too large", "far too large"],
)
def test_what_is_no_image_is_said_in_a_sentence(data, message):
    with pytest.raises(UserError, match=message):
        read_image(data, (8, 8, 3))


def test_only_plain_files_of_a_size_that_can_be_held_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")  # opening it would wait for a writer
    (tmp_path / "folder.png").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "loose.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for path, message in (
        (tmp_path / "fifo.png", "a pipe, a socket or a device"),
        (tmp_path / os.devnull, "a pipe, a socket or a device"),
        (tmp_path / "folder.png", "it is a directory: use --dir"),
        (tmp_path / "loose.png", "No such file"),
        (tmp_path / "huge.png", "more than 500 MB"),
    ):
        with pytest.raises(UserError, match=message):
            read_bytes(path)


def test_the_centre_crop_of_evaluation_is_the_published_one():
    """Resize to 256 and crop 224: of 500x375 pixels the 328.125 a side at the centre."""
    x, y = np.meshgrid(np.arange(500), np.arange(375))
    ramp = np.stack([x / 2, y / 2, x * 0], -1).astype(np.uint8)
    image, back = fit_image(encode(ramp), (224, 224, 3), share=0.875)
    corners = back.matrix @ [[0, 224], [0, 224], [1, 1]]
    np.testing.assert_allclose(corners[:2], [[85.9375, 414.0625], [23.4375, 351.5625]])
    for place in (20, 110, 200):  # the middle of an output pixel, in the file
        at = back.matrix @ [place + 0.5, place + 0.5, 1]
        np.testing.assert_allclose(image[place, place, :2], (at[:2] - 0.5) / 2, atol=1)
