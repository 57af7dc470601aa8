"""Builds the page of a report, as HTML without scripts."""

import shlex
from collections.abc import Iterable, Sequence
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
from cv_jax.workdir.metric import Metric, headline_text, is_loss
from cv_jax.workdir.result import setting_text, statistics_of

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
    """Returns the page of a run; for several runs a comparison, then the first run in full.

    Args:
        runs: one or more runs.
        num_images: number of test images to predict.
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
    """Returns the name of the config file, or of the work directory if there is none."""
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
    """Returns the headline of each split in large, then all numbers of the result in a table."""
    if run.result is None:
        last = run.records[-1] if run.records else {"step": 0, "epoch": 0}
        return paragraph(
            "This run is not complete and has no result yet. "
            f"Its log ends after step {last['step']:,}, epoch {last['epoch']:.2f}."
        )
    shown, rows = [], []
    for split in ("test", "val"):
        if not run.result[split]:
            continue
        statistics = statistics_of(run.result[split])
        shown.append(_large(run, split, statistics.get(run.headline)))
        for name, s in statistics.items():
            metric = run.metric(name)
            numbers = _number(metric, s["mean"]), _number(metric, s["std"]), _interval(metric, s)
            rows.append([f"{split} {_words(name)}", *numbers, s["n"]])
        trivial = (run.result.get("baseline") or {}).get(split, {})
        for name, value in trivial.items():
            value = _number(run.metric(name), value)
            rows.append([f"{split} {_words(name)}, trivial baseline", value, *["-"] * 2, 1])
    head = ["", "mean", "standard deviation", "95 % interval of the mean over seeds", "seeds"]
    if all(n == 1 for *_, n in rows):
        head, rows = ["", "value"], [row[:2] for row in rows]
    if diverged := _diverged(run):
        shown.append(soft(f"{diverged} of {len(run.result['seeds'])} seeds diverged: no mean."))
    about = soft(escape(_protocols(run)))
    return f'<div class="numbers">{"".join(shown)}</div>{about}{table(head, rows, "result")}'


def _large(run: Run, split: str, s: dict[str, Any] | None) -> str:
    """Returns the headline of a split in large, with its protocol; `s` are its statistics."""
    metric = run.metric(run.headline)
    if s is None:
        return f"<div>{soft(escape(f'{split}: no {_words(run.headline)}'))}</div>"
    spread = "" if s["std"] is None else f" <small>± {metric.digits(s['std'])}</small>"
    count, examples = run.result[split]["count"], run.result.get("examples_are", "images")
    of = f"{split} {_words(run.headline)}, {count:,} {examples}, {_seeds(s['n'])}"
    if metric.protocol:
        of += f"; {metric.protocol}"
    value = f"<strong>{_number(metric, s['mean'])}{spread}</strong>"
    return f"<div>{value}{soft(escape(of))}</div>"


def _protocols(run: Run) -> str:
    """Returns the protocols of the metrics beside the headline."""
    splits = [statistics_of(run.result[split]) for split in ("test", "val")]
    names = dict.fromkeys(name for split in splits for name in split if name != run.headline)
    protocols = {_words(name): run.metric(name).protocol for name in names}
    texts = [f"{name}: {protocol}" for name, protocol in protocols.items() if protocol]
    return f"{'; '.join(texts)}." if texts else ""


def _diverged(run: Run) -> int:
    """Returns the number of seeds of the result without a headline on test or on val."""
    splits = [statistics_of(run.result[split]).get(run.headline) for split in ("test", "val")]
    return max((s["values"].count(None) for s in splits if s), default=0)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"mean ± standard deviation of {n} seeds"


def _number(metric: Metric, value: float | None) -> str:
    return _UNKNOWN if value is None else metric.number(value)


def _interval(metric: Metric, s: dict[str, Any]) -> str:
    low, high = s["ci95"] or (None, None)
    return _UNKNOWN if low is None else f"{metric.number(low)} to {metric.number(high)}"


def _short_names(names: Sequence[str], most: int = 40) -> list[str]:
    """Returns the ends of long names for a legend, with a number in front where two agree."""
    short = [name if len(name) <= most else f"…{name[-most:]}" for name in names]
    if len(set(short)) == len(short):
        return short
    return [f"{i}: {name}" for i, name in enumerate(short, 1)]


def _comparison(runs: Sequence[Run], show: Show) -> str:
    names = [str(run.path) for run in runs]
    rows = []
    headline = runs[0].headline
    for name, run in zip(names, runs, strict=True):
        result = run.result or {}
        s = statistics_of(result.get("test")).get(headline)
        seconds = result.get("seconds", {}).get("train")
        rows.append(
            [
                name,
                _compared(run, headline),
                _interval(run.metric(headline), s) if s else _UNKNOWN,
                s["n"] if s else _UNKNOWN,
                _UNKNOWN if seconds is None else f"{seconds:,.1f}",
                _commit(run.env).removeprefix("commit "),
            ]
        )
    head = [
        *("run", f"test {_words(headline)}", "95 % interval", "seeds", "seconds of training"),
        "commit",
    ]
    parts = [h2("Side by side"), table(head, rows, "runs")]

    drawn = ""
    for split, name in (("val", headline), ("train", "loss")):
        metric = runs[0].metric(name)
        found = [curve(run, split, name) for run in runs]
        curves = _there(zip(_short_names(names), found, strict=True), metric)
        if len(curves) > 1:
            label = f"{_words(name)} on {split} of each run over the epochs"
            axis = metric.label(f"{_words(name)} on {split}")
            drawn += show(plot.draw_curves(curves, axis), f"runs_{_file_name(name)}", label)
    if drawn:
        parts.append(f'<div class="pair">{drawn}</div>')

    leaves = [measured(run) for run in runs]
    apart = {key for own in leaves[1:] for key in differences(leaves[0], own)}
    rows = [
        [key, *(repr(own[key]) if key in own else _UNKNOWN for own in leaves)]
        for key in sorted(apart - SEED_KEYS)
    ]
    if rows:
        parts += [paragraph("The configs differ in:"), table(["", *names], rows, "differences")]
    else:
        parts.append(paragraph("The configs are equal except for the seeds."))
    parts.append(soft(f"The following sections describe the first run, {escape(names[0])}."))
    return "".join(parts)


def _compared(run: Run, headline: str) -> str:
    """Returns the mean of `headline` on test for the comparison."""
    if not run.result:
        return "not complete"
    numbers = statistics_of(run.result["test"]).get(headline)
    if numbers is None:
        return headline_text({"headline": headline}, "test")
    return _number(run.metric(headline), numbers["mean"])


def _there(curves: Iterable[tuple[str, Any]], metric: Metric) -> dict[str, plot.Curve]:
    """Returns the curves that are not None, in the metric's unit."""
    return {
        label: plot.Curve(found.epoch, metric.scale * found.mean, metric.scale * found.std)
        for label, found in curves
        if found is not None
    }


