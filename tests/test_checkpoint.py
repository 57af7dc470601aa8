"""What is saved comes back to the bit; a damaged checkpoint costs one interval, not the run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.checkpoint import Checkpoints
from cv_jax.errors import UserError
from cv_jax.update import TrainState


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


def _damage(directory, step):
    files = [p for p in (directory / "checkpoints" / str(step)).rglob("*") if p.is_file()]
    for path in files:
        if path.stat().st_size:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_named_and_kept_aside(tmp_path, capfd):
    _save(tmp_path, {3: None, 5: None})
    _damage(tmp_path, 5)
    state, _ = _restore(tmp_path)
    chex.assert_trees_all_equal(state, _state(3))
    assert "Checkpoint 5" in capfd.readouterr().err
    assert _steps(tmp_path) == ["3", "broken-5"]
    _save(tmp_path, {5: None})  # the run comes by there again
    assert _steps(tmp_path) == ["3", "5", "broken-5"]


def test_only_damaged_checkpoints_stop_the_run(tmp_path):
    _save(tmp_path, {3: None})
    _damage(tmp_path, 3)
    with pytest.raises(UserError, match=r"None of the checkpoints in .* can be read"):
        _restore(tmp_path)
    assert _restore(tmp_path) is None
