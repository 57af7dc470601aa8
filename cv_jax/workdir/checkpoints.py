"""Writes the checkpoints of a run in the background, verifies them and restores them."""

import contextlib
import errno
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
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
from cv_jax.workdir.metric import Metric
from cv_jax.workdir.numbers import finite_mean

# CRC-32 of every file of a checkpoint, verified before orbax opens the file: TensorStore does not
# detect flipped bits, and orbax prints tracebacks over files that it cannot read.
CHECKSUMS = "checksums.json"
_HIGHER = Metric()


class Checkpoints:
    """The checkpoints under `<workdir>/checkpoints`: the newest few and the best on val.

    Opening removes checkpoints that a kill left half-written. A damaged checkpoint is named on
    stderr and renamed to broken-STEP. The checkpoint before it is the newest then.

    Args:
        workdir: the run's directory. It is locked against other programs.
        keep: how many of the newest checkpoints are kept.
        metric: the meaning of the headline, by which the best on val is chosen.

    Raises:
        UserError: another program has the directory, the directory cannot be written, not all
            processes see it, or all checkpoints in it are damaged.
    """

    def __init__(self, workdir: Path, keep: int, metric: Metric = _HIGHER):
        self._lock = on_process_0(partial(Lock, workdir))
        workdir = Path(workdir)
        self._directory = _directory_of(workdir)
        self._best = _BestOnVal(metric)
        self._keep = keep
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

    def save(self, state: Any, progress: dict, val_headline: np.ndarray | None) -> None:
        """Starts to write a checkpoint, in the background.

        Args:
            state: a TrainState of all runs; its step names the checkpoint.
            progress: what else the run needs to resume, as JSON values.
            val_headline: (r,), the headline on val of each run, where val was evaluated at this
                step. The checkpoint with the fewest diverged runs is the best, and among equals the
                one with the best mean over the others.

        Raises:
            UserError: no run has finite parameters. The earlier checkpoints are kept.
        """
        step = int(state.step)
        if not _any_run_is_finite(state.params):
            raise UserError(
                f"A parameter is not finite after step {step}, so that this step is not saved; "
                "earlier checkpoints are kept. Lower config.optim.lr, lengthen config.optim.warmup "
                "or set config.optim.clip_norm."
            )
        if step == self._manager.latest_step():
            return
        if val_headline is not None:
            self._best.add(step, np.asarray(val_headline))
        # A copy, because the next chunk of steps reuses this state's memory.
        state = _copy(state)
        progress = {"progress": progress, "val_headline": dict(self._best.values)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
        )

    def rank(self, step: int, val_headline: np.ndarray | None) -> None:
        """Takes the headline on val at an earlier step, whose checkpoint was saved without it.

        Removes checkpoints that were kept only because they were the best until then.
        """
        if val_headline is None:
            return
        self._best.add(step, np.asarray(val_headline))
        infos = [SimpleNamespace(step=saved) for saved in sorted(self._manager.all_steps())]
        are_best = self._best.should_preserve(infos, context=None)
        for info, is_best in list(zip(infos, are_best, strict=True))[: -self._keep]:
            if not is_best:
                self._manager.delete(info.step)

    def _add_checksums(self) -> None:
        """Adds checksums to the checkpoint that was just written, before orbax finishes it."""
        (folder,) = _unfinished(self._directory)
        checksums = {
            str(path.relative_to(folder)): _checksum(path)
            for item in sorted(folder.iterdir())
            if item.is_dir()  # orbax writes the files at the top after this
            for path in _files(item)
        }
        (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2))

    def exist(self) -> bool:
        """Returns whether there is a checkpoint."""
        return self._manager.latest_step() is not None

    def restore_latest(self, like: Any) -> tuple[Any, dict] | None:
        """Returns (state, progress) of the newest checkpoint, or None where there is none.

        Args:
            like: a TrainState of ShapeDtypeStructs with shardings.

        Raises:
            UserError: the checkpoint holds another state than `like`.
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
        if "val_headline" in progress:
            values = progress["val_headline"]
        else:  # of older code, which saved one number for all runs
            values = {
                step: [1.0, mean]
                for step, mean in progress["val_accuracies"].items()
                if np.isfinite(mean)
            }
        self._best.values = {int(step): tuple(pair) for step, pair in values.items()}
        return restored["state"], progress["progress"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits until all checkpoints are written, also when the training ends in an error."""
        try:
            self._manager.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock:
            self._lock.close()


