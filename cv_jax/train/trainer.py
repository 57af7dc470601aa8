"""Trains all runs of a program: their first state, and many steps in one dispatch."""

from typing import Any

import jax
import ml_collections
import numpy as np

from cv_jax.config.plan import Chunk
from cv_jax.data import Dataset
from cv_jax.data.batches import make_batches
from cv_jax.learn.inputs import check_augmented
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.signals import answer_signals_during
from cv_jax.runtime.startup import jit_once
from cv_jax.tasks import Task, draw_all
from cv_jax.train.chunks import compile_train_chunk
from cv_jax.train.flops import evaluation_flops, step_flops, training_flops
from cv_jax.train.programs import make_programs, try_step
from cv_jax.train.runs import Runs
from cv_jax.train.sweeps import check_sweep


class Trainer:
    """The training of a task, as programs of all runs.

    Building a Trainer traces one step and augments one batch. So a mistake in the config shows
    before anything is written.

    Args:
        config: the config of the runs.
        data: the splits; the Trainer reads train.
        task: what is trained.
        runs: the runs.
        clock: counts "compile".

    Attributes:
        evals: evaluations by name, see `programs.Programs`.
        limit: step -> the most steps that one dispatch may make from there on.
        shapes: a state of all runs, as ShapeDtypeStructs with shardings.
        notes: lines that the log shows at the start.
        dtype: of the computation, as `config.dtype` names it.

    Raises:
        UserError: the config does not fit the data.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        data: Dataset,
        task: Task,
        runs: Runs,
        clock: Clock,
    ):
        self._task, self._spec, self._runs, self._clock = task, data.spec, runs, clock
        self._batches = make_batches(config, data.train, runs.own.keys.order, runs.mesh)
        with clock("compile"):
            try_step(task, self._batches.shapes, runs.mesh)
        check_sweep(runs.sweep, config, data.spec, self._batches.shapes)
        self._programs = make_programs(config, data.spec, task, self._batches, runs)
        self.evals, self.limit = self._programs.evals, self._batches.limit
        with clock("compile"):
            lowered = self._programs.preview.lower(*self._first(0))
            self._augment = answer_signals_during(lowered.compile)
            examples = self._augment(*self._first(0))
        self.notes = check_augmented(config.augment, examples, data.spec)
        layout = runs.state_sharding(jax.eval_shape(self._programs.init, runs.own))
        self._init = jit_once(self._programs.init, out_shardings=layout)
        self.shapes = self._init.eval_shape(runs.own)
        self.dtype = config.dtype
        self._last_step = 0

    def init(self) -> Any:
        """Returns the first state of all runs."""
        with self._clock("compile"):
            lowered = self._init.lower(self._runs.own)
            return answer_signals_during(lowered.compile)(self._runs.own)

    def compile(self, state: Any) -> None:
        """Compiles the training steps; `state` is laid out as the states that will come."""
        self._train_chunk = compile_train_chunk(
            self._programs.train_chunk,
            self._runs.own,
            state,
            self._batches,
            self._runs.mesh,
            self._clock,
        )

    def __call__(self, state: Any, chunk: Chunk) -> tuple[Any, dict]:
        """Makes the steps of a chunk, in one dispatch. Replaces `state`.

        Returns:
            state; and metrics, (sum, count) pairs (r, MAX_STEPS) with a column for each step.
        """
        feed = self._batches.feed(chunk.start, chunk.num_steps)
        self._last_step = chunk.end - 1
        return self._train_chunk(self._runs.own, state, feed, np.int32(chunk.num_steps))

    def preview(self, step: int) -> np.ndarray:
        """Returns pictures (m, h, w, 3) of augmented examples of a step, of the first run."""
        return draw_all(self._task, self._augment(*self._first(step)))

    def _first(self, step: int) -> tuple[Any, Any, np.int32]:
        """Returns the arguments of `programs.Programs.preview`."""
        return self._runs.own, self._batches.feed(step, 1), np.int32(step)

    def step_flops(self) -> int:
        """Returns the FLOPs of the newest step, of all runs together."""
        of_run = step_flops(self._task, self._batches.shapes, self._last_step)
        return len(self._runs.names) * of_run

    def flops(self, steps: int) -> dict[str, int]:
        """Returns the FLOPs of one run: of so many training steps, and of the final evaluation."""
        num_evaluated = self._spec.num_val + self._spec.num_test
        return {
            "training": training_flops(self._task, self._batches.shapes, steps),
            "evaluation": evaluation_flops(self._task, self._spec, num_evaluated),
        }
