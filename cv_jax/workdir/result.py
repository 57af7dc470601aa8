"""What a run was and what came of it: env.json, data.json and result.json."""

import json
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from cv_jax.config.base import flatten
from cv_jax.config.errors import UserError
from cv_jax.data import Dataset, DataSpec
from cv_jax.data.dataset import spec_to_json
from cv_jax.data.typical import measure
from cv_jax.runtime.clock import CLOCKS
from cv_jax.runtime.startup import num_cores, number_variables
from cv_jax.workdir.files import write_json
from cv_jax.workdir.numbers import means

# Of which result.json has the confusion matrix.
MOST_CLASSES = 100
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


def is_share(metric: str) -> bool:
    """Returns whether a metric is a share of examples, in [0, 1], such as "accuracy" or "top5"."""
    return metric.endswith("accuracy") or metric.startswith("top")


def summarize(values: Sequence[float], share: bool = False) -> dict[str, Any]:
    """Returns statistics of one number measured on n seeds.

    Let m be the mean, s the sample standard deviation (n - 1) and t the 0.975 quantile of Student's
    t with n - 1 degrees of freedom. The 95 % interval of the mean is

        m ± t s / sqrt(n)                                                     of any number,
        logistic(logit(m) ± t s / (sqrt(n) m (1 - m)))                        of a share.

    The second is Student's t on the logit of the mean, whose standard error is that of the mean
    times logit'(m) = 1 / (m (1 - m)) (delta method): it stays inside [0, 1]. Where all values are
    equal, also where all are 0 or all are 1, both intervals are [m, m].

    Args:
        values: of each seed; NaN of one that has diverged.
        share: whether the number lies in [0, 1] by its nature, see `is_share`.

    Returns:
        mean; std; ci95 = [low, high]; n; values. std and ci95 are None for n = 1, since one run
        says nothing about spread, and where a value is not finite.
    """
    values = [float(value) for value in values]
    n, mean = len(values), float(np.mean(values))
    std = ci95 = None
    if n > 1 and np.isfinite(values).all():
        # Slow to import, and most runs have one seed; scipy.stats is three times slower still.
        from scipy.special import expit, logit, stdtrit

        std = float(np.std(values, ddof=1))
        half = float(stdtrit(n - 1, 0.975)) * std / n**0.5
        ci95 = [mean - half, mean + half]
        if share and half > 0 and 0 < mean < 1:
            center, half = float(logit(mean)), half / mean / (1 - mean)
            ci95 = [float(expit(center - half)), float(expit(center + half))]
    return {"mean": mean, "std": std, "ci95": ci95, "n": n, "values": values}


def percent(mean: float | None, std: float | None) -> str:
    """Returns an accuracy in [0, 1] for a table: "94.29 % ± 0.20", or "diverged" for no number.

    The spread is left out where it is unknown.
    """
    if mean is None or not np.isfinite(mean):
        return "diverged"
    spread = "" if std is None else f" ± {100 * std:.2f}"
    return f"{100 * mean:.2f} %{spread}"


def git_commit() -> tuple[str | None, bool | None]:
    """The commit of the code that runs and whether it was changed since; None outside of git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except OSError:  # git is not installed
        return None, None
    return (commit, bool(status)) if commit else (None, None)


def device_name() -> str:
    """What computes, in words: "8 x TPU v5 lite", "cpu (AMD EPYC 9554)"."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = f"cpu ({_cpu_model()})"
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or "unknown"


def environment() -> dict[str, Any]:
    """The content of env.json: code, versions, device and host of the program that runs."""
    commit, dirty = git_commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": device_name(),
        "cores": num_cores(),
        "variables": number_variables(),
    }


def write_environment(workdir: epath.Path, goes_on: bool = False) -> None:
    """Writes env.json; of a run that goes on, the newest start's counts.

    Raises:
        UserError: the run goes on, and an environment variable that changes numbers has another
            value than at its last start.
    """
    path, here = workdir / "env.json", environment()
    try:
        there = json.loads(path.read_text())["variables"] if goes_on else {}
    except (OSError, ValueError, KeyError, TypeError):  # of older code, or damaged
        there = {}
    for name, value in here["variables"].items():
        if there.get(name, value) != value:
            raise UserError(
                f"The environment variable {name} is {value!r} and was {there[name]!r} when the "
                f"run in {workdir} was last started, which can change its numbers: set it as it "
                "was, or choose another --workdir."
            )
    write_json(path, here)


