"""Writes a trained network as one file, for programs without cv_jax.

    python -m cv_jax.tools.export --workdir=runs/a --format=onnx
    python -m cv_jax.tools.export --workdir=runs/a --format=stablehlo --run=seed=3 --tta=mirror

Formats: stablehlo (jax.export: CPU, CUDA and TPU), onnx (any ONNX runtime) and safetensors (the
weights, for cv_jax or your own code). A file holds weights, normalisation and a model card; a
Markdown card is written beside it. Then the file is read again, and its predictions on the whole
test set are compared with the network's: exit code 1 if they differ. Needs
`pip install -r requirements-export.txt`.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from cv_jax.config.errors import UserError, first_line
from cv_jax.config.paths import path_argument
from cv_jax.data import Examples, load_dataset
from cv_jax.data.fields import decoded, num_examples, take
from cv_jax.runtime.startup import check_platform, prepare_jax
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.tools.export.card import make_card, to_markdown
from cv_jax.tools.export.formats import (
    FORMATS,
    Predict,
    check_packages,
    read,
    snippet,
)
from cv_jax.trained.load import (
    Trained,
    check_finite_predictions,
    in_float32,
    input_shapes,
    load_trained,
)
from cv_jax.workdir.bucket import work_directory
from cv_jax.workdir.files import read_json, write_json
from cv_jax.workdir.result import environment, percent


def write(workdir: epath.Path, trained: Trained, name: str, out: epath.Path) -> None:
    """Writes a network as a file, and its Markdown card beside it.

    Args:
        workdir: the run's work directory.
        trained: the network, see `load_trained`; the file uses its test-time views.
        name: a format, one of FORMATS.
        out: the file to write; the card is `out` with ".md" appended.

    Raises:
        UserError: a package is missing, or the file cannot be written.
    """
    check_packages(name)
    card = make_card(workdir, trained)
    content = FORMATS[name].write(in_float32(trained), card)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_name(out.name + ".tmp")
        scratch.write_bytes(content)
        scratch.replace(out)
        text = to_markdown(card, snippet(name, trained, out.name))
        out.with_name(out.name + ".md").write_text(text, "utf-8")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({first_line(error)}): choose another --out."
        ) from error


def own_predict(trained: Trained) -> Predict:
    """Returns batch -> predictions of the network, in float32."""
    trained = in_float32(trained)
    return jax.jit(partial(trained.task.predict, trained.state))


def compare(
    ours: Predict, theirs: Predict, examples: Examples, trained: Trained, batch_size: int
) -> dict[str, Any]:
    """Compares the predictions of two programs.

    Args:
        ours: the first program.
        theirs: the second program. Its predictions that are not finite agree with nothing.
        examples: the examples to predict.
        trained: the network.
        batch_size: examples in a batch.

    Returns:
        of: the number of examples.
        equal: the number of examples whose descriptions agree (numbers within CLOSE).
        largest_difference: the largest difference of two predicted numbers.
        accuracy: that of the second program, if examples have a label.

    Raises:
        UserError: the first program predicts numbers that are not finite.
    """
    equal, right, largest = 0, 0, 0.0
    count = num_examples(examples)
    for start in range(0, count, batch_size):
        rows = decoded(take(examples, slice(start, start + batch_size)))
        batch = {name: rows[name] for name in trained.task.inputs}
        a, b = ({k: np.asarray(x) for k, x in f(batch).items()} for f in (ours, theirs))
        check_finite_predictions(a)
        for name in a:
            largest = float(np.maximum(largest, np.abs(1.0 * a[name] - b[name]).max()))  # NaN stays
        for i in range(num_examples(rows)):
            example = take(rows, i)
            first, second = (
                trained.task.describe(example, take(found, i), None) for found in (a, b)
            )
            agrees = _agree(first, second)
            equal += agrees
            if "label" in example and "class" in second:
                right += agrees and trained.spec.class_names[example["label"]] == second["class"]
    report = {"equal": equal, "of": count, "largest_difference": largest}
    return {**report, "accuracy": right / count} if "label" in examples else report


CLOSE = 1e-3  # tolerance of numbers in descriptions: relative, absolute below 1


def _agree(a: Any, b: Any) -> bool:
    """Returns whether two descriptions agree; a number that is not finite never agrees."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_agree(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_agree, a, b))
    return abs(a - b) <= CLOSE * max(1, abs(a)) if isinstance(a, float) else a == b


def record(path: Path, name: str, report: dict[str, Any], trained: Trained) -> None:
    """Adds the comparison of a format to a JSON file, which keeps those of other formats."""
    records = read_json(path) if path.exists() else {}
    made_with = {
        key: value for key, value in environment().items() if key not in ("command", "host")
    }
    network = {"model": trained.config.model, "data": trained.spec.name, "run": trained.name}
    records[name] = {**report, **network, "steps": int(trained.state.step), **made_with}
    write_json(path, records)


def describe(report: dict[str, Any]) -> str:
    """Returns the comparison as a line of text."""
    text = (
        f"{report['equal']:,} of {report['of']:,} test predictions equal; largest difference of a "
        f"number {report['largest_difference']:.1e}"
    )
    if "accuracy" in report:
        text += f"; accuracy {percent(report['accuracy'], None)}"
    return text


@command("export")
def main() -> None:
    """Reads the command line, writes the file and compares it with the network."""
    parser = make_parser(__doc__)
    add_run_arguments(parser)
    parser.add_argument("--format", required=True, choices=tuple(FORMATS))
    parser.add_argument("--out", help="default: WORKDIR/export/model.FORMAT")
    parser.add_argument("--record", type=path_argument, help="a JSON file to add the comparison to")
    arguments = parser.parse_args()
    sys.exit(run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Exports by the command line's arguments; returns the exit code."""
    prepare_jax()
    check_platform()
    name = arguments.format
    check_packages(name)
    workdir = work_directory(arguments.workdir)
    if workdir.suffix == ".safetensors":
        raise UserError(
            f"{workdir} is an exported file: set --workdir to the directory of its run."
        )
    default = workdir / "export" / f"model.{name}"
    out = work_directory(arguments.out) if arguments.out else default
    trained = load_trained(workdir, arguments.run, arguments.tta)
    ours = own_predict(trained)
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), input_shapes(trained, 1))
    check_finite_predictions(jax.device_get(ours(blank)))
    write(workdir, trained, name, out)
    size = out.stat().length
    print(f"written {out} ({size:,} bytes) and {out.name}.md")
    try:
        test = load_dataset(trained.config.data).test
    except UserError as error:
        print(f"not compared with the network: the data set cannot be loaded: {error}")
        return 0
    theirs = read(name, out)
    report = compare(ours, theirs, test, trained, trained.config.eval_batch_size)
    print(describe(report))
    if arguments.record:
        record(arguments.record, name, {**report, "bytes": size, "tta": trained.tta}, trained)
    if report["equal"] < report["of"]:
        print(
            f"export: the predictions of {out} differ from the network's; the file is kept.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    main()
