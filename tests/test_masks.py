"""Images with masks: exact classes from folders and from VOC, and what is wrong in data sets."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import load as load_module
from cv_jax.data import load_dataset
from cv_jax.data.encoded import Encoded, read_training
from cv_jax.data.read_mask import decode_mask, letterbox_mask, mask_numbers
from tests.test_data import prepare_tiny
from tests.test_folder import encoded

pytestmark = pytest.mark.usefixtures("own_cache")

SIZE = 12, 8  # height, width
NAMES = ("sky", "road", "car")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def load(where, name="masks", **settings):
    config = base_config()
    config.data.update({"name": name, "dir": str(where), **settings})
    return load_dataset(config.data)


def refused(where, name="masks", **settings) -> str:
    with pytest.raises(UserError) as error:
        load(where, name, **settings)
    return str(error.value)


def random_mask(seed, size=SIZE, values=(0, 1, 2, 255)) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.uint8(values), size)


def add(folder: Path, name: str, mask: np.ndarray, seed: int = 0, **of_image) -> None:
    """Writes an image and its mask; the image has the mask's size unless `size` says another."""
    size = of_image.pop("size", mask.shape[:2])
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"images/{name}.png", **of_image)
    Image.fromarray(mask).save(folder / f"labels/{name}.png")


def write(root, train=("a", "b"), size=SIZE, names=NAMES) -> Path:
    for i, name in enumerate(train):
        add(root / "train", name, random_mask(i, size), i)
    add(root / "test", "z", random_mask(9, size), 9)
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


# ---- Mask files


def test_every_kind_of_mask_file_has_the_same_classes():
    mask = random_mask(0)
    numbers = mask_numbers(3)
    grey = Image.fromarray(mask)
    paletted = Image.fromarray(mask)
    paletted.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    images = {
        "grey": grey,
        "palette": paletted,
        "16 bits": Image.fromarray(mask.astype(np.uint16)),
        "equal channels": Image.merge("RGB", [grey] * 3),
        "alpha": Image.merge("LA", [grey, Image.new("L", grey.size, 200)]),
    }
    assert {image.mode for image in images.values()} == {"L", "P", "I;16", "RGB", "LA"}
    for name, image in images.items():
        np.testing.assert_array_equal(
            decode_mask(encoded(image, "PNG"), numbers), mask, err_msg=name
        )
    bits = Image.fromarray(mask > 0)
    assert bits.mode == "1"
    np.testing.assert_array_equal(decode_mask(encoded(bits, "PNG"), numbers), mask > 0)


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.full((2, 2), 3, np.uint8), "its mask has the value 3, which is no class"),
        (np.full((2, 2), 300, np.uint16), "its mask has the value 300, which is no class"),
        (np.eye(3, dtype=np.uint8)[None], "its mask has colours"),
    ],
)
def test_a_value_that_is_no_class_is_named(pixels, says):
    with pytest.raises(UserError, match=says):
        decode_mask(encoded(Image.fromarray(pixels), "PNG"), mask_numbers(3))


def test_values_of_void_are_ignored():
    mask = np.uint8([[0, 1, 2, 255]])
    numbers = mask_numbers(2, ignored=(2,))
    np.testing.assert_array_equal(
        decode_mask(encoded(Image.fromarray(mask), "PNG"), numbers), [[0, 1, 255, 255]]
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no image", "is not an image without loss, such as PNG"),
        (encoded(Image.new("RGB", (4, 4)), "JPEG"), "is not an image without loss, such as PNG"),
        (encoded(Image.new("L", (4, 4)), "PNG")[:40], "its mask is "),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "its mask has pixels of the mode F"),
    ],
)
def test_a_file_that_is_no_mask_says_so(data, says):
    with pytest.raises(UserError, match=says):
        decode_mask(data, mask_numbers(3))


def test_masks_shrink_by_pixel_centres_and_are_padded_with_255():
    # Shrinking takes the pixel at the centre, and makes no class that is not there.
    large = random_mask(1, (30, 30))
    data = encoded(Image.fromarray(large), "PNG")
    small = letterbox_mask(data, mask_numbers(3), (10, 12))
    np.testing.assert_array_equal(small[:, :10], large[1::3, 1::3])
    assert (small[:, 10:] == 255).all()
    # An image that fits keeps its pixels, and so does its mask.
    whole = letterbox_mask(data, mask_numbers(3), (40, 50))
    np.testing.assert_array_equal(whole[:30, :30], large)
    assert (whole[30:] == 255).all()
    assert (whole[:, 30:] == 255).all()


def test_pixels_of_masks_decoded_when_needed_are_counted_in_some_of_them(root):
    write(root, train="abcd", names=(*NAMES, "never"))
    once, always = load(root), load(root, decode="always")
    assert once.spec.pixel_counts[3] == 0
    assert always.spec.pixel_counts == tuple(x + 1 for x in once.spec.pixel_counts)
    assert once.spec.label_counts == ()


