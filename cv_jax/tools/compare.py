"""Compares runs: whether their numbers differ by more than chance, and how their configs differ.

    python -m cv_jax.tools.compare runs/a runs/b
    python -m cv_jax.tools.compare results/a.json runs/b runs/c --metric=loss --out=compare.json

A run is a work directory, or a record of `cv_jax.tools.collect`. Each other run is compared with
the first run, by a paired t-test if both have the same seeds, else by Welch's t-test.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import stats

from cv_jax.config.base import SEED_KEYS, differences
from cv_jax.config.errors import UserError
from cv_jax.config.paths import path_argument
from cv_jax.tools.command import command, make_parser
from cv_jax.workdir.bucket import work_directory
from cv_jax.workdir.files import write_json
from cv_jax.workdir.metric import Metric, headline_of, metric_of
from cv_jax.workdir.result import (
    check_no_seed_diverged,
    measured_config,
    setting_text,
    summarize,
)

ALPHA, POWER = 0.05, 0.8  # level and power of the test that `seeds_to_see` plans
MOST_SEEDS = 100_000


def compare(runs: dict[str, dict[str, Any]], split: str, metric: str) -> dict[str, Any]:
    """Compares every run with the first.

    Args:
        runs: name -> the content of a result.json or a record.
        split: "val" or "test".
        metric: a metric of the results, such as "accuracy" or "loss".

    Returns:
        split, metric: the arguments.
        unit, better, protocol: those of the metric, see `Metric`.
        runs: name -> `result.summarize` of the metric.
        order: the names of the runs, the best mean first.
        settings: name -> the best setting of the run's sweep; {} without a sweep.
        differences: for each run but the first, the result of `difference`; "better", whether the
            mean is better than that of the first run, None for equal means; and "config", the keys
            that differ. A swept key has its value in the best setting.

    Raises:
        UserError: a run does not have the metric, or one of its seeds has diverged.
    """
    values = {name: _values(name, run, split, metric) for name, run in runs.items()}
    (first, base), *others = runs.items()
    meaning = metric_of(base, metric)
    ranks = {name: meaning.rank(float(np.mean(x))) for name, x in values.items()}
    report = {
        "split": split,
        "metric": metric,
        **meaning._asdict(),
        "runs": {name: summarize(x, meaning.unit == "%") for name, x in values.items()},
        "order": sorted(ranks, key=ranks.get, reverse=True),
        "settings": {name: run.get("best") or {} for name, run in runs.items()},
        "differences": [],
    }
    for name, run in others:
        paired = len(base["seeds"]) > 1 and base["seeds"] == run["seeds"]
        apart = differences(measured_config(base), measured_config(run))
        report["differences"].append(
            {
                "of": name,
                "from": first,
                **difference(values[first], values[name], paired),
                "better": None if ranks[name] == ranks[first] else ranks[name] > ranks[first],
                "config": {key: pair for key, pair in apart.items() if key not in SEED_KEYS},
            }
        )
    return report


def difference(a: Sequence[float], b: Sequence[float], paired: bool) -> dict[str, Any]:
    """Computes the difference of means b - a, and its uncertainty over seeds.

    Args:
        a, b: one value for each seed.
        paired: whether a[i] and b[i] have the same seed.

    Returns:
        mean: the difference of means.
        test: "paired" or "welch", the two-sided t-test against no difference.
        ci95: the 95 % interval of the mean over seeds.
        p: the p-value of the test.
        seeds_to_see: the seeds that each side needs, see `seeds_to_see`.
        ci95, p and seeds_to_see are None if a side has one value, or if no value varies.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    report = {"mean": float(b.mean() - a.mean()), "test": "paired" if paired else "welch"}
    spread = float(np.std(b - a, ddof=1)) if paired else _pooled_std(a, b)
    if min(len(a), len(b)) < 2 or not spread > 0:
        return {**report, "ci95": None, "p": None, "seeds_to_see": None}
    test = stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(0.95)
    return {
        **report,
        "ci95": [float(interval.low), float(interval.high)],
        "p": float(test.pvalue),
        "seeds_to_see": seeds_to_see(report["mean"], spread, paired),
    }


def _pooled_std(a: np.ndarray, b: np.ndarray) -> float:
    if min(len(a), len(b)) < 2:
        return 0.0
    return float(np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2))


