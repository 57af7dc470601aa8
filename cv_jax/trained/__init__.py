"""A trained network in use: loading it, reading files for it.

Imports every room but tools. `load_trained` is what notebooks and exported files import.
"""

from cv_jax.trained.load import load_trained

__all__ = ["load_trained"]
