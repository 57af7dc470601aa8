"""Writes and reads what a run was and its numbers: env.json, data.json and result.json."""

import json
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
from cv_jax.data.dataset import SPLITS, sample_of, spec_from_json, spec_to_json
from cv_jax.data.typical import measure
from cv_jax.runtime.clock import CLOCKS
from cv_jax.runtime.startup import num_cores, number_variables
from cv_jax.workdir.files import read_json, write_json
from cv_jax.workdir.metric import Metric, headline_of, headline_text, metric_of, metrics_to_json
from cv_jax.workdir.numbers import means

# result.json has the confusion matrix of up to this many classes.
MOST_CLASSES = 100
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


def examples_word(spec: DataSpec) -> str:
    """Returns "images" for data with images, else "examples"."""
    has_images = any(field.kind == "image" for field in spec.fields.values())
    return "images" if has_images else "examples"


def summarize(values: Sequence[float], share: bool = False) -> dict[str, Any]:
    """Returns statistics of one number measured on n seeds.

    Let m be the mean, s the sample standard deviation (n - 1) and t the 0.975 quantile of Student's
    t with n - 1 degrees of freedom. The 95 % interval of the mean is

        m ± t s / sqrt(n)                                                     of any number,
        logistic(logit(m) ± t s / (sqrt(n) m (1 - m)))                        of a share.

    The interval of a share is Student's t on the logit of the mean. The standard error of the logit
    is that of the mean times logit'(m) = 1 / (m (1 - m)) (delta method). This interval stays inside
    [0, 1]. Where all values are equal, both intervals are [m, m].

    Both are intervals over seeds: they say how far the mean of other seeds may lie, and nothing
    about other examples.

    Args:
        values: of each seed; NaN for a seed that has diverged.
        share: whether the metric is a share in [0, 1], which is a metric of unit "%".

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
    """Returns a share in [0, 1] for a table: "94.29 % ± 0.20"; see `Metric.text`."""
    return Metric("%").text(mean, std)


def git_commit() -> tuple[str | None, bool | None]:
    """Returns the commit of this code and whether files differ from it; None outside of git."""
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
    """Returns the devices as text: "8 x TPU v5 lite", "cpu (AMD EPYC 9554)"."""
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
    """Returns the content of env.json: code, versions, device and host of this program."""
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
    """Writes env.json, over that of an earlier start.

    Args:
        workdir: the work directory.
        goes_on: whether the run resumes.

    Raises:
        UserError: the run resumes, and an environment variable that changes numbers has another
            value than at the last start.
    """
    path, here = workdir / "env.json", environment()
    try:
        there = json.loads(path.read_text())["variables"] if goes_on else {}
    except (OSError, ValueError, KeyError, TypeError):  # written by older code, or damaged
        there = {}
    for name, value in here["variables"].items():
        if there.get(name, value) != value:
            raise UserError(
                f"The environment variable {name} is {value!r} and was {there[name]!r} when the "
                f"run in {workdir} was last started. It can change the run's numbers: set it as it "
                "was, or choose another --workdir."
            )
    write_json(path, here)


def write_data(workdir: epath.Path, data: Dataset) -> None:
    """Writes data.json, with which the trained network can be used without the data set."""
    if jax.process_index() == 0:
        spec = data.spec
        if "image" in spec.fields:
            val = sample_of(data.val)["image"]
            spec = spec._replace(typical=measure(spec.sample["image"], val))
        write_json(workdir / "data.json", spec_to_json(spec))


def check_data(workdir: epath.Path, spec: DataSpec) -> None:
    """Raises UserError if data.json describes other data than `spec`: val would be another, too.

    A missing or damaged file is no error: the caller writes the file again.
    """
    try:
        before = spec_from_json(read_json(workdir / "data.json"))
    except (UserError, KeyError, TypeError, ValueError):
        return
    old, new = _facts(before), _facts(spec)
    changed = [
        f"the {name} was {_shown(old[name])}, now {_shown(x)}"
        for name, x in new.items()
        if old.get(name, x) != x  # older code did not write all of them
    ]
    if not changed and not _same_statistics(before, spec):
        changed = ["the mean and std of the training images are others"]
    if changed:
        raise UserError(
            f"The data set has changed since {workdir} was last started: {', '.join(changed)}. "
            "Restore the data, or choose another --workdir."
        )


def _facts(spec: DataSpec) -> dict[str, Any]:
    """Returns what data of the same content have in common, by its name in a message."""
    counts = spec.label_counts
    return {
        **{f"size of {name}": getattr(spec, f"num_{name}") for name in SPLITS},
        **({"number of labels by class": list(counts)} if counts else {}),
        "list of fields": sorted(spec.fields),
        **{f"shape of {name}": list(field.shape) for name, field in spec.fields.items()},
        **{f"list of names of {name}": list(field.names) for name, field in spec.fields.items()},
    }


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _same_statistics(before: DataSpec, spec: DataSpec) -> bool:
    return all(
        field.mean is None
        or before.fields[name].mean is None
        or (
            np.allclose(field.mean, before.fields[name].mean, rtol=1e-5)
            and np.allclose(field.std, before.fields[name].std, rtol=1e-5)
        )
        for name, field in spec.fields.items()
    )


def finished_result(workdir: epath.Path, step: int, total: int) -> dict[str, Any] | None:
    """Returns the result of a complete run and prints that it is complete; None of other runs.

    Args:
        workdir: the work directory.
        step: of the newest checkpoint.
        total: steps of the training.

    Raises:
        UserError: the run has already made more steps than the config asks for.
    """
    if step > total:
        raise UserError(
            f"{workdir} is at step {step} already, past the {total} steps that config.epochs or "
            "config.steps ask for: set a larger number, or choose another --workdir."
        )
    path = workdir / "result.json"
    if step < total or not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        # A longer run that was killed before its end still has the result of the shorter run.
        if result["steps"] != total:
            return None
    except (ValueError, TypeError, KeyError):  # damaged: the run is evaluated again
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
    metrics: Mapping[str, Metric],
    headline: str,
    baseline: dict[str, dict[str, float]] | None = None,
    stopped_early: dict[str, int] | None = None,
    broken_images: int = 0,
) -> dict[str, Any]:
    """Writes result.json, and sweep.png for a sweep. Returns the content of result.json.

    The best setting is the one with the best mean headline on val. A setting with fewer diverged
    seeds is always better. "val" and "test" of the result are the numbers of the best setting.

    Args:
        workdir: the work directory.
        config: the config of the runs.
        spec: the facts about their data.
        settings: {config key: value} of each setting of a sweep; [{}] without a sweep.
        steps: made in all.
        sums: split -> {metric: (sum, count)} of the final evaluation, with a leading axis of runs:
            all seeds of the first setting, then all seeds of the second. {} for an empty split.
        flops: of the "training" of a run, and of its final "evaluation" with all views.
        seconds: of all runs, see `clock.CLOCKS`.
        metrics, headline: what the task measures and which metric ranks, see `tasks.Task`.
        baseline: split -> {metric: number} of a trivial predictor; None where there is none.
        stopped_early: the planned steps and the step of the last improvement on val; None where
            the training had its whole length.
        broken_images: that this process could not decode during the run.
    """
    commit, dirty = git_commit()
    examples = steps * config.batch_size
    described = metrics_to_json(metrics, headline)
    values = {split: means(of_split) for split, of_split in sums.items()}
    per_setting = [
        {
            split: _split_result(v, spec, runs_of(i, config.num_seeds), described)
            for split, v in values.items()
        }
        for i in range(len(settings))
    ]
    on_val = [_on_val(splits, described) for splits in per_setting]
    best = on_val.index(max(on_val))
    num_examples = {"val": spec.num_val, "test": spec.num_test}
    result = {
        "config": config.to_dict(),
        "seeds": list(range(config.seed, config.seed + config.num_seeds)),
        **described,
        **{
            split: {
                **per_setting[best][split],
                **_counts(of_split, runs_of(best, config.num_seeds)),
                "count": num_examples[split],
            }
            if of_split
            else None
            for split, of_split in sums.items()
        },
        "baseline": baseline,
        "examples_are": examples_word(spec),
        **({"broken_images": broken_images} if broken_images else {}),
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
    if stopped_early:
        result["stopped_early"] = stopped_early
    if config.sweep:
        result["best"] = settings[best]
        result["sweep"] = [
            {"setting": setting, "val": split["val"]}
            for setting, split in zip(settings, per_setting, strict=True)
        ]
    if jax.process_index() == 0:
        if config.sweep:
            from cv_jax.workdir.figures import draw_sweep  # slow to import, seldom needed

            metric = metric_of(result, headline)
            figure = draw_sweep(result["sweep"], result["best"], headline, metric)
            with (workdir / "sweep.png").open("wb") as file:
                figure.savefig(file)
        write_json(workdir / "result.json", result)
    return result


def runs_of(setting: int, num_seeds: int) -> slice:
    """Returns the positions of a setting's seeds among all runs of a program."""
    return slice(setting * num_seeds, (setting + 1) * num_seeds)


