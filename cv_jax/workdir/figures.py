"""Draws results with matplotlib."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cv_jax.workdir.metric import Metric

# The colour of text and lines. It looks black, and nothing else has this colour, so that a page can
# replace it by its own.
INK = "#010203"
# Easy to tell apart on white and on black.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#b8579b", "#8a7a00"),
    *("#7d6bd6", "#a5673f", "#1691b8", "#d1405a", "#808080"),
)
MARKERS = "o^sD"
STYLE = {
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("edge", "label", "title")},
    "axes.facecolor": "none",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
}
WIDTH = 4.6  # inches


class Curve(NamedTuple):
    """A number over the training: epoch, mean and std (0: unknown) over the runs, all (m,)."""

    epoch: np.ndarray
    mean: np.ndarray
    std: np.ndarray


@rc_context(STYLE)
def draw_curves(curves: dict[str, Curve], ylabel: str, log: bool = False) -> Figure:
    """Draws curves with a band of one std around each; a curve of one point is a dot.

    Args:
        curves: label -> Curve.
        ylabel: the quantity and its unit.
        log: whether the y axis is logarithmic, without values of 0 or less.
    """
    axes = _axes(3.0)
    for i, (label, (epoch, mean, std)) in enumerate(curves.items()):
        color, marker = COLORS[i % len(COLORS)], "o" if len(epoch) == 1 else None
        axes.plot(epoch, mean, color=color, marker=marker, label=label, linewidth=1.6)
        axes.fill_between(epoch, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    if log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.grid()
    if len(curves) > 1:
        _legend(axes)
    return axes.figure


@rc_context(STYLE)
def draw_bars(values: dict[str, float]) -> Figure:
    """Draws accuracies in [0, 1] as horizontal bars with their values, the first bar on top."""
    axes = _axes(0.7 + 0.21 * len(values))
    bars = axes.barh(range(len(values)), [100 * v for v in values.values()], color=COLORS[0])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.set_yticks(range(len(values)), list(values), parse_math=False)
    axes.set(xlim=(0, 112), ylim=(len(values) - 0.4, -0.6), xlabel="accuracy, %")
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    return axes.figure


@rc_context(STYLE)
def draw_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draws a confusion matrix (n, n) of counts: rows are labels, columns are answers.

    The colour is the share of a label's examples. Up to 20 classes, counts above 0 are written into
    their cells.
    """
    confusion = np.asarray(confusion)
    n = len(confusion)
    rates = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes = _axes(WIDTH)
    axes.imshow(_shades(rates), interpolation="none")
    axes.set(
        xlabel="answer",
        ylabel="label",
        title=f"{np.trace(confusion):.0f} of {confusion.sum():.0f} right",
    )
    axes.spines[:].set_visible(False)
    if n <= 20:
        axes.set_xticks(range(n), class_names, rotation=90, parse_math=False)
        axes.set_yticks(range(n), class_names, parse_math=False)
        axes.tick_params(length=0)
        for i, j in np.argwhere(confusion):
            color = "white" if rates[i, j] > 0.7 else INK
            size = 8 if n <= 10 else 5
            text = f"{confusion[i, j]:.0f}"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=size)
    return axes.figure


def _shades(rates: np.ndarray) -> np.ndarray:
    """Returns rates (n, n) in [0, 1] as RGBA. The alpha is the rate, for any background."""
    color = [int(COLORS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return np.dstack([*(np.full_like(rates, c, dtype=float) for c in color), rates])


@rc_context(STYLE)
def draw_reliability(calibration: np.ndarray) -> Figure:
    """Draws a reliability diagram: the accuracy of answers in each bin of confidence.

    C. Guo et al., arXiv 1706.04599.

    Args:
        calibration: (3, bins): answers, right answers, sum of the confidences.
    """
    count, right, confidence = np.asarray(calibration)
    some = count > 0
    edges = np.linspace(0, 1, len(count) + 1)[:-1]
    axes = _axes(3.4)
    axes.bar(
        100 * edges[some],
        100 * right[some] / count[some],
        width=100 / len(count),
        align="edge",
        color=COLORS[0],
        edgecolor=INK,
        linewidth=0.4,
        label="accuracy",
    )
    axes.plot(
        100 * confidence[some] / count[some],
        100 * confidence[some] / count[some],
        "_",
        color=COLORS[1],
        markersize=14,
        markeredgewidth=2.5,
        label="mean confidence",
    )
    axes.plot([0, 100], [0, 100], "--", color=INK, linewidth=0.8)
    axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100))
    # Above the axes, since bars may be anywhere inside.
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return axes.figure


