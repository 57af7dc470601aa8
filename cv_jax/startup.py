"""A quick and quiet start: the compilation cache, quiet libraries, and what runs only once."""

import math
import os
import sys
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import jax
from absl import logging

# jax.jit for what runs once: compiled in a third of the time, to the same bits.
jit_once = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})


def prepare_jax(num_runs: int = 1) -> None:
    """Turns JAX's persistent compilation cache on and informational logging of libraries off.

    The cache lies in JAX_COMPILATION_CACHE_DIR where that is set, else in `cache_dir()`/xla. The
    CPU becomes several devices where several runs can share them, unless XLA_FLAGS or
    JAX_NUM_CPU_DEVICES is set; that does not change what a GPU or TPU does.
    """
    chosen = os.environ.get("XLA_FLAGS", "") + os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if num_runs > 1 and not chosen:
        jax.config.update("jax_num_cpu_devices", math.gcd(num_runs, num_cores()))
    _silence_background_threads()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _silence_background_threads() -> None:
    """Leaves out the tracebacks of orbax's threads; it raises the error itself when it is asked.

    They come by a log, from coroutines that were given up, and from callbacks of those. gcsfs, too,
    logs what it raises.
    """
    logging.set_verbosity(logging.WARNING)
    for name in ("absl", "asyncio", "gcsfs"):
        getLogger(name).addFilter(lambda record: not record.exc_info)
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_dir() -> Path:
    """CV_JAX_CACHE where that is set, else cv_jax in the user's cache directory."""
    if chosen := os.environ.get("CV_JAX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cv_jax"