# ---- Data sets


def test_a_folder_of_images_and_masks(root):
    data = load(write(root))
    assert data.spec.fields["mask"].names == NAMES
    assert data.spec.fields["mask"].shape == SIZE
    assert (data.spec.num_train, data.spec.num_test) == (2, 1)
    np.testing.assert_array_equal(data.train["mask"], [random_mask(0), random_mask(1)])
    np.testing.assert_array_equal(data.test["mask"], [random_mask(9)])
    counts = np.bincount(data.train["mask"].ravel(), minlength=256)
    assert data.spec.pixel_counts == tuple(counts[:3])
    assert data.spec.summary == "12x8x3, mask of 3 classes"
    again = load(root)  # from the cache
    np.testing.assert_array_equal(again.train["mask"], data.train["mask"])


def test_a_class_called_void_is_ignored(root):
    write(root, names=("sky", "road", "void"))
    data = load(root)
    assert data.spec.fields["mask"].names == ("sky", "road")
    expected = np.where(random_mask(9) == 2, 255, random_mask(9))
    np.testing.assert_array_equal(data.test["mask"][0], expected)


def test_images_decoded_when_needed_are_equal_with_their_masks(root):
    write(root, train="abcd")
    once, always = load(root), load(root, decode="always")
    for split in ("train", "test"):
        here, there = getattr(always, split), getattr(once, split)
        assert isinstance(here["mask"], Encoded)
        assert here["mask"].shape == there["mask"].shape
        for name in ("image", "mask"):
            np.testing.assert_array_equal(np.asarray(here[name]), there[name])
    found = read_training(always.train, np.array([2, 0]), key=0, epoch=0)
    np.testing.assert_array_equal(found["mask"], once.train["mask"][[2, 0]])
    padded = np.asarray(always.test["mask"].padded(1))
    assert (padded[1] == 255).all()


def test_a_mask_that_breaks_during_the_run_is_ignored(root, capsys):
    data = load(write(root), decode="always")
    (root / "test/labels/z.png").write_bytes(b"broken")
    assert (np.asarray(data.test["mask"]) == 255).all()
    assert "test/labels/z.png cannot be decoded" in capsys.readouterr().err


def test_images_of_different_sizes_are_letter_boxed_with_their_masks(root):
    write(root)
    add(root / "train", "c", random_mask(3, (6, 20)))
    whole = load(root)  # a canvas for all; sides are multiples of 4
    assert whole.spec.fields["mask"].shape == (12, 20)
    np.testing.assert_array_equal(whole.train["mask"][0, :, :8], random_mask(0))
    pixels = np.asarray(Image.open(root / "train/images/a.png"))
    np.testing.assert_array_equal(whole.train["image"][0, :, :8], pixels)
    np.testing.assert_array_equal(whole.train["mask"][2, :6], random_mask(3, (6, 20)))
    assert (whole.train["mask"][2, 6:] == 255).all()
    small = load(root, size=8)
    assert small.spec.fields["mask"].shape == (8, 8)
    assert (small.train["mask"][2, 2:] == 255).all()
    assert set(np.unique(small.train["mask"])) <= {0, 1, 2, 255}


def test_without_split_folders_a_fifth_becomes_test(root):
    for i in range(10):
        add(root, f"{i}", random_mask(i), i)
    (root / "classes.txt").write_text("\n".join(NAMES))
    data = load(root)
    assert (data.spec.num_train, data.spec.num_test) == (8, 2)


def test_camvid_has_names_of_its_own_and_val_is_train_unless_asked_for(root):
    for split in ("train", "val", "test"):
        for i in range(2):
            add(root / split, f"{split}{i}", random_mask(i, values=(0, 10, 11)), hash(split) % 99)
    joined, apart = load(root, "camvid"), load(root, "camvid", num_val=-1)
    assert joined.spec.num_train == 4
    assert (apart.spec.num_train, apart.spec.num_val) == (2, 2)
    assert len(apart.spec.fields["mask"].names) == 11
    assert set(np.unique(apart.val["mask"])) == {0, 10, 255}


def test_vocs_own_layout(root):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, split in (("a", "train"), ("b", "val"), ("c", "")):
        mask = Image.fromarray(random_mask(ord(name), values=(0, 20, 255)))
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        mask.save(root / f"SegmentationClass/{name}.png")
        Image.new("RGB", SIZE[::-1]).save(root / f"JPEGImages/{name}.jpg")
        if split:
            (root / f"ImageSets/Segmentation/{split}.txt").write_text(f"{name}\n")
    data = load(root, "voc_masks")
    assert data.spec.fields["mask"].names[20] == "tvmonitor"
    np.testing.assert_array_equal(data.test["mask"], [random_mask(ord("b"), values=(0, 20, 255))])
    assert any("the val images are test" in note for note in data.notes)


