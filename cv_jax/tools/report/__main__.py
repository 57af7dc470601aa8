"""Runs `python -m cv_jax.tools.report`."""

from cv_jax.tools.report.command import main

main()
