"""Watches the losses of training steps and stops a program whose runs have all diverged."""

from collections.abc import Callable, Sequence

import numpy as np

from cv_jax.config.errors import UserError

_REMEDIES = (
    "Earlier checkpoints are kept; lower config.optim.lr, lengthen config.optim.warmup or set "
    "config.optim.clip_norm"
)
# When every run has skipped this many steps in a row, the program stops. The number is fixed, so
# that it does not depend on how many steps a chunk or a row has.
MAX_SKIPPED = 10


class Divergence:
    """Knows which runs have diverged and how many steps in a row each run has skipped.

    Args:
        names: names of the runs.
        total: steps of the whole training. Shorter trainings stop after fewer skipped steps.
        epoch_text: step -> its epoch as text, for messages.
    """

    def __init__(self, names: Sequence[str], total: int, epoch_text: Callable[[int], str]):
        self._names = names
        self._epoch_text = epoch_text
        self._max_skipped = min(MAX_SKIPPED, total)
        self._skipped_in_a_row = np.zeros(len(names), int)
        self._diverged: set[int] = set()

    def watch(self, start: int, finite: dict[str, np.ndarray], skipped: np.ndarray) -> list[str]:
        """Looks at the next k steps. Returns a line for each run that has diverged in them.

        Args:
            start: steps before these k steps.
            finite: {loss: (r, k)}, whether the summed loss of a step is finite. A step that counts
                no example has the sum 0, and so has a skipped step.
            skipped: (r, k), whether `update.skip_nonfinite` skipped the step.

        Raises:
            UserError: all runs have diverged, or all have skipped too many steps in a row.
        """
        self._count_skipped(start, skipped)
        lines = []
        all_finite = np.logical_and.reduce([*finite.values(), np.ones(skipped.shape, bool)])
        for run in map(int, np.flatnonzero(~all_finite.all(axis=1))):
            if run in self._diverged:
                continue
            self._diverged.add(run)
            at = int(np.argmin(all_finite[run]))
            step = start + at + 1
            loss = next(name for name, of_steps in finite.items() if not of_steps[run, at])
            if len(self._diverged) == len(self._names):
                raise UserError(
                    f"The {loss} is not finite at step {step} ({self._epoch_text(step)}). "
                    f"{_REMEDIES}; if it is a single step, config.optim.skip_nonfinite=true skips "
                    "that step."
                )
            lines.append(
                f"{self._names[run]}: the {loss} is not finite at step {step}; others go on"
            )
        return lines

    def _count_skipped(self, start: int, skipped: np.ndarray) -> None:
        for step, at_step in enumerate(skipped.T, start + 1):
            self._skipped_in_a_row = (self._skipped_in_a_row + 1) * at_step
            if self._skipped_in_a_row.min() >= self._max_skipped:
                raise UserError(
                    f"The steps from {step - self._max_skipped + 1} to {step} "
                    f"({self._epoch_text(step)}) were all skipped: their loss or their new state "
                    f"was not finite. {_REMEDIES}."
                )