@pytest.mark.parametrize("decode", ["once", "always"])
def test_masks_of_tfds(root, monkeypatch, decode):
    names = ("pet", "background", "border")
    monkeypatch.setitem(load_module.TFDS_MASKS, "pets", ("tiny", "segmentation_mask", names, 1))
    features = {
        "image": tfds.features.Image(encoding_format="png"),
        "segmentation_mask": tfds.features.Image(
            shape=(None, None, 1), use_colormap=True, encoding_format="png"
        ),
    }
    masks = {seed: random_mask(seed, values=(1, 2, 3)) for seed in range(3)}

    def example(seed):
        image = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
        files = {"image": image, "segmentation_mask": masks[seed]}
        return {k: BytesIO(encoded(Image.fromarray(x), "PNG")) for k, x in files.items()}

    root.mkdir()
    prepare_tiny(root, features, {"train": [example(0), example(1)], "test": [example(2)]})
    data = load(root, "pets", decode=decode)
    assert data.spec.fields["mask"].names == names
    np.testing.assert_array_equal(data.train["mask"], [masks[0] - 1, masks[1] - 1])
    np.testing.assert_array_equal(data.test["mask"], [masks[2] - 1])


def test_label_fraction_keeps_some_of_the_images(root):
    write(root, train="abcdefgh")
    data = load(root, label_fraction=0.25)
    assert data.spec.num_train == len(data.train["mask"]) == 2
    other = load(root, label_fraction=0.25, label_seed=1)
    assert not np.array_equal(data.train["mask"], other.train["mask"])
    assert "config.data.labels_per_class must be 0: masks has no field 'label'." in refused(
        root, labels_per_class=2
    )
    assert "config.data.keep_unlabelled must be False" in refused(
        root, label_fraction=0.5, keep_unlabelled=True
    )


def _other_size(root):
    add(root / "train", "c", random_mask(0), size=(12, 9))


def _colours(root):
    pixels = np.random.default_rng(0).integers(0, 3, (*SIZE, 3), np.uint8)
    add(root / "train", "c", pixels)


def _value(root):
    add(root / "train", "c", np.full(SIZE, 7, np.uint8))


def _damaged(root):
    add(root / "train", "c", random_mask(0))
    (root / "train/labels/c.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_other_size, "train/images/c.png (its mask is of 8x12 pixels, and it has 9x12)"),
        (_colours, "train/images/c.png (its mask has colours"),
        (_value, "train/images/c.png (its mask has the value 7, which is no class)"),
        (_damaged, "train/images/c.png (its mask is not an image without loss, such as PNG)"),
    ],
)
def test_a_bad_mask_is_left_out_counted_and_named(root, spoil, says):
    write(root)
    spoil(root)
    data = load(root)
    assert data.spec.num_train == 2
    assert any(f"1 image left out, not to be decoded: {says}" in note for note in data.notes)


def test_an_image_without_a_mask_is_left_out_and_named(root):
    write(root)
    (root / "train/labels/a.png").unlink()
    notes = load(root).notes
    assert "data    1 image without a mask, left out: train/images/a.png" in notes


def _two_masks(root):
    for ending in ("tif", "png"):
        (root / f"train/labels/a.{ending}").touch()


def _names(text):
    return lambda root: (root / "classes.txt").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: (root / "classes.txt").unlink(), "classes.txt cannot be read: write the"),
        (_names(""), "classes.txt has 0 names, 0 of them different"),
        (_names("a\na\nb"), "classes.txt has 3 names, 2 of them different"),
        (_names("void\na\nb"), "'void' must be the last class"),
        (lambda root: (root / "test/labels").rename(root / "test/x"), "must have the folders"),
        (_two_masks, "keep one of them"),
        (lambda root: [x.unlink() for x in root.glob("*/labels/*")], "has no images with masks"),
    ],
    ids=["no names", "empty", "twice", "void", "no folder", "two masks", "no masks"],
)
def test_a_bad_folder_gets_one_sentence(root, spoil, says):
    write(root)
    spoil(root)
    message = refused(root)
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"crop": "random_resized()"}, "would cut masks off"),
        ({"eval_crop": 0.875}, "would cut masks off"),
        ({"num_val": -1}, "asks for the official val split"),
    ],
)
def test_settings_that_do_not_fit_masks(root, settings, says):
    assert says in refused(write(root), **settings)


def test_voc_masks_need_vocs_folders(root):
    assert "has no folder ImageSets/Segmentation" in refused(write(root), "voc_masks")
    file = root / "classes.txt"
    assert f"config.data.dir={str(file)!r} is a file" in refused(file, "voc_masks")
