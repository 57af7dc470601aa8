"""Images of one's own: class folders, CSV files, and what is wrong in them."""

import csv
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.data.encoded import Encoded

pytestmark = pytest.mark.usefixtures("own_cache")


def picture(seed: int, size=(6, 8), mode="RGB") -> Image.Image:
    """Returns an image (width, height) of random pixels."""
    rng = np.random.default_rng(seed)
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    return Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_folder(root, split_counts, size=(8, 8), mode="RGB", start=0) -> dict[str, np.ndarray]:
    """Writes {"train/cat": 3, ...} PNG files; returns {path: pixels}."""
    written = {}
    for folder, count in split_counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            image = picture(start + len(written), size, mode)
            image.save(root / folder / f"{i:03d}.png")
            written[f"{folder}/{i:03d}.png"] = np.asarray(image).reshape(size[1], size[0], -1)
    return written


def load(directory, **settings):
    config = base_config()
    config.data.update({"name": "folder", "dir": str(directory), **settings})
    return load_dataset(config.data)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "images"


@pytest.mark.parametrize("decode", ["auto", "always"])
def test_folders_of_splits_and_classes(root, decode):
    counts = {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test/cat": 1}
    written = write_folder(root, {**counts, "test/dog": 2})
    data = load(root, decode=decode, num_val=-1)
    assert data.spec.class_names == ("cat", "dog")
    assert (data.spec.num_train, data.spec.num_val, data.spec.num_test) == (5, 2, 3)
    for split in ("train", "val", "test"):
        examples = getattr(data, split)
        paths = [path for path in written if path.startswith(split)]
        paths.sort(key=lambda path: (path.rpartition("/")[2], path))
        expected = np.stack([written[path] for path in paths])
        np.testing.assert_array_equal(np.asarray(examples["image"]), expected)
        assert examples["label"].tolist() == [int("/dog/" in path) for path in paths]
        assert isinstance(examples["image"], Encoded) == (decode == "always")
    pixels = np.stack([written[path] for path in written if path.startswith("train")]) / 255
    np.testing.assert_allclose(data.spec.fields["image"].mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(data.spec.fields["image"].std, pixels.std((0, 1, 2)), rtol=1e-5)
    assert "data    images by class: cat 5, dog 5" in data.notes


def test_val_is_test_where_there_is_no_test(root):
    write_folder(root, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    data = load(root)
    assert data.spec.num_test == 2
    assert any("the val images are test" in note for note in data.notes)
    with pytest.raises(UserError, match="has none besides test"):
        load(root, num_val=-1)


@pytest.mark.parametrize("decode", ["auto", "always"])
def test_a_second_start_finds_the_same_and_reads_no_image(root, decode, monkeypatch):
    write_folder(root, {"cat": 10, "dog": 10})
    (root / "cat/broken.png").write_bytes(b"no image")
    first = load(root, decode=decode, num_val=3)
    monkeypatch.setattr("cv_jax.data.sources.photos._read", lambda *_: pytest.fail("reads"))
    second = load(root, decode=decode, num_val=3)
    assert first.notes == second.notes
    for split in ("train", "val", "test"):
        for name, x in getattr(first, split).items():
            np.testing.assert_array_equal(np.asarray(x), np.asarray(getattr(second, split)[name]))


def test_a_chosen_test_is_a_fifth_of_each_class_and_stays_when_images_come(root):
    write_folder(root, {"cat": 20, "dog": 10})
    before = load(root)
    assert np.bincount(before.test["label"]).tolist() == [4, 2]
    with (root / "cv_jax_split.csv").open() as lines:
        split = {row["path"]: row["split"] for row in csv.DictReader(lines)}
    assert len(split) == 30
    # New files come before the others by name; without the file of splits the choice would move.
    for i in range(10):
        picture(100 + i, (8, 8)).save(root / "cat" / f"0{i}.png")
    after = load(root)
    assert np.bincount(after.test["label"]).tolist() == [6, 2]
    kept = {image.tobytes() for image in before.test["image"]}
    assert kept <= {image.tobytes() for image in after.test["image"]}


def test_a_corrected_file_of_splits_counts_though_the_images_are_in_the_cache(root):
    write_folder(root, {"cat": 10, "dog": 10})
    assert load(root).spec.num_test == 4
    file = root / "cv_jax_split.csv"
    file.write_text(file.read_text().replace("cat/000.png,train", "cat/000.png,test"))
    assert load(root).spec.num_test == 5


def test_an_image_that_may_be_read_later_is_read_then(root, monkeypatch):
    written = write_folder(root, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    closed = root / next(iter(written))
    monkeypatch.setattr(
        "cv_jax.data.encoded.read_bytes",
        lambda path: _denied() if path == str(closed) and mode == 0 else Path(path).read_bytes(),
    )
    for mode, count in ((0, 3), (0o644, 4)):
        closed.chmod(mode)
        assert load(root).spec.num_train == count


def _denied():
    raise UserError("Permission denied")


def test_split_folders_in_capitals_are_split_folders_and_what_is_beside_is_named(root):
    write_folder(root, {"Train/a": 2, "Train/b": 2, "TEST/a": 1, "TEST/b": 1, "more/c": 1})
    data = load(root)
    assert data.spec.class_names == ("a", "b")
    assert (data.spec.num_train, data.spec.num_test) == (4, 2)
    assert "data    only TEST and Train are read; not read is: more" in data.notes


def test_a_link_to_a_folder_above_is_followed_once(root):
    write_folder(root, {"cat/deep": 5, "dog": 5})
    os.symlink("..", root / "cat/deep/loop")
    data = load(root)
    assert data.spec.num_train + data.spec.num_test == 10


def test_names_that_are_no_utf_8_are_read_and_kept(root):
    write_folder(root, {"cat": 5, "dog": 5})
    for name in (b"\xff1.png", b"\xff2.png"):
        picture(50, (8, 8)).save(root / "cat/new.png")
        os.rename(root / "cat/new.png", os.fsencode(root / "cat") + b"/" + name)
    before = load(root)
    picture(51, (8, 8)).save(root / "cat/more.png")
    after = load(root)
    assert (before.spec.num_train, before.spec.num_test) == (10, 2)
    assert after.spec.num_train + after.spec.num_test == 13
    "\n".join(after.notes).encode()


def test_a_directory_is_asked_for_and_has_to_exist(root):
    with pytest.raises(UserError, match=r"data\.name='folder' needs config\.data\.dir"):
        load("")
    with pytest.raises(UserError, match="does not exist: name the directory"):
        load(root)
    write_folder(root, {"cat": 5, "dog": 5})
    with pytest.raises(UserError, match=r"val_fraction=0\.99 leaves none of the 8"):
        load(root, val_fraction=0.99)


def test_a_directory_that_cannot_be_written_is_said(root, capsys, monkeypatch):
    write_folder(root, {"cat": 5, "dog": 5})
    (root / "cv_jax_split.csv").mkdir()  # nothing can be written or read there
    with pytest.raises(UserError, match=r"cv_jax_split\.csv is damaged"):
        load(root)


def test_grey_images_have_one_channel_and_colours_among_them_three(root):
    write_folder(root, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1}, mode="L")
    assert load(root).spec.image_shape == (8, 8, 1)
    picture(50, (8, 8)).save(root / "test/a/colour.png")
    assert load(root).spec.image_shape == (8, 8, 3)


def test_images_of_any_size_need_config_data_size(root):
    write_folder(root, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    picture(9, (20, 10)).save(root / "train/a/wide.png")
    with pytest.raises(UserError, match=r"000\.png has 8x8 .*wide\.png 10x20.*data\.size"):
        load(root)
    assert load(root, size=5).spec.image_shape == (5, 5, 3)


def test_what_is_wrong_is_named_and_counted_and_the_rest_is_read(root):
    write_folder(root, {"train/cat": 30, "train/dog": 30, "test/cat": 5, "test/dog": 5})
    whole = encoded(picture(1000, (64, 64)))
    (root / "train/cat/a_short.png").write_bytes(whole[: len(whole) // 2])
    (root / "train/cat/b_page.png").write_bytes(b"<html>404</html>")
    (root / "train/dog/c_empty.jpg").write_bytes(b"")
    os.symlink("nowhere", root / "train/dog/d_link.png")
    (root / "train/dog/e_folder.png").mkdir()
    (root / "train/dog/notes.txt").write_text("hello")
    (root / "train/bird").mkdir()
    (root / "test/dog/copy.png").write_bytes((root / "train/dog/001.png").read_bytes())
    (root / "train/cat/again.png").write_bytes((root / "train/cat/000.png").read_bytes())
    for decode in ("auto", "always"):
        data = load(root, size=8, decode=decode)
        assert (data.spec.num_train, data.spec.num_test) == (61, 11)
        notes = "\n".join(data.notes)
        assert "4 images left out" in notes
        assert "a_short.png (it is damaged" in notes
        assert "b_page.png (it is not an image" in notes
        assert "data    1 file is not an image: train/dog/notes.txt" in notes
        assert "data    1 class folder without images: train/bird" in notes
        assert "data    1 images of test are also in train" in notes
        assert "data    1 file of train is a copy of another: train/cat/000.png = " in notes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no images in class folders"),
        ({"cat/a.txt": b""}, "has no images"),
        ({"cat/a.png": encoded(picture(0))}, "only one class, 'cat'"),
        ({"a/a.png": b"1", "b/b.png": b"2"}, "None of the 2 images"),
        (
            {"train/a/1.png": b"", "val/a/1.png": b"", "valid/a/1.png": b""},
            "train and val and valid",
        ),
        ({"val/a/1.png": b"", "test/a/1.png": b""}, "split folders test and val, but no train"),
    ],
)
def test_a_folder_without_use_says_what_to_do(root, files, message):
    root.mkdir()
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(root)


def write_table(root, header, rows):
    file = root / "images.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([header, *rows])
    return file


def test_a_table_with_labels_splits_and_groups(root):
    written = list(write_folder(root, {"any": 6}))
    splits = ["train", "train", "train", "val", "test", "test"]
    rows = [
        [path, name, split, group]
        for path, name, split, group in zip(written, "bababa", splits, "xxyyzz", strict=True)
    ]
    file = write_table(root, ["path", "label", "split", "group"], rows)
    data = load(file, num_val=-1)
    assert data.spec.class_names == ("a", "b")
    assert data.train["label"].tolist() == [1, 0, 1]
    assert data.train["group"].tolist() == [0, 0, 1]
    assert data.spec.num_val == 1


def test_a_table_without_splits_holds_out_whole_groups(root):
    written = list(write_folder(root, {"any": 20}))
    rows = [[path, "ab"[i % 2], f"patient {i // 4}"] for i, path in enumerate(written)]
    data = load(write_table(root, ["path", "label", "group"], rows))
    assert set(data.test["group"]) & set(data.train["group"]) == set()
    assert data.spec.num_test == 4
    assert (root / "images.split.csv").exists()


def test_new_images_join_the_split_of_their_group(root):
    written = list(write_folder(root, {"any": 40}))
    rows = [[path, "ab"[i % 2], f"patient {i % 10}"] for i, path in enumerate(written)]
    header = ["path", "label", "group"]
    few = [row for row in rows[:20] if row[2] < "patient 6"]
    before = load(write_table(root, header, few))
    after = load(write_table(root, header, rows))
    assert set(after.test["group"]) & set(after.train["group"]) == set()
    assert set(before.test["group"]) <= set(after.test["group"])
    assert not any("two splits" in note for note in after.notes)
    rows = [[*row, "train" if i < 20 else "test"] for i, row in enumerate(rows)]
    divided = load(write_table(root, [*header, "split"], rows))
    assert "data    10 groups have images in two splits" in divided.notes
    rows = [[path, label, "all"] for path, label, *_ in rows]
    (root / "images.split.csv").unlink()
    with pytest.raises(UserError, match="too few groups"):
        load(write_table(root, header, rows))


def test_images_without_a_group_are_groups_of_their_own(root):
    written = list(write_folder(root, {"any": 20}))
    rows = [[path, "ab"[i % 2], "x" if i < 4 else ""] for i, path in enumerate(written)]
    data = load(write_table(root, ["path", "label", "group"], rows))
    groups = np.concatenate([data.train["group"], data.test["group"]])
    assert sorted(np.unique(groups, return_counts=True)[1]) == [1] * 16 + [4]


def test_a_table_of_train_alone_or_without_labels_has_a_chosen_test(root):
    written = list(write_folder(root, {"any": 10}))
    rows = [[path, " a" if i % 2 else "b ", "train"] for i, path in enumerate(written)]
    data = load(write_table(root, ["path", " label", "split"], rows))
    assert (data.spec.num_train, data.spec.num_test) == (8, 2)
    assert data.spec.class_names == ("a", "b")
    data = load(write_table(root, ["path"], [[path] for path in written]))
    assert (data.spec.num_train, data.spec.num_test) == (8, 2)
    assert list(data.spec.fields) == ["image"]


def test_a_table_with_several_labels_and_numbers(root):
    written = list(write_folder(root, {"any": 5}))
    cells = ["cat; dog", "", "dog", "cat", "dog"]
    rows = [
        [path, labels, i, -i / 2]
        for i, (path, labels) in enumerate(zip(written, cells, strict=True))
    ]
    header = ["path", "labels", "target:age", "target:weight"]
    data = load(write_table(root, header, rows), num_val=0)
    found = {}
    for split in (data.train, data.test):
        for target, labels in zip(split["target"], split["labels"], strict=True):
            found[tuple(target)] = labels.tolist()
    expected = [[True, True], [False, False], [False, True], [True, False], [False, True]]
    assert found == {(i, -i / 2): x for i, x in enumerate(expected)}
    assert data.spec.fields["labels"].names == ("cat", "dog")
    assert data.spec.fields["target"].names == ("age", "weight")


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["file", "label"], ["x.png", "a"], "has no column 'path'"),
        (["path", "lable"], ["x.png", "a"], "unknown column 'lable'. Did you mean 'label'"),
        (["path", "label"], ["x.png", ""], "line 2 has no label"),
        (
            ["path", "target", "split"],
            ["x.png", "1", "tset"],
            "line 2 has the unknown split 'tset'",
        ),
        (["path", "target"], ["x.png", "much"], "line 2: target='much' is not a finite number"),
        (["path", "label"], ["x.png", "a", "b"], "line 2 has more cells"),
        (["path", "label"], ["x.png", "a"], "only one class, 'a'"),
        (["path", "label"], ["", "a"], "line 2 has no path"),
        (["path", "label", "label"], ["x.png", "a", "b"], "has 2 columns 'label'"),
        (["path", "labels"], ["x.png", ""], "has no class in its column 'labels'"),
        (["path", "target"], ["x.png", "1e300"], "is not a finite number of 32 bits"),
        (["path;label"], ["x.png;a"], "divided by ';': divide them by commas"),
    ],
)
def test_an_odd_table_names_its_line(root, header, row, message):
    root.mkdir()
    with pytest.raises(UserError, match=message):
        load(write_table(root, header, [row]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"path,target\n", "names no images: add a line"),
        (b"path,target\na.png,1\n\n\nb.png,x\n", "line 5: target='x'"),
        (b"path,target\na.png,1\nb.png,1\na.png,1\n", "line 4 names 'a.png' again, as line 2 does"),
        (b"path,target\n\xff.png,1\n", "neither a directory nor a CSV file in UTF-8"),
        (b'path,target\n"a.png,1\n', "is not a CSV file after line 1: unexpected end"),
        (b"path,target\na.png,1\n", r"such as a\.png \(No such file or directory\)"),
        (b"path,target\n.,1\n", r"such as \. \(it is a directory\)"),
    ],
)
def test_a_table_without_use_says_what_to_do(tmp_path, text, message):
    file = tmp_path / "images.csv"
    file.write_bytes(text)
    with pytest.raises(UserError, match=message):
        load(file)


def test_a_table_whose_split_has_no_images_names_the_split(root):
    written = list(write_folder(root, {"any": 4}))
    rows = [[path, i, "test"] for i, path in enumerate(written)]
    with pytest.raises(UserError, match="no images in the split 'train'"):
        load(write_table(root, ["path", "target", "split"], rows))


def test_keys_of_photographs_are_refused_for_arrays():
    config = base_config()
    config.data.size = 64
    with pytest.raises(UserError, match=r"data\.size=64 has no effect: the images of digits"):
        load_dataset(config.data)
