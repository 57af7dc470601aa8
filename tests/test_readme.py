"""README and docs are true: links, files and commands exist, and the examples train."""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from absl import flags

from cv_jax.config.base import flatten
from cv_jax.config.command_line import gather_sweeps
from cv_jax.config.errors import UserError
from cv_jax.config.sweep import make_sweep
from cv_jax.tools.aot import read_config
from tests.conftest import ROOT

# Of ml_collections, where it reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

README = ROOT / "README.md"
EXTEND = ROOT / "docs" / "extend.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("[!.]*/README.md"))]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S)


def _prose(page: str) -> str:
    return re.sub(r"^```\w*\n.*?^```", "", page, flags=re.M | re.S)


def test_the_quick_start_is_two_commands_that_bring_their_installation():
    commands = _blocks(README.read_text())[0][1].strip().splitlines()
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)
    assert "pip install --quiet -r requirements.txt && " in commands[0]
    assert "--config=configs/digits.py" in commands[0]
    assert "pip install --quiet -r requirements-dev.txt && " in commands[1]
    assert "pytest" in commands[1]


def test_every_config_with_a_result_has_its_record():
    rows = re.findall(r"^\| (\w+) \|.* %", README.read_text(), re.M)
    assert len(rows) >= 3
    for row in rows:
        assert (ROOT / "results" / f"{row}.json").exists()


def _made_by_the_reader() -> set[str]:
    """Returns the files that a reader of docs/extend.md writes, by the first lines of its code."""
    return set(re.findall(r"^# ([\w/]+\.py)$", EXTEND.read_text(), re.M)) | {"configs/NAME.py"}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_file_that_is_named_exists(page):
    named = set(re.findall(r"\b(?:cv_jax|configs|tests|launch)/[\w/]+\.\w+", page.read_text()))
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing <= _made_by_the_reader()


def _anchors(page: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    slugs, seen = set(), Counter()
    for title in re.findall(r"^#+ (.+)$", _prose(page), re.M):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        slugs.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return slugs


def test_anchors_are_those_of_github():
    page = "# A `b`, c: 2 %\n## One-two\n## One-two\n```bash\n# a comment\n```\n"
    assert _anchors(page) == {"a-b-c-2-", "one-two", "one-two-1"}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", _prose(page.read_text())):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file.read_text()), target


PYTHON = re.compile(r"(?:\.venv/bin/)?python3?")


def _commands(page: str) -> list[list[str]]:
    """Returns the arguments of every call of python in a page's code, also within a line."""
    lines = re.sub(r" *\\\n *", " ", "\n".join(code for _, code in _blocks(page))).splitlines()
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _prose(page))]
    return [call for line in lines if PYTHON.search(line) for call in _calls(line)]


def _calls(line: str) -> list[list[str]]:
    words, calls = shlex.split(line, comments=True), []
    while words:
        end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";", ">")), len(words))
        command, words = words[:end], words[end + 1 :]
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
            command = command[1:]  # environment variables
        if command and PYTHON.fullmatch(command[0]):
            calls.append(command[1:])
    return calls


def _texts() -> dict[str, str]:
    """Returns all pages, the docstrings of the configs (as code), and the notebook's text."""
    texts = {_name(page): page.read_text() for page in PAGES}
    for config in sorted(ROOT.glob("configs/*.py")):
        texts[_name(config)] = f"```\n{ast.get_docstring(ast.parse(config.read_text()))}\n```\n"
    tour = nbformat.read(ROOT / "notebooks" / "tour.ipynb", as_version=4)
    cells = [cell.source for cell in tour.cells if cell.cell_type == "markdown"]
    return {**texts, "notebooks/tour.ipynb": "\n\n".join(cells) + "\n"}


CALLS = {name: _commands(text) for name, text in _texts().items()}


def test_commands_are_found():
    page = "`python -m a\n b` and\n```bash\nX=1 .venv/bin/python c.py \\\n  d | cat  # e\n```\n"
    assert _commands(page) == [["c.py", "d"], ["-m", "a", "b"]]
    assert len(CALLS["README.md"]) > 15
    assert all(CALLS[_name(config)] for config in ROOT.glob("configs/*.py"))


class _Parsed(Exception):
    """Ends a command where its arguments have been parsed: (namespace, the other arguments)."""


