"""The log of a program: console, metrics.jsonl, TensorBoard, and diverged runs.

Imports what its parent room imports. Outside, only `Log` is used.
"""

from cv_jax.workdir.log.log import Log

__all__ = ["Log"]
