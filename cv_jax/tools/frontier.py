"""Draws test accuracy against the FLOPs of training and evaluation: records beside public ones.

    python -m cv_jax.tools.frontier results/cifar10*.json --out=results/frontier.png

Prints the points as well. A record is what `cv_jax.tools.collect` writes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cv_jax.config.errors import UserError
from cv_jax.config.paths import path_argument
from cv_jax.tools.command import command, make_parser
from cv_jax.workdir.result import percent


class Point(NamedTuple):
    """A training: PFLOP of all of it, mean and (None: unknown) std of its test accuracy."""

    name: str
    pflop: float
    mean: float
    std: float | None
    n: int | None


# https://github.com/KellerJordan/cifar10-airbench; n of the first from its source.
PUBLIC = (
    Point("airbench94_muon", 0.29, 0.9401, None, 200),
    Point("airbench94", 0.36, 0.9401, None, None),
    Point("airbench95", 1.4, 0.9501, None, None),
    Point("airbench96, filtered data", 3.1, 0.9600, None, None),
    Point("airbench96", 4.9, 0.9603, None, None),
    Point("ResNet-18, usual training", 32.3, 0.96, None, None),
)


def read_point(path: Path) -> Point:
    """Returns the point of a record. Raises UserError for a file that is none, or has none."""
    try:
        record = json.loads(path.read_text())
        accuracy, flops = record["test"]["accuracy"], record["flops"]["total"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a record of cv_jax.tools.collect ({error!r}).") from error
    if accuracy["mean"] is None:
        raise UserError(f"{path}: a seed has diverged, so that its test accuracy is no number.")
    return Point(path.stem, flops / 1e15, accuracy["mean"], accuracy["std"], accuracy["n"])


def draw(points: Sequence[Point], public: Sequence[Point]) -> Figure:
    """Our points joined by a line, with bars of one std; the public ones named."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = sorted(points, key=lambda point: point.pflop)
    axes.errorbar(
        [p.pflop for p in points],
        [100 * p.mean for p in points],
        yerr=[100 * (p.std or 0) for p in points],
        marker="o",
        capsize=3,
        label="cv_jax, configs/cifar10.py",
    )
    costs, means = [p.pflop for p in public], [100 * p.mean for p in public]
    axes.plot(costs, means, "s", color="0.45", label="published")
    for p in public:
        axes.annotate(
            p.name,
            (p.pflop, 100 * p.mean),
            (0, -7),
            textcoords="offset points",
            fontsize=7,
            rotation=90,
            ha="center",
            va="top",
        )
    axes.set_xscale("log")
    axes.set_xlabel("PFLOP of training and final evaluation")
    axes.set_ylabel("CIFAR-10 test accuracy, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    return figure


@command("frontier")
def main() -> None:
    """Reads the command line, prints the points, writes the picture."""
    parser = make_parser(__doc__)
    parser.add_argument("records", nargs="+", type=path_argument)
    parser.add_argument("--out", required=True, type=path_argument, help="the PNG file to write")
    arguments = parser.parse_args()
    points = [read_point(path) for path in arguments.records]
    for point in sorted(points, key=lambda p: p.pflop):
        print(_row(point))
    draw(points, PUBLIC).savefig(arguments.out)


def _row(point: Point) -> str:
    accuracy = percent(point.mean, point.std)
    return f"| {point.name} | {point.pflop:.3f} | {accuracy} | {point.n} |"


if __name__ == "__main__":
    main()
