"""What storage refuses ends a run with one sentence, and costs nothing that was saved."""

import errno
import os
import subprocess

import pytest

from cv_jax.config.errors import UserError
from cv_jax.workdir.lock import Lock
from cv_jax.workdir.storage import storage_errors
from tests.conftest import ROOT
from tests.test_resume import command


def _raise_in(directory, error):
    directory.mkdir(exist_ok=True)
    Lock(directory).close()
    with storage_errors(directory):
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOENT])
def test_what_storage_refuses_is_named(number, tmp_path):
    for file in (None, str(tmp_path / "file")):
        with pytest.raises(UserError, match=f"cannot write to {tmp_path}: {os.strerror(number)}"):
            _raise_in(tmp_path, OSError(number, "", file))


def test_a_directory_that_is_gone_is_named(tmp_path):
    with (
        pytest.raises(UserError, match="unmounted has disappeared"),
        storage_errors(tmp_path / "unmounted"),
    ):
        raise ValueError("whatever comes of that")


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


_TROUBLE = """
start() { "$@" 2>&1 && code=0 || code=$?; echo "exit code $code"; }
# One checkpoint fits, some 120 KB, and two do not.
mount -t tmpfs -o size=220k none "$disk" && start "$@"
mount -o remount,ro "$disk" && start "$@"
mount -o remount,rw,size=20m "$disk" && start "$@"
"""


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one(tmp_path):
    mounting = ["unshare", "-rm", "sh", "-c"]
    probe = "mount -t tmpfs -o size=1m none /tmp && mount -o remount,ro /tmp"
    try:
        subprocess.run([*mounting, probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a user namespace with tmpfs")
    done = subprocess.run(
        [*mounting, _TROUBLE, "sh", *command(tmp_path / "run", epochs=1)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "disk": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    full, read_only, mended = done.stdout.split("exit code ")[:-1]
    codes = [line[-1] for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["2", "2", "0"], done.stdout
    assert f"cannot write to {tmp_path / 'run'}: No space left on device" in full
    assert "(Read-only file system)" in read_only
    assert "resumes after step 3" in mended, done.stdout
    assert "Traceback" not in done.stdout
