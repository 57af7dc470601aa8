"""What is saved comes back to the bit; a damaged checkpoint costs one interval, not the run."""

import errno
import json
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cv_jax.config.errors import UserError
from cv_jax.optim.state import TrainState
from cv_jax.workdir.checkpoints import Checkpoints, _check_shared, read_newest
from cv_jax.workdir.metric import Metric
from cv_jax.workdir.storage import storage_errors


def _state(step):
    rng = np.random.default_rng(step)
    array = jnp.asarray(rng.normal(size=(3, 4)).astype(np.float32))
    return TrainState(
        step=jnp.int32(step),
        params={"kernel": array, "half": array.astype(jnp.bfloat16)},
        model_state={},
        opt_state=(jnp.uint32(7), ()),
    )


LIKE = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0)
)


def _save(directory, accuracies, keep=2):
    with Checkpoints(directory, keep) as checkpoints:
        for step, accuracy in accuracies.items():
            accuracy = None if accuracy is None else np.array([accuracy])
            checkpoints.save(_state(step), {"train": float(step)}, accuracy)


def _steps(directory):
    return sorted(p.name for p in (directory / "checkpoints").iterdir())


def _restore(directory):
    with Checkpoints(directory, 2) as checkpoints:
        return checkpoints.restore_latest(LIKE)


def test_the_newest_comes_back_to_the_bit(tmp_path):
    _save(tmp_path, {3: None, 5: None})
    state, seconds = _restore(tmp_path)
    chex.assert_trees_all_equal(state, _state(5))
    chex.assert_trees_all_equal_dtypes(state, _state(5))
    assert seconds == {"train": 5.0}


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    assert _restore(tmp_path) is None


def test_the_newest_and_the_best_on_val_are_kept(tmp_path):
    _save(tmp_path, {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.4, 6: None})
    assert _steps(tmp_path) == ["2", "5", "6"]


def test_a_run_that_has_diverged_makes_no_checkpoint_the_best(tmp_path):
    accuracies = {1: [0.6, 0.5], 2: [0.9, np.nan], 3: [np.nan, np.nan], 4: [0.1, 0.1]}
    with Checkpoints(tmp_path, 1) as checkpoints:
        for step, accuracy in accuracies.items():
            checkpoints.save(_state(step), {}, np.array(accuracy))
    assert _steps(tmp_path) == ["1", "4"]


def test_saving_a_step_again_changes_nothing(tmp_path):
    _save(tmp_path, {4: 0.1})
    _save(tmp_path, {4: 0.2})
    assert _steps(tmp_path) == ["4"]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    bad = _state(5).replace(params={"kernel": jnp.array([[1.0, jnp.nan]])})
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(_state(3), {}, None)
        with pytest.raises(UserError, match="not finite after step 5"):
            checkpoints.save(bad, {}, None)
    assert _steps(tmp_path) == ["3"]


def test_one_finite_run_is_enough_to_save(tmp_path):
    def state(step, kernel, bias):
        params = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
        return _state(step).replace(params=params)

    nan = jnp.nan
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(state(3, [[1, 2], [nan, 4]], [1, 2]), {}, None)
        checkpoints.save(state(4, [[1, 2], [3, 4]], [nan, 2]), {}, None)
        with pytest.raises(UserError, match="not finite after step 5"):  # another array each
            checkpoints.save(state(5, [[1, 2], [nan, 4]], [nan, 2]), {}, None)
    assert _steps(tmp_path) == ["3", "4"]


def _in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_in_half, _flip_a_bit, lambda path: path.unlink()])
@pytest.mark.parametrize("pattern", ["state/ocdbt.process_0/d/*", "progress/metadata", "*.json"])
def test_a_damaged_checkpoint_is_named_and_kept_aside(damage, pattern, tmp_path, capfd):
    _save(tmp_path, {3: None, 5: None})
    files = (tmp_path / "checkpoints" / "5").glob(pattern)
    damage(max(files, key=lambda path: path.stat().st_size))
    state, seconds = _restore(tmp_path)
    chex.assert_trees_all_equal(state, _state(3))
    assert seconds == {"train": 3.0}
    said = capfd.readouterr().err
    assert "Checkpoint 5" in said
    assert "Traceback" not in said
    assert _steps(tmp_path) == ["3", "broken-5"]


def test_checksums_are_the_crc_32_of_every_file(tmp_path):
    """As in every checkpoint until now: another start value would call all of these damaged."""
    _save(tmp_path, {3: None})
    folder = tmp_path / "checkpoints" / "3"
    checksums = json.loads((folder / "checksums.json").read_text())
    files = {p for item in ("state", "progress") for p in (folder / item).rglob("*") if p.is_file()}
    assert {folder / name for name in checksums} == files
    for name, checksum in checksums.items():
        assert checksum == zlib.crc32((folder / name).read_bytes()), name


def test_the_newest_is_that_of_the_highest_number(tmp_path, capfd):
    _save(tmp_path, {9: None, 10: None})
    assert read_newest(tmp_path)["step"] == 10
    (tmp_path / "checkpoints/10/state/_METADATA").unlink()
    assert read_newest(tmp_path)["step"] == 9
    chex.assert_trees_all_equal(_restore(tmp_path)[0], _state(9))
    assert "Checkpoint 10" in capfd.readouterr().err
    assert _steps(tmp_path) == ["9", "broken-10"]


def test_a_step_can_be_damaged_again(tmp_path):
    _save(tmp_path, {3: None})
    for _ in range(2):
        _save(tmp_path, {5: None})  # the run comes by there again
        (tmp_path / "checkpoints/5/state/_METADATA").unlink()
        chex.assert_trees_all_equal(_restore(tmp_path)[0], _state(3))
    assert _steps(tmp_path) == ["3", "broken-5", "broken-5-again"]


