"""Checkpoints of a run: written in the background, whole or not at all, and found again."""

import contextlib
import errno
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import Path
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from cv_jax.config.errors import UserError, first_line
from cv_jax.runtime.processes import broadcast, on_all_processes, on_process_0
from cv_jax.runtime.startup import jit_once
from cv_jax.workdir.bucket import in_bucket, refusal
from cv_jax.workdir.lock import Lock
from cv_jax.workdir.numbers import finite_mean

# In each checkpoint, of its files: TensorStore would take a flipped bit for data, and orbax prints
# tracebacks of its own over a file that it cannot read. So they are verified before it opens them.
CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints under `<workdir>/checkpoints`: the newest few and the best on val.

    To open them clears what a kill left half-written. A damaged checkpoint is named on stderr and
    kept aside, and the one before it is the newest then.

    Args:
        workdir: the run's directory; no other program can have it meanwhile.
        keep: how many of the newest are kept.

    Raises:
        UserError: another program has it, nothing can be written there, not all processes see it,
            or there are checkpoints and all of them are damaged.
    """

    def __init__(self, workdir: Path, keep: int):
        self._lock = on_process_0(partial(Lock, workdir))
        workdir = Path(workdir)
        self._directory = _directory_of(workdir)
        self._best = _BestOnVal()
        try:
            on_all_processes(partial(_check_shared, workdir))
            on_process_0(partial(_clear, self._directory))
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy([LatestN(keep), self._best]),
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
                ),
            )
        except BaseException:
            self._unlock()
            raise

    def save(self, state: Any, progress: dict, val_accuracy: np.ndarray | None) -> None:
        """Begins to save; the training goes on meanwhile.

        Args:
            state: a TrainState of all runs; its step names the checkpoint.
            progress: what the run knows of itself beside the state, as JSON values.
            val_accuracy: of each run, where val was evaluated at this step. Its mean is the
                measure of the best; a run that has diverged counts as 0.

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
        if val_accuracy is not None:
            # NaN where all runs have diverged: such a checkpoint is never the best.
            share = np.isfinite(val_accuracy).mean()
            self._best.accuracies[step] = share * finite_mean(val_accuracy)
        # A copy, because the next chunk of steps is given this state's memory.
        state = jax.tree.map(jnp.copy, state)
        progress = {"progress": progress, "val_accuracies": dict(self._best.accuracies)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
        )

    def _add_checksums(self) -> None:
        """Seals a checkpoint: in the background, when it is written and not finished yet."""
        (folder,) = _unfinished(self._directory)
        checksums = {
            str(path.relative_to(folder)): _checksum(path)
            for item in sorted(folder.iterdir())
            if item.is_dir()  # the files at the top, orbax writes after this
            for path in _files(item)
        }
        (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2))

    def restore_latest(self, like: Any) -> tuple[Any, dict] | None:
        """Returns (state, progress) of the newest checkpoint, or None where there is none.

        Args:
            like: a TrainState of ShapeDtypeStructs with shardings.

        Raises:
            UserError: the checkpoint is of another state than `like`.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        with _of_this_program(self._directory, step, ", or choose another --workdir"):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
                ),
            )
        progress = restored["progress"]
        self._best.accuracies = {int(k): v for k, v in progress["val_accuracies"].items()}
        return restored["state"], progress["progress"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits until what was saved is on the disk, also when the training ends in an error."""
        try:
            self._manager.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock:
            self._lock.close()


def _check_shared(workdir: Path) -> None:
    """Raises UserError where this process does not see what the first one has locked."""
    path = workdir / "lock"
    owner = path.read_text() if path.exists() else ""
    if owner != broadcast(owner):
        raise UserError(
            f"{workdir} is another directory here than in process 0: choose a --workdir on storage "
            "that all processes share."
        )


