"""Draws the headline on test against the FLOPs of training and evaluation.

    python -m cv_jax.tools.frontier results/cifar10*.json --out=results/frontier.png

Prints the points as well. A record is a file of `cv_jax.tools.collect`. Accuracies stand beside
published ones of CIFAR-10.
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
from cv_jax.workdir.metric import Metric, headline_of, metric_of


class Point(NamedTuple):
    """A training.

    Attributes:
        name: the record's name.
        pflop: PFLOP of training and evaluation.
        mean, std: mean and standard deviation of the headline on test; std is None if unknown.
        n: number of seeds; None if unknown.
        headline: name of the headline metric.
        metric: unit, direction and protocol of the headline.
    """

    name: str
    pflop: float
    mean: float
    std: float | None
    n: int | None
    headline: str = "accuracy"
    metric: Metric = Metric("%")


# Accuracies on CIFAR-10: https://github.com/KellerJordan/cifar10-airbench; the n of airbench94_muon
# is from its source code.
PUBLIC = (
    Point("airbench94_muon", 0.29, 0.9401, None, 200),
    Point("airbench94", 0.36, 0.9401, None, None),
    Point("airbench95", 1.4, 0.9501, None, None),
    Point("airbench96, filtered data", 3.1, 0.9600, None, None),
    Point("airbench96", 4.9, 0.9603, None, None),
    Point("ResNet-18, usual training", 32.3, 0.96, None, None),
)


def read_point(path: Path) -> Point:
    """Reads a record as a point; raises UserError if the file has no headline on test."""
    try:
        record = json.loads(path.read_text())
        test, flops = record["test"], record["flops"]["total"]
        headline = headline_of(record)
        numbers = test.get(headline)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a record of cv_jax.tools.collect ({error!r}).") from error
    if numbers is None:
        raise UserError(f"{path} has no {headline} on test: leave it out.")
    if numbers["mean"] is None:
        raise UserError(f"{path}: a seed diverged, so test {headline} has no mean: leave it out.")
    return Point(
        path.stem,
        flops / 1e15,
        numbers["mean"],
        numbers["std"],
        numbers["n"],
        headline,
        metric_of(record, headline),
    )


def draw(points: Sequence[Point], public: Sequence[Point]) -> Figure:
    """Draws our points joined by a line, with bars of one std, and public points with their names.

    Our points must share one headline. Public points of another metric are left out.
    """
    name, metric = points[0].headline, points[0].metric
    public = [point for point in public if point.headline == name]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = sorted(points, key=lambda point: point.pflop)
    axes.errorbar(
        [p.pflop for p in points],
        [metric.scale * p.mean for p in points],
        yerr=[metric.scale * (p.std or 0) for p in points],
        marker="o",
        capsize=3,
        label="cv_jax, configs/cifar10.py" if public else "cv_jax",
    )
    if public:
        costs, means = [p.pflop for p in public], [metric.scale * p.mean for p in public]
        axes.plot(costs, means, "s", color="0.45", label="published")
    for p in public:
        axes.annotate(
            p.name,
            (p.pflop, metric.scale * p.mean),
            (0, -7),
            textcoords="offset points",
            fontsize=7,
            rotation=90,
            ha="center",
            va="top",
        )
    axes.set_xscale("log")
    axes.set_xlabel("PFLOP of training and final evaluation")
    ylabel = metric.label(f"{'CIFAR-10 ' if public else ''}test {name}")
    axes.set_ylabel(ylabel if metric.better == "higher" else f"{ylabel} (lower is better)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right" if metric.better == "higher" else "upper right")
    return figure


@command("frontier")
def main() -> None:
    """Reads the command line, prints the points and writes the picture."""
    parser = make_parser(__doc__)
    parser.add_argument("records", nargs="+", type=path_argument)
    parser.add_argument("--out", required=True, type=path_argument, help="the PNG file to write")
    arguments = parser.parse_args()
    points = [read_point(path) for path in arguments.records]
    for path, point in zip(arguments.records, points, strict=True):
        if point.headline != points[0].headline:
            raise UserError(
                f"{path} has the headline {point.headline}, but {arguments.records[0]} has "
                f"{points[0].headline}: draw them in two pictures."
            )
    for point in sorted(points, key=lambda p: p.pflop):
        print(_row(point))
    draw(points, PUBLIC).savefig(arguments.out)


def _row(point: Point) -> str:
    headline = point.metric.text(point.mean, point.std)
    return f"| {point.name} | {point.pflop:.3f} | {headline} | {point.n} |"


if __name__ == "__main__":
    main()
