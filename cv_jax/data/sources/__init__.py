"""Sources of data sets, one file each: a function that returns `cv_jax.data.Stored`.

Imports config, runtime and the modules of data that describe examples. A new source is a new file
here, found by `load.py`.
"""
