"""Paths as users write them."""

import argparse
import os
from pathlib import Path

from cv_jax.config.errors import UserError


def expand(path: str) -> str:
    """Replaces a leading ~ or ~USER by the home directory.

    Raises:
        UserError: the home directory is unknown, as in a container whose user has no name.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(
            f"{path}: the home directory {user} is unknown here. Set HOME or write the whole "
            f"path; write ./{path} for a directory of this name."
        )
    return expanded


def path_argument(text: str) -> Path:
    """Converts a command-line argument to a path, as the `type` of an argparse argument."""
    try:
        return Path(expand(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
