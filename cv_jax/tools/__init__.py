"""Commands, one file or folder each: python -m cv_jax.tools.NAME.

Imports every room, and no room imports it. command.py holds what all of them share.
"""
