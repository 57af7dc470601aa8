"""Uses a trained network: loads it, predicts, and puts predictions into words.

Imports every room but tools. Notebooks and exported files import `load_trained`.
"""

from cv_jax.trained.load import load_trained

__all__ = ["load_trained"]
