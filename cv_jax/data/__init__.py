"""Data sets by name: reading, checking, splits, the cache, and batches of (seed, step).

Imports config and runtime. A new data set is a function that returns `Stored` and a line of OWN in
load.py.
"""

from cv_jax.data.dataset import Dataset, DataSpec, Split
from cv_jax.data.load import load_dataset

__all__ = ["DataSpec", "Dataset", "Split", "load_dataset"]
