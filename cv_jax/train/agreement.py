"""Makes sure that all processes of a program run the same code, config and data."""

import hashlib
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from cv_jax.config.base import flatten
from cv_jax.data import Dataset, load_dataset
from cv_jax.data.dataset import data_fingerprint
from cv_jax.runtime.processes import assert_equal_on_processes, on_all_processes
from cv_jax.runtime.startup import number_variables
from cv_jax.workdir.result import PACKAGES


def assert_same_program(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Raises UserError where a process has other code or was asked to do something else."""
    assert_equal_on_processes(partial(of_program, config, workdir))


def load_same_data(config_data: ml_collections.ConfigDict) -> Dataset:
    """Returns `load_dataset(config_data)`.

    Raises:
        UserError: as `load_dataset`, in any process; or a process has read other data.
    """
    data = on_all_processes(partial(load_dataset, config_data))
    assert_equal_on_processes(partial(data_fingerprint, data))
    return data


def of_program(config: ml_collections.ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Returns the code, the versions of its packages, and what the program was asked to do."""
    root = Path(__file__).resolve().parents[1]
    sources = [root.parent / "train.py", *sorted(root.rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {
        "code (a digest of train.py and cv_jax)": digest[:16],
        **{f"version of {name}": metadata.version(name) for name in PACKAGES},
        **{f"environment variable {k}": value for k, value in number_variables().items()},
        "--workdir": str(workdir),
        **{f"config.{key}": value for key, value in flatten(config).items()},
    }
