"""Measures predict and report on a trained network, from the command to its end.

    python -m benchmarks.predict --workdir=runs/cifar10 --tta=none

Writes the test set as PNG files and runs predict on all of them, plainly and with huge pages
(GLIBC_TUNABLES) in turn. Counts the correct predictions, and those of train.py's evaluation. Then
runs report. The first run of each command, which may compile, is not counted.
"""

import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath
from PIL import Image

from benchmarks.machine import make_parser, paired_ratio, save, timed_run
from cv_jax.data import Examples, load_dataset
from cv_jax.data.batches import padded_batches
from cv_jax.runtime.startup import prepare_jax
from cv_jax.tasks.classification.views import TTA
from cv_jax.train.evaluator import sum_batches
from cv_jax.trained.load import load_trained

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def write_images(split: Examples, folder: Path) -> None:
    """Writes each image as a PNG file whose name ends with the label."""
    for i, (image, label) in enumerate(zip(split["image"], split["label"], strict=True)):
        Image.fromarray(image.squeeze()).save(folder / f"{i:06d}-{label}.png")


def count_right(workdir: str, tta: str, test: Examples) -> int:
    """Counts the test images that train.py's evaluation predicts correctly."""
    trained = load_trained(epath.Path(workdir), tta=tta)
    evaluate = partial(jax.jit(trained.task.evals["final"]), trained.state)
    batches = padded_batches(test, trained.spec.fields, trained.config.eval_batch_size)
    return int(sum_batches(evaluate, batches)["accuracy"][0])


def run(tool: str, *arguments: str, **environment: str) -> tuple[float, str]:
    """Runs a tool of cv_jax; returns its seconds and its output."""
    return timed_run(["-m", f"cv_jax.tools.{tool}", *arguments], **environment)


def measure(workdir: str, tta: str, rounds: int, scratch: Path) -> dict[str, Any]:
    """Runs all rounds of predict, then of report."""
    trained = load_trained(epath.Path(workdir))
    test = load_dataset(trained.config.data).test
    (scratch / "images").mkdir()
    write_images(test, scratch / "images")
    names = trained.spec.class_names
    ask = [f"--workdir={workdir}", f"--dir={scratch / 'images'}", f"--tta={tta}", "--json"]

    _, printed = run("predict", *ask)
    answers = [json.loads(line) for line in printed.splitlines()]
    right = sum(names[int(a["file"].rsplit("-")[-1][:-4])] == a["class"] for a in answers)
    plain, huge = [], []
    for _ in range(rounds):
        plain.append(run("predict", *ask)[0])
        huge.append(run("predict", *ask, **HUGE_PAGES)[0])

    page = scratch / "report.html"
    write = [workdir, f"--out={page}"]
    run("report", *write)
    report = [run("report", *write)[0] for _ in range(rounds)]
    return {
        "predict": {
            "images": len(answers),
            "tta": tta,
            "right": right,
            "right_in_evaluation": count_right(workdir, tta, test),
            "seconds": _median(plain),
            "seconds_with_huge_pages": _median(huge),
            "huge_pages_faster": paired_ratio(plain, huge),
        },
        "report": {"seconds": _median(report), "bytes": page.stat().st_size},
    }


def _median(times: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(times), "rounds": times}


def main() -> None:
    """Measures and prints; writes the record if --out is given."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--workdir", required=True, help="work directory of a finished run")
    parser.add_argument("--tta", default="none", choices=tuple(TTA), help="views of an image")
    args = parser.parse_args()
    prepare_jax()
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(args.workdir, args.tta, args.rounds, Path(scratch))
    predict, report = results["predict"], results["report"]
    count = predict["images"]
    print(
        f"right    {predict['right']:,} of {count:,}; evaluation {predict['right_in_evaluation']:,}"
    )
    for name in ("seconds", "seconds_with_huge_pages"):
        seconds = predict[name]["median"]
        print(f"predict  {seconds:.1f} s, {count / seconds:,.0f} images/s ({name})")
    print(f"report   {report['seconds']['median']:.1f} s, {report['bytes']:,} bytes")
    save("predict", args, results)


if __name__ == "__main__":
    main()
