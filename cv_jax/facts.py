"""What has to be the same in all processes of a program."""

import hashlib
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from cv_jax.config import flatten
from cv_jax.data import Dataset
from cv_jax.result import PACKAGES
from cv_jax.startup import number_variables


def of_program(config: ml_collections.ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """The code, the versions of what it is built on, and what it was asked to do."""
    root = Path(__file__).resolve().parent
    sources = [root.parent / "train.py", *sorted(root.rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {
        "code (a digest of train.py and cv_jax)": digest[:16],
        **{f"version of {name}": metadata.version(name) for name in PACKAGES},
        **{f"environment variable {k}": value for k, value in number_variables().items()},
        "--workdir": str(workdir),
        **{f"config.{key}": value for key, value in flatten(config).items()},
    }


def of_data(data: Dataset) -> dict[str, int]:
    """Checksums of a data set."""
    return {
        f"data set ({split}, CRC-32 of the {name}s)": zlib.crc32(np.ascontiguousarray(array))
        for split in ("train", "val", "test")
        for name, array in getattr(data, split)._asdict().items()
    }
