"""What the environment must not change, and what is said of one that cannot be used."""

import os
import pwd
import sys
import tempfile

import jax
import pytest

from cv_jax.config.errors import UserError
from cv_jax.runtime import startup
from cv_jax.runtime.processes import leave
from cv_jax.runtime.startup import (
    cache_dir,
    check_platform,
    number_variables,
    prepare_jax,
)


@pytest.mark.parametrize(
    ("flag", "other", "own"),
    [
        ("jax_enable_x64", True, False),
        ("jax_default_prng_impl", "rbg", "threefry2x32"),
        ("jax_threefry_partitionable", False, True),
        ("jax_default_matmul_precision", "bfloat16", None),
        ("jax_random_seed_offset", 3, 0),
        ("jax_disable_jit", True, False),
    ],
)
def test_flags_that_change_numbers_are_not_the_environments(flag, other, own, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    try:
        jax.config.update(flag, other)  # as JAX_ENABLE_X64=1 and the like do
        prepare_jax()
        assert getattr(jax.config, flag) == own
    finally:
        jax.config.update(flag, own)


def test_variables_that_change_numbers(monkeypatch):
    for name in startup.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    none = dict.fromkeys(startup.VARIABLES, "")
    assert number_variables() == none
    devices = "--xla_force_host_platform_device_count=2 --xla_dump_to=/x"
    monkeypatch.setenv("XLA_FLAGS", f"{devices} --xla_cpu_enable_fast_math=true")
    monkeypatch.setenv("NPROC", "7")
    changed = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true", "NPROC": "7"}
    assert number_variables() == none | changed


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "it is not installed"),
        (RuntimeError("no 'tpux' (set JAX_PLATFORMS='' to choose)"), "no 'tpux'"),
    ],
)
def test_a_platform_that_cannot_be_used(error, reason, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError) as said:
        check_platform()
    assert str(said.value).startswith(
        f"JAX_PLATFORMS=cpu: JAX cannot use this platform ({reason}). Install its package"
    )


def test_a_start_without_devices_can_be_left(monkeypatch):
    def process_count():
        raise RuntimeError("no device")

    monkeypatch.setattr(jax, "process_count", process_count)
    with pytest.raises(SystemExit) as left:
        leave(2)
    assert left.value.code == 2


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """A user without HOME and without an entry in passwd; temporary files go to tmp_path."""

    def getpwuid(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "CV_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    startup._temporary_cache.cache_clear()
    yield tmp_path
    startup._temporary_cache.cache_clear()


def test_without_a_home_the_cache_is_temporary(no_home, capsys):
    expected = no_home / f"cv_jax-{os.getuid()}"
    assert cache_dir() == cache_dir() == expected
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"cv_jax: the cache is in {expected}, since the user's cannot be used")
    assert expected.stat().st_mode & 0o777 == 0o700


def test_a_temporary_cache_that_others_can_write_is_not_used(no_home, capsys):
    planted = no_home / f"cv_jax-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    assert cache_dir() != planted
    assert cache_dir().parent == no_home


def test_a_home_that_cannot_be_written(no_home, monkeypatch):
    (no_home / "file").write_text("")
    monkeypatch.setenv("HOME", str(no_home / "file"))
    assert cache_dir() == no_home / f"cv_jax-{os.getuid()}"
