"""Times whole trainings by the rule of the public records; `benchmarks.gpu` calls this.

The rule is that of K. Jordan's airbench, arXiv 2404.00498. A run is timed from the whitening of the
training images to the accuracy on test with all views, on the host. The clock counts the initial
parameters, all steps with the order of their batches, and the evaluation. The clock counts neither
loading, nor compiling, nor one warm-up run. A timed run writes no log and no checkpoint.
"""

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from cv_jax.config.durations import total_steps
from cv_jax.config.plan import MAX_STEPS, Intervals, plan_chunks
from cv_jax.data import Dataset
from cv_jax.data.batches import Batches, make_batches
from cv_jax.learn.inputs import make_normalize, to_unit
from cv_jax.models import build_model, compute_dtype
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.startup import jit_once
from cv_jax.tasks import build_task
from cv_jax.train.chunks import lower_train_chunk
from cv_jax.train.evaluator import Evaluator
from cv_jax.train.programs import make_programs
from cv_jax.train.runs import Runs, make_runs
from cv_jax.workdir.numbers import means
from cv_jax.workdir.result import device_name, summarize

TARGET = 0.94


class Program:
    """The programs of a training, compiled once and run for any seeds.

    A call of train.py with the same config and seed gives the same accuracy.

    Args:
        config: of the runs; `num_seeds` of them share each program. A call changes its `seed`.
            Its model is initialised from images, as n94 is, and its task is classification.
        data: the splits.
    """

    def __init__(self, config: ml_collections.ConfigDict, data: Dataset) -> None:
        self._config, self._data = config, data
        self._normalize = make_normalize(data.spec, config.data.normalize, config.data.normalize_by)
        self._model = build_model(config.model, data.spec.num_classes, compute_dtype(config.dtype))
        self.num_steps = total_steps(config, data.spec.num_train)
        runs, batches = self._prepare(config.seed)
        task = build_task(config, data.spec)
        programs = make_programs(config, data.spec, task, batches, runs)
        layout = runs.state_sharding(jax.eval_shape(programs.init, runs.own))
        self._init = jit_once(programs.init, out_shardings=layout)
        arguments = runs.own, self._init(runs.own), batches.feed(0, 1), runs.mesh
        lowered = [lower_train_chunk(chunk, *arguments) for chunk in programs.train_chunks]
        self._stages, self._train_chunks = task.stages, [x.compile() for x in lowered]
        # The evaluation reads no keys, so it serves every seed.
        self._evaluate = Evaluator(programs.evals, runs.own, data, config, runs.mesh, Clock())

    def _prepare(self, seed: int) -> tuple[Runs, Batches]:
        """Returns the runs from `seed` on, and their batches on the device."""
        self._config.seed = seed
        runs = make_runs(self._config)
        batches = make_batches(self._config, self._data.train, runs.own.keys.order, runs.mesh)
        # Compiles the order of an epoch. This is the second epoch: a run computes its first order.
        jax.block_until_ready(batches.feed(batches.limit(0), 1))
        return runs, batches

    def __call__(self, seed: int) -> dict[str, Any]:
        """Trains and evaluates the runs with the seeds `seed`, `seed` + 1, ...

        Returns:
            seeds; accuracies on test in [0, 1]; seconds of all runs together, by part: init,
            train, eval.
        """
        runs, batches = self._prepare(seed)
        intervals = Intervals(self.num_steps, log=0, eval=0, save=0)

        def limit(step: int) -> int:
            return min([batches.limit(step), *(x - step for x in self._stages if x > step)])

        start = time.perf_counter()
        # The whitening filters depend on the images alone. `_init` has the same as constants.
        self._model.params_from_images(self._normalize(to_unit(self._data.spec.sample["image"])))
        state = jax.block_until_ready(self._init(runs.own))
        begun = time.perf_counter()
        for chunk in plan_chunks(0, intervals, limit, lambda: MAX_STEPS):
            train_chunk = self._train_chunks[bisect_right(self._stages, chunk.start) - 1]
            feed = batches.feed(chunk.start, chunk.num_steps)
            state, _ = train_chunk(runs.own, state, feed, np.int32(chunk.num_steps))
        jax.block_until_ready(state)
        trained = time.perf_counter()
        accuracies = means(self._evaluate("final", state, "test"))["accuracy"].tolist()
        end = time.perf_counter()
        seconds = {"init": begun - start, "train": trained - begun, "eval": end - trained}
        seeds = list(range(seed, seed + len(accuracies)))
        return {"seeds": seeds, "accuracies": accuracies, "seconds": seconds}


def measure(
    config: ml_collections.ConfigDict,
    data: Dataset,
    rounds: int,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Times `rounds` calls of a Program after one warm-up call, each with new seeds; prints them.

    Args:
        config: of the runs; a call trains `num_seeds` of them.
        data: the splits.
        rounds: calls that are timed.
        write: is called after each round with the results so far, see `results_of`.
    """
    first, start = config.seed, time.perf_counter()
    program = Program(config, data)
    program(first)
    facts = {
        "device": device_name(),
        "dtype": str(compute_dtype(config.dtype)),
        "steps": program.num_steps,
        "batch_size": config.batch_size,
        "compile_and_warm_up_seconds": time.perf_counter() - start,
    }
    done: list[dict[str, Any]] = []
    for i in range(rounds):
        done.append(program(first + i * config.num_seeds))
        accuracies = " ".join(f"{value:.2%}" for value in done[-1]["accuracies"])
        seconds = sum(done[-1]["seconds"].values())
        print(f"seeds from {done[-1]['seeds'][0]:2d}: {seconds:.2f} s, {accuracies}", flush=True)
        write({**facts, **results_of(done, program.num_steps * config.batch_size)})


def results_of(rounds: Sequence[dict[str, Any]], examples: int) -> dict[str, Any]:
    """Returns statistics over the runs of all rounds, and the rounds.

    Args:
        rounds: results of a Program.
        examples: that one run draws. With `config.select` a run trains on a part of them.

    Returns:
        accuracy: statistics over the runs, see `result.summarize`.
        reached: the number of runs whose accuracy is at least TARGET.
        seconds: statistics over the rounds of the seconds of one run, which are the seconds of the
            round divided by its runs.
        images_per_second: examples drawn in a second of the training steps, of all runs together:
            the median over the rounds.
        rounds: as given.
    """
    accuracies = [value for of_round in rounds for value in of_round["accuracies"]]
    per_run = [sum(r["seconds"].values()) / len(r["seeds"]) for r in rounds]
    speeds = [len(r["seeds"]) * examples / r["seconds"]["train"] for r in rounds]
    return {
        "accuracy": summarize(accuracies, share=True),
        "target": TARGET,
        "reached": sum(value >= TARGET for value in accuracies),
        "seconds": summarize(per_run),
        "images_per_second": statistics.median(speeds),
        "rounds": list(rounds),
    }