def seeds_to_see(mean: float, std: float, paired: bool) -> int | None:
    """Returns the fewest seeds a side with which a t-test at level ALPHA has the power POWER.

    Assumes that `mean` and `std` are the true values. None if MOST_SEEDS are too few.

    Args:
        mean: mean of the difference.
        std: standard deviation of the differences if paired; else of one side.
        paired: whether both sides have the same seeds.
    """

    def power(n):
        freedom = n - 1 if paired else 2 * (n - 1)
        noncentrality = abs(mean) / std * np.sqrt(n if paired else n / 2)
        critical = stats.t.ppf(1 - ALPHA / 2, freedom)
        return stats.nct.sf(critical, freedom, noncentrality)

    low, high = 1, 2
    while not power(high) >= POWER:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def _values(name: str, run: dict[str, Any], split: str, metric: str) -> list[float]:
    numbers = (run.get(split) or {}).get(metric)
    if not isinstance(numbers, dict) or "values" not in numbers:
        raise UserError(f"{name} has no {metric} on {split}: choose another --metric or --split.")
    check_no_seed_diverged(name, run, split, metric)
    return numbers["values"]


def read_run(path: epath.Path) -> dict[str, Any]:
    """Reads a record, or the result.json of a work directory."""
    file = path / "result.json" if path.is_dir() else path
    try:
        run = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: is the run complete? ({error})") from error
    if not isinstance(run, dict) or not {"config", "test"} <= run.keys():
        raise UserError(f"{file} is neither a result.json nor a record of cv_jax.tools.collect.")
    return {"seeds": [run["config"].get("seed", 0)], **run}


def describe(report: dict[str, Any]) -> str:
    """Returns the report as text. Differences of a metric in % are in points."""
    metric = Metric(report["unit"], report["better"], report["protocol"])
    number = metric.digits
    points = " points" if metric.unit == "%" else f" {metric.unit}".rstrip()
    lines = [metric.label(f"{report['metric']} on {report['split']}")]
    if metric.protocol:
        lines[0] += f" ({metric.protocol})"
    width = max(map(len, report["runs"]))
    for name, s in report["runs"].items():
        spread = (
            f" ± {number(s['std'])}  95 % interval {number(s['ci95'][0])} to {number(s['ci95'][1])}"
            if s["n"] > 1
            else ""
        )
        best = "  <- best" if name == report["order"][0] else ""
        lines.append(f"  {name:<{width}}  {number(s['mean'])}{spread}  n = {s['n']}{best}")
        if setting := report["settings"][name]:
            lines.append(f"  {'':<{width}}  best on val of its sweep: {setting_text(setting)}")
    for d in report["differences"]:
        mark = {True: ", better", False: ", worse", None: ""}[d["better"]]
        lines.append(f"\n{d['of']} - {d['from']}: {number(d['mean'], '+')}{points}{mark}")
        if d["p"] is None:
            lines.append("  one value, or no spread: no test is possible")
        else:
            low, high = (number(x, "+") for x in d["ci95"])
            lines.append(f"  95 % interval {low} to {high}, p = {d['p']:.2g} ({d['test']} t-test)")
            needed = d["seeds_to_see"]
            lines.append(
                f"  to see a difference of this size 4 times in 5: "
                f"{f'more than {MOST_SEEDS:,}' if needed is None else needed} seeds a side"
            )
        lines += [f"  config.{key}: {a!r} -> {b!r}" for key, (a, b) in d["config"].items()]
    return "\n".join(lines)


@command("compare")
def main() -> None:
    """Reads the command line, prints the comparison, and writes it to --out."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="work directories or records")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--metric", help="default: the headline of the first run")
    parser.add_argument("--out", type=path_argument, help="a JSON file to write")
    arguments = parser.parse_args()
    paths = dict.fromkeys(map(work_directory, arguments.runs))
    if len(paths) < 2:
        parser.error("give two different runs or more")
    runs = {str(path): read_run(path) for path in paths}
    metric = arguments.metric or headline_of(next(iter(runs.values())))
    report = compare(runs, arguments.split, metric)
    if arguments.out:
        write_json(arguments.out, report)
    print(describe(report))


if __name__ == "__main__":
    main()
