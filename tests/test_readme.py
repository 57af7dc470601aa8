"""README and docs keep what they say: commands and files exist, and the examples run."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGES = {
    path.name: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
README = PAGES["README.md"]


def _blocks(page):
    return re.findall(r"```(\w*)\n(.*?)```", page, re.S)


def test_the_quick_start_is_two_commands_that_bring_their_installation():
    commands = _blocks(README)[0][1].strip().splitlines()
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)
    assert "pip install --quiet -r requirements.txt && " in commands[0]
    assert "--config=configs/digits.py" in commands[0]
    assert "pip install --quiet -r requirements-dev.txt && " in commands[1]
    assert "pytest" in commands[1]


FILES = {
    (name, path)
    for name, page in PAGES.items()
    for path in re.findall(r"\b(?:cv_jax|configs|tests)/[\w/]+\.py", page)
}
OF_THE_READER = {"tiny.py", "stripes.py", "invert.py", "linear.py"}


@pytest.mark.parametrize(("name", "path"), sorted(FILES))
def test_a_file_that_is_named_is_there(name, path):
    assert (ROOT / path).exists() or path.rpartition("/")[2] in (*OF_THE_READER, "NAME.py")


def test_a_link_leads_to_a_file():
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page):
            assert (folder / target).exists(), (name, target)


def test_every_config_with_a_result_has_its_record():
    rows = re.findall(r"^\| (\w+) \|.* %", README, re.M)
    assert len(rows) >= 3
    for row in rows:
        assert (ROOT / "results" / f"{row}.json").exists()


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory):
    """The project with the code of docs/extend.md in the files that it names."""
    tree = tmp_path_factory.mktemp("reader")
    for name in ("cv_jax", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tree)
    for kind, code in _blocks(PAGES["extend.md"]):
        if kind == "python":
            first, _, rest = code.partition("\n")
            file = tree / first.removeprefix("# ").removeprefix("append to ")
            before = file.read_text() if first.startswith("# append to ") else ""
            file.write_text(before + rest)
    return tree


COMMANDS = [text.strip() for kind, text in _blocks(PAGES["extend.md"]) if kind == "bash"]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_trains_to_its_result(copied_tree, command):
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copied_tree, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (workdir,) = (a.removeprefix("--workdir=") for a in arguments if a.startswith("--workdir="))
    result = json.loads((copied_tree / workdir / "result.json").read_text())
    assert 0 <= result["test"]["accuracy"]["mean"] <= 1
    assert result["test"]["count"] > 0
