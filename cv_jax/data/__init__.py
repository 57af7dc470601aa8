"""A data set by name -> uint8 arrays on the host, and batches of them."""

from cv_jax.data.dataset import Dataset, DataSpec, Split
from cv_jax.data.load import load_dataset

__all__ = ["DataSpec", "Dataset", "Split", "load_dataset"]
