"""What a run was and what came of it: env.json and result.json."""

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

from cv_jax.config import write_atomically
from cv_jax.data import DataSpec
from cv_jax.errors import UserError
from cv_jax.evaluate import means
from cv_jax.loop import CLOCKS

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Statistics of one number measured on n seeds.

    Returns:
        mean; std, the sample standard deviation (n - 1); ci95 = [low, high], the 95 % interval of
        the mean by Student's t; n; values, one a seed. std and ci95 are None for n = 1: one run
        says nothing about spread.
    """
    values = [float(value) for value in values]
    n, mean = len(values), float(np.mean(values))
    std = ci95 = None
    if n > 1:
        from scipy import stats  # slow to import, and most runs have one seed

        std = float(np.std(values, ddof=1))
        half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
        ci95 = [mean - half, mean + half]
    return {"mean": mean, "std": std, "ci95": ci95, "n": n, "values": values}


def percent(mean: float, std: float | None) -> str:
    """An accuracy in [0, 1] for a table: "94.29 % ± 0.20", without spread where it is unknown."""
    spread = "" if std is None else f" ± {100 * std:.2f}"
    return f"{100 * mean:.2f} %{spread}"


def git_commit() -> tuple[str | None, bool | None]:
    """The commit of the code that runs and whether it was changed since; None outside of git."""
    root = Path(__file__).resolve().parent.parent

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
    }


def write_environment(workdir: Path) -> None:
    """Writes env.json; of a run that goes on, the newest start's counts."""
    write_json(workdir / "env.json", environment())


def finished_result(workdir: Path, step: int, total: int) -> dict[str, Any] | None:
    """Returns the result of a run that has nothing left to do, else None.

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
    result = json.loads(path.read_text())
    # A run that was lengthened and then killed before its end left the shorter one's result.
    return result if result["steps"] == total else None


def write_result(
    workdir: Path,
    config: ml_collections.ConfigDict,
    spec: DataSpec,
    steps: int,
    sums: dict[str, dict],
    flops: dict[str, int],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Writes result.json, what tables are made of, and returns it.

    Args:
        workdir: the run's directory.
        config, spec: of the run.
        steps: made in all.
        sums: split -> {metric: (sum, count)} of the final evaluation; {} for an empty split.
        flops: of "training", and of the final "evaluation" with all its views.
        seconds: by what they were spent on, see `loop.CLOCKS`.
    """
    commit, dirty = git_commit()
    examples = steps * config.batch_size
    result = {
        "config": config.to_dict(),
        **{split: _split_result(metrics, spec.class_names) for split, metrics in sums.items()},
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
    write_json(workdir / "result.json", result)
    return result


def _split_result(sums: dict, class_names: Sequence[str]) -> dict[str, Any] | None:
    if not sums:
        return None
    values = means(sums)
    per_class = values.pop("per_class_accuracy")
    return {
        **{name: summarize([value]) for name, value in values.items() if np.ndim(value) == 0},
        "per_class_accuracy": dict(zip(class_names, per_class.tolist(), strict=True)),
        "count": int(sums["accuracy"][1]),
    }


def print_result(result: dict[str, Any], workdir: Path) -> None:
    """Prints what came of the run, for a person."""
    for split in ("val", "test"):
        if result[split]:
            numbers = ", ".join(
                f"{name} {values['mean']:.4f}"
                for name, values in result[split].items()
                if isinstance(values, dict) and "mean" in values
            )
            print(f"{split:<7} {numbers}  ({result[split]['count']:,} images)")
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    print(f"seconds {seconds}")
    flops = result["flops"]
    print(
        f"FLOPs   {flops['training']:.3e} of training ({result['examples']:,} examples), "
        f"{flops['evaluation']:.3e} of the final evaluation"
    )
    print(f"written {workdir / 'result.json'}")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that any reader takes (no NaN), whole or not at all."""
    write_atomically(path, json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
