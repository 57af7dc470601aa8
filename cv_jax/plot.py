"""Pictures of results, by matplotlib."""

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_sweep(points: list[dict[str, Any]], best: dict[str, Any]) -> Figure:
    """Accuracy on val against the swept values: mean and one std over the seeds.

    The key with the most values is the x axis; settings of the others are lines of their own.

    Args:
        points: "sweep" of a result.json.
        best: its "best".
    """
    values = {key: list(dict.fromkeys(p["setting"][key] for p in points)) for key in best}
    x_key = max(values, key=lambda key: len(values[key]))
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        rest = {key: value for key, value in point["setting"].items() if key != x_key}
        lines.setdefault(", ".join(f"{k}={v}" for k, v in rest.items()), []).append(point)

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    numeric = all(isinstance(x, int | float) for x in values[x_key])
    for label, line in lines.items():
        accuracy = [point["val"]["accuracy"] for point in line]
        axes.errorbar(
            [x if numeric else str(x) for x in (point["setting"][x_key] for point in line)],
            [100 * a["mean"] for a in accuracy],
            yerr=[100 * (a["std"] or 0) for a in accuracy],
            marker="o",
            capsize=3,
            label=label or None,
        )
    chosen = next(p for p in points if p["setting"] == best)
    axes.plot(
        [best[x_key] if numeric else str(best[x_key])],
        [100 * chosen["val"]["accuracy"]["mean"]],
        "o",
        markersize=14,
        fillstyle="none",
        color="black",
        label="best on val",
    )
    if numeric and min(values[x_key]) > 0 and max(values[x_key]) >= 10 * min(values[x_key]):
        axes.set_xscale("log")
    if numeric:
        axes.set_xticks(values[x_key], [f"{x:g}" for x in values[x_key]])
        axes.minorticks_off()
    seeds = chosen["val"]["accuracy"]["n"]
    title = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed a setting"
    axes.set(xlabel=f"config.{x_key}", ylabel="accuracy on val, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