def _check_shared(workdir: Path) -> None:
    """Raises UserError where this process does not see the lock of process 0."""
    path = workdir / "lock"
    owner = path.read_text() if path.exists() else ""
    if owner != broadcast(owner):
        raise UserError(
            f"{workdir} is another directory here than in process 0: choose a --workdir on storage "
            "that all processes share."
        )


class _BestOnVal:
    """Orbax's PreservationPolicy for the checkpoint with the best headline on val.

    Attributes:
        values: step -> (share of the runs with a finite headline, their mean).
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self.values: dict[int, tuple[float, float]] = {}

    def add(self, step: int, headline: np.ndarray) -> None:
        """Takes the headline (r,) of a step. Where no run has one, the step is never the best."""
        share = float(np.isfinite(headline).mean())
        if share:
            self.values[step] = share, finite_mean(headline)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        there = {info.step for info in checkpoints}
        self.values = {step: pair for step, pair in self.values.items() if step in there}
        best = max(self.values, key=self._rank, default=None)
        return [info.step == best for info in checkpoints]

    def _rank(self, step: int) -> tuple[float, float]:
        share, mean = self.values[step]
        return share, self._metric.rank(mean)


def _unfinished(directory: Path) -> list[Path]:
    """Returns the folders of unfinished checkpoints: being written, or left behind by a kill.

    On a disk, orbax renames a folder when its checkpoint is whole. A bucket cannot rename: there
    the object that is written last marks the checkpoint as whole.
    """
    if in_bucket(directory):
        steps = [path for path in directory.glob("*") if path.name.isdecimal()]
        return [path for path in steps if not (path / "commit_success.txt").exists()]
    return [path for path in directory.glob("*.orbax-checkpoint-tmp*") if path.is_dir()]


def _files(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _clear(directory: Path) -> None:
    """Removes unfinished checkpoints, and renames damaged ones that are newer than a whole one.

    Orbax would remove unfinished checkpoints too, but in a thread that prints a traceback where the
    program ends first.
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
            "Run the command again to start from step 0."
        )


def read_newest(workdir: Path) -> dict[str, Any]:
    """Reads the state in the newest whole checkpoint, as dicts of NumPy arrays.

    Changes no file, so the run may be training.

    Raises:
        UserError: there is no checkpoint, or none is whole.
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
        # Not the checkpointer's own metadata, which warns of a file that such a folder lacks.
        shapes = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path / "state", like)
    raise UserError(f"{directory} has no checkpoint that can be read ({problem}).")


def _directory_of(workdir: Path) -> Path:
    """Returns the directory of a run's checkpoints, as the absolute path that orbax needs."""
    # absolute() would make a bucket a folder of the current directory.
    workdir = workdir if workdir.is_absolute() else workdir.absolute()
    return workdir / "checkpoints"


def _newest_first(directory: Path) -> list[Path]:
    """Returns the folders of the checkpoints."""
    steps = [path for path in directory.glob("*") if path.name.isdecimal()]
    return sorted(steps, key=lambda path: int(path.name), reverse=True)


@contextlib.contextmanager
def _of_this_program(directory: Path, step: int, otherwise: str = "") -> Iterator[None]:
    """Turns orbax's error over a checkpoint of another state into a UserError."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        if refusal(error):
            raise
        raise UserError(
            f"Checkpoint {step} in {directory} is whole, but holds another state than this "
            f"program's ({first_line(error)}): use the code that env.json names{otherwise}."
        ) from error


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files; None where nothing is."""
    name = CHECKSUMS
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for name, checksum in checksums.items():
            if _checksum(folder / name) != checksum:
                return f"{name} does not match its checksum"
    except (ValueError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS}: {first_line(error)}"
    except OSError as error:
        # Other errors, such as a lack of permission, are no damage.
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


@jax.jit
def _copy(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)  # one program for all arrays: each would be one more


@jit_once
def _any_run_is_finite(params: Any) -> jax.Array:
    """Returns whether some run has only finite parameters; their leading axis is that of runs."""
    finite = [
        jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in jax.tree.leaves(params)
    ]
    return jnp.stack(finite).all(axis=0).any()
