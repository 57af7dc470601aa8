"""Paths as people write them."""

import argparse
import os
from pathlib import Path

from cv_jax.config.errors import UserError


def expand(path: str) -> str:
    """Returns the path with the home directory in place of a ~ or ~USER that it begins with.

    Raises:
        UserError: there is no such home directory, as in a container whose user has no name.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(
            f"{path}: the home directory {user} is not known here; set HOME or write the whole "
            f"path, and ./{path} for a directory of this name."
        )
    return expanded


def path_argument(text: str) -> Path:
    """Returns the path of a command-line argument, for argparse's `type`."""
    try:
        return Path(expand(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
