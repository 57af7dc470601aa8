"""What the commands in cv_jax/tools share: parser, console, and one sentence for an error."""

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
    """Adds --workdir, --run and --tta, which choose a trained network and how it is asked."""
    parser.add_argument("--workdir", required=True, help="of the run that trained the network")
    parser.add_argument("--run", default="", help="such as seed=3; default: first seed of the best")
    parser.add_argument("--tta", help="views of an image; default: as the run was evaluated")


@contextlib.contextmanager
def command(name: str, results: bool = True) -> Iterator[None]:
    """Guards the console of a command's main(), and ends it with a sentence for a UserError.

    Args:
        name: of the command, which the sentence begins with.
        results: see `guard_console`; False for a command that goes on without a console.
    """
    guard_console(results)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where the text that is left can still fail in order
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
