"""What has to be the same in all processes of a program."""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from cv_jax.config.base import flatten
from cv_jax.runtime.startup import number_variables
from cv_jax.workdir.result import PACKAGES


def of_program(config: ml_collections.ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """The code, the versions of what it is built on, and what it was asked to do."""
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
