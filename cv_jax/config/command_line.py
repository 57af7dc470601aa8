"""Reads the command line: --config.KEY=VALUE, sweeps, and the command that resumes a run."""

import ast
import os
import runpy
import shlex
import time
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from etils import epath

from cv_jax.config.base import flatten
from cv_jax.config.errors import UserError, nearest
from cv_jax.config.rules import _check_key, _check_type


def check_command_line(argv: list[str]) -> None:
    """Checks --config and every --config.KEY of a command line before absl parses it.

    Raises:
        UserError: --config is missing, its file does not exist or builds no config, the config
            lacks a key, or a value is not of the key's type.
    """
    arguments = [f"--{a.lstrip('-')}" if a.startswith("-") else a for a in argv[1:]]
    if any(a.startswith("--help") for a in arguments):
        return
    chosen = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    if "--config" in arguments[:-1]:
        chosen.append(arguments[arguments.index("--config") + 1])
    files = sorted(str(path) for path in Path("configs").glob("*.py"))
    if not chosen:
        raise UserError(
            f"--config is missing: choose an experiment, --config=FILE. There are: "
            f"{', '.join(files)}."
        )
    path, *arg = chosen[-1].split(":", 1)
    if not os.path.isfile(path):
        raise UserError(
            f"There is no config file {path!r}.{nearest(path, files)} "
            f"There are: {', '.join(files)}."
        )
    leaves = flatten(_load(path, *arg))
    for argument in arguments:
        if argument.startswith("--config."):
            key, equals, text = argument.removeprefix("--config.").partition("=")
            _check_key(key, leaves)
            if not equals:
                raise UserError(f"--config.{key} has no value: write --config.{key}=VALUE.")
            _check_text(key, text, leaves[key])


def _load(path: str, *arg: str) -> ml_collections.ConfigDict:
    try:
        config = runpy.run_path(path)["get_config"](*arg)
    except UserError:
        raise
    except Exception as error:  # whatever the file does
        raise UserError(
            f"{path} builds no config ({type(error).__name__}: {error}). Define a function "
            "get_config(arg='') that returns one, as the files in configs/ do."
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config returned {config!r}; return a ConfigDict.")
    return config


def _check_text(key: str, text: str, default: Any) -> None:
    """Checks that a command-line value parses as the type of the key's default."""
    read = {
        bool: flags.BooleanParser().parse,
        int: flags.IntegerParser().parse,
        float: flags.FloatParser().parse,
        tuple: ast.literal_eval,
    }.get(type(default), str)
    try:
        value = read(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = text
    _check_type(key, value, default)


def gather_sweeps(argv: list[str]) -> list[str]:
    """Combines all --config.sweep.KEY=(VALUE, VALUE, ...) into one --config.sweep.

    Raises:
        UserError: the values are not a Python tuple of numbers or texts.
    """
    others, sweeps = [], []
    for argument in argv:
        name, _, text = argument.lstrip("-").partition("=")
        key = name.removeprefix("config.sweep.")
        if key == name:
            others.append(argument)
            continue
        try:
            values = ast.literal_eval(text)
            if not isinstance(values, tuple | list):
                raise TypeError(values)
            sweeps.append((key, tuple(values)))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise UserError(
                f'{argument}: write the values as "(0.1, 0.2)", each text in its own quotes.'
            ) from error
    return [*others, f"--config.sweep={tuple(sweeps)}"] if sweeps else others


def make_default_workdir(config_file: str) -> Path:
    """Creates runs/<config>/<time> for a config file such as "configs/digits.py:smoke".

    A run that starts in the same second gets runs/<config>/<time>-2, and so on.

    Raises:
        UserError: the directory cannot be created.
    """
    path, _, arg = config_file.partition(":")
    name = Path(path).stem + (f"-{arg}" if arg else "")
    first = Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
    directory, number = first, 1
    while True:
        try:
            directory.mkdir(parents=True)  # fails where another run has just made it
            return directory
        except OSError as error:
            if not directory.is_dir():
                raise UserError(
                    f"{directory} cannot be created ({error.strerror}); choose another directory "
                    "with --workdir."
                ) from error
        number += 1
        directory = first.with_name(f"{first.name}-{number}")


def resume_command(argv: list[str], workdir: epath.Path | None) -> str:
    """Returns the shell command that resumes the run.

    Args:
        argv: arguments of this program.
        workdir: work directory of the run; None where it stopped before it had one.
    """
    given = any(argument.lstrip("-").partition("=")[0] == "workdir" for argument in argv)
    return "python " + shlex.join(argv if given or not workdir else [*argv, f"--workdir={workdir}"])
