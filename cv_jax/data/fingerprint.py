"""Checksums of a data set, by which processes agree that they read the same one."""

import zlib

import numpy as np

from cv_jax.data import Dataset


def of_data(data: Dataset) -> dict[str, int]:
    """Checksums of a data set."""
    return {
        f"data set ({split}, CRC-32 of the {name}s)": zlib.crc32(np.ascontiguousarray(array))
        for split in ("train", "val", "test")
        for name, array in getattr(data, split)._asdict().items()
    }
