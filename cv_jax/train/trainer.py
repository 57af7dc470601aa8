"""Trains all runs of a program: their first state, and many steps in one dispatch."""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import ml_collections
import numpy as np

from cv_jax.config.plan import MAX_STEPS, Chunk
from cv_jax.data import Dataset
from cv_jax.data.batches import make_batches
from cv_jax.learn.inputs import check_augmented
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.signals import (
    CutShort,
    answer_signals_during,
    call_in_thread,
    never,
    wait_for,
)
from cv_jax.runtime.startup import jit_once
from cv_jax.tasks import Task, draw_all
from cv_jax.train.chunks import lower_train_chunk
from cv_jax.train.flops import evaluation_flops, step_flops, traced_flops, training_flops
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
            self._first_step = try_step(task, self._batches.shapes, runs.mesh)
        check_sweep(runs.sweep, config, data.spec, self._batches.shapes)
        self._programs = make_programs(config, data.spec, task, self._batches, runs)
        self.evals = self._programs.evals
        with clock("compile"):
            own, feed, step = self._first(0)
            self._feed_shapes = jax.tree.map(_shape, feed)
            lowered = self._programs.preview.lower(own, feed, step)
            self._augment = answer_signals_during(
                lowered.compile, doing="compiling the augmentation"
            )
            examples = self._augment(own, feed, step)
        self.notes = check_augmented(config.augment, examples, data.spec)
        layout = runs.state_sharding(jax.eval_shape(self._programs.init, runs.own))
        self._init = jit_once(self._programs.init, out_shardings=layout)
        self.shapes = self._init.eval_shape(runs.own)
        self.dtype = config.dtype
        self._stage, self._coming = -1, None  # the compiled stage, and the next one's Future

    def init(self) -> Any:
        """Returns the first state of all runs; begins to compile the first steps meanwhile."""
        self._begin_to_compile(self._stage_of(0))
        with self._clock("compile"):
            lowered = self._init.lower(self._runs.own)
            init = answer_signals_during(lowered.compile, doing="compiling the first state")
            return init(self._runs.own)

    def compile(self, step: int, stop: Callable[[], int] = never) -> None:
        """Waits until the training steps of the stage of `step` are compiled.

        A thread compiles them while the steps of the stage before run. The wait ends at once where
        `stop` asks to stop.
        """
        stage, count = self._stage_of(step), len(self._task.stages)
        if stage == self._stage:
            return
        if not self._coming:  # the run was resumed
            self._begin_to_compile(stage)
        doing = "compiling the training step"
        if count > 1:
            doing += f", stage {stage + 1} of {count}"
        with self._clock("compile"), suppress(CutShort):
            self._train_chunk = wait_for(self._coming, stop, doing)
            self._stage, self._coming = stage, None

    def _begin_to_compile(self, stage: int) -> None:
        arguments = self._runs.own, self.shapes, self._feed_shapes, self._runs.mesh
        train_chunk = self._programs.train_chunks[stage]
        self._coming = call_in_thread(lambda: lower_train_chunk(train_chunk, *arguments).compile())

    def _stage_of(self, step: int) -> int:
        return bisect_right(self._task.stages, step) - 1

    def _steps_left(self, step: int) -> int:
        """Returns the steps from `step` to the next stage."""
        return min([start - step for start in self._task.stages if start > step], default=MAX_STEPS)

    def limit(self, step: int) -> int:
        """Returns the most steps that one dispatch may make from `step` on."""
        return min(self._batches.limit(step), self._steps_left(step))

    def __call__(self, state: Any, chunk: Chunk) -> tuple[Any, dict]:
        """Makes the steps of a chunk, in one dispatch. Replaces `state`.

        Returns:
            state; and metrics, (sum, count) pairs (r, MAX_STEPS) with a column for each step.
        """
        feed = self._batches.feed(chunk.start, chunk.num_steps)
        done = self._train_chunk(self._runs.own, state, feed, np.int32(chunk.num_steps))
        following = self._stage_of(chunk.start + self._steps_left(chunk.start))
        if following > self._stage and not self._coming:
            self._begin_to_compile(following)  # while the devices are at work
        return done

    def preview(self, step: int) -> np.ndarray:
        """Returns pictures (m, h, w, 3) of augmented examples of a step, of the first run."""
        return draw_all(self._task, self._augment(*self._first(step)))

    def _first(self, step: int) -> tuple[Any, Any, np.int32]:
        """Returns the arguments of `programs.Programs.preview`."""
        return self._runs.own, self._batches.feed(step, 1), np.int32(step)

    def step_flops(self) -> int:
        """Returns the FLOPs of the newest step, of all runs together."""
        return len(self._runs.names) * self._flops_of(self._stage)

    def flops(self, steps: int) -> dict[str, int]:
        """Returns the FLOPs of one run: of so many training steps, and of the final evaluation."""
        num_evaluated = self._spec.num_val + self._spec.num_test
        return {
            "training": training_flops(self._task.stages, self._flops_of, steps),
            "evaluation": evaluation_flops(self._task, self._spec, num_evaluated),
        }

    def _flops_of(self, stage: int) -> int:
        """Returns the FLOPs of a step of one run."""
        if stage == 0:
            return traced_flops(self._first_step)
        return step_flops(self._task, self._batches.shapes, stage)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    """Returns what a program must know of an array, on devices or of NumPy."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
