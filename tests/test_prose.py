"""Docstrings: that of a function begins with a verb in -s, such as "Returns" or "Builds"."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folders, and single files of folders that are not checked as a whole yet.
ROOMS = (
    "benchmarks",
    "cv_jax/augment",
    "cv_jax/config",
    "cv_jax/data",
    "cv_jax/learn",
    "cv_jax/models",
    "cv_jax/optim",
    "cv_jax/runtime",
    "cv_jax/tasks",
    "cv_jax/tools",
    "cv_jax/trained",
    "cv_jax/workdir/adopt.py",
    "cv_jax/workdir/bucket.py",
    "cv_jax/workdir/files.py",
    "cv_jax/workdir/lock.py",
    "cv_jax/workdir/storage.py",
)
NOUNS = {"Args", "Arrays", "As", "Bytes", "Lines", "Names", "Pixels", "Seconds", "Shapes", "This"}


def misfits(source):
    """Returns "line name: first word" of each function whose docstring begins otherwise."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            word = docstring.split()[0].rstrip(".,:;") if docstring else "Returns"
            verb = word.isalpha() and word[0].isupper() and word.endswith("s") and word not in NOUNS
            if not verb:
                found.append(f"{node.lineno} {node.name}: {word}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_functions_docstring_begins_with_a_verb(room):
    path = ROOT / room
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files
    assert [f"{f.relative_to(ROOT)}:{m}" for f in files for m in misfits(f.read_text())] == []


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Returns the rate.", []),
        ("The rate.", ["1 f: The"]),
        ("(b, c) -> (b, n).", ["1 f: (b"]),
        ("Shapes of a batch.", ["1 f: Shapes"]),
        ("returns the rate.", ["1 f: returns"]),
    ],
)
def test_another_beginning_is_found(docstring, expected):
    assert misfits(f'def f():\n    """{docstring}"""') == expected
