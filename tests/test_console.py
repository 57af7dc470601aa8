"""The console: nothing that is behind stdout and stderr makes a program fail."""

import io
import json
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from cv_jax.config.errors import UserError
from cv_jax.runtime import console
from cv_jax.tools import collect
from tests.conftest import ROOT

TINY = "--config=configs/digits.py:smoke --config.model='n94(widths=(4,))'"


@pytest.fixture
def guarded(monkeypatch):
    """Makes sys.stdout a guarded stream on a descriptor or file."""
    opened = []

    def make(target, results=False, encoding="utf-8"):
        stream = open(target, "w", encoding=encoding)  # noqa: SIM115
        opened.append(stream)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        console.guard_console(results)
        opened.append(sys.stdout)
        return sys.stdout

    yield make
    for stream in reversed(opened):
        stream.close()


def _unread_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", b"\\xb1 \\u732b \\udcff\n"), ("utf-8", "± 猫 \\udcff\n".encode())],
)
def test_what_cannot_be_encoded_is_escaped(guarded, tmp_path, encoding, printed):
    guarded(tmp_path / "out", encoding=encoding)
    print("± 猫 \udcff", flush=True)
    assert (tmp_path / "out").read_bytes() == printed


@pytest.mark.parametrize("target", [_unread_pipe, lambda: "/dev/full"])
def test_a_closed_or_full_console_ends_no_training(guarded, target):
    stream = guarded(target())
    print("x" * 100_000, flush=True)
    print("again", flush=True)
    with tqdm(range(2), file=stream) as bar:
        tqdm.write("a line", file=stream)
        assert list(bar) == [0, 1]


def test_a_tool_ends_where_nobody_reads_its_results(guarded):
    stream = guarded(_unread_pipe(), results=True)
    with pytest.raises(SystemExit) as ended:
        print("x", flush=True)
    assert ended.value.code == 141
    stream.flush()  # as the interpreter does at its end


def test_a_tool_says_that_stdout_is_full(guarded):
    stream = guarded("/dev/full", results=True)
    with pytest.raises(UserError, match=r"stdout cannot be written \(No space left on device\)"):
        print("x", flush=True)
    stream.flush()


def test_the_last_line_of_a_tool_counts_too(guarded, tmp_path, monkeypatch, capsys):
    result = {"config": {"seed": 0}, "seeds": [0]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(collect, "collect", lambda results: results[0])
    monkeypatch.setattr(collect, "row", lambda name, record: "| row |")
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path), f"--out={tmp_path / 'x.json'}"])
    guarded("/dev/full")
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    with pytest.raises(SystemExit) as ended:
        collect.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("collect: stdout cannot be written")


def test_a_stream_that_a_notebook_or_test_has_put_there_stays(monkeypatch):
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    console.guard_console()
    assert sys.stdout is own


@pytest.mark.slow
def test_training_needs_no_console(tmp_path):
    """In one shell: stdout and stderr closed, then read no further, then full, on one run."""
    script = f"""
        export PYTHONIOENCODING=ascii
        exec 3>&1
        train() {{ "$0" train.py {TINY} --workdir="$1" --config.steps=$2; }}
        train "$1" 2 >&- 2>&- </dev/null; echo $?
        {{ train "$1" 4 2>&1; echo $? >&3; }} | head -n 1
        train "$1" 6 > /dev/full 2> /dev/full; echo $?
    """
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, tmp_path],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    codes = [line for line in done.stdout.splitlines() if not line.startswith("workdir")]
    assert (codes, done.stderr) == (["0", "0", "0"], "")
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 6
