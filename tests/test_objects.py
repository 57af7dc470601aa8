"""Images with boxes: exact corners from VOC, COCO and TFDS, and what is wrong in data sets."""

import json
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.data.encoded import Encoded
from cv_jax.data.read_image import decode_image, letterbox_image
from cv_jax.data.sources.objects import turn_boxes
from cv_jax.data.sources.voc import list_voc
from tests.test_data import prepare_tiny, to_tfrecord
from tests.test_folder import encoded

pytestmark = pytest.mark.usefixtures("own_cache")

SIZE = 20, 16  # width, height


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def load(where, name="voc", **settings):
    config = base_config()
    config.data.update({"name": name, "dir": str(where), **settings})
    return load_dataset(config.data)


def picture(size=SIZE, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def boxes_of(examples) -> list[list[list[float]]]:
    """Returns the boxes of each example, without padding."""
    pairs = zip(examples["boxes"], examples["box_label"], strict=True)
    return [boxes[label >= 0].tolist() for boxes, label in pairs]


def notes_about(data, text) -> list[str]:
    return [note.removeprefix("data    ") for note in data.notes if text in note]


# ---- PASCAL VOC


def xml_of(objects, size=SIZE) -> str:
    """Returns an annotation; each object is (class, xmin, ymin, xmax, ymax[, difficult])."""
    text = ""
    for label, *corners in objects:
        names = ("xmin", "ymin", "xmax", "ymax")
        box = "".join(f"<{n}>{x}</{n}>" for n, x in zip(names, corners, strict=False))
        difficult = f"<difficult>{corners[4]}</difficult>" if len(corners) > 4 else ""
        text += f"<object><name>{label}</name>{difficult}<bndbox>{box}</bndbox></object>"
    said = "" if size is None else "<size><width>{}</width><height>{}</height></size>".format(*size)
    return f"<annotation>{said}{text}</annotation>"


def write_voc(root, objects=(("cat", 3, 3, 8, 8),), size=SIZE, sets=None, said=SIZE) -> Path:
    """Writes the image `a` of train with these objects, and a plain image `z` of test."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    add_voc(root, "a", objects, size, size if said == SIZE else said)
    add_voc(root, "z", [("cat", 1, 1, 4, 4)], size, seed=1)
    for name, lines in (sets or {"train": ["a"], "test": ["z"]}).items():
        (root / f"ImageSets/Main/{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def add_voc(root, name, objects, size=SIZE, said=SIZE, seed=0) -> None:
    picture(size, seed).save(root / f"JPEGImages/{name}.png")
    (root / f"Annotations/{name}.xml").write_text(xml_of(objects, size if said == SIZE else said))


def test_corners_of_a_whole_image_are_those_of_the_image(root):
    write_voc(root, [("cat", 1, 1, 500, 375)], (500, 375))
    listing = list_voc(root, True)
    np.testing.assert_array_equal(listing.columns["boxes"][0], [[0, 0, 500, 375]])
    assert listing.columns["boxes"].dtype == np.float32
    data = load(root)
    assert boxes_of(data.train) == [[[0, 0, 500, 375]]]
    x0, y0, x1, y1 = data.train["boxes"][0, 0]
    assert (x1 - x0) * (y1 - y0) == 500 * 375
    assert data.spec.image_shape == (376, 500, 3)  # a multiple of 4, black below
    np.testing.assert_array_equal(data.train["image"][0, :375], picture((500, 375)))
    assert not data.train["image"][0, 375:].any()


@pytest.mark.parametrize(
    ("given", "kept", "note"),
    [
        ((0, 3, 8, 8), [0, 2, 8, 8], "1 box partly outside the image, cut: Annotations/a.xml"),
        ((3, 3, 21, 17), [2, 2, 20, 16], "1 box partly outside the image, cut: Annotations/a.xml"),
        ((20, 1, 1, 16), [0, 0, 20, 16], "1 box with exchanged corners, put in order: Annotat"),
        ((20, 16, 1, 1), [0, 0, 20, 16], "1 box with exchanged corners, put in order: Annotat"),
        ((5, 3, 5, 8), None, "1 box without area, left out: Annotations/a.xml"),
        ((5, 8, 9, 8), None, "1 box without area, left out: Annotations/a.xml"),
        ((25, 3, 30, 8), None, "1 box outside the image, left out: Annotations/a.xml"),
        ((-9, 3, 0, 8), None, "1 box outside the image, left out: Annotations/a.xml"),
        (("x", 3, 9, 8), None, "1 box with corners that are not numbers, left out: Annotations/a"),
        (("nan", 3, 9, 8), None, "1 box with corners that are not numbers, left out: Annotations"),
        (("inf", 3, 9, 8), None, "1 box with corners that are not numbers, left out: Annotations"),
        ((3, 3, 9), None, "1 box with corners that are not numbers, left out: Annotations/a.xml"),
        ((3.5, 3, 9.25, 8), [2.5, 2, 9.25, 8], None),
        ((20, 16, 20, 20), None, "1 box without area, left out: Annotations/a.xml"),
    ],
)
def test_a_box_is_corrected_or_left_out_with_one_note(root, given, kept, note):
    write_voc(root, [("cat", 2, 3, 4, 5), ("cat", *given)])
    data = load(root)
    assert boxes_of(data.train) == [[[1, 2, 4, 5], *([kept] if kept else [])]]
    found = [one for one in notes_about(data, "a.xml") if "decoded" not in one]
    assert len(found) == bool(note)
    assert not note or found[0].startswith(note)


def test_boxes_without_a_size_in_the_annotation_are_cut_to_the_image(root):
    for said in (None, (0, 0), (1e300, 16), ("inf", 16)):
        shutil.rmtree(root, ignore_errors=True)
        write_voc(root, [("cat", 3, 3, 1e99, 8)], said=said)
        data = load(root)
        assert boxes_of(data.train) == [[[2, 2, 20, 8]]]
        assert len(notes_about(data, "partly outside the image, cut")) == 1


def test_padding_and_difficult_objects(root):
    write_voc(root, [("dog", 1, 1, 4, 4, 1), ("cat", 1, 1, 5, 5, 0), ("cat", 1, 1, 6, 6)])
    data = load(root)
    assert data.train["difficult"].tolist() == [[True, False, False]]
    assert data.train["crowd"].tolist() == [[False] * 3]
    assert data.train["box_label"].tolist() == [[1, 0, 0]]
    assert data.test["box_label"].tolist() == [[0, -1, -1]]
    assert data.test["boxes"].tolist() == [[[0, 0, 4, 4], [0] * 4, [0] * 4]]
    assert data.spec.fields["box_label"].names == ("cat", "dog")
    assert notes_about(data, "boxes, up to") == ["4 boxes, up to 3 an image: cat 3, dog 1"]


def test_classes_are_those_of_the_file_in_its_order(root):
    write_voc(root, [("dog", 1, 1, 4, 4), ("cat", 1, 1, 5, 5), ("cow", 1, 1, 6, 6)])
    assert load(root).spec.fields["box_label"].names == ("cat", "cow", "dog")
    (root / "classes.txt").write_text("dog\ncat\n\n")  # an older cache no longer holds
    data = load(root)
    assert data.spec.fields["box_label"].names == ("dog", "cat")
    assert data.train["box_label"].tolist() == [[0, 1]]
    assert notes_about(data, "cow") == ["1 box of the unknown class 'cow', left out: " + A_XML]
    (root / "classes.txt").write_text("cow\ndog\ncat\n")
    assert load(root).train["box_label"].tolist() == [[1, 2, 0]]


A_XML = str(Path("Annotations/a.xml"))


def test_an_image_without_objects_is_kept(root):
    write_voc(root, [])
    data = load(root)
    assert data.train["box_label"].tolist() == [[-1]]
    assert data.spec.num_train == 1


def test_a_letter_box_halves_the_boxes(root):
    write_voc(root, [("cat", 1, 1, 640, 480), ("cat", 101, 51, 300, 250)], (640, 480))
    data = load(root, size=320)
    assert data.spec.image_shape == (240, 320, 3)
    assert boxes_of(data.train) == [[[0, 0, 320, 240], [50, 25, 150, 125]]]


def test_rounded_sides_scale_boxes_as_the_image(root):
    write_voc(root, [("cat", 1, 1, 33, 20), ("cat", 12, 5, 22, 10)], (33, 20))
    data = load(root, size=16)  # 16 / 33 across, and 10 / 20 down
    assert data.spec.image_shape == (12, 16, 3)
    expected = [[0, 0, 16, 10], [11 * 16 / 33, 2, 22 * 16 / 33, 5]]
    np.testing.assert_allclose(data.train["boxes"][0], expected, rtol=1e-6)
    _, back = letterbox_image(encoded(picture((33, 20))), (12, 16, 3))
    np.testing.assert_allclose(back.matrix @ [16, 10, 1], [33, 20, 1])


def test_images_of_several_shapes_share_a_square_and_are_black_beside(root):
    write_voc(root, [("cat", 101, 51, 300, 250)], (640, 480))
    add_voc(root, "b", [("cat", 1, 1, 480, 640)], (480, 640), (480, 640), seed=3)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    data = load(root, size=320)
    assert data.spec.image_shape == (320, 320, 3)
    assert boxes_of(data.train) == [[[50, 25, 150, 125]], [[0, 0, 240, 320]]]
    wide, high = data.train["image"]
    assert not wide[240:].any()
    assert not high[:, 240:].any()
    half = picture((640, 480)).resize((320, 240), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(wide[:240], half)
    half = picture((480, 640), 3).resize((240, 320), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(high[:, :240], half)


def test_without_a_size_no_pixel_is_resampled(root):
    write_voc(root, [("cat", 2, 3, 17, 13)], (17, 13))
    data = load(root)
    assert data.spec.image_shape == (16, 20, 3)
    assert boxes_of(data.train) == [[[1, 2, 17, 13]]]
    np.testing.assert_array_equal(data.train["image"][0, :13, :17], picture((17, 13)))
    assert not data.train["image"][0, 13:].any()
    assert not data.train["image"][0, :, 17:].any()
    image, back = letterbox_image(encoded(picture((17, 13))), (16, 20, 3))
    np.testing.assert_array_equal(image, data.train["image"][0])
    np.testing.assert_array_equal(back.matrix, np.eye(3))
    assert back.size == (13, 17)


def test_a_small_image_is_enlarged_to_the_size_and_points_come_back(root):
    write_voc(root, [("cat", 1, 1, 10, 4)], (20, 8))
    data = load(root, size=40)
    assert data.spec.image_shape == (16, 40, 3)
    assert boxes_of(data.train) == [[[0, 0, 20, 8]]]
    _, back = letterbox_image(encoded(picture((20, 8))), (16, 40, 3))
    np.testing.assert_array_equal(back.matrix @ [20, 8, 1], [10, 4, 1])


@pytest.mark.parametrize("size", [0, 12])
def test_images_decoded_when_needed_are_the_same(root, size):
    write_voc(root, [("cat", 3, 3, 8, 8)], (20, 16))
    add_voc(root, "b", [("cat", 1, 1, 16, 20)], (16, 20), (16, 20), seed=3)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    once, always = (load(root, decode=how, size=size) for how in ("once", "always"))
    assert isinstance(always.train["image"], Encoded)
    for name in once.spec.fields:
        np.testing.assert_array_equal(once.train[name], np.asarray(always.train[name]))
    again = load(root, decode="always", size=size)  # from the cache
    np.testing.assert_array_equal(once.train["boxes"], again.train["boxes"])


# ---- EXIF rotations


def marked(orientation: int) -> tuple[bytes, Image.Image]:
    """Returns a JPEG file of 20x16 with this orientation, white at [2, 10) x [1, 5) of it."""
    pixels = np.zeros((16, 20, 3), np.uint8)
    pixels[1:5, 2:10] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=100, subsampling=0, exif=exif)
    return file.getvalue(), decode_image(file.getvalue(), 3)


def white(image) -> list[int]:
    """Returns the box around what is white."""
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 128)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_the_unturned_size_turn_with_the_image(root, orientation):
    data, shown = marked(orientation)
    assert shown.size == (16, 20)
    turned = white(shown)
    for given, said in (([2, 1, 10, 5], (20, 16)), (turned, (16, 20))):
        shutil.rmtree(root, ignore_errors=True)
        corners = given[0] + 1, given[1] + 1, *given[2:]
        write_voc(root, [("cat", *corners), ("cat", 1, 1, 3, 1)], said=said)
        (root / "JPEGImages/a.png").unlink()
        (root / "JPEGImages/a.jpg").write_bytes(data)
        for decode in ("once", "always"):
            found = load(root, decode=decode)
            assert boxes_of(found.train) == [[turned]]
            image = np.asarray(found.train["image"])[0]
            assert white(image) == turned


def test_padding_does_not_turn():
    boxes = np.float32([[2, 4, 10, 12], [0, 0, 0, 0]])
    assert turn_boxes(boxes, (16, 20), 6).tolist() == [[4, 2, 12, 10], [0, 0, 0, 0]]
    assert turn_boxes(boxes, (16, 20), 8).tolist() == [[4, 10, 12, 18], [0, 0, 0, 0]]


def test_an_annotation_of_another_size_leaves_its_image_out(root):
    write_voc(root)
    add_voc(root, "b", [("cat", 1, 1, 5, 5)], said=(20, 17))
    add_voc(root, "c", [("cat", 1, 1, 5, 5)], said=(16, 20))  # turned, but the image has no EXIF
    (root / "ImageSets/Main/train.txt").write_text("a\nb\nc\nd\n")
    (root / "Annotations/d.xml").write_text(xml_of([("cat", 1, 1, 5, 5)], (21, 16)))
    (root / "JPEGImages/d.jpg").write_bytes(marked(6)[0])
    data = load(root)
    assert data.spec.num_train == 1
    (note,) = notes_about(data, "not to be decoded")
    assert note.startswith("3 images left out")
    assert "d.jpg (its annotation is of 21x16 pixels, and it has 16x20)" in note
    assert "b.png (its annotation is of 20x17 pixels, and it has 20x16)" in note
    assert "c.png (its annotation is of 16x20 pixels, and it has 20x16)" in note


# ---- splits of VOC


def write_sets(root, part, **sets) -> None:
    """Writes an image for each name in the sets, such as train="ab"."""
    write_voc(root / part, sets={name: list(lines) for name, lines in sets.items()})
    for i, name in enumerate(sorted(set("".join(sets.values())))):
        add_voc(root / part, name, [("cat", 1, 1, i + 2, 9)], seed=ord(name) + len(part))


def test_splits_are_those_of_image_sets(root):
    write_sets(root, "", train="ab", val="c", trainval="abc", test="defg")
    joined = list_voc(root, True)
    assert joined.split.tolist() == ["train"] * 3 + ["test"] * 4
    apart = list_voc(root, False)
    assert apart.split.tolist() == ["train", "train", "val"] + ["test"] * 4
    assert apart.split_file is joined.split_file is None
    assert apart.identity != joined.identity
    data = load(root)
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (3, 0, 4)
    data = load(root, num_val=-1)
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (2, 1, 4)
    assert boxes_of(data.val) == [[[0, 0, 4, 9]]]
    data = load(root, val_fraction=0.5)
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (2, 1, 4)


@pytest.mark.parametrize("join_val", [True, False])
def test_val_is_test_where_voc_has_no_test(root, join_val):
    write_sets(root, "", train="ab", val="cd", trainval="abcd")
    listing = list_voc(root, join_val)
    assert listing.split.tolist() == ["train", "train", "test", "test"]
    assert any("the val images are test" in note for note in listing.notes)


def test_several_folders_are_one_data_set(root):
    write_sets(root, "VOC2007", train="ab", val="c", trainval="abc", test="d")
    write_sets(root, "VOC2012", train="ef", val="a", trainval="efa")
    paths = [f"VOC2007/JPEGImages/{x}.png" for x in "abcd"]
    paths += [f"VOC2012/JPEGImages/{x}.png" for x in "aef"]
    listing = list_voc(root, False)
    assert [listing.source.name(i) for i in range(7)] == paths
    assert listing.split.tolist() == ["train"] * 2 + ["val", "test", "val"] + ["train"] * 2
    joined = list_voc(root, True)
    assert joined.split.tolist() == ["train"] * 3 + ["test"] + ["train"] * 3
    assert load(root).spec.num_train == 6


@pytest.mark.parametrize("sets", ["none", "train alone"])
def test_a_fifth_becomes_test_where_no_file_names_one_and_is_kept(root, sets):
    write_sets(root, "", train="abcdefghij")
    (root / "Annotations/z.xml").unlink()
    (root / "JPEGImages/z.png").unlink()
    if sets == "none":
        shutil.rmtree(root / "ImageSets")
    data = load(root)
    assert (data.spec.num_train, data.spec.num_test) == (8, 2)
    lines = (root / "cv_jax_split.csv").read_text().splitlines()
    assert len(lines) == 11
    tests = {line.split(",")[0] for line in lines if line.endswith(",test")}
    for i in range(5):
        add_voc(root, f"0{i}", [("cat", 1, 1, 9, 9)], seed=50 + i)
    if sets != "none":
        (root / "ImageSets/Main/train.txt").write_text("\n".join([*"abcdefghij", "00", "01"]))
    load(root)
    lines = (root / "cv_jax_split.csv").read_text().splitlines()
    assert tests <= {line.split(",")[0] for line in lines if line.endswith(",test")}


def test_names_with_spaces_and_files_of_a_mac(root):
    write_voc(root, sets={"train": ["image 1"], "test": ["z"]})
    add_voc(root, "image 1", [("cat", 1, 1, 9, 9)])
    (root / "Annotations/._a.xml").write_bytes(b"\0\5\x16\7")
    (root / "JPEGImages/._a.png").write_bytes(b"\0\5\x16\7")
    assert boxes_of(load(root).train) == [[[0, 0, 9, 9]]]
    shutil.rmtree(root / "ImageSets")
    listing = list_voc(root, True)
    assert listing.split.tolist() == ["", "", ""]
    assert len(listing.notes) == 1  # nothing is left out


# ---- COCO


def coco_of(images, annotations, categories=((7, "dog"), (2, "cat"))) -> dict:
    """Returns the content of a file: images (id, file_name), annotations (image, category, bbox)"""
    keys = "image_id", "category_id", "bbox", "iscrowd"
    return {
        "images": [
            {"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for i, name in images
        ],
        "annotations": [
            {"id": i, **dict(zip(keys, one, strict=False))} for i, one in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }


TRAIN = coco_of(
    [(30, "a.png"), (4, "b.png"), (11, "c.png")],
    [(4, 7, [1.5, 2, 3, 4]), (30, 2, [0, 0, 20, 16], 1), (4, 2, [5, 6, 10, 10], 0)],
)
TEST = coco_of([(1, "d.png")], [(1, 7, [2, 2, 4, 4])])


def write_images(folder, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        picture(seed=ord(name)).save(folder / f"{name}.png")


def write_json(file, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def write_coco(root, train=TRAIN, test=TEST, second="val2017", images="") -> Path:
    write_json(root / "annotations/instances_train2017.json", train)
    write_json(root / f"annotations/instances_{second}.json", test)
    write_images(root / images / "train2017", "abc")
    write_images(root / images / second, "d")
    return root


def check_coco(data) -> None:
    assert data.spec.fields["box_label"].names == ("cat", "dog")  # in the order of their ids
    assert boxes_of(data.train) == [[[0, 0, 20, 16]], [[1.5, 2, 4.5, 6], [5, 6, 15, 16]], []]
    assert data.train["box_label"].tolist() == [[0, -1], [1, 0], [-1, -1]]
    assert data.train["crowd"].tolist() == [[True, False], [False, False], [False, False]]
    assert not data.train["difficult"].any()
    assert boxes_of(data.test) == [[[2, 2, 6, 6]]]
    assert data.test["box_label"].tolist() == [[1, -1]]
    for pixels, name in zip(np.asarray(data.train["image"]), "abc", strict=True):
        np.testing.assert_array_equal(pixels, picture(seed=ord(name)))
    np.testing.assert_array_equal(np.asarray(data.test["image"])[0], picture(seed=ord("d")))


@pytest.mark.parametrize("decode", ["once", "always"])
@pytest.mark.parametrize("images", ["", "images"])
def test_coco_own_layout(root, images, decode):
    data = load(write_coco(root, images=images), "coco", decode=decode)
    check_coco(data)
    assert len(notes_about(data, "the val images are test")) == 1


def test_coco_images_in_one_folder_and_a_test_of_ones_own(root):
    write_coco(root, second="test")
    (root / "images").mkdir()
    for file in [*root.glob("t*/*.png")]:
        file.rename(root / "images" / file.name)
    write_json(root / "annotations/instances_val.json", coco_of([(5, "c.png")], []))
    data = load(root, "coco", num_val=-1)
    check_coco(data)
    np.testing.assert_array_equal(data.val["image"][0], picture(seed=ord("c")))
    assert not notes_about(data, "the val images are test")


@pytest.mark.parametrize("valid", ["valid", "val", "test"])
def test_coco_as_roboflow_exports_it(root, valid):
    for folder, content, names in (("train", TRAIN, "abc"), (valid, TEST, "d")):
        write_json(root / folder / "_annotations.coco.json", content)
        write_images(root / folder, names)
    check_coco(load(root, "coco"))


@pytest.mark.parametrize("folder", ["", "images"])
def test_coco_one_file_whose_test_is_chosen(root, folder):
    names = [(i, f"{chr(97 + i)}.png") for i in range(10)]
    annotations = [(i, 2, [i, 0, 1, 1]) for i in range(10)]
    write_images(root / folder, "abcdefghij")
    one = write_json(root / "one.json", coco_of(names, annotations))
    other = write_json(root / "other.json", coco_of(names[:5], annotations[:5]))
    data = load(one, "coco")
    assert (data.spec.num_train, data.spec.num_test) == (8, 2)
    kept = (root / "one.split.csv").read_text()
    for split in ("train", "test"):
        found = boxes_of(getattr(data, split))
        tests = [line.partition(",")[0][-5] for line in kept.split() if line.endswith(split)]
        assert found == [[[ord(x) - 97, 0, ord(x) - 96, 1]] for x in tests]
    assert load(other, "coco").spec.num_train == 4
    assert (root / "one.split.csv").read_text() == kept
    assert (root / "other.split.csv").exists()


def test_coco_a_changed_file_counts_though_the_images_are_in_the_cache(root):
    check_coco(load(write_coco(root), "coco"))
    changed = coco_of([(1, "d.png")], [(1, 2, [2, 2, 5, 5])])
    write_json(root / "annotations/instances_val2017.json", changed)
    assert boxes_of(load(root, "coco").test) == [[[2, 2, 7, 7]]]


def test_coco_ids_may_be_texts_and_sizes_may_be_missing(root):
    train = json.loads(json.dumps(TRAIN))
    for row in train["images"]:
        row["id"] = f"image {row['id']}"
        del row["width"], row["height"]
    for row in train["annotations"]:
        row["image_id"] = f"image {row['image_id']}"
        row["iscrowd"] = bool(row.get("iscrowd"))
    check_coco(load(write_coco(root, train), "coco"))


def test_coco_categories_of_one_name_are_one_class(root):
    train = {**TRAIN, "categories": [{"id": i, "name": "cat"} for i in (2, 7)]}
    data = load(write_coco(root, train), "coco")
    assert data.spec.fields["box_label"].names == ("cat", "dog")
    assert data.train["box_label"].tolist() == [[0, -1], [0, 0], [-1, -1]]
    assert data.test["box_label"].tolist() == [[1, -1]]


# ---- TFDS


def prepare_objects(root, flag="is_difficult", **splits) -> Path:
    """Prepares "tiny"; each split is a list of images, an image a list of (box, class, flag)."""
    of_one = {
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(names=["dog", "cat"]),
        flag: np.bool_,
    }
    features = {
        "image": tfds.features.Image(encoding_format="png"),
        "objects": tfds.features.Sequence(of_one),
        "labels": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=2)),
    }
    examples, seed = {}, 0
    for name, images in splits.items():
        examples[name] = []
        for objects in images:
            file = BytesIO(encoded(picture(seed=seed)))
            rows = [
                {"bbox": tfds.features.BBox(*map(float, box)), "label": label, flag: set_}
                for box, label, set_ in objects
            ]
            examples[name].append({"image": file, "objects": rows, "labels": []})
            seed += 1
    root.mkdir(parents=True, exist_ok=True)
    return Path(prepare_tiny(root, features, examples))


WHOLE = (0, 0, 1, 1)
PART = (0.25, 0.1, 0.5, 0.35)  # ymin, xmin, ymax, xmax: 2 to 7 of 20 pixels, 4 to 8 of 16


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_objects_of_tfds(root, file_format):
    train = [[(PART, 1, True), (WHOLE, 0, False)], []]
    directory = prepare_objects(
        root, train=train, validation=[[(PART, 0, False)]], test=[[(WHOLE, 1, False)]]
    )
    if file_format == "tfrecord":
        to_tfrecord(directory)
    for settings in ({}, {"decode": "always"}):
        data = load(root, "tiny", num_val=-1, **settings)
        assert boxes_of(data.train) == [[[2, 4, 7, 8], [0, 0, 20, 16]], []]
        assert data.train["box_label"].tolist() == [[1, 0], [-1, -1]]
        assert data.train["difficult"].tolist() == [[True, False], [False, False]]
        assert not data.train["crowd"].any()
        assert boxes_of(data.val) == [[[2, 4, 7, 8]]]
        assert data.val["box_label"].tolist() == [[0, -1]]
        assert boxes_of(data.test) == [[[0, 0, 20, 16]]]
        assert data.spec.fields["box_label"].names == ("dog", "cat")
        images = np.concatenate([np.asarray(x["image"]) for x in (data.train, data.val, data.test)])
        for seed, image in enumerate(images):
            np.testing.assert_array_equal(image, picture(seed=seed))
    half = load(root, "tiny", num_val=-1, size=10)
    assert half.spec.image_shape == (8, 12, 3)
    assert boxes_of(half.train)[0] == [[1, 2, 3.5, 4], [0, 0, 10, 8]]
    assert "tensorflow" not in sys.modules


def test_validation_of_tfds_is_test_where_test_has_no_boxes(root):
    prepare_objects(
        root,
        "is_crowd",
        train=[[(PART, 1, True), (WHOLE, 0, False)]],
        validation=[[(PART, 0, False)]],
        test=[[], []],
    )
    for _ in range(2):  # the second time from the cache
        data = load(root, "tiny")
        assert boxes_of(data.test) == [[[2, 4, 7, 8]]]
        assert data.train["crowd"].tolist() == [[True, False]]
        assert data.spec.num_test == 1
        assert len(notes_about(data, "the val images are test")) == 1
        np.testing.assert_array_equal(data.test["image"][0], picture(seed=1))


def test_mistakes_in_objects_of_tfds_are_said(root):
    prepare_objects(root / "none", train=[[]], test=[[]])
    with pytest.raises(UserError, match="has no boxes to learn from"):
        load(root / "none", "tiny")
    train = [[((0.5, 0.5, 0.5, 0.75), 1, False), (PART, -1, False), (PART, 0, False)]]
    directory = prepare_objects(root, train=train, test=[[(WHOLE, 1, False)]])
    data = load(root, "tiny")
    assert boxes_of(data.train) == [[[2, 4, 7, 8]]]
    (note,) = notes_about(data, "without area")
    assert note == "1 box without area, left out: tiny/1.0.0, split train, record 0"
    assert len(notes_about(data, "without the name of a class")) == 1
    to_tfrecord(directory)
    file = sorted(directory.glob("*train*"))[0]
    content = file.read_bytes()
    for damage, reason in ((content[:-1], "cut off"), (b"", "train, record 0 is missing")):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=reason):
            load(root, "tiny")


# ---- one mistake each: an error of one sentence or two, or a note, and nothing else


def text_file(name, content):
    def write(root):
        data = content if isinstance(content, bytes) else content.encode()
        (root / name).write_bytes(data)

    return write


def xml_file(content):
    return text_file("Annotations/a.xml", content)


def set_file(content, name="train"):
    return text_file(f"ImageSets/Main/{name}.txt", content)


def remove(*names):
    def run(root):
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return run


def directory_for_image(root):
    (root / "JPEGImages/a.png").unlink()
    (root / "JPEGImages/a.png").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("Annotations"), "data' has no folder Annotations"),
        (remove("JPEGImages"), "data has no folder JPEGImages: put the images there"),
        (remove("Annotations/a.xml", "Annotations/z.xml"), "2 images whose annotation is missing"),
        (remove("JPEGImages/a.png", "JPEGImages/z.png"), "2 annotations whose image is missing"),
        (xml_file("<annotation><object>"), r"a\.xml cannot be read \(no element found"),
        (xml_file(""), r"a\.xml cannot be read \(no element found"),
        (xml_file(b"\x89PNG\r\n\0"), r"a\.xml cannot be read \(not well-formed"),
        (xml_file("<?xml version='1.0' encoding='gbk'?><annotation/>"), r"a\.xml cannot be read"),
        (xml_file("<?xml version='1.0' encoding='no'?><annotation/>"), r"a\.xml cannot be read"),
        (xml_file("<html><body/></html>"), r"a\.xml has the element <html> and no <annotation>"),
        (set_file(b"\xff\xfe\0"), r"train\.txt cannot be read"),
        (set_file("a\nz\n"), r"test\.txt names 'z', which is in train already"),
        (set_file("a\n", "test"), r"test\.txt names 'a', which is in train already"),
        (set_file("", "train"), "data' has no images with annotations in the split 'train'"),
        (set_file("a.png\n"), r"'train'\. 1 image whose annotation is missing.*/a\.png\.xml"),
        (text_file("classes.txt", "cat\ncat\n"), r"classes\.txt names a class twice"),
        (text_file("classes.txt", "\n"), r"classes\.txt names no class"),
        (text_file("classes.txt", b"\xff\xfe"), r"classes\.txt cannot be read"),
        (text_file("classes.txt", "cow\n"), "no boxes to learn from .*2 boxes of the unknown cla"),
        (text_file("JPEGImages/a.jpg", ""), r"JPEGImages has a\.jpg and a\.png: keep one"),
        (text_file("JPEGImages/a.png", "no"), "no images in the split 'train', and 1 images cann"),
        (directory_for_image, "no images in the split 'train', and 1 images cann"),
    ],
)
def test_a_mistake_in_a_voc_data_set_is_said(root, damage, message):
    damage(write_voc(root))
    with pytest.raises(UserError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (
            remove("JPEGImages/b.png"),
            "1 annotation whose image is missing, left out: Annotations/b.xml",
        ),
        (
            remove("Annotations/b.xml"),
            "1 image whose annotation is missing, left out: Annotations/b.xml",
        ),
        (
            set_file("a\nb c\n"),
            "1 image whose annotation is missing, left out: Annotations/b c.xml",
        ),
        (text_file("JPEGImages/b.png", "no"), r"JPEGImages/b.png (it is not an image"),
        (text_file("Annotations/b.xml", xml_of([("", 1, 1, 4, 4)])), "1 box without the name of a"),
        (
            text_file("Annotations/b.xml", xml_of([(" ", 1, 1, 4, 4)])),
            "a class, left out: Annotati",
        ),
        (text_file("Annotations/b.xml", "<annotation><object/></annotation>"), "Annotations/b.xml"),
    ],
)
def test_a_mistake_in_one_image_of_a_voc_data_set_is_noted(root, damage, note):
    write_voc(root)
    add_voc(root, "b", [("cat", 2, 2, 9, 9)], seed=2)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    damage(root)
    data = load(root)
    assert boxes_of(data.train)[0] == [[2, 2, 8, 8]]
    assert len(notes_about(data, note)) == 1


def test_without_sets_an_image_without_annotation_is_noted(root):
    write_voc(root)
    add_voc(root, "b", [("cat", 2, 2, 9, 9)], seed=2)
    shutil.rmtree(root / "ImageSets")
    (root / "Annotations/b.xml").unlink()
    (note,) = [note for note in list_voc(root, True).notes if "is missing" in note]
    assert note == "data    1 image whose annotation is missing, left out: Annotations/b.xml"


def test_a_file_is_no_voc_data_set_and_images_with_boxes_are_not_cropped(root):
    write_voc(root)
    with pytest.raises(UserError, match=r"a\.xml' is a file: name VOC's directory"):
        load(root / "Annotations/a.xml")
    with pytest.raises(UserError, match=r"data\.eval_crop=0\.5 would cut boxes off"):
        load(root, eval_crop=0.5)


def with_row(key, index=0, **values):
    """Returns TRAIN with other values in a row; None removes a value."""
    content = json.loads(json.dumps(TRAIN))
    row = {**content[key][index], **values}
    content[key][index] = {name: value for name, value in row.items() if value is not None}
    return content


def without(key):
    return {name: rows for name, rows in TRAIN.items() if name != key}


JSON = r"instances_train2017\.json"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("", f"{JSON} cannot be read as JSON"),
        ('{"images": [', f"{JSON} cannot be read as JSON"),
        ("[" * 100_000, f"{JSON} cannot be read as JSON"),
        ("[]", f"{JSON} holds no JSON object"),
        (without("images"), f"{JSON} has no 'images', so it is not in COCO's format"),
        (without("annotations"), f"{JSON} has no 'annotations', so it is not in COCO's format"),
        (without("categories"), f"{JSON} has no 'categories', so it is not in COCO's format"),
        ({**TRAIN, "images": {}}, f"{JSON}: 'images' is {{}}, and must be a list"),
        ({**TRAIN, "annotations": [3]}, rf"{JSON}: annotations\[0\] is 3, and must be an object"),
        (
            {**TRAIN, "images": []},
            "'train'. 3 annotations of an unknown image_id, left out: 4 in annotatio",
        ),
        (with_row("images", id=None), rf"{JSON} has no images\[0\]\['id'\]"),
        (with_row("images", id=[1]), rf"{JSON}: images\[0\]\['id'\] is \[1\], and must be a numb"),
        (with_row("images", id=4), rf"{JSON}: images\[1\]\['id'\] is 4, as one before it"),
        (with_row("images", file_name=None), rf"{JSON} has no images\[0\]\['file_name'\]"),
        (with_row("images", file_name=5), rf"{JSON}: images\[0\]\['file_name'\] is 5, and must"),
        (with_row("images", width="20"), rf"{JSON}: images\[0\]\['width'\] is '20', and must be"),
        (with_row("annotations", image_id=None), rf"{JSON} has no annotations\[0\]\['image_id'\]"),
        (with_row("annotations", category_id=None), rf"{JSON} has no annotations\[0\]\['category"),
        (with_row("annotations", category_id="7"), r"annotations\[0\]\['category_id'\] is '7'"),
        (with_row("annotations", bbox=None), rf"{JSON} has no annotations\[0\]\['bbox'\]"),
        (with_row("annotations", bbox=[]), rf"{JSON}: annotations\[0\]\['bbox'\] is \[\], and mus"),
        (with_row("annotations", bbox=[1, 2, 3]), r"bbox'\] is \[1, 2, 3\], and must be 4 numb"),
        (with_row("annotations", bbox=[1, 2, 3, "4"]), rf"{JSON}: annotations\[0\]\['bbox'\] is"),
        (with_row("annotations", bbox="1 2 3 4"), rf"{JSON}: annotations\[0\]\['bbox'\] is '1 2"),
        (with_row("annotations", iscrowd="no"), rf"{JSON}: annotations\[0\]\['iscrowd'\] is 'no'"),
        (with_row("categories", name=None), rf"{JSON} has no categories\[0\]\['name'\]"),
        (with_row("categories", name=" "), rf"{JSON}: categories\[0\]\['name'\] is empty"),
        (with_row("categories", id=2), rf"{JSON}: categories\[1\]\['id'\] is 2, as one before it"),
        (with_row("categories", id="7"), rf"{JSON}: categories\[0\]\['id'\] is '7', and must be"),
    ],
)
def test_a_mistake_in_a_coco_file_is_said(root, train, message):
    write_coco(root, train)
    with pytest.raises(UserError, match=message) as error:
        load(root, "coco")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("train", "note", "boxes"),
    [
        (
            with_row("images", 2, file_name="x.png"),
            "1 image whose file is missing, left out: x.png",
            3,
        ),
        (
            with_row("images", 2, file_name=""),
            "1 image whose file is missing, left out:  of annot",
            3,
        ),
        (with_row("images", 2, file_name="a\0"), "1 image whose file is missing, left out: a", 3),
        (
            with_row("images", 2, file_name="a" * 999),
            "1 image whose file is missing, left out: a",
            3,
        ),
        (with_row("images", 2, file_name="\ud800"), "1 image whose file is missing, left out: ", 3),
        (
            with_row("images", 2, width=21),
            "c.png (its annotation is of 21x16 pixels, and it has",
            3,
        ),
        (
            with_row("annotations", image_id=5),
            "1 annotation of an unknown image_id, left out: 5",
            2,
        ),
        (
            with_row("annotations", image_id="4"),
            "of an unknown image_id, left out: '4' in annot",
            2,
        ),
        (with_row("annotations", category_id=1), "unknown category_id, left out: 1 in annotati", 2),
        (
            with_row("annotations", bbox=[1, 2, 0, 4]),
            "1 box without area, left out: train2017/b",
            2,
        ),
        (
            with_row("annotations", bbox=[20, 2, 5, 4]),
            "1 box outside the image, left out: train",
            2,
        ),
        (
            with_row("annotations", bbox=[4, 2, -3, 4]),
            "1 box with exchanged corners, put in ord",
            3,
        ),
        (
            with_row("annotations", bbox=[15, 2, 9, 4]),
            "1 box partly outside the image, cut: tra",
            3,
        ),
        (
            with_row("annotations", bbox=[1, 2, 1e999, 4]),
            "1 box with corners that are not numbers",
            2,
        ),
        (
            with_row("annotations", bbox=[1, 2, 10**400, 4]),
            "1 box with corners that are not numb",
            2,
        ),
    ],
)
def test_a_mistake_in_one_row_of_a_coco_file_is_noted(root, train, note, boxes):
    data = load(write_coco(root, train), "coco")
    assert len(notes_about(data, note)) == 1
    assert sum(map(len, boxes_of(data.train))) == boxes


def test_a_directory_without_coco_files_is_said(root):
    root.mkdir()
    with pytest.raises(UserError, match=r"neither annotations/instances_train\*\.json nor train/_"):
        load(root, "coco")
    write_json(root / "valid/_annotations.coco.json", TEST)
    with pytest.raises(UserError, match=r"has valid/_annotations\.coco\.json, but no such file of"):
        load(root, "coco")
    write_json(root / "train/_annotations.coco.json", TRAIN)
    write_json(root / "val/_annotations.coco.json", TRAIN)
    with pytest.raises(UserError, match=r"val/_ann.* and .*valid/_ann.* are both of the split"):
        load(root, "coco")
    (root / "val/_annotations.coco.json").unlink()
    with pytest.raises(
        UserError,
        match=r"annotations\. 3 images whose file is missing.* 1 image whose",
    ):
        load(root, "coco")
    write_coco(root)
    write_json(root / "annotations/instances_train2014.json", TRAIN)
    with pytest.raises(UserError, match=r"train2014\.json and .*train2017\.json are both of the"):
        load(root, "coco")
    with pytest.raises(UserError, match=r"needs config\.data\.dir: a JSON file"):
        load("", "coco")
    with pytest.raises(UserError, match=r"d\.png cannot be read as JSON"):
        load(root / "val2017/d.png", "coco")
