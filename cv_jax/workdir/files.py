"""Reads and writes small files of a work directory, whole or not at all."""

import json
from typing import Any

import numpy as np
from etils import epath

from cv_jax.config.errors import UserError, first_line


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a whole file or nothing: a reader, or a kill, never meets half of it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text + "\n")
    scratch.replace(path)


AGAIN = "Start the run again with its command: it writes the file anew."


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        UserError: the file is not there or damaged.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: is {path.parent} the --workdir of a run?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}). {AGAIN}") from error
    return values


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON that any reader takes (no NaN), whole or not at all."""
    write_atomically(path, json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
