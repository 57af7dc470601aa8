"""Counts lines of code by room, without blank lines, comments and docstrings.

python -m benchmarks.lines            # each room of cv_jax, and train.py
python -m benchmarks.lines --files    # each file as well
"""

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(source: str) -> int:
    """Counts the lines of a Python source that hold code; a string over n lines counts n."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def main() -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", action="store_true", help="count each file as well")
    by_file = parser.parse_args().files
    files = {
        path.relative_to(ROOT): lines_of_code(path.read_text())
        for path in [ROOT / "train.py", *sorted((ROOT / "cv_jax").rglob("*.py"))]
    }
    rooms: Counter[str] = Counter()
    for path, count in files.items():
        rooms["/".join(path.parts[:2])] += count
    for room, count in rooms.items():
        print(f"{count:6,}  {room}")
        for path, lines in files.items() if by_file else ():
            if path.parts[: len(Path(room).parts)] == Path(room).parts and str(path) != room:
                print(f"{lines:6,}      {path.relative_to(room)}")
    without_tools = sum(rooms.values()) - rooms["cv_jax/tools"] - rooms["train.py"]
    print(f"{without_tools:6,}  cv_jax without tools")


if __name__ == "__main__":
    main()
