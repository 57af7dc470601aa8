"""Trains a network as a config says, and measures it.

    python train.py --config=configs/digits.py
    python train.py --config=configs/cifar10.py --config.seed=1 --config.epochs=2
    python train.py --config=configs/cifar10.py:smoke             # a run of seconds
    python train.py --config=configs/cifar10.py --workdir=runs/a  # the same again goes on there

Every leaf of a config can be given as --config.KEY=VALUE; cv_jax/config/base.py lists them all.
The run leaves config.json, env.json, metrics.jsonl, TensorBoard events, checkpoints and result.json
in its work directory. Ctrl-C or SIGTERM saves a checkpoint and prints the command that resumes the
run; a second one stops it at once.

Exit codes: 0 done; 2 something to mend, the message says what; 3 another process of the same
program was lost; 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

import contextlib
import signal
import sys
from functools import partial

from cv_jax.runtime.console import guard_console

if __name__ == "__main__":
    guard_console()
    # While it imports there is nothing to end in order.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax
import ml_collections
import numpy as np
from absl import app, flags
from etils.epath import Path
from ml_collections import config_flags

from cv_jax.config.command_line import (
    check_command_line,
    gather_sweeps,
    make_default_workdir,
    resume_command,
)
from cv_jax.config.errors import UserError
from cv_jax.config.plan import make_intervals, plan_chunks
from cv_jax.config.rules import check
from cv_jax.config.sweep import make_sweep, num_runs
from cv_jax.data import load_dataset
from cv_jax.data.batches import make_batches
from cv_jax.data.dataset import data_fingerprint
from cv_jax.learn.inputs import check_augmented
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.mesh import check_batch_size
from cv_jax.runtime.processes import (
    assert_equal_on_processes,
    broadcast,
    join,
    leave,
    lost_process_ends_this,
    on_all_processes,
    on_process_0,
)
from cv_jax.runtime.signals import Stopped, StopRequest, raise_when_signalled
from cv_jax.runtime.startup import jit_once, prepare_jax
from cv_jax.tasks import build_task, draw_all
from cv_jax.train.chunks import compile_train_chunk
from cv_jax.train.evaluator import Evaluator
from cv_jax.train.fingerprint import of_program
from cv_jax.train.flops import evaluation_flops, step_flops, training_flops
from cv_jax.train.profile import Profiler
from cv_jax.train.programs import make_programs, try_step
from cv_jax.train.runs import make_runs
from cv_jax.train.sweeps import check_sweep
from cv_jax.workdir.adopt import adopt_workdir
from cv_jax.workdir.bucket import work_directory
from cv_jax.workdir.checkpoints import Checkpoints
from cv_jax.workdir.log import Log
from cv_jax.workdir.metric import Metric
from cv_jax.workdir.numbers import means
from cv_jax.workdir.result import (
    finished_result,
    print_result,
    write_data,
    write_environment,
    write_result,
)
from cv_jax.workdir.storage import storage_errors

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: configs/NAME.py, or configs/NAME.py:smoke.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run keeps everything, a directory or gs://BUCKET/PATH; runs/<config>/<time> when "
    "not given.",
)
_PROFILE_STEPS = flags.DEFINE_integer(
    "profile_steps", 0, "Steps to trace into <workdir>/profile; 0: none."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes, where nothing says so."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")


def run(config: ml_collections.ConfigDict, workdir: Path, profile_steps: int = 0) -> dict:
    """Trains as `config` says, from where `workdir` stopped if it did. Returns the result."""
    assert_equal_on_processes(partial(of_program, config, workdir))
    check(config)
    sweep = make_sweep(config)
    runs = make_runs(config, sweep)
    check_batch_size(config.batch_size, runs.mesh)
    clock = Clock()
    with clock("data"):
        data = on_all_processes(partial(load_dataset, config.data))
        assert_equal_on_processes(partial(data_fingerprint, data))
    with clock("init"):
        task = build_task(config, data.spec)
    metric = task.metrics.get(task.headline, Metric())
    intervals = make_intervals(config, data.spec.num_train, data.spec.num_val)
    batches = make_batches(config, data.train, runs.own.keys.order, runs.mesh)
    try_step(task, batches.shapes)
    check_sweep(sweep, config, data.spec, batches.shapes)
    programs = make_programs(config, data.spec, task, sweep, batches, runs)
    with clock("compile"):
        augmented = programs.preview(runs.own, batches.feed(0, 1), np.int32(0))
    notes = [*data.notes, *check_augmented(config.augment, augmented, data.spec)]

    with (
        storage_errors(workdir),
        Checkpoints(workdir, config.keep_checkpoints, metric) as checkpoints,
        lost_process_ends_this(),  # before the checkpoints wait for it
    ):
        changes = on_process_0(partial(adopt_workdir, workdir, config))
        layout = runs.state_sharding(jax.eval_shape(programs.init, runs.own))
        init = jit_once(programs.init, out_shardings=layout)
        restored = checkpoints.restore_latest(like=init.eval_shape(runs.own))
        with clock("compile"):
            state, progress = restored or (init(runs.own), {"seconds": {}, "window": {}})
        clock.add(progress["seconds"])
        write_data(workdir, data)
        if result := finished_result(workdir, int(state.step), intervals.total):
            return result

        on_process_0(partial(write_environment, workdir, goes_on=bool(restored)))
        train_chunk = compile_train_chunk(
            programs.train_chunk, runs.own, state, batches, runs.mesh, clock
        )
        evaluate = Evaluator(programs.evals, runs.own, data, config, runs.mesh, clock)
        log = Log(
            workdir,
            config,
            data.spec,
            runs.names,
            int(state.step),
            intervals,
            task.metrics,
            task.headline,
            progress["window"],
            task.warn,
        )

        def last_step_flops() -> int:
            return len(runs.names) * step_flops(task, batches.shapes, int(state.step) - 1)

        num_left = intervals.total - int(state.step)
        with (
            log,
            Profiler(
                profile_steps, num_left, workdir, config.dtype, last_step_flops, log, clock
            ) as profiler,
        ):
            log.begin(changes, [*task.notes, *notes, *runs.notes])
            step = np.int32(state.step)
            log.preview(
                draw_all(task, programs.preview(runs.own, batches.feed(int(step), 1), step))
            )
            with StopRequest() as stop, clock("train"):
                for chunk in plan_chunks(int(state.step), intervals, batches.limit, profiler.pace):
                    with profiler(chunk):
                        feed = batches.feed(chunk.start, chunk.num_steps)
                        state, metrics = train_chunk(
                            runs.own, state, feed, np.int32(chunk.num_steps)
                        )
                        log.train(chunk, metrics)
                    log.histograms(chunk, state.params, runs.mesh)
                    val = means(evaluate("watch", state, "val")) if chunk.evals else {}
                    log.evals(chunk.end, "val", val)
                    signum = stop()  # looked at once: what stops the run has been saved
                    if chunk.saves or signum:
                        log.save()
                        progress = {"seconds": clock.read(), "window": log.window()}
                        with clock("save"):
                            checkpoints.save(state, progress, val.get(task.headline))
                    log.row()
                    if signum:
                        raise Stopped(signum, chunk.end)
            sums = {split: evaluate("final", state, split) for split in ("val", "test")}
            log.finals(intervals.total, sums, data.spec.class_names)

    num_evaluated = data.spec.num_val + data.spec.num_test
    flops = {
        "training": training_flops(task, batches.shapes, intervals.total),
        "evaluation": evaluation_flops(task, data.spec, num_evaluated),
    }
    with storage_errors(workdir):
        return write_result(
            workdir,
            config,
            data.spec,
            sweep.settings,
            intervals.total,
            sums,
            flops,
            clock.read(),
            task.metrics,
            task.headline,
        )


def main(argv: list[str]) -> None:
    """Runs one training; whatever the user can mend comes as one message, without a traceback."""
    del argv
    workdir = None
    raise_when_signalled()
    try:
        prepare_jax(num_runs(_CONFIG.value))
        join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        workdir = on_all_processes(
            partial(work_directory, broadcast(on_process_0(choose_workdir) or ""))
        )
        with lost_process_ends_this():
            result = run(_CONFIG.value, workdir, _PROFILE_STEPS.value)
        if jax.process_index() == 0:
            print_result(result, workdir)
    except UserError as error:
        if workdir and not _WORKDIR.value:
            with contextlib.suppress(OSError):
                workdir.rmdir()  # where nothing is in it yet
        leave(fail(error))
    except Stopped as stopped:
        print(f"Stopped by {stopped}. To go on:\n  {resume_command(sys.argv, workdir)}")
        leave(stopped.exit_code)


def choose_workdir() -> str:
    """Returns --workdir, or a new directory that is named after the config and the time."""
    if _WORKDIR.value:
        return _WORKDIR.value
    return str(make_default_workdir(config_flags.get_config_filename(flags.FLAGS["config"])))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake in it gives one clear sentence."""
    try:
        argv = sys.argv = gather_sweeps(argv)  # config_flags looks at sys.argv
        check_command_line(argv)
        _, *others = flags.FLAGS(argv)
        if others:
            raise UserError(f"{others[0]!r} is not understood; a key is --config.KEY=VALUE.")
    except (UserError, flags.Error) as error:
        sys.exit(fail(error))
    return argv[:1]


def fail(error: UserError | flags.Error) -> int:
    """Prints the message and returns the exit code."""
    print(f"train.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
