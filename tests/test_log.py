"""What a run writes can be read back: JSON lines, TensorBoard events, the table."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.config.plan import Chunk, Intervals
from cv_jax.runtime.mesh import make_mesh
from cv_jax.workdir.log import Log
from cv_jax.workdir.log import log as log_module
from cv_jax.workdir.log.confusion import draw_confusion
from cv_jax.workdir.log.tensorboard import image_grid
from cv_jax.workdir.log.window import Window
from cv_jax.workdir.metric import Metric
from tests.conftest import ROOT, random_dataset


@pytest.fixture
def make_log(tmp_path):
    config = base_config()
    config.batch_size = 10  # 7 steps an epoch

    def make(
        start_step=0,
        names=("seed=0",),
        window=None,
        metrics=None,
        headline="accuracy",
        warn=None,
        val_is_due=False,
    ):
        config.num_seeds = len(names)
        intervals = Intervals(total=14, log=2, eval=0, save=0)
        spec = random_dataset().spec
        metrics = {"accuracy": Metric("%")} if metrics is None else metrics
        return Log(
            *(tmp_path, config, spec, names, start_step, intervals, metrics, headline),
            *(window, warn, val_is_due),
        )

    return make


def _metrics(losses):
    losses = np.array([[*losses, 99.0]])  # rows past the chunk's end are not read
    return {
        "loss": (losses * 10, np.full(losses.shape, 10.0)),
        "lr": (losses, np.ones_like(losses)),
    }


def _records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def read_events(tmp_path):
    """The values of all event files: (tag, step) -> value; none is there twice."""
    values = {}
    for path in sorted(tmp_path.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            for value in event.summary.value:
                assert (value.tag, event.step) not in values
                values[value.tag, event.step] = value
            at += 16 + length
    return values


def test_a_row_is_the_mean_over_its_steps(make_log, tmp_path, capsys):
    with make_log() as log:
        log.train(Chunk(0, 1, False, False, False), _metrics([4.0]))
        log.row()
        log.train(Chunk(1, 2, True, False, False), _metrics([2.0]))
        one_run = {
            "loss": np.array([1.5]),
            "accuracy": np.array([0.25]),
            "confusion": np.eye(2)[None],
        }
        log.evals(2, "val", one_run)
        log.row()
    train, val = _records(tmp_path)
    assert (train["step"], train["split"], train["epoch"]) == (2, "train", round(2 / 7, 6))
    assert train["values"]["loss"] == 3.0
    assert val["values"] == {"loss": 1.5, "accuracy": 0.25}
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:4] == ["0.29", "2", "3", "3.0000"]
    assert "25.00%" in row

    events = read_events(tmp_path)
    assert events["train/loss", 2].simple_value == 3.0
    assert events["val/accuracy", 2].simple_value == 0.25


def test_steps_that_count_nothing_are_no_skipped_and_no_diverged_ones(make_log, tmp_path, capsys):
    nothing = {"loss": (np.zeros((1, 14)), np.zeros((1, 14)))}
    with make_log() as log:
        log.train(Chunk(0, 14, True, False, False), nothing)
    (record,) = _records(tmp_path)
    assert list(record["values"]) == ["images_per_second"]
    assert "skipped" not in capsys.readouterr().out


def test_the_speed_is_all_examples_over_all_seconds():
    window = Window()
    assert np.isnan(window.means("images")["images_per_second"]).all()  # before the first step
    window.add(_metrics([4.0]), num_examples=30, seconds=2.0)
    window.add(_metrics([2.0]), num_examples=20, seconds=0.5)
    np.testing.assert_array_equal(window.means("images")["images_per_second"], [20.0])


def test_a_resumed_log_forgets_the_steps_after_the_checkpoint(make_log, tmp_path):
    with make_log() as log:
        for step in (2, 4, 6):
            log.train(Chunk(step - 2, step, True, False, False), _metrics([1.0, 1.0]))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "ep')  # what a kill leaves behind
    with make_log(start_step=4) as log:
        log.train(Chunk(4, 6, True, False, False), _metrics([2.0, 2.0]))
    assert [(r["step"], r["values"]["loss"]) for r in _records(tmp_path)] == [
        (2, 1.0),
        (4, 1.0),
        (6, 2.0),
    ]


def test_an_evaluation_that_was_cut_short_stands_there_once(make_log, tmp_path):
    for val_is_due in (False, True):
        with make_log(start_step=4 * val_is_due, val_is_due=val_is_due) as log:
            if not val_is_due:
                log.train(Chunk(0, 4, True, True, True), _metrics([1.0] * 4))
                log.evals(3, "val", {"accuracy": np.array([0.1])})
            log.evals(4, "val", {"accuracy": np.array([0.5])})
            log.evals(4, "val", None)
    found = [(record["step"], record["split"]) for record in _records(tmp_path)]
    assert found == [(4, "train"), (3, "val"), (4, "val")]


@pytest.mark.parametrize(("seconds", "late"), [(0.0, 0), (0.1, 1), (4.9, 1), (5.1, 0)])
def test_only_the_metrics_of_fast_steps_are_fetched_late(make_log, monkeypatch, seconds, late):
    with make_log() as log:
        log.pace.seconds_per_step = seconds
        fetched = []
        monkeypatch.setattr(log, "_fetch", lambda chunk, metrics: fetched.append(chunk.end))
        for step in range(1, 5):
            log.train(Chunk(step - 1, step, False, False, False), {})
        assert len(fetched) == 4 - late


def test_a_row_counts_the_steps_before_a_restart_too(make_log, tmp_path):
    with make_log() as log:
        log.train(Chunk(0, 1, False, False, True), _metrics([4.0]))
        window = json.loads(json.dumps(log.window()))
    with make_log(start_step=1, window=window) as log:
        log.train(Chunk(1, 2, True, False, False), _metrics([2.0]))
    assert [(r["step"], r["values"]["loss"]) for r in _records(tmp_path)] == [(2, 3.0)]


def test_a_damaged_log_is_mended_and_a_final_evaluation_stands_there_once(make_log, tmp_path):
    lines = [
        b'{"step": 2, "split": "final_test"}',  # of the run before it was lengthened
        b'{"step": 14, "split": "train"}',
        b'{"step": 14, "split": "final_test"}',
        b'{"step": "14"}',
        b"7",
        b"\xff\x00",
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with make_log(start_step=14) as log:
        count = np.array([5.0])
        sums = {"accuracy": (count, count), "confusion": (np.eye(2)[None], count)}
        log.finals(14, {"test": sums}, ["a", "b"])
    records = [(r["step"], r["split"]) for r in _records(tmp_path)]
    assert records == [(2, "final_test"), (14, "train"), (14, "final_test")]


def test_a_clock_that_is_set_back_loses_no_events(make_log, tmp_path, monkeypatch):
    for start_step, now in ((0, 2e9), (2, 2e9), (4, 1e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        with make_log(start_step) as log:
            chunk = Chunk(start_step, start_step + 2, True, False, False)
            log.train(chunk, _metrics([start_step, start_step]))
    values = read_events(tmp_path)  # reads files in the order of their names, as TensorBoard does
    assert [values["train/loss", step].simple_value for step in (2, 4, 6)] == [0.0, 2.0, 4.0]
    assert len(list(tmp_path.glob("events.*"))) == 3


def test_tensorboard_has_no_value_twice_at_a_step(make_log, tmp_path):
    one, two = np.array([5.0, 5.0]), np.array([1.0, 2.0])
    spec = random_dataset().spec

    def start(start_step, *ends):
        with make_log(start_step, names=("seed=0", "seed=1")) as log:
            log.begin([], [])
            log.preview(np.zeros((8, 8, 8, 1), np.float32))
            for end in ends:
                metrics = {"loss": (two[:, None] * start_step, np.ones((2, 1)))}
                log.train(Chunk(end - 1, end, True, True, True), metrics)
                log.evals(end, "val", {"accuracy": two})
                params = {"w": np.full((2, 3), start_step, np.float32)}
                log.histograms(Chunk(end - 1, end, True, True, True, True), params, make_mesh())
            if not ends or ends[-1] == 14:
                confusion = (np.ones((2, 10, 10)), one)
                sums = {"test": {"accuracy": (one, one), "confusion": confusion}}
                log.finals(14, sums, spec.class_names)

    start(0, 1)
    start(0, 1, 2)  # killed before its first checkpoint
    start(1, 2, 3)
    start(1, 2, 14)  # killed before its second, and before result.json
    start(14)
    for folder in (tmp_path, tmp_path / "runs" / "seed=1"):
        events = read_events(folder)  # fails where a value is there twice
        steps = {tag: {step for other, step in events if other == tag} for tag, _ in events}
        for tag in ("train/loss", "val/accuracy"):
            assert steps[tag] == {1, 2, 14}
        assert events["train/loss", 1].simple_value == 0
        assert events["train/loss", 2].simple_value > 0  # of the later start
        assert steps["final_test/accuracy"] == {14}
    assert steps["params/w"] == {1, 2, 14}
    assert steps["_hparams_/session_start_info"] == {0, 1, 14}
    mean = read_events(tmp_path)
    assert {step for tag, step in mean if tag == "augmented"} == {0, 1, 14}
    assert {step for tag, step in mean if tag == "confusion/test"} == {14}
    assert ("custom_scalars__config__", 0) in mean
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("rest", [b"\x30" + bytes(20), b"\x03" + bytes(11) + b"\xff" * 7])
def test_a_damaged_end_of_an_event_file_is_dropped(make_log, tmp_path, rest):
    with make_log() as log:
        log.train(Chunk(0, 2, True, False, True), _metrics([1.0, 1.0]))
    (path,) = tmp_path.glob("events.*")
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    with make_log(start_step=2):
        assert path.read_bytes() == whole


def test_a_loss_that_is_not_finite_names_its_step(make_log):
    with make_log() as log, pytest.raises(UserError, match="not finite at step 5"):
        log.train(Chunk(2, 6, True, False, False), _metrics([1.0, 1.0, math.nan, 1.0]))


def test_several_runs_are_written_one_by_one_and_as_their_mean(make_log, tmp_path):
    with make_log(names=("seed=0", "seed=1")) as log:
        metrics = {"loss": (np.array([[10.0, 99], [30, 99]]), np.full((2, 2), 10.0))}
        log.train(Chunk(0, 1, True, False, False), metrics)
        log.evals(1, "val", {"accuracy": np.array([0.5, 0.7])})
    train, val = _records(tmp_path)
    assert train["values"]["loss"] == 2.0
    assert train["runs"] == {"loss": [1.0, 3.0]}
    assert val["runs"] == {"accuracy": [0.5, 0.7]}
    events = read_events(tmp_path)
    assert events["val/accuracy", 1].simple_value == pytest.approx(0.6)
    std = math.sqrt(0.02)
    assert events["band/val/accuracy/low", 1].simple_value == pytest.approx(0.6 - std)
    assert events["band/val/accuracy/high", 1].simple_value == pytest.approx(0.6 + std)
    own = read_events(tmp_path / "runs" / "seed=1")
    assert own["train/loss", 1].simple_value == 3.0


def test_a_run_that_diverges_leaves_the_others_alone(make_log, tmp_path, capsys):
    def losses(*values):
        return {"loss": (np.array([values]).T, np.ones((2, 1)))}

    with make_log(names=("lr=1", "lr=9")) as log:
        log.train(Chunk(0, 1, True, False, False), losses(1.0, 2.0))
        for step in (1, 2):
            log.train(Chunk(step, step + 1, True, False, False), losses(1.0, math.nan))
        with pytest.raises(UserError, match="not finite at step 4"):
            log.train(Chunk(3, 4, True, False, False), losses(math.inf, math.nan))
    assert capsys.readouterr().out.count("lr=9: the loss is not finite at step 2") == 1
    assert [record["values"]["loss"] for record in _records(tmp_path)] == [1.5, 1.0, 1.0]
    assert _records(tmp_path)[1]["runs"]["loss"] == [1.0, None]


def test_a_step_without_a_loss_has_no_accuracy(make_log, tmp_path):
    def metrics(*losses):
        losses, one = np.array([losses]).T, np.ones((2, 1))
        return {"loss": (losses, one), "accuracy": (one, one), "lr": (0.1 * one, one)}

    with make_log(names=("lr=1", "lr=9")) as log:
        log.train(Chunk(0, 1, True, False, False), metrics(2.0, math.nan))
        log.evals(1, "val", {"accuracy": np.array([0.5, math.nan])})
    train, val = _records(tmp_path)
    assert train["runs"] == {"loss": [2.0, None], "accuracy": [1.0, None], "lr": [0.1, 0.1]}
    assert val["runs"] == {"accuracy": [0.5, None]}


def test_a_row_leaves_out_what_no_run_has(make_log, capsys):
    with make_log() as log:
        log.evals(2, "val", {"loss": np.array([math.nan]), "accuracy": np.array([math.nan])})
        log.row()
    assert "nan" not in capsys.readouterr().out


def test_the_confusion_in_tensorboard_is_of_the_runs_that_have_not_diverged(
    make_log, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        log_module, "draw_confusion", lambda *args: drawn.append(args[0]) or draw_confusion(*args)
    )
    confusion = np.stack([np.diag([2.0, 3.0]), np.full((2, 2), np.nan)])
    count = np.full(2, 5.0)
    accuracy = np.array([5.0, np.nan])
    sums = {"accuracy": (accuracy, count), "confusion": (confusion, count)}
    nothing = {"accuracy": (0 * accuracy[1:], count[1:]), "confusion": (confusion[1:], count[1:])}
    with make_log(names=("lr=1", "lr=9")) as log:
        log.finals(14, {"val": sums, "test": nothing}, ["a", "b"])
    (one,) = drawn
    np.testing.assert_array_equal(one, np.diag([2.0, 3.0]))


def test_a_cell_of_the_confusion_matrix_has_the_colour_of_its_share():
    confusion = np.array([[6.0, 0.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    names = ["$x$", "<b>", "a name that is far longer than the matrix has room for"]
    picture = draw_confusion(confusion, names)
    side = 640 // 3
    top, left = 30, picture.shape[1] - 6 - 3 * side
    corners = picture[top + 5 :: side, left + 5 :: side][:3, :3]
    full, white = np.array([0, 114, 178]), np.full(3, 255)
    expected = [[full, white, white], [(255 * 3 + full) / 4, (255 + 3 * full) / 4, white]]
    np.testing.assert_allclose(corners[:2], expected, atol=0.5)
    assert (corners[2] == 255).all()  # a class without examples
    many = draw_confusion(np.eye(100), [])
    assert (many[30 + 1, 6 + 1] == full).all()


def test_a_grid_lays_images_out_in_rows():
    images = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1) / 2
    grid = image_grid(np.broadcast_to(images, (3, 2, 2, 1)), columns=2, gap=1)
    assert grid.shape == (6, 6, 3)
    assert grid.dtype == np.uint8
    assert grid[0, 0].tolist() == [0, 0, 0]
    assert grid[0, 3].tolist() == [128, 128, 128]
    assert grid[3, 0].tolist() == [255, 255, 255]
    assert grid[3, 3].tolist() == [0, 0, 0]  # an empty place


def test_images_and_confusion_reach_tensorboard(make_log, tmp_path):
    count = np.array([5.0])
    pair = (np.diag([2.0, 3.0])[None], count)
    sums = {"test": {"accuracy": (count, count), "confusion": pair}, "val": {}}
    with make_log() as log:
        log.finals(14, sums, ["a", "b"])
    events = read_events(tmp_path)
    assert events["final_test/accuracy", 14].simple_value == 1.0
    assert events["confusion/test", 14].image.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.slow
def test_tensorboard_is_written_without_importing_pytorch(tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError('imported')")
    code = (
        "import sys, pathlib as p, cv_jax.workdir.log.tensorboard as b; "
        "b.Board(p.Path(sys.argv[1]), ['a'], 0, 1, 'accuracy')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").glob("events.*"))


DISTANCE = {"distance": Metric("px", "lower"), "loss": Metric(better="lower")}


def test_columns_are_named_after_the_headline_and_in_its_unit(make_log, tmp_path, capsys):
    with make_log(metrics=DISTANCE, headline="distance") as log:
        log.begin([], [])
        log.train(Chunk(0, 1, True, True, False), _metrics([4.0]))
        log.evals(1, "val", {"loss": np.array([1.5]), "distance": np.array([12.25])})
        log.row()
        one = np.ones((1, 1))
        log.train(Chunk(1, 2, True, False, False), {"loss": (one, one), "distance": (one, one)})
        log.row()
    *_, head, row, second = capsys.readouterr().out.splitlines()
    assert head.replace("val ", "val~").split() == [
        *("epoch", "step", "lr", "loss", "distance", "val~loss", "val~dis", "images/s", "elapsed")
    ]
    # The training step measured no distance in the first row.
    assert row.split()[3:7] == ["4.0000", "-", "1.5000", "12.2500"]
    assert second.split()[2:4] == ["1.0000", "1.0000"]
    assert len(head) == len(row)
    task = json.loads((tmp_path / "task.json").read_text())
    assert task["headline"] == "distance"
    assert task["metrics"]["distance"] == {"unit": "px", "better": "lower", "protocol": ""}


def test_classification_has_the_columns_that_it_had(make_log, capsys):
    with make_log() as log:
        one = np.ones((1, 1))
        metrics = {name: (value * one, one) for name, value in (("loss", 1.6161), ("lr", 0.0171))}
        metrics["accuracy"] = 0.823 * one, one
        log.train(Chunk(0, 1, True, True, False), metrics)
        log.evals(1, "val", {"loss": np.array([0.8131]), "accuracy": np.array([0.99])})
        log.row()
    head, row = capsys.readouterr().out.splitlines()
    assert head == (
        "  epoch     step        lr     loss accuracy  val loss  val acc  images/s  elapsed"
    )
    assert row.startswith("   0.14        1    0.0171   1.6161   82.30%    0.8131   99.00% ")
    assert len(row) == len(head)


def test_bands_are_of_the_headline(make_log, tmp_path):
    with make_log(names=("a", "b"), metrics=DISTANCE, headline="distance") as log:
        log.evals(1, "val", {"distance": np.array([1.0, 3.0]), "accuracy": np.array([0.5, 0.7])})
    events = read_events(tmp_path)
    assert events["band/val/distance/high", 1].simple_value == pytest.approx(2 + math.sqrt(2))
    assert ("band/val/accuracy/high", 1) not in events


def test_every_loss_is_watched(make_log, tmp_path, capsys):
    def metrics(*pairs):
        critic, generator = (np.array([of_runs]).T for of_runs in pairs)
        one = np.ones((2, 1))
        losses = {"loss/critic": (critic, one), "loss/generator": (generator, one)}
        return {**losses, "lossless": (np.full((2, 1), np.inf), one)}

    with make_log(names=("a", "b")) as log:
        log.train(Chunk(0, 1, True, False, False), metrics((1.0, 2.0), (3.0, math.nan)))
        with pytest.raises(UserError, match=r"The loss/critic is not finite at step 2"):
            log.train(Chunk(1, 2, True, False, False), metrics((math.inf, 2.0), (3.0, 3.0)))
    assert "b: the loss/generator is not finite at step 1; others go on" in capsys.readouterr().out
    (record,) = _records(tmp_path)
    assert record["runs"]["loss/critic"] == [1.0, None]


def test_the_task_warns_about_the_values_of_a_row(make_log, capsys):
    def warn(values, names):
        assert values.keys() == {"loss", "lr"}  # one value a run; the speed is of the program
        return [f"{name}: high" for name, x in zip(names, values["loss"], strict=True) if x > 2]

    losses = {"loss": (np.array([[1.0], [3.0]]), np.ones((2, 1)))}
    with make_log(names=("a", "b"), warn=warn) as log:
        log.train(Chunk(0, 1, True, False, False), {**losses, "lr": losses["loss"]})
    assert "a: high" not in (out := capsys.readouterr().out)
    assert "b: high" in out
