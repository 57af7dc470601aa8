"""predict on real files: evaluation's accuracy, any kind of file, and no file spoils the others."""

import json
import os
import re
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from etils.epath import Path
from PIL import Image

from cv_jax.data import load_dataset
from cv_jax.learn.stored import read_config
from cv_jax.tasks.classification import describe
from cv_jax.tools import predict
from tests.conftest import random_dataset
from tests.test_images import encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits_files(digits_run, tmp_path_factory):
    """The test set as PNG files; the label is the first letter of the name."""
    test = load_dataset(read_config(Path(digits_run)).data).test
    folder = tmp_path_factory.mktemp("images")
    for i, (image, label) in enumerate(zip(test["image"], test["label"], strict=True)):
        (folder / f"{label}-{i}.png").write_bytes(encode(image[..., 0]))
    return folder


@pytest.fixture
def run_predict(digits_run, monkeypatch, capsys):
    def run(*arguments, workdir=digits_run):
        argv = ["predict", f"--workdir={workdir}", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(predict.signal, "signal", lambda *args: None)
        with pytest.raises(SystemExit) as ended:
            predict.main()
        out, err = capsys.readouterr()
        return ended.value.code, out.splitlines(), err

    return run


def test_the_test_set_as_files_has_the_accuracy_of_the_result(
    run_predict, digits_run, digits_files, monkeypatch
):
    monkeypatch.setattr(predict, "MOST_AT_ONCE", 300)  # the 360 come in two parts
    code, lines, err = run_predict(f"--dir={digits_files}", "--json", "--run=seed=1")
    answers = [json.loads(line) for line in lines]
    assert (code, len(answers)) == (0, 360)
    assert re.fullmatch(
        r"predict: n94\(widths=\(16, 32\)\) trained on digits, 8x8x1, 10 classes: 0, 1, .*, 9; "
        r"seed=1, step 152; unlike: a score above \d\.\d\d, exceeded by 1 % of val\n",
        err,
    )
    assert 0 < sum(answer["unlike"] for answer in answers) <= 18  # of 1 %, and of chance
    assert [answer["file"] for answer in answers] == sorted(map(str, digits_files.glob("*")))
    right = [answer["class"] == Path(answer["file"]).name[0] for answer in answers]
    result = json.loads((digits_run / "result.json").read_text())
    assert np.mean(right) == pytest.approx(result["test"]["accuracy"]["values"][1])


def test_a_bad_file_gets_its_line_and_the_others_go_on(run_predict, digits_files, tmp_path):
    good = sorted(digits_files.glob("3-*"))[0]
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "notes <b>.txt").write_text("no image")
    (tmp_path / ".hidden").write_text("not looked at")
    (tmp_path / "folder").mkdir()
    os.symlink(good, tmp_path / "folder" / "link.png")
    os.symlink(tmp_path / "gone", tmp_path / "loose.png")
    os.symlink(tmp_path / "folder", tmp_path / "linked")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "full.png").mkdir()  # all that is in it is read
    os.symlink(good, tmp_path / "full.png" / "link.png")
    code, lines, err = run_predict(f"--dir={tmp_path}", good)
    assert code == 1
    assert [line.split(": ")[0] for line in lines] == [
        str(good),
        *(f"{tmp_path}/{name}/link.png" for name in ("folder", "full.png")),
    ]
    assert all(line.split(": ")[1].startswith("3 ") for line in lines)
    bad = ["empty.png", "fifo.png", "half.png", "linked", "loose.png", "notes <b>.txt"]
    assert [line.split(": ")[0] for line in err.splitlines()] == [
        "predict",
        *(f"{tmp_path}/{name}" for name in bad),
        "predict",
    ]
    assert "6 of 9 files could not be read" in err

    code, lines, _ = run_predict(tmp_path / "half.png", "--json")
    assert code == 1
    assert "damaged" in json.loads(lines[0])["error"]


def test_what_the_network_was_given_is_written_and_what_is_unlike_is_marked(
    run_predict, digits_files, tmp_path
):
    good = sorted(digits_files.glob("3-*"))[0]
    grey = tmp_path / "grey.png"
    grey.write_bytes(encode(np.full((40, 30, 3), 128, np.uint8)))
    files = (tmp_path / "none.png", grey, good)
    _, lines, err = run_predict(*files, f"--inputs={tmp_path}/in")
    assert re.search(r" %; unlike \(score \d+\.\d\)$", lines[0])
    assert "unlike" not in lines[1]
    written = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "in").iterdir()}
    assert sorted(written) == ["000002-grey.png", f"000003-{good.stem}.png"]
    np.testing.assert_array_equal(written["000002-grey.png"], np.full((8, 8), 128))
    np.testing.assert_array_equal(written[f"000003-{good.stem}.png"], Image.open(good))
    _, lines, _ = run_predict(*files[1:], "--json", f"--pictures={tmp_path}/out")
    drawn = np.asarray(Image.open(tmp_path / "out" / "000001-grey.png"))
    np.testing.assert_array_equal(drawn, np.full((8, 8, 3), 128))
    grey, good = map(json.loads, lines)
    assert (grey["unlike"], good["unlike"]) == (True, False)
    assert grey["score"] > 2 * good["score"]

    code, lines, err = run_predict(*files, f"--inputs={files[1]}")
    assert (code, lines) == (2, [])
    assert "grey.png cannot be created" in err