def write_data(workdir: epath.Path, data: Dataset) -> None:
    """Writes data.json, with which the trained network can be used without the data set."""
    if jax.process_index() == 0:
        spec = data.spec
        if "image" in spec.fields:
            spec = spec._replace(typical=measure(spec.sample["image"], data.val["image"]))
        write_json(workdir / "data.json", spec_to_json(spec))


def finished_result(workdir: epath.Path, step: int, total: int) -> dict[str, Any] | None:
    """Returns the result of a run that has nothing left to do, and says so; else None.

    Raises:
        UserError: the run has already gone further than it is now asked to go.
    """
    if step > total:
        raise UserError(
            f"{workdir} is at step {step} already, past the {total} steps that config.epochs or "
            "config.steps ask for; ask for more, or choose another --workdir."
        )
    path = workdir / "result.json"
    if step < total or not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        # A run that was lengthened and then killed before its end left the shorter one's result.
        if result["steps"] != total:
            return None
    except (ValueError, TypeError, KeyError):  # damaged: it is measured and written again
        return None
    if jax.process_index() == 0:
        print(f"{workdir}: this run is complete.")
    return result


def write_result(
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    spec: DataSpec,
    settings: Sequence[dict[str, Any]],
    steps: int,
    sums: dict[str, dict],
    flops: dict[str, int],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Writes result.json, what tables are made of, and of a sweep sweep.png; returns the result.

    Args:
        workdir: where.
        config, spec: of the runs.
        settings: {config key: value} of a sweep, [{}] without one. The best by its mean accuracy
            on val, where there is one, is that whose numbers stand under "val" and "test". A
            setting of which a seed has diverged is worse than all that have fewer such seeds.
        steps: made in all.
        sums: split -> {metric: (sum, count)} of the final evaluation, with the axis of runs (all
            seeds of the first setting, ...); {} for an empty split.
        flops: of "training" of a run, and of its final "evaluation" with all its views.
        seconds: of all runs, by what they were spent on, see `clock.CLOCKS`.
    """
    commit, dirty = git_commit()
    examples = steps * config.batch_size
    values = {split: means(metrics) for split, metrics in sums.items()}
    per_setting = [
        {
            split: _split_result(v, spec.class_names, runs_of(i, config.num_seeds))
            for split, v in values.items()
        }
        for i in range(len(settings))
    ]
    best = max(range(len(settings)), key=lambda i: _on_val(per_setting[i]))
    result = {
        "config": config.to_dict(),
        "seeds": list(range(config.seed, config.seed + config.num_seeds)),
        **{
            split: {
                **per_setting[best][split],
                **_counts(metrics, runs_of(best, config.num_seeds)),
                "count": int(metrics["accuracy"][1][0]),
            }
            if metrics
            else None
            for split, metrics in sums.items()
        },
        "seconds": seconds,
        "seconds_count": CLOCKS,
        "steps": steps,
        "epochs": steps / (spec.num_train // config.batch_size),
        "examples": examples,
        "flops": {**flops, "total": sum(flops.values())},
        "commit": commit,
        "dirty": dirty,
        "device": device_name(),
    }
    if config.sweep:
        result["best"] = settings[best]
        result["sweep"] = [
            {"setting": setting, "val": split["val"]}
            for setting, split in zip(settings, per_setting, strict=True)
        ]
    if jax.process_index() == 0:
        if config.sweep:
            from cv_jax.workdir.figures import (
                draw_sweep,  # slow to import, and most programs sweep nothing
            )

            with (workdir / "sweep.png").open("wb") as file:
                draw_sweep(result["sweep"], result["best"]).savefig(file)
        write_json(workdir / "result.json", result)
    return result


def runs_of(setting: int, num_seeds: int) -> slice:
    """Returns where the seeds of the i-th setting are among all runs of a program."""
    return slice(setting * num_seeds, (setting + 1) * num_seeds)


def best_runs(result: dict[str, Any] | None, num_seeds: int) -> slice:
    """Returns where the runs of the best setting are among all runs of a program.

    Without a sweep, or where the best is not known yet, they are those of the first setting.

    Args:
        result: the content of result.json; None of a run that is not complete.
        num_seeds: of the config.
    """
    result = result or {}
    settings = [point["setting"] for point in result.get("sweep", ())]
    return runs_of(settings.index(result["best"]) if settings else 0, num_seeds)


def measured_config(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of the config that a run's numbers are of, {config key: value}.

    A swept key has its value in the best setting.

    Args:
        run: the content of a result.json or a record: its "config", and its "best" of a sweep.
    """
    return {**flatten(run["config"]), **(run.get("best") or {})}


def setting_text(setting: dict[str, Any]) -> str:
    """Returns a setting for people: "optim.lr=0.1, label_smoothing=0.2"."""
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def check_no_seed_diverged(name: str, run: dict[str, Any], split: str, metric: str) -> None:
    """Raises UserError where a seed has no finite value of a metric; result.json has null then."""
    values = run[split][metric]["values"]
    seeds = run.get("seeds", range(len(values)))
    bad = [str(seed) for seed, value in zip(seeds, values, strict=True) if value is None]
    if bad:
        raise UserError(
            f"{name}: seed {', '.join(bad)} has diverged, so that {metric} on {split} is no "
            "number; lower config.optim.lr, or train it with other seeds."
        )


def _counts(metrics: dict[str, tuple], runs: slice) -> dict[str, Any]:
    """What is counted and not averaged, over some runs; None where one of them has diverged.

    See `metrics.classification_metrics`.
    """
    counts = {
        name: metrics[name][0][runs].sum(axis=0)
        for name in ("confusion", "calibration")
        if name in metrics
    }
    return {
        name: x.tolist() if np.isfinite(x).all() else None
        for name, x in counts.items()
        if len(x) <= MOST_CLASSES
    }


def _split_result(
    values: dict[str, np.ndarray], class_names: Sequence[str], runs: slice
) -> dict[str, Any]:
    """The statistics over the seeds of a setting."""
    result = {
        name: summarize(v[runs], is_share(name)) for name, v in values.items() if np.ndim(v) == 1
    }
    if "per_class_accuracy" in values:
        per_class = values["per_class_accuracy"][runs].mean(axis=0)
        result["per_class_accuracy"] = dict(zip(class_names, per_class.tolist(), strict=True))
    return result


def _on_val(splits: dict[str, dict]) -> tuple[int, float]:
    """What settings are chosen by: the number of seeds with an accuracy, then its mean."""
    if not splits["val"]:
        return 0, 0.0
    values = np.array(splits["val"]["accuracy"]["values"])
    finite = values[np.isfinite(values)]
    return len(finite), float(finite.mean()) if len(finite) else 0.0


def print_result(result: dict[str, Any], workdir: epath.Path) -> None:
    """Prints what came of the runs, for a person."""
    for point in result.get("sweep", ()):
        accuracy = point["val"]["accuracy"]
        chosen = "  <- best on val" if point["setting"] == result["best"] else ""
        value = percent(accuracy["mean"], accuracy["std"])
        print(f"{setting_text(point['setting'])}: val {value}{chosen}")
    for split in ("val", "test"):
        if result[split]:
            numbers = ", ".join(
                f"{name} {_with_spread(values)}"
                for name, values in result[split].items()
                if isinstance(values, dict) and "mean" in values
            )
            seeds = f", {len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else ""
            print(f"{split:<7} {numbers}  ({result[split]['count']:,} images{seeds})")
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    print(f"seconds {seconds}")
    flops = result["flops"]
    print(
        f"FLOPs   {flops['training']:.3e} of training ({result['examples']:,} examples), "
        f"{flops['evaluation']:.3e} of the final evaluation"
    )
    print(f"written {workdir / 'result.json'}")


def _with_spread(values: dict[str, Any]) -> str:
    if values["mean"] is None or not np.isfinite(values["mean"]):
        return "diverged"
    spread = "" if values["std"] is None else f" ± {values['std']:.4f}"
    return f"{values['mean']:.4f}{spread}"