@rc_context(STYLE)
def draw_precision(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draws precision over recall: {label: (recall, precision), both (d,)}."""
    axes = _axes(3.2)
    for i, (label, (recall, precision)) in enumerate(curves.items()):
        axes.plot(recall, precision, color=COLORS[i % len(COLORS)], label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes)
    return axes.figure


def to_pixels(figure: Figure) -> np.ndarray:
    """Returns a figure on white as pixels (h, w, 3) uint8."""
    figure.set_facecolor("white")
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


@rc_context(STYLE)
def draw_map(points: np.ndarray, label: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draws points (m, 2) in the colours of their classes, with a legend up to 40 classes."""
    axes = _axes(5.0)
    for i in np.unique(label):
        axes.scatter(
            *points[label == i].T,
            s=10,
            marker=MARKERS[i // len(COLORS) % len(MARKERS)],
            color=COLORS[i % len(COLORS)],
            alpha=0.85,
            linewidths=0,
            label=class_names[i],
        )
    axes.set_axis_off()
    axes.set_aspect("equal")
    if len(class_names) <= len(COLORS) * len(MARKERS):
        _legend(axes, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, markerscale=2)
    return axes.figure


@rc_context(STYLE)
def draw_sweep(
    points: list[dict[str, Any]], best: dict[str, Any], name: str, metric: Metric
) -> Figure:
    """Draws a metric on val against the swept values: mean and one std over the seeds.

    The key with the most values is the x axis. Each combination of the other keys is a line.

    Args:
        points: "sweep" of a result.json.
        best: "best" of the same result.
        name: of the metric.
        metric: its meaning.
    """
    values = {key: list(dict.fromkeys(p["setting"][key] for p in points)) for key in best}
    x_key = max(values, key=lambda key: len(values[key]))
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        rest = {key: value for key, value in point["setting"].items() if key != x_key}
        lines.setdefault(", ".join(f"{k}={v}" for k, v in rest.items()), []).append(point)

    axes = _axes(3.4)
    numeric = all(isinstance(x, int | float) for x in values[x_key])
    for i, (label, line) in enumerate(lines.items()):
        numbers = [_on_val(point, name) for point in line]
        axes.errorbar(
            [x if numeric else str(x) for x in (point["setting"][x_key] for point in line)],
            metric.scale * np.array([n["mean"] for n in numbers], float),  # None: diverged
            yerr=[metric.scale * (n["std"] or 0) for n in numbers],
            marker="o",
            capsize=3,
            color=COLORS[i % len(COLORS)],
            label=label or None,
        )
    chosen = next(p for p in points if p["setting"] == best)
    axes.plot(
        [best[x_key] if numeric else str(best[x_key])],
        [metric.scale * np.array(_on_val(chosen, name)["mean"], float)],
        "o",
        markersize=14,
        fillstyle="none",
        color=INK,
        label="best on val",
    )
    if numeric and min(values[x_key]) > 0 and max(values[x_key]) >= 10 * min(values[x_key]):
        axes.set_xscale("log")
    if numeric:
        axes.set_xticks(values[x_key], [f"{x:g}" for x in values[x_key]])
        axes.minorticks_off()
    seeds = _on_val(chosen, name)["n"]
    title = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed a setting"
    ylabel = metric.label(f"{name.replace('_', ' ')} on val")
    if metric.better == "lower":
        ylabel += " (lower is better)"
    axes.set(xlabel=f"config.{x_key}", ylabel=ylabel, title=title)
    axes.grid()
    _legend(axes)
    return axes.figure


def _on_val(point: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the statistics of a metric on val; without a mean where a setting has none."""
    return (point["val"] or {}).get(name) or {"mean": None, "std": None, "n": 1}


def _axes(height: float) -> Axes:
    """Returns the axes of a new figure."""
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def _legend(axes: Axes, **options: Any) -> None:
    """Adds a legend that shows "$" in names of classes and runs as it is."""
    for text in axes.legend(**options).get_texts():
        text.set_parse_math(False)
