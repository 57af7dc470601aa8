"""Reads and writes small files of a work directory, whole or not at all."""

import json
from typing import Any

import numpy as np
from etils import epath

from cv_jax.config.errors import UserError, first_line


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a whole file or nothing: neither a reader nor a kill ever sees half of it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text + "\n")
    scratch.replace(path)


AGAIN = "Run the command of the run again: it rewrites the file."


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads the object in a JSON file of a run.

    Raises:
        UserError: the file does not exist or is damaged.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: choose the work directory of a run.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}). {AGAIN}") from error
    return values


def write_json(path: epath.Path, value: Any) -> None:
    """Writes standard JSON (null in place of NaN), whole or not at all."""
    write_atomically(path, json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
