"""The page of a report: its sections in their order, as HTML without scripts."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cv_jax.config.base import SEED_KEYS, differences, flatten
from cv_jax.tools.report.examples import examples
from cv_jax.tools.report.markup import (
    Show,
    beside,
    h2,
    paragraph,
    soft,
    table,
)
from cv_jax.tools.report.run import (
    Run,
    calibration_error,
    curve,
    measured,
)
from cv_jax.workdir import figures as plot
from cv_jax.workdir.result import is_share, setting_text

_UNKNOWN = "-"
MOST_BARS = 30  # classes

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def build_page(runs: Sequence[Run], num_images: int, show: Show) -> str:
    """The report of a run, or of several: those beside each other, then the first one in full.

    Args:
        runs: one or more.
        num_images: of test that the network is asked about.
        show: see `Show`.
    """
    run = runs[0]
    sections = [
        _heading(run),
        _comparison(runs, show) if len(runs) > 1 else "",
        _training(run, show),
        _classes(run, show),
        _calibration(run, show),
        examples(run.path, num_images, show),
        _sweep(run, show),
        _facts(run),
    ]
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    body = "\n".join(section for section in sections if section)
    return _PAGE.format(title=f"{escape(_title(run))} · report", style=style, body=body)


def _title(run: Run) -> str:
    """The name of the config file, else of the work directory."""
    command = [str(word) for word in run.env.get("command", ())]
    for word, following in zip(command, [*command, ""][1:], strict=True):
        flag, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and flag == "config":
            return Path((value if equals else following).partition(":")[0]).stem
    return run.path.name


def _heading(run: Run) -> str:
    config, env = measured(run), run.env
    about = f"{config['model']} on {config['data.name']}, in {run.path}"
    parts = [f"<h1>{escape(_title(run))}</h1>", soft(escape(about))]
    if run.result and "best" in run.result:
        chosen = setting_text(run.result["best"])
        num_settings = len(run.result["sweep"])
        parts.append(soft(escape(f"Best on val of {num_settings} settings: {chosen}.")))
    parts.append(_numbers(run))
    if command := env.get("command"):
        words = escape(shlex.join(["python", *map(str, command)]))
        parts.append(f'<code class="command">{words}</code>')
    where = [_commit(env)] if env.get("commit") else []
    where += [f"on {env['device']}"] if env.get("device") else []
    parts.append(soft(escape(", ".join(where))))
    return "".join(parts)


def _commit(env: dict[str, Any]) -> str:
    commit = str(env.get("commit") or "unknown")[:10]
    return f"commit {commit}, with uncommitted changes" if env.get("dirty") else f"commit {commit}"


def _numbers(run: Run) -> str:
    """The accuracies in large, then all numbers of the result in a table."""
    if run.result is None:
        last = run.records[-1] if run.records else {"step": 0, "epoch": 0}
        return paragraph(
            "This run is not complete, so that it has no result yet. "
            f"Its log ends after step {last['step']:,}, epoch {last['epoch']:.2f}."
        )
    shown, rows = [], []
    for split in ("test", "val"):
        metrics = run.result[split] or {}
        for name, s in metrics.items():
            if not isinstance(s, dict) or name == "per_class_accuracy":
                continue
            form = _percent if is_share(name) else _decimals
            interval = _interval(s, form)
            rows.append(
                [f"{split} {_words(name)}", form(s["mean"]), form(s["std"]), interval, s["n"]]
            )
            if name == "accuracy":
                spread = "" if s["std"] is None else f" <small>± {100 * s['std']:.2f}</small>"
                of = f"{split} accuracy, {metrics['count']:,} images, {_seeds(s['n'])}"
                value = f"<strong>{form(s['mean'])}{spread}</strong>"
                shown.append(f"<div>{value}{soft(escape(of))}</div>")
    head = ["", "mean", "standard deviation", "95 % interval of the mean", "seeds"]
    if all(n == 1 for *_, n in rows):
        head, rows = ["", "value"], [row[:2] for row in rows]
    if diverged := _diverged(run):
        shown.append(soft(f"{diverged} of {len(run.result['seeds'])} seeds diverged: no mean."))
    about = soft(_PROBED) if "linear_accuracy" in (run.result["test"] or {}) else ""
    return f'<div class="numbers">{"".join(shown)}</div>{about}{table(head, rows, "result")}'


def _diverged(run: Run) -> int:
    """Returns how many seeds of the result have no accuracy, on test or on val."""
    splits = [run.result[split]["accuracy"] for split in ("test", "val") if run.result[split]]
    return max((s["values"].count(None) for s in splits if "values" in s), default=0)


_PROBED = (
    "It learned without labels. Accuracy is that of the nearest neighbours among its features of "
    "training images, linear accuracy that of a linear classifier on them; spread near 0 or a rank "
    "near 1 would mean that all images look the same to it."
)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"mean ± standard deviation of {n} seeds"


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{100 * value:.2f} %"


def _decimals(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.4f}"


def _interval(s: dict[str, Any], form: Callable[[float | None], str]) -> str:
    low, high = s["ci95"] or (None, None)
    return _UNKNOWN if low is None else f"{form(low)} to {form(high)}"


def _comparison(runs: Sequence[Run], show: Show) -> str:
    names = [str(run.path) for run in runs]
    rows = []
    for name, run in zip(names, runs, strict=True):
        result = run.result or {}
        s = (result.get("test") or {}).get("accuracy") or {
            "mean": None,
            "ci95": None,
            "n": _UNKNOWN,
        }
        seconds = result.get("seconds", {}).get("train")
        rows.append(
            [
                name,
                _percent(s["mean"]) if result else "not complete",
                _interval(s, _percent),
                s["n"],
                _UNKNOWN if seconds is None else f"{seconds:,.1f}",
                _commit(run.env).removeprefix("commit "),
            ]
        )
    head = ["run", "test accuracy", "95 % interval", "seeds", "seconds of training", "commit"]
    parts = [h2("Side by side"), table(head, rows, "runs")]

    drawn = ""
    for split, metric in (("val", "accuracy"), ("train", "loss")):
        found = [curve(run, split, metric) for run in runs]
        curves = _there(zip(names, found, strict=True), metric)
        if len(curves) > 1:
            label = f"{metric} on {split} of each run over the epochs"
            drawn += show(plot.draw_curves(curves, _axis(metric, split)), f"runs_{metric}", label)
    if drawn:
        parts.append(f'<div class="pair">{drawn}</div>')

    leaves = [measured(run) for run in runs]
    apart = {key for own in leaves[1:] for key in differences(leaves[0], own)}
    rows = [
        [key, *(repr(own[key]) if key in own else _UNKNOWN for own in leaves)]
        for key in sorted(apart - SEED_KEYS)
    ]
    if rows:
        parts += [paragraph("Their configs differ in:"), table(["", *names], rows, "differences")]
    else:
        parts.append(paragraph("Their configs are the same, but for the seeds."))
    parts.append(soft(f"What follows is of the first run, {escape(names[0])}."))
    return "".join(parts)


def _there(curves: Iterable[tuple[str, Any]], metric: str) -> dict[str, plot.Curve]:
    """Those that there are, accuracies in %."""
    scale = 100 if metric.endswith("accuracy") else 1
    return {
        label: plot.Curve(found.epoch, scale * found.mean, scale * found.std)
        for label, found in curves
        if found is not None
    }


def _axis(metric: str, split: str = "") -> str:
    name = f"{_words(metric)} on {split}" if split else _words(metric)
    return f"{name}, %" if metric.endswith("accuracy") else name


def _training(run: Run, show: Show) -> str:
    splits = {"train": "train", "val": "val", "final_test": "test, at the end"}
    drawn = ""
    for metric in ("loss", "accuracy", "linear_accuracy", "feature_rank"):
        curves = _there(((label, curve(run, s, metric)) for s, label in splits.items()), metric)
        if curves:
            label = f"{_words(metric)} on {', '.join(curves)} over the epochs"
            drawn += show(plot.draw_curves(curves, _axis(metric)), metric, label)
    names = {name for r in run.records if r["split"] == "train" for name in r["values"]}
    rates = {
        name: curve(run, "train", name)
        for name in sorted(names)
        if name == "lr" or name.startswith("lr/")
    }
    rates = {
        "base" if name == "lr" else name.removeprefix("lr/"): rate
        for name, rate in rates.items()
        if rate is not None
    }
    if rates:
        peaks = [rate.mean.max() for rate in rates.values() if rate.mean.max() > 0]
        log = bool(peaks) and max(peaks) > 20 * min(peaks)
        figure = plot.draw_curves(rates, "learning rate", log)
        drawn += show(figure, "learning_rate", "learning rate over the epochs")
    if not drawn:
        return ""
    notes = []
    if any(record.get("runs") for record in run.records):
        notes.append("Bands are one standard deviation over the seeds to either side of the mean.")
    if select := measured(run).get("select"):
        notes.append(f"Loss and accuracy on train are of {select} alone.")
    return f'{h2("Training")}<div class="pair">{drawn}</div>{soft(escape(" ".join(notes)))}'


def _classes(run: Run, show: Show) -> str:
    test = (run.result or {}).get("test") or {}
    accuracy, confusion = test.get("per_class_accuracy"), test.get("confusion")
    if not accuracy:
        return ""
    notes, bars = [], {name: value for name, value in accuracy.items() if value is not None}
    if not bars:  # a seed has diverged
        return ""
    if len(bars) < len(accuracy):
        missing = ", ".join(escape(name) for name in accuracy if name not in bars)
        notes.append(f"Without images in test, and so without accuracy: {missing}.")
    if len(bars) > MOST_BARS:
        bars = dict(sorted(bars.items(), key=lambda item: item[1])[:MOST_BARS])
        notes.append(f"The {MOST_BARS} of {len(accuracy)} classes with the lowest accuracy.")
    drawn = show(plot.draw_bars(bars), "per_class", "accuracy on test of each class")
    if confusion:
        label = "confusion matrix of test: rows the labels, columns the answers"
        drawn += show(plot.draw_confusion(confusion, list(accuracy)), "confusion", label)
        if test["accuracy"]["n"] > 1:
            notes.append("The matrix counts the test images of all seeds.")
    return f'{h2("Classes")}<div class="pair">{drawn}</div>{soft(" ".join(notes))}'


def _calibration(run: Run, show: Show) -> str:
    calibration = ((run.result or {}).get("test") or {}).get("calibration")
    if not calibration:
        return ""
    error = _percent(calibration_error(calibration))
    drawn = show(plot.draw_reliability(calibration), "calibration", "reliability diagram on test")
    number = f"<strong>{error}</strong>{soft('expected calibration error on test')}"
    about = (
        "How far accuracy and confidence lie apart, in the mean over the test images, "
        f"by {len(calibration[0])} bins of confidence. On the dashed line a network is right as "
        "often as it is sure. Bars above it: more often; below it: it is too sure of itself."
    )
    text = f'<div class="numbers"><div>{number}</div></div>{soft(about)}'
    return f"{h2('Calibration')}{beside(drawn, text)}"


def _sweep(run: Run, show: Show) -> str:
    if not (run.result and "sweep" in run.result):
        return ""
    figure = plot.draw_sweep(run.result["sweep"], run.result["best"])
    best = setting_text(run.result["best"])
    about = soft(escape(f"Best on val: {best}. All that is above is of this setting."))
    drawn = show(figure, "sweep", "accuracy on val of each setting")
    return f"{h2('Sweep')}{beside(drawn, about)}"


def _facts(run: Run) -> str:
    tables = []
    if run.result:
        says = run.result.get("seconds_count", {})
        rows = [[k, f"{v:,.1f}", says.get(k, "")] for k, v in run.result["seconds"].items()]
        tables.append(("Seconds", table(["", "seconds", "spent on"], rows, "seconds")))
        flops = [[k, f"{v:.4g}"] for k, v in run.result.get("flops", {}).items()]
        tables.append(("FLOPs", table(["of", "FLOPs"], flops, "FLOPs")))
    env = {**run.env, "command": shlex.join(map(str, run.env.get("command", ())))}
    tables.append(("Environment", _leaves(env, "environment")))
    tables.append(("Config", _leaves(run.config, "config")))
    closed = "".join(f"<details><summary>{t}</summary>{html}</details>" for t, html in tables)
    return f"{h2('Facts')}{closed}"


def _leaves(values: dict[str, Any], label: str) -> str:
    rows = [
        [key, value if isinstance(value, str) else repr(value)]
        for key, value in sorted(flatten(values).items())
    ]
    return table(["key", "value"], rows, label)