def best_runs(result: dict[str, Any] | None, num_seeds: int) -> slice:
    """Returns the positions of the best setting's seeds among all runs of a program.

    Without a sweep, or where the best setting is not known yet, the first setting counts as best.

    Args:
        result: the content of result.json; None where the run is not complete.
        num_seeds: of the config.
    """
    result = result or {}
    settings = [point["setting"] for point in result.get("sweep", ())]
    return runs_of(settings.index(result["best"]) if settings else 0, num_seeds)


def measured_config(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the config that gave a run's numbers, as {config key: value}.

    A swept key has its value in the best setting.

    Args:
        run: the content of a result.json or a record. "config" is read, and "best" of a sweep.
    """
    return {**flatten(run["config"]), **(run.get("best") or {})}


def setting_text(setting: dict[str, Any]) -> str:
    """Returns a setting as text: "optim.lr=0.1, label_smoothing=0.2"."""
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def statistics_of(split: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Returns {metric: its statistics over the seeds} of a split of a result, see `summarize`."""
    return {
        name: numbers
        for name, numbers in (split or {}).items()
        if isinstance(numbers, dict) and isinstance(numbers.get("values"), list)
    }


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
    """Returns sums over the examples and some runs; None where one of the runs has diverged.

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
    values: dict[str, np.ndarray], spec: DataSpec, runs: slice, described: dict[str, Any]
) -> dict[str, Any]:
    """Returns the statistics over the seeds of a setting. `described`: see `metrics_to_json`."""
    result = {
        name: summarize(v[runs], metric_of(described, name).unit == "%")
        for name, v in values.items()
        if np.ndim(v) == 1
    }
    if "per_class_accuracy" in values:
        per_class = values["per_class_accuracy"][runs].mean(axis=0)
        result["per_class_accuracy"] = dict(zip(spec.class_names, per_class.tolist(), strict=True))
    return result


def _on_val(splits: dict[str, dict], described: dict[str, Any]) -> tuple[int, float]:
    """Returns the rank of a setting: its finite seeds, then its mean headline on val."""
    headline = headline_of(described)
    numbers = statistics_of(splits["val"]).get(headline, {"values": []})
    return metric_of(described, headline).rank_of_runs(numbers["values"])


def print_result(result: dict[str, Any], workdir: epath.Path) -> None:
    """Prints the numbers of a complete program."""
    for point in result.get("sweep", ()):
        chosen = "  <- best on val" if point["setting"] == result["best"] else ""
        value = headline_text({**result, "val": point["val"]}, "val")
        print(f"{setting_text(point['setting'])}: val {value}{chosen}")
    for split in ("val", "test"):
        if result[split]:
            statistics = statistics_of(result[split])
            numbers = ", ".join(f"{k} {_with_spread(v)}" for k, v in statistics.items())
            headline = headline_of(result)
            if headline not in statistics:
                numbers = ", ".join([f"no {headline}", *([numbers] if numbers else [])])
            seeds = f", {len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else ""
            examples = result.get("examples_are", "images")
            print(f"{split:<7} {numbers}  ({result[split]['count']:,} {examples}{seeds})")
    if baseline := _baseline_text(result):
        print(f"baseline {baseline}")
    if protocol := metric_of(result, headline_of(result)).protocol:
        print(f"protocol {headline_of(result)}: {protocol}")
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    print(f"seconds {seconds}")
    flops = result["flops"]
    print(
        f"FLOPs   {flops['training']:.3e} of training ({result['examples']:,} examples), "
        f"{flops['evaluation']:.3e} of the final evaluation"
    )
    print(f"written {workdir / 'result.json'}")


def _baseline_text(result: dict[str, Any]) -> str:
    """Returns the numbers of the trivial predictor on test, else on val; "" for none."""
    baseline = result.get("baseline") or {}
    numbers = baseline.get("test") or baseline.get("val") or {}
    return ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())


def _with_spread(values: dict[str, Any]) -> str:
    if values["mean"] is None or not np.isfinite(values["mean"]):
        return "diverged"
    spread = "" if values["std"] is None else f" ± {values['std']:.4f}"
    return f"{values['mean']:.4f}{spread}"
