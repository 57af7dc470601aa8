"""The parser, console and error messages shared by the commands in cv_jax/tools."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from cv_jax.config.errors import UserError
from cv_jax.runtime.console import guard_console


def make_parser(doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """Builds the parser of a command whose module has the docstring `doc`."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir, --run and --tta, which choose a trained network and its test-time views."""
    parser.add_argument("--workdir", required=True, help="work directory of the trained network")
    parser.add_argument("--run", default="", help="such as seed=3; default: first seed of the best")
    parser.add_argument("--tta", help="test-time views; default: those of the run's evaluation")


@contextlib.contextmanager
def command(name: str, results: bool = True) -> Iterator[None]:
    """Guards the console of a command's main(); a UserError ends the command with its message.

    Args:
        name: name of the command, printed before the message.
        results: see `guard_console`; False for a command that continues without a console.
    """
    guard_console(results)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, so that a failure to write becomes a UserError
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
