"""Prepares JAX: the compilation cache, quiet libraries, and flags that change numbers."""

import functools
import math
import os
import stat
import sys
import tempfile
from logging import getLogger
from pathlib import Path
from typing import Any

import jax
from absl import logging

from cv_jax.config.errors import UserError, first_line
from cv_jax.config.paths import expand

# jax.jit for programs that run once: compiles in a third of the time, to the same bits.
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})

# JAX's flags that change numbers, with JAX's defaults. The environment could set each of them.
_NUMBERS = {
    "jax_allow_f16_reductions": True,
    "jax_compiler_enable_remat_pass": True,
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_enable_pgle": False,
    "jax_enable_x64": False,
    "jax_exec_time_optimization_effort": 0.0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_memory_fitting_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_optimization_level": "UNKNOWN",
    "jax_random_seed_offset": 0,
    "jax_softmax_custom_jvp": False,
    "jax_threefry_partitionable": True,
    "jax_use_direct_linearize": True,
}
# Environment variables that change numbers and stay the user's choice. env.json records them, and
# a run must keep them.
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION",
    "NPROC",  # XLA's threads on a CPU
    "NVIDIA_TF32_OVERRIDE",
)
# Flags in XLA_FLAGS that a run may change: the number of devices, and dumps.
_NO_NUMBERS = ("--xla_force_host_platform_device_count", "--xla_dump_")


def prepare_jax(num_runs: int = 1) -> None:
    """Turns JAX's compilation cache on and informational logging off; calls `fix_numbers`.

    The cache is in JAX_COMPILATION_CACHE_DIR where that is set, else in `cache_dir()`/xla. With
    several runs, the CPU becomes several devices that divide them, unless XLA_FLAGS or
    JAX_NUM_CPU_DEVICES says how many. GPUs and TPUs are not affected.
    """
    chosen = "_device_count" in os.environ.get("XLA_FLAGS", "")
    if num_runs > 1 and not (chosen or os.environ.get("JAX_NUM_CPU_DEVICES")):
        jax.config.update("jax_num_cpu_devices", math.gcd(num_runs, num_cores()))
    fix_numbers()
    _silence_background_threads()
    compiled = jax.config.jax_compilation_cache_dir or str(cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", expand(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def fix_numbers() -> None:
    """Sets JAX's flags that change numbers to their defaults, whatever the environment says."""
    for name, value in _NUMBERS.items():
        if getattr(jax.config, name, value) != value:
            jax.config.update(name, value)


def number_variables() -> dict[str, str]:
    """Returns the environment variables that change numbers, by name; "" where one is not set."""
    found = {name: os.environ.get(name, "") for name in VARIABLES}
    xla_flags = found["XLA_FLAGS"].split()
    return {
        **found,
        "XLA_FLAGS": " ".join(f for f in xla_flags if not f.startswith(_NO_NUMBERS)),
    }


def check_platform() -> None:
    """Raises UserError where JAX cannot use the requested platform.

    This call fixes JAX's devices, so it must come after `processes.join`.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        # Without JAX's own advice, which does not mention installing.
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "it is not installed"
        raise UserError(
            f"JAX_PLATFORMS={asked or ''}: JAX cannot use this platform ({reason}). Install its "
            "package (pip install -U 'jax[cuda13]' for NVIDIA GPUs, 'jax[tpu]' for TPUs), or "
            "unset JAX_PLATFORMS."
        ) from error


def _silence_background_threads() -> None:
    """Silences the tracebacks of orbax's threads; orbax still raises the error when asked.

    The tracebacks come from a log, from abandoned coroutines and from their callbacks. gcsfs also
    logs the errors that it raises.
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
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_dir() -> Path:
    """Returns CV_JAX_CACHE where that is set, else cv_jax in the user's cache directory.

    Where the user's cache directory cannot be used, a temporary directory replaces it, with a line
    on stderr.
    """
    if chosen := os.environ.get("CV_JAX_CACHE"):
        return Path(expand(chosen))
    try:
        directory = Path(expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "cv_jax"
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    except (UserError, OSError) as error:
        return _temporary_cache(first_line(error))


@functools.cache
def _temporary_cache(reason: str) -> Path:
    """Returns a directory that only this user may write: compiled programs are run from there."""
    directory = Path(tempfile.gettempdir(), f"cv_jax-{os.getuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        directory = Path(tempfile.mkdtemp(prefix="cv_jax-"))
    os.environ.setdefault("MPLCONFIGDIR", str(directory / "matplotlib"))  # else Matplotlib warns
    print(
        f"cv_jax: the cache is in {directory}, since the user's cannot be used ({reason}). Set "
        "CV_JAX_CACHE to move it.",
        file=sys.stderr,
    )
    return directory