def test_only_damaged_checkpoints_stop_the_run(tmp_path):
    _save(tmp_path, {3: None})
    (tmp_path / "checkpoints/3/state/_METADATA").unlink()
    with pytest.raises(UserError, match=r"None of the checkpoints in .* can be read"):
        _restore(tmp_path)
    assert _restore(tmp_path) is None


def test_what_is_no_checkpoint_does_no_harm(tmp_path):
    _save(tmp_path, {3: None})
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / "old").mkdir()
    (checkpoints / "7").write_text("")
    (checkpoints / "9").mkdir()
    (checkpoints / "5.orbax-checkpoint-tmp").mkdir()  # what a kill left behind
    chex.assert_trees_all_equal(_restore(tmp_path)[0], _state(3))
    assert _steps(tmp_path) == ["3", "broken-7", "broken-9", "notes.txt", "old"]


def test_no_permission_is_no_damage(tmp_path, monkeypatch):
    _save(tmp_path, {3: None})

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("cv_jax.workdir.checkpoints._checksum", refuse)
    with pytest.raises(PermissionError):
        _restore(tmp_path)
    monkeypatch.undo()
    chex.assert_trees_all_equal(_restore(tmp_path)[0], _state(3))


def test_a_checkpoint_of_other_code_stays_where_it_is(tmp_path):
    _save(tmp_path, {3: None})
    other = LIKE.replace(params={"bias": LIKE.params["kernel"]})
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(UserError, match="Checkpoint 3 in"):
        checkpoints.restore_latest(other)
    assert _steps(tmp_path) == ["3"]


def test_the_best_is_known_after_a_restart(tmp_path):
    _save(tmp_path, {1: 0.9, 2: 0.5})
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.restore_latest(LIKE)
        checkpoints.save(_state(3), {}, np.array([0.7]))
        checkpoints.save(_state(4), {}, np.array([np.nan]))
    assert _steps(tmp_path) == ["1", "4"]


def test_a_disk_that_is_full_in_the_background_leaves_whole_checkpoints(tmp_path, monkeypatch):
    _save(tmp_path, {3: None})

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path, 2)
    monkeypatch.setattr("cv_jax.workdir.checkpoints._checksum", full)
    with pytest.raises(UserError, match="No space left"), storage_errors(tmp_path), checkpoints:
        checkpoints.save(_state(5), {}, None)
    monkeypatch.undo()
    chex.assert_trees_all_equal(_restore(tmp_path)[0], _state(3))
    assert _steps(tmp_path) == ["3"]


def test_a_directory_that_is_not_the_first_process_s(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "cv_jax.workdir.checkpoints.broadcast", lambda text: "process 7 on elsewhere"
    )
    with pytest.raises(UserError, match="is another directory here than in process 0"):
        Checkpoints(tmp_path, 1)
    monkeypatch.undo()
    assert _restore(tmp_path) is None  # and the lock is free


def test_all_processes_must_see_the_lock_of_process_0(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("process 3 on here")
    monkeypatch.setattr("cv_jax.workdir.checkpoints.broadcast", lambda text: "process 3 on here")
    _check_shared(tmp_path)
    (tmp_path / "lock").unlink()
    with pytest.raises(UserError, match="is another directory here than in process 0"):
        _check_shared(tmp_path)


def test_a_lower_headline_is_the_best_where_the_metric_says_so(tmp_path):
    lower = Metric("px", "lower")
    values = {1: [3.0, 5.0], 2: [1.0, 2.0], 3: [0.1, np.nan], 4: [np.inf, -np.inf], 5: [4.0, 4.0]}
    with Checkpoints(tmp_path, 1, lower) as checkpoints:
        for step, of_runs in values.items():
            checkpoints.save(_state(step), {}, np.array(of_runs))
    assert _steps(tmp_path) == ["2", "5"]
    with Checkpoints(tmp_path, 1, lower) as checkpoints:
        checkpoints.restore_latest(LIKE)
        checkpoints.save(_state(6), {}, np.array([2.0, 2.0]))
        checkpoints.save(_state(7), {}, np.array([0.5, 1.0]))
        checkpoints.save(_state(8), {}, None)
    assert _steps(tmp_path) == ["7", "8"]


@pytest.mark.parametrize(("late", "kept"), [(0.9, ["4", "5"]), (0.1, ["1", "4", "5"])])
def test_a_headline_that_comes_late_ranks_as_one_in_time(tmp_path, late, kept):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    accuracies = {1: 0.5, 4: 0.2, 5: late}
    _save(whole, accuracies)
    _save(cut, {**accuracies, 5: None})
    assert _steps(cut) == ["1", "4", "5"]
    with Checkpoints(cut, 2) as checkpoints:
        checkpoints.restore_latest(LIKE)
        checkpoints.rank(5, np.array([late]))
    assert _steps(cut) == _steps(whole) == kept


def test_the_best_of_older_code_is_restored(tmp_path, monkeypatch):
    def older(progress):
        values = progress.pop("val_headline")
        means = {step: mean for step, (_, mean) in values.items()}
        return {**progress, "val_accuracies": {**means, 9: np.nan}}

    args = ocp.args.JsonSave
    monkeypatch.setattr(ocp.args, "JsonSave", lambda progress: args(older(progress)))
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(_state(1), {"train": 1.0}, np.array([0.9]))
    monkeypatch.undo()
    with Checkpoints(tmp_path, 1) as checkpoints:
        state, progress = checkpoints.restore_latest(LIKE)
        assert progress == {"train": 1.0}
        chex.assert_trees_all_equal(state, _state(1))
        checkpoints.save(_state(2), {}, np.array([0.5]))
        checkpoints.save(_state(3), {}, None)
    assert _steps(tmp_path) == ["1", "3"]
