"""Runs `python -m cv_jax.tools.export`."""

from cv_jax.tools.export.command import main

main()