def _parse_tool(monkeypatch, module: str, arguments: list[str]):
    """Returns what the parser of a command makes of its arguments; the command does not run."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, *args):
        raise _Parsed(*parse(self, *args))

    def parse_args(self, *args):
        namespace, rest = parse(self, *args)
        assert not rest, rest
        raise _Parsed(namespace, rest)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    found = importlib.import_module(module)
    main = getattr(found, "main", None) or importlib.import_module(f"{module}.command").main
    try:
        main()
    except _Parsed as parsed:
        return parsed.args
    raise AssertionError(f"{module} parses no arguments")


def _check_train(arguments: list[str]) -> None:
    """Raises where train.py would refuse its arguments before it looks at the data."""
    _, *arguments = gather_sweeps(["train.py", *arguments])
    of_config = [a for a in arguments if a.startswith("--config")]
    make_sweep(read_config(["train.py", *of_config]))
    own = {flag.name: flag for flag in flags.FLAGS.get_flags_for_module("train")}
    for argument in arguments:
        if argument not in of_config:
            name, _, text = argument.removeprefix("--").partition("=")
            own[name].parser.parse(text)


def _check_tool(monkeypatch, module: str, arguments: list[str]) -> None:
    with monkeypatch.context() as patch:
        namespace, others = _parse_tool(patch, module, arguments)
    if others:
        read_config([module, *others])
    if space := getattr(namespace, "space", None):
        keys = {text.partition("=")[0] for text in space}
        assert keys <= flatten(read_config([module, f"--config={namespace.config}"])).keys()


def _check_options(module: str, arguments: list[str]) -> None:
    """Checks a module's options by its text: it is not imported, since it may need PyTorch."""
    sources = [ROOT / f"{module.replace('.', '/')}.py", ROOT / "benchmarks" / "machine.py"]
    known = set(re.findall(r'"(--\w+)"', "".join(source.read_text() for source in sources)))
    assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= known


@pytest.mark.parametrize("name", CALLS)
def test_a_command_parses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for call in CALLS[name]:
        match call:
            case ["train.py", *arguments] if arguments:
                _check_train(arguments)
            case ["-m", module, *arguments] if module.startswith("cv_jax.tools."):
                file = ROOT / module.replace(".", "/")
                assert file.with_suffix(".py").exists() or (file / "__main__.py").exists()
                if arguments:  # else the page names the tool
                    _check_tool(monkeypatch, module, arguments)
            case ["-m", module, *arguments] if module.startswith(("benchmarks.", "tests.")):
                _check_options(module, arguments)


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("`python train.py --config=configs/digits.py --config.optim.lrr=1`", UserError),
        ("`python train.py --config=configs/digit.py`", UserError),
        ("`python train.py --config=configs/digits.py --config.sweep.lrr='(1, 2)'`", UserError),
        ("`python train.py --config=configs/digits.py --wordir=a`", KeyError),
        ("`python -m cv_jax.tools.predict --workdir=a --dirs=b c.png`", AssertionError),
        ("`python -m cv_jax.tools.export --workdir=a`", SystemExit),
        ("`python -m cv_jax.tools.aot --config=configs/digits.py --topology=a --x`", UserError),
        ("`python -m cv_jax.tools.none --workdir=a`", AssertionError),
        ("`python -m benchmarks.step --modell=n94`", AssertionError),
    ],
)
def test_a_wrong_command_is_found(page, error, monkeypatch):
    monkeypatch.setitem(CALLS, "page", _commands(page))
    with pytest.raises(error):
        test_a_command_parses("page", monkeypatch)


# Trains every [argument, ..., work directory] of the JSON list in its argument.
TRAIN = """
import json, sys
from etils.epath import Path
import train
from cv_jax.runtime.startup import prepare_jax
from cv_jax.tools.aot import read_config
prepare_jax()
for *arguments, workdir in json.loads(sys.argv[1]):
    config = read_config(["train.py", *arguments])
    config.dtype = "float32"  # what "auto" means on a CPU
    train.run(config, Path(workdir))
"""


def _copy_tree(tree: Path) -> None:
    """Copies the project, with the code of docs/extend.md in the files that it names."""
    for name in ("cv_jax", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tree)
    for kind, code in _blocks(EXTEND.read_text()):
        if kind == "python":
            first, _, rest = code.partition("\n")
            file = tree / first.removeprefix("# ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(rest)


@pytest.mark.slow
def test_the_examples_train_to_their_results(tmp_path):
    """All in one process: most of a short training is the start."""
    _copy_tree(tmp_path)
    runs = []
    for file, *arguments in CALLS["docs/extend.md"]:
        if file == "train.py":
            (workdir,) = (a for a in arguments if a.startswith("--workdir="))
            arguments.remove(workdir)
            runs.append([*arguments, workdir.removeprefix("--workdir=")])
    assert len(runs) >= 4
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(runs)],
        cwd=tmp_path,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},  # compiles sooner
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for *_, workdir in runs:
        result = json.loads((tmp_path / workdir / "result.json").read_text())
        assert 0 <= result["test"]["accuracy"]["mean"] <= 1
        assert result["test"]["count"] > 0
