"""Data sets: reads, checks, splits and caches them, and makes batches of (seed, step).

Examples are dicts: field name -> array. Imports config and runtime. A new data set is a function
that returns `Stored`, found by `load.py`.
"""

from cv_jax.data.dataset import Dataset, DataSpec, Stored
from cv_jax.data.fields import (
    Examples,
    Field,
    boxes_fields,
    image_field,
    label_field,
    labels_field,
    mask_field,
    points_field,
    values_field,
)
from cv_jax.data.load import load_dataset

__all__ = [
    "DataSpec",
    "Dataset",
    "Examples",
    "Field",
    "Stored",
    "boxes_fields",
    "image_field",
    "label_field",
    "labels_field",
    "load_dataset",
    "mask_field",
    "points_field",
    "values_field",
]
