"""Reads the data set `digits`: handwriting that scikit-learn ships, without a download."""

import importlib.util
from pathlib import Path

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.dataset import Stored
from cv_jax.data.fields import image_field, label_field
from cv_jax.data.splits import stratified

NUM_TEST = 360


def load_digits() -> Stored:
    """Reads the 1,797 grey images of 8x8 pixels; 360 of them, stratified, are test.

    The values 0..16 become round(value * 255 / 16). Source: E. Alpaydin and C. Kaynak, Optical
    Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Raises:
        UserError: scikit-learn is not installed.
    """
    # Reads the file without importing scikit-learn, since the import takes longer than the rest.
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise UserError("config.data.name='digits' needs scikit-learn: pip install scikit-learn")
    rows = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")

    image = np.rint(rows[:, :-1] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    label = rows[:, -1].astype(np.int32)
    is_test = np.zeros(len(label), bool)
    is_test[stratified(label, NUM_TEST)] = True
    return Stored(
        fields={"image": image_field((8, 8, 1)), "label": label_field("0123456789")},
        train={"image": image[~is_test], "label": label[~is_test]},
        test={"image": image[is_test], "label": label[is_test]},
    )
