"""A work directory in a bucket: the run there is, to the bit, the one on a disk."""

import importlib.util
import signal
import time

import chex
import pytest

import train
from cv_jax.config.errors import UserError
from cv_jax.runtime.signals import Stopped
from cv_jax.workdir import directory
from cv_jax.workdir.bucket import (
    REWRITE_SECONDS,
    Growing,
    open_to_append,
    refusal,
    work_directory,
)
from cv_jax.workdir.checkpoints import Checkpoints
from cv_jax.workdir.log import Log
from cv_jax.workdir.storage import storage_errors
from tests.fake_gcs import FakeGCS
from tests.test_checkpoint import _restore, _save, _state
from tests.test_resume import assert_same_run


@pytest.fixture(scope="module")
def server():
    with FakeGCS() as fake, pytest.MonkeyPatch.context() as patch:
        for name, value in fake.environment().items():
            patch.setenv(name, value)
        pytest.importorskip("gcsfs")  # looks at one of them
        yield fake


@pytest.fixture
def run(server):
    """The directory of a run, in a bucket of its own."""
    name = f"bucket{len(server.buckets)}"
    server.buckets[name] = {}
    yield work_directory(f"gs://{name}/runs/a")
    server.refuses = False


def _download(server, run, folder):
    """Copies a run to a disk."""
    for name, (content, _) in server.buckets[run.parts[2]].items():
        path = folder / name.removeprefix("runs/a/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def _steps(server, run):
    names = [name.split("/") for name in server.buckets[run.parts[2]]]
    return sorted({parts[3] for parts in names if parts[2] == "checkpoints"})


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on(server, run, tiny_config, tmp_path, monkeypatch):
    for name in ("augment", "progressive_resizing", "select"):
        tiny_config[name] = ""  # which take most of the compiling
    train.run(tiny_config, tmp_path / "whole")

    class StopsItself(Log):
        def train(self, chunk, metrics):
            super().train(chunk, metrics)
            if chunk.end >= 6:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(directory, "Log", StopsItself)
    monkeypatch.setattr(Growing, "close", lambda self: None)  # as a kill: nothing is saved later
    with pytest.raises(Stopped, match="SIGTERM after step"):
        train.run(tiny_config, run)
    monkeypatch.undo()
    assert not (run / "result.json").exists()
    train.run(tiny_config, run)
    there = _download(server, run, tmp_path / "there")
    assert_same_run(tmp_path / "whole", there)
    whole = {path.name.split(".0000")[0] for path in (tmp_path / "whole").iterdir()}
    assert {path.name.split(".0000")[0] for path in there.iterdir()} == whole


@pytest.mark.slow
def test_a_bucket_that_is_missing_is_named(server, train_py):
    pipe = train_py("--config=configs/digits.py", "--workdir=gs://missing/a")
    assert pipe.returncode == 2
    said = pipe.stderr.strip().splitlines()[-1]
    assert said == (
        "train.py: Nothing can be written in gs://missing/a (there is no bucket missing); choose "
        "another --workdir."
    )
    assert "Traceback" not in pipe.stderr
    assert "missing" not in server.buckets


@pytest.mark.slow
def test_a_damaged_checkpoint_is_kept_aside_and_half_of_one_removed(server, run, capfd):
    objects = server.buckets[run.parts[2]]
    _save(run, {3: None, 5: None, 7: None}, keep=3)
    del objects["runs/a/checkpoints/7/commit_success.txt"]  # as a kill would leave it
    name = max(
        (name for name in objects if "checkpoints/5/state/ocdbt" in name),
        key=lambda name: len(objects[name][0]),
    )
    content, generation = objects[name]
    objects[name] = (content[:-1] + bytes([content[-1] ^ 4]), generation)
    state, progress = _restore(run)
    chex.assert_trees_all_equal(state, _state(3))
    assert progress == {"train": 3.0}
    said = capfd.readouterr().err
    assert f"Checkpoint 5 in {run}/checkpoints is damaged and kept as broken-5" in said
    assert "Traceback" not in said
    assert _steps(server, run) == ["3", "broken-5"]

    del objects["runs/a/checkpoints/3/state/_METADATA"]
    with pytest.raises(UserError, match="None of the checkpoints"):
        _restore(run)


def test_a_permission_that_is_taken_away_is_named(server, run):
    checkpoints = Checkpoints(run, 2)
    server.refuses = True
    sentence = f"cannot write to {run}: .*Forbidden"
    with pytest.raises(UserError, match=sentence), storage_errors(run), checkpoints:
        checkpoints.save(_state(3), {}, None)
    with pytest.raises(UserError, match=rf"Nothing can be written in {run} \(Forbidden"):
        Checkpoints(run, 2)


def test_what_another_program_writes_is_seen(server, run):
    (run / "a").write_text("")
    assert [path.name for path in run.iterdir()] == ["a"]
    server.buckets[run.parts[2]]["runs/a/b"] = (b"", 1)
    assert [path.name for path in run.iterdir()] == ["a", "b"]


def test_only_what_a_bucket_refuses_is_its_refusal():
    tensorstores = "ABORTED: All 32 retry attempts failed: CURL error [curl_code='7']"
    assert refusal(ValueError(tensorstores)) == tensorstores
    assert refusal(OSError("Forbidden: b/x\nNo.")) == "Forbidden: b/x No."
    for other in (ValueError("a bug"), BrokenPipeError(32, "of the console")):
        assert refusal(other) is None


def test_an_object_that_grows_is_seldom_written(run, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    path = run / "lines"
    with open_to_append(path) as file:
        for now in (0.0, REWRITE_SECONDS + 1.0, REWRITE_SECONDS + 2.0):
            file.write(b"%d\n" % now)
            file.flush()
        assert path.read_bytes() == b"0\n61\n"
    with open_to_append(path) as file:
        file.write(b"more\n")
    assert path.read_bytes() == b"0\n61\n62\nmore\n"


def test_a_place_of_another_kind_or_without_gcsfs_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"^s3://bucket/a: .* gs://BUCKET/PATH"):
        work_directory("s3://bucket/a")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gcsfs"):
        work_directory("gs://bucket/a")
    assert work_directory("runs/a").name == "a"


def test_a_work_directory_below_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(work_directory("~/runs/a")) == "/home/somebody/runs/a"
    with pytest.raises(UserError, match="~nobody-here/a: the home directory ~nobody-here is unk"):
        work_directory("~nobody-here/a")
