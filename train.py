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

import signal

from cv_jax.runtime.console import guard_console
from cv_jax.runtime.huge_pages import use_huge_pages

if __name__ == "__main__":
    # While it imports there is nothing to end in order.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    use_huge_pages()
    guard_console()

from functools import partial

import ml_collections
from absl import app, flags
from etils.epath import Path
from ml_collections import config_flags

from cv_jax.config.plan import make_intervals, plan_chunks
from cv_jax.config.rules import check
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.signals import Stopped, StopRequest
from cv_jax.tasks import build_task
from cv_jax.train.agreement import assert_same_program, load_same_data
from cv_jax.train.command import parse_flags, run_command
from cv_jax.train.evaluator import Evaluator
from cv_jax.train.profile import Profiler
from cv_jax.train.runs import make_runs
from cv_jax.train.trainer import Trainer
from cv_jax.workdir.directory import Workdir

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


def run(config: ml_collections.ConfigDict, directory: Path, profile_steps: int = 0) -> dict:
    """Trains as `config` says, from where `directory` stopped if it did. Returns the result."""
    assert_same_program(config, directory)
    check(config)
    runs = make_runs(config)
    clock = Clock()
    with clock("data"):
        data = load_same_data(config.data)
    with clock("init"):
        task = build_task(config, data.spec)
    intervals = make_intervals(config, data.spec.num_train, data.spec.num_val)
    trainer = Trainer(config, data, task, runs, clock)
    stop = StopRequest()
    evaluate = Evaluator(trainer.evals, runs.own, data, config, runs.mesh, clock, stop)
    notes = [*task.notes, *data.notes, *trainer.notes, *runs.notes]

    with Workdir(directory, config, data, task, intervals, clock) as workdir:
        state = workdir.restore(like=trainer.shapes) or trainer.init()
        if result := workdir.finished():
            return result
        workdir.write_environment()
        start = int(state.step)
        trainer.compile(start)
        log = workdir.open_log()
        profiler = Profiler(profile_steps, intervals.total - start, directory, trainer, log, clock)
        log.begin(workdir.changes, notes)
        log.preview(trainer.preview(start))
        evaluate.compile(trainer.shapes)
        with profiler, stop:
            if workdir.val_is_due:  # it was cut short when the run was stopped
                workdir.catch_up(evaluate.watch(state))
                stop.raise_if_asked(start)
            with clock("train"):
                for chunk in plan_chunks(
                    start, intervals, trainer.limit, profiler.pace, workdir.is_over
                ):
                    with profiler(chunk):
                        state, metrics = trainer(state, chunk)  # many steps in one dispatch
                        log.train(chunk, metrics)  # fetched late: the device never waits
                    log.histograms(chunk, state.params, runs.mesh)
                    val = evaluate.watch(state) if chunk.evals else {}
                    workdir.evals(chunk.end, val)
                    log.row()
                    trainer.compile(chunk.end, stop)  # where a new stage begins
                    signum = stop()  # looked at once: what stops the run has been saved
                    if chunk.saves or signum or workdir.is_over():
                        workdir.save(state, val)
                    if signum:
                        raise Stopped(signum, chunk.end)
            steps = workdir.end(int(state.step))  # fewer where val has ceased to improve
            sums = evaluate.final(state)
            stop.raise_if_asked(steps)
        log.finals(steps, sums, data.spec.class_names)
    return workdir.write_result(sums, trainer.flops(steps))


def main(argv: list[str]) -> None:
    """Runs one training; whatever the user can mend comes as one message, without a traceback."""
    del argv
    run_command(
        partial(run, profile_steps=_PROFILE_STEPS.value),
        _CONFIG.value,
        config_flags.get_config_filename(flags.FLAGS["config"]),
        _WORKDIR.value,
        process=(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value),
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