class _BestOnVal:
    """Orbax's PreservationPolicy for the checkpoint with the best mean accuracy on val."""

    def __init__(self) -> None:
        self.accuracies: dict[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        known = {info.step: self.accuracies.get(info.step, math.nan) for info in checkpoints}
        self.accuracies = {step: x for step, x in known.items() if math.isfinite(x)}
        best = max(self.accuracies, key=self.accuracies.get, default=None)
        return [info.step == best for info in checkpoints]


def _unfinished(directory: Path) -> list[Path]:
    """The checkpoint that is being saved; where nothing is, what a kill left behind.

    On a disk it has no name yet. A bucket cannot rename: there the last object to be written says
    that the others are whole.
    """
    if in_bucket(directory):
        steps = [path for path in directory.glob("*") if path.name.isdecimal()]
        return [path for path in steps if not (path / "commit_success.txt").exists()]
    return [path for path in directory.glob("*.orbax-checkpoint-tmp*") if path.is_dir()]


def _files(folder: Path) -> Iterator[Path]:
    """All files in it and below it."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _clear(directory: Path) -> None:
    """Removes what is half-written, and sets checkpoints aside until the newest is a whole one.

    Orbax would remove it too, but in a thread that prints a traceback where the program ends first.
    """
    for folder in _unfinished(directory):
        folder.rmtree()
    steps = _newest_first(directory)
    for path in steps:
        problem = damage(path)
        if problem is None:
            return
        aside = path.with_name(f"broken-{path.name}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        path.rename(aside)
        print(
            f"Checkpoint {path.name} in {directory} is damaged and kept as {aside.name} "
            f"({problem}).",
            file=sys.stderr,
        )
    if steps:
        raise UserError(
            f"None of the checkpoints in {directory} can be read; they are kept as broken-*. "
            "Run the command again to begin anew."
        )


def read_newest(workdir: Path, like: Any = None) -> Any:
    """Returns the state in the newest whole checkpoint. Only reads: a run may be going on there.

    Args:
        workdir: the run's directory.
        like: a TrainState of ShapeDtypeStructs with shardings; None: whatever is there, as dicts
            of NumPy arrays.

    Raises:
        UserError: there is none, none is whole, or it is of another state than `like`.
    """
    directory = _directory_of(workdir)
    unfinished = set(_unfinished(directory))
    problem = "there is none"
    for path in _newest_first(directory):
        if path in unfinished:
            continue
        problem = damage(path)
        if problem:
            problem = f"{path.name}: {problem}"
            continue
        with (
            _of_this_program(directory, int(path.name)),
            ocp.StandardCheckpointer() as checkpointer,
        ):
            if like is None:
                shapes = checkpointer.metadata(path / "state").item_metadata.tree
                like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
            return checkpointer.restore(path / "state", like)
    raise UserError(f"{directory} has no checkpoint that can be read ({problem}).")


def _directory_of(workdir: Path) -> Path:
    """Where the checkpoints of a run are, absolute, as orbax wants it."""
    # absolute() would take a bucket for a directory of the current one.
    workdir = workdir if workdir.is_absolute() else workdir.absolute()
    return workdir / "checkpoints"


def _newest_first(directory: Path) -> list[Path]:
    """The folders of the checkpoints."""
    steps = [path for path in directory.glob("*") if path.name.isdecimal()]
    return sorted(steps, key=lambda path: int(path.name), reverse=True)


@contextlib.contextmanager
def _of_this_program(directory: Path, step: int, otherwise: str = "") -> Iterator[None]:
    """Makes a UserError of what orbax says where a checkpoint is of another state."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        if refusal(error):
            raise
        raise UserError(
            f"Checkpoint {step} in {directory} is whole, but not of this program's state "
            f"({first_line(error)}): go back to the code that env.json names{otherwise}."
        ) from error


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    name = CHECKSUMS
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for name, checksum in checksums.items():
            if _checksum(folder / name) != checksum:
                return f"{name} does not match its checksum"
    except (ValueError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS}: {first_line(error)}"
    except OSError as error:
        # Anything else, such as a lack of permission, is no damage.
        gone = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        if not gone and error.errno != errno.EIO:
            raise
        return f"{name}: {error.strerror or 'it is not there'}"
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


@jit_once
def _any_run_is_finite(params: Any) -> jax.Array:
    """Whether all parameters of a run are finite; their leading axis is that of runs."""
    finite = [
        jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in jax.tree.leaves(params)
    ]
    return jnp.stack(finite).all(axis=0).any()