def test_a_run_that_measured_no_images_marks_none():
    spec = random_dataset().spec
    task = SimpleNamespace(describe=partial(describe, spec.class_names))
    network = SimpleNamespace(spec=spec, task=task)
    one = predict.Predicted({}, {"logits": 100 * np.eye(10, dtype=np.float32)[2]}, None, None)
    assert predict.describe(Path("a.png"), one, network, 1, False) == "a.png: class 2 100.0 %"
    line = '{"file": "a.png", "class": "class 2", "probabilities": {"class 2": 1.0}}'
    assert predict.describe(Path("a.png"), one, network, 1, True) == line


def test_a_directory_that_cannot_be_listed_is_said(monkeypatch, tmp_path):
    def walk(directory, onerror):
        onerror(PermissionError(13, "Permission denied", f"{directory}/closed"))
        return iter([(str(directory), ["closed"], ["a.png"])])

    monkeypatch.setattr(os, "walk", walk)
    assert predict.find_files([], tmp_path) == [tmp_path / "a.png", tmp_path / "closed"]


def test_a_name_of_any_bytes_makes_one_line(run_predict, digits_files, tmp_path):
    names = [b"a\nb.png", b"c\td\x1b[31m.png", b"\xe9\xc3\xa9.png"]
    file = next(digits_files.iterdir()).read_bytes()
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(file)
    code, lines, _ = run_predict(f"--dir={tmp_path}")
    shown = [rf"{tmp_path}/{name}" for name in (r"a\nb.png", r"c\td\x1b[31m.png", r"\xe9é.png")]
    assert (code, [line.split(": ")[0] for line in lines]) == (0, shown)
    _, lines, _ = run_predict(f"--dir={tmp_path}", "--json")
    files = [json.loads(line)["file"] for line in lines]
    assert files == [
        f"{tmp_path}/{name}" for name in ("a\nb.png", "c\td\x1b[31m.png", r"\xe9é.png")
    ]


def test_photos_of_any_kind_are_brought_to_the_network(run_predict, tmp_path):
    photo = Image.new("RGBA", (640, 480), (10, 200, 30, 128))
    photo.save(tmp_path / "photo.png")
    photo.convert("RGB").save(tmp_path / "photo.jpg")
    code, lines, _ = run_predict(f"--dir={tmp_path}", "--top=2", "--tta=mirror")
    assert (code, len(lines)) == (0, 2)
    assert all(line.count(" %") == 2 for line in lines)


def test_answers_that_are_not_finite_are_refused(run_predict, digits_files, monkeypatch):
    logits = {"logits": np.array([[0.5, 0.5], [np.nan, 0.5]])}
    monkeypatch.setattr(predict, "make_predict", lambda *args: lambda examples: logits)
    files = sorted(digits_files.glob("*"))[:2]
    code, lines, err = run_predict(*files, "--json")
    assert (code, lines) == (2, [])
    said = err.splitlines()[-1]  # after what it was trained on
    assert said.startswith("predict: The network predicts logits that are not finite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There are no files"),
        (["--dir=nowhere"], "--dir=nowhere is not a directory"),
        (["x.png", "--run=seed=9"], "There are: seed=0, seed=1"),
        (["x.png", "--tta=miror"], "Did you mean 'mirror'?"),
        (["x.png", "--workdir=nowhere"], "nowhere/config.json is not there"),
    ],
)
def test_a_mistake_gets_one_sentence(run_predict, arguments, message):
    code, lines, err = run_predict(*arguments)
    assert (code, lines) == (2, [])
    assert err.startswith("predict: ")
    assert message in err


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--threshold=0.5", "--threshold=0.5 has no effect: config.task='classification' predicts"),
        ("--masks=m", "--masks: config.task='classification' predicts no masks: leave it out"),
    ],
)
def test_a_flag_without_effect_is_refused(run_predict, digits_files, argument, says):
    code, lines, err = run_predict(f"--dir={digits_files}", argument)
    assert (code, lines) == (2, [])
    assert says in err
