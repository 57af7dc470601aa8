"""Stub."""

from cv_jax.data.read_image import fit_image


def find_crop(text):
    return None


def make_fit(shape, share):
    return lambda data: fit_image(data, shape, share)[0]
