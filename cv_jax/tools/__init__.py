"""Commands that one runs beside training: python -m cv_jax.tools.NAME."""
