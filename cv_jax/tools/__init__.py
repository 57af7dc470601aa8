"""Commands, one file or folder each: python -m cv_jax.tools.NAME.

Imports every room, and no room imports it. All commands share command.py.
"""