def _file_name(metric: str) -> str:
    """Returns a metric's name for files and ids of plots, without the slash of "loss/critic"."""
    return metric.replace("/", "_")


def _measured_names(run: Run) -> list[str]:
    """Returns the metrics with training curves: losses, the headline, and those of evaluations."""
    train = [r["values"] for r in run.records if r["split"] == "train"]
    others = [r["values"] for r in run.records if r["split"] != "train"]
    losses = [name for values in train for name in values if is_loss(name)]
    names = [name for values in others for name in values]
    return list(dict.fromkeys(["loss", *losses, run.headline, *names]))


def _training(run: Run, show: Show) -> str:
    splits = {"train": "train", "val": "val", "final_test": "test, at the end"}
    drawn = ""
    for name in _measured_names(run):
        metric = run.metric(name)
        curves = _there(((label, curve(run, s, name)) for s, label in splits.items()), metric)
        if curves:
            label = f"{_words(name)} on {', '.join(curves)} over the epochs"
            figure = plot.draw_curves(curves, metric.label(_words(name)))
            drawn += show(figure, _file_name(name), label)
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
        notes.append("Bands show one standard deviation over the seeds on each side of the mean.")
    if select := measured(run).get("select"):
        notes.append(f"Training curves count only the examples that {select} chose.")
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
        notes.append(f"Classes without test images have no accuracy: {missing}.")
    if len(bars) > MOST_BARS:
        bars = dict(sorted(bars.items(), key=lambda item: item[1])[:MOST_BARS])
        notes.append(f"The {MOST_BARS} of {len(accuracy)} classes with the lowest accuracy.")
    drawn = show(plot.draw_bars(bars), "per_class", "accuracy on test of each class")
    if confusion:
        label = "confusion matrix on test: rows are labels, columns are predictions"
        drawn += show(plot.draw_confusion(confusion, list(accuracy)), "confusion", label)
        if len(run.result["seeds"]) > 1:
            notes.append("The matrix counts the test images of all seeds.")
    return f'{h2("Classes")}<div class="pair">{drawn}</div>{soft(" ".join(notes))}'


def _calibration(run: Run, show: Show) -> str:
    calibration = ((run.result or {}).get("test") or {}).get("calibration")
    if not calibration:
        return ""
    error = Metric("%").number(calibration_error(calibration))
    drawn = show(plot.draw_reliability(calibration), "calibration", "reliability diagram on test")
    number = f"<strong>{error}</strong>{soft('expected calibration error on test')}"
    about = (
        "The mean difference between accuracy and confidence over the test images, by "
        f"{len(calibration[0])} bins of confidence. On the dashed line, accuracy equals "
        "confidence. Bars below the line mean that the network is too confident."
    )
    text = f'<div class="numbers"><div>{number}</div></div>{soft(about)}'
    return f"{h2('Calibration')}{beside(drawn, text)}"


def _sweep(run: Run, show: Show) -> str:
    if not (run.result and "sweep" in run.result):
        return ""
    name = run.headline
    figure = plot.draw_sweep(run.result["sweep"], run.result["best"], name, run.metric(name))
    best = setting_text(run.result["best"])
    about = soft(escape(f"Best on val: {best}. All numbers above are from this setting."))
    drawn = show(figure, "sweep", f"{_words(name)} on val of each setting")
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
