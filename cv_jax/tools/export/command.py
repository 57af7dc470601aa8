"""Writes a trained network as one file, for programs that know nothing of cv_jax.

    python -m cv_jax.tools.export --workdir=runs/a --format=onnx
    python -m cv_jax.tools.export --workdir=runs/a --format=stablehlo --run=seed=3 --tta=mirror

stablehlo (jax.export: CPU, CUDA and TPU), onnx (any ONNX runtime) and safetensors (the weights, for
cv_jax or one's own code) each hold weights, normalisation and a model card; a card for people is
written beside. Then the file is read again, and has to predict on the whole test set what the
network predicts: exit code 1 where it does not. It needs `pip install -r requirements-export.txt`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from cv_jax.config.errors import UserError, first_line
from cv_jax.config.paths import path_argument
from cv_jax.config.sweep import with_values
from cv_jax.data import Split, load_dataset
from cv_jax.runtime.startup import check_platform, prepare_jax
from cv_jax.tasks import build_task
from cv_jax.tasks.classification.views import find_tta
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.tools.export.card import make_card, to_markdown
from cv_jax.tools.export.formats import (
    FORMATS,
    Predict,
    check_packages,
    read,
)
from cv_jax.trained.load import (
    Trained,
    as_evaluated,
    check_answers,
    load_trained,
)
from cv_jax.workdir.bucket import work_directory
from cv_jax.workdir.files import read_json, write_json
from cv_jax.workdir.result import environment, percent


def write(workdir: epath.Path, trained: Trained, name: str, tta: str, out: epath.Path) -> None:
    """Writes a network as a file, and its card for people beside it.

    Args:
        workdir: of its run.
        trained: as `load_trained` gives it.
        name: one of FORMATS.
        tta: one of TTA.
        out: the file; "NAME.md" beside it is the card.

    Raises:
        UserError: a package is missing, or the file cannot be written.
    """
    check_packages(name)
    card = make_card(workdir, trained, tta)
    content = FORMATS[name].write(as_evaluated(trained), tta, card)
    shape = ", ".join(map(str, trained.spec.image_shape))
    snippet = FORMATS[name].snippet.format(file=repr(out.name), shape=shape)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_name(out.name + ".tmp")
        scratch.write_bytes(content)
        scratch.replace(out)
        out.with_name(out.name + ".md").write_text(to_markdown(card, snippet), "utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({first_line(error)}).") from error


def own_predict(trained: Trained, tta: str) -> Predict:
    """image -> logits of the network as its run evaluates it, in float32."""
    config = with_values(trained.config, {"dtype": "float32"})
    predict = build_task(config, trained.spec).predict
    return jax.jit(lambda image: predict(trained.state, image, tta)[0])


def compare(ours: Predict, theirs: Predict, split: Split, batch_size: int) -> dict[str, Any]:
    """Compares what two programs predict.

    Returns:
        of, the number of images; equal, for how many both choose the same class;
        largest_difference of any two logits; accuracy of the second. An image for which the second
        gives a logit that is not finite counts as not equal and not right.

    Raises:
        UserError: the first gives a logit that is not finite.
    """
    equal, right, largest = 0, 0, 0.0
    for start in range(0, len(split.label), batch_size):
        image, label = (x[start : start + batch_size] for x in split)
        a, b = np.asarray(ours(image)), np.asarray(theirs(image))
        check_answers(a)
        answer = np.where(np.isfinite(b).all(-1), b.argmax(-1), -1)
        equal += int((a.argmax(-1) == answer).sum())
        right += int((answer == label).sum())
        largest = float(np.maximum(largest, np.abs(a - b).max()))  # NaN stays
    count = len(split.label)
    return {
        "equal": equal,
        "of": count,
        "largest_difference": largest,
        "accuracy": right / count,
    }


def record(path: Path, name: str, report: dict[str, Any], trained: Trained) -> None:
    """Puts the comparison of a format into a JSON file that may have those of others."""
    records = read_json(path) if path.exists() else {}
    made_with = {
        key: value for key, value in environment().items() if key not in ("command", "host")
    }
    network = {"model": trained.config.model, "data": trained.spec.name, "run": trained.name}
    records[name] = {**report, **network, "steps": int(trained.state.step), **made_with}
    write_json(path, records)


def describe(report: dict[str, Any]) -> str:
    """The comparison in a line."""
    return (
        f"{report['equal']:,} of {report['of']:,} test predictions equal; largest difference of a "
        f"logit {report['largest_difference']:.1e}; accuracy {percent(report['accuracy'], None)}"
    )


@command("export")
def main() -> None:
    """Reads the command line, writes the file, and holds it against the network."""
    parser = make_parser(__doc__)
    add_run_arguments(parser)
    parser.add_argument("--format", required=True, choices=tuple(FORMATS))
    parser.add_argument("--out", help="default: WORKDIR/export/model.FORMAT")
    parser.add_argument("--record", type=path_argument, help="a JSON file to add the comparison to")
    arguments = parser.parse_args()
    sys.exit(run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Exports as the command line says; returns the exit code."""
    prepare_jax()
    check_platform()
    name = arguments.format
    check_packages(name)
    workdir = work_directory(arguments.workdir)
    if workdir.suffix == ".safetensors":
        raise UserError(f"{workdir} is an exported file; --workdir is the directory of its run.")
    default = workdir / "export" / f"model.{name}"
    out = work_directory(arguments.out) if arguments.out else default
    trained = load_trained(workdir, arguments.run)
    tta = arguments.tta or trained.config.tta
    find_tta(tta)
    ours = own_predict(trained, tta)
    check_answers(ours(np.zeros((1, *trained.spec.image_shape), np.uint8)))
    write(workdir, trained, name, tta, out)
    size = out.stat().length
    print(f"written {out} ({size:,} bytes) and {out.name}.md")
    try:
        test = load_dataset(trained.config.data).test
    except UserError as error:
        print(f"not compared with the network, since the data set is not at hand: {error}")
        return 0
    theirs = read(name, out)
    report = compare(ours, theirs, test, trained.config.eval_batch_size)
    print(describe(report))
    if arguments.record:
        record(arguments.record, name, {**report, "bytes": size, "tta": tta}, trained)
    if report["equal"] < report["of"]:
        print(
            f"export: {out} does not predict what the network does; the file is kept.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    main()
