"""Checkpoints of a run: written in the background, whole or not at all, and found again."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from cv_jax.errors import UserError
from cv_jax.evaluate import finite_mean
from cv_jax.lock import Lock
from cv_jax.startup import jit_once


class Checkpoints:
    """The checkpoints under `<workdir>/checkpoints`: the newest few and the best on val.

    Args:
        workdir: the run's directory; no other process can have it meanwhile.
        keep: how many of the newest are kept.

    Raises:
        UserError: another process has it, or nothing can be written there.
    """

    def __init__(self, workdir: Path, keep: int):
        self._lock = Lock(workdir)
        self._directory = workdir.absolute() / "checkpoints"
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(
                [
                    LatestN(keep),
                    BestN(
                        get_metric_fn=lambda metrics: metrics["val_accuracy"],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._directory, options=self._options)

    def save(self, state: Any, progress: dict, val_accuracy: np.ndarray | None) -> None:
        """Begins to save; the training goes on meanwhile.

        Args:
            state: a TrainState of all runs; its step names the checkpoint.
            progress: what the run knows of itself beside the state, as JSON values.
            val_accuracy: of each run, where val was evaluated at this step; the mean over those
                that have not diverged is the measure of the best.

        Raises:
            UserError: no run's parameters are finite; the good checkpoints stay the newest.
        """
        step = int(state.step)
        if not _any_run_is_finite(state.params):
            raise UserError(
                f"A parameter is not finite after step {step}, which is not saved; the checkpoints "
                "before it are kept. Lower config.optim.lr, lengthen config.optim.warmup or set "
                "config.optim.clip_norm."
            )
        if step == self._manager.latest_step():
            return
        # A copy, because the next chunk of steps is given this state's memory.
        state = jax.tree.map(jnp.copy, state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
            metrics=None if val_accuracy is None else {"val_accuracy": finite_mean(val_accuracy)},
        )

    def restore_latest(self, like: Any) -> tuple[Any, dict] | None:
        """Returns (state, progress) of the newest whole checkpoint, or None where there is none.

        A checkpoint that cannot be read is named on stderr and kept aside, and the one before it
        is used.

        Args:
            like: a TrainState of ShapeDtypeStructs with shardings.

        Raises:
            UserError: there are checkpoints, and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
                    ),
                )
            except Exception as error:  # whatever a damaged file leads to, deep in the storage
                self._set_aside(step, error)
            else:
                return restored["state"], restored["progress"]
        if steps:
            raise UserError(
                f"None of the checkpoints in {self._directory} can be read; they are kept as "
                "broken-*. Run the command again to begin anew."
            )
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        broken = self._directory / f"broken-{step}"
        reason = str(error).strip().partition("\n")[0]
        print(
            f"Checkpoint {step} in {self._directory} cannot be read and is kept as {broken.name} "
            f"({type(error).__name__}: {reason[:200]}).",
            file=sys.stderr,
        )
        (self._directory / str(step)).rename(broken)
        self._manager.close()
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits until what was saved is on the disk, also when the training ends in an error."""
        self._manager.close()
        self._lock.close()


@jit_once
def _any_run_is_finite(params: Any) -> jax.Array:
    """Whether all parameters of a run are finite; their leading axis is that of runs."""
    finite = [
        jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in jax.tree.leaves(params)
    ]
    return jnp.stack(finite).all(axis=0).any()
