"""Runs train.py's command line: its start, its messages and its exit codes."""

import contextlib
import gc
import sys
from collections.abc import Callable
from functools import partial

import jax
import ml_collections
from absl import flags
from etils.epath import Path

from cv_jax.config.command_line import (
    check_command_line,
    gather_sweeps,
    make_default_workdir,
    resume_command,
)
from cv_jax.config.errors import UserError
from cv_jax.config.sweep import num_runs
from cv_jax.runtime.processes import (
    broadcast,
    join,
    leave,
    lost_process_ends_this,
    on_all_processes,
    on_process_0,
)
from cv_jax.runtime.signals import Stopped, is_busy, raise_when_signalled
from cv_jax.runtime.startup import prepare_jax
from cv_jax.workdir.bucket import work_directory
from cv_jax.workdir.result import print_result


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


def run_command(
    run: Callable[[ml_collections.ConfigDict, Path], dict],
    config: ml_collections.ConfigDict,
    config_file: str,
    workdir: str | None,
    process: tuple[str | None, int | None, int | None],
) -> None:
    """Calls run(config, directory). Ends the program where the user, or a signal, stops it.

    A mistake of the user gives one message, without a traceback.

    Args:
        run: trains and returns the result.
        config: the config of the runs.
        config_file: --config as it was given.
        workdir: --workdir; None: a new directory, named after the config and the time.
        process: arguments of `processes.join`.
    """
    directory = None
    raise_when_signalled()
    try:
        prepare_jax(num_runs(config))
        join(*process)
        chosen = broadcast(on_process_0(partial(choose_workdir, workdir, config_file)) or "")
        directory = on_all_processes(partial(work_directory, chosen))
        with lost_process_ends_this():
            result = run(config, directory)
        if jax.process_index() == 0:
            print_result(result, directory)
        if is_busy():  # with the steps of a stage that an early stop has left out
            leave(0, at_once=True)
    except UserError as error:
        if directory and not workdir:
            with contextlib.suppress(OSError):
                directory.rmdir()  # where nothing is in it yet
        leave(fail(error), at_once=is_busy())
    except Stopped as stopped:
        print(f"Stopped by {stopped}. To go on:\n  {resume_command(sys.argv, directory)}")
        leave(stopped.exit_code, at_once=is_busy())
    finally:
        gc.freeze()  # Python's end would look for cycles among all objects of JAX, for 0.7 s


def choose_workdir(workdir: str | None, config_file: str) -> str:
    """Returns `workdir`, or a new directory that is named after the config and the time."""
    return workdir or str(make_default_workdir(config_file))


def fail(error: UserError | flags.Error) -> int:
    """Prints the message and returns the exit code."""
    print(f"train.py: {error}", file=sys.stderr)
    return 2
