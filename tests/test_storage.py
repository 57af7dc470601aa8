"""What storage refuses ends a run with one sentence, and costs nothing that was saved."""

import errno
import os
import subprocess

import pytest

from cv_jax.errors import UserError
from cv_jax.storage import storage_errors
from tests.conftest import ROOT
from tests.test_resume import assert_same_run, command


def _raise_in(directory, error):
    with storage_errors(directory):
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOENT])
def test_what_storage_refuses_is_named(number, tmp_path):
    for file in (None, str(tmp_path / "file")):
        with pytest.raises(UserError, match=f"{tmp_path} cannot .*: {os.strerror(number)}"):
            _raise_in(tmp_path, OSError(number, "", file))


def test_tensorstores_errors_are_storages(tmp_path):
    text = f"RESOURCE_EXHAUSTED: Error writing local file \"{tmp_path}/3\" [os_error_code='28']"
    with pytest.raises(UserError, match="No space left"):
        _raise_in(tmp_path, ValueError(text))
    with pytest.raises(ValueError, match="RESOURCE"):
        _raise_in(tmp_path / "other", ValueError(text))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        OSError("without a number"),
        BrokenPipeError(errno.EPIPE, "of the console"),
        FileNotFoundError(errno.ENOENT, "not of this directory", "/elsewhere"),
        UserError("said already"),
    ],
)
def test_other_errors_stay_themselves(error, tmp_path):
    with pytest.raises(type(error)) as raised:
        _raise_in(tmp_path, error)
    assert raised.value is error


_FULL_DISKS = """
set -e
start() { "$@" 2>&1 && code=0 || code=$?; echo "exit code $code"; }
mkdir -p "$disk"
mount -t tmpfs -o size=170k none "$disk"
start "$@"
mount -o remount,ro "$disk"
start "$@"
mount -o remount,rw,size=20m "$disk"
start "$@"
cp -r "$disk/run" "$result"
"""


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one(tmp_path):
    mounting = ["unshare", "-rm", "sh", "-c"]
    probe = "mount -t tmpfs -o size=1m none /tmp && mount -o remount,ro /tmp"
    try:
        subprocess.run([*mounting, probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a user namespace with tmpfs")
    whole = subprocess.run(command(tmp_path / "whole"), cwd=ROOT, capture_output=True)
    assert whole.returncode == 0
    places = {"disk": str(tmp_path / "disk"), "result": str(tmp_path / "result")}
    done = subprocess.run(
        [*mounting, _FULL_DISKS, "sh", *command(tmp_path / "disk" / "run")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **places},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == [f"exit code {code}" for code in (2, 2, 0)], done.stdout
    assert "cannot be used any further: No space left on device" in done.stdout
    assert "(Read-only file system)" in done.stdout
    assert "resumes after step 3" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "result")
