"""What the files of a work directory say of a run, complete or not."""

import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from cv_jax.config.errors import UserError
from cv_jax.workdir.figures import Curve
from cv_jax.workdir.files import read_json
from cv_jax.workdir.result import best_runs, measured_config


class Run(NamedTuple):
    """A work directory.

    Attributes:
        path: of it; its text names the run.
        config: the content of config.json.
        env: of env.json; {} where it is not there.
        records: the lines of metrics.jsonl that are whole.
        result: the content of result.json; None where the run is not complete.
    """

    path: epath.Path
    config: dict[str, Any]
    env: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any] | None


def read_run(path: epath.Path) -> Run:
    """Reads a work directory; the run may still be going on.

    Raises:
        UserError: there is no run, or one of its files is damaged.
    """

    def optional(name):
        return read_json(path / name) if (path / name).exists() else None

    config = read_json(path / "config.json")
    if not {"model", "data", "num_seeds"} <= config.keys():
        raise UserError(f"{path / 'config.json'} is no config: is {path} the --workdir of a run?")
    env = optional("env.json") or {}
    return Run(path, config, env, _read_records(path / "metrics.jsonl"), optional("result.json"))


def measured(run: Run) -> dict[str, Any]:
    """Returns the leaves of the config that the run's numbers are of, see `measured_config`."""
    return measured_config({"config": run.config, "best": (run.result or {}).get("best")})


def _read_records(path: epath.Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the half line of a run that was killed, or is writing
            continue
        if isinstance(record, dict) and record.keys() >= {"step", "epoch", "split", "values"}:
            records.append(record)
    return records


def curve(run: Run, split: str, name: str) -> Curve | None:
    """A number of metrics.jsonl over the training, None where there is none of this name.

    Mean and std are over the seeds; of a sweep over those of its best setting, where it is known.

    Args:
        run: of which.
        split: "train", "val"; of "final_val" and "final_test" the newest value alone.
        name: "loss", "accuracy", "lr", ...
    """
    known = run.result and "best" in run.result
    runs = best_runs(run.result, run.config["num_seeds"]) if known else slice(None)
    records = [r for r in run.records if r["split"] == split and name in r["values"]]
    if split.startswith("final_"):
        records = records[-1:]
    points = []
    for record in records:
        of_runs = record.get("runs", {}).get(name, [record["values"][name]])
        values = np.array(of_runs, float)[runs]
        values = values[np.isfinite(values)]
        if len(values):
            std = values.std(ddof=1) if len(values) > 1 else 0.0
            points.append((record["epoch"], values.mean(), std))
    return Curve(*np.array(points).T) if points else None


def calibration_error(calibration: Any) -> float:
    """The expected calibration error: sum_b (n_b / n) |accuracy_b - confidence_b| over bins b.

    C. Guo et al., arXiv 1706.04599, with the mean confidence of a bin.

    Args:
        calibration: (3, bins): number n_b, how many are right, sum of the confidences.
    """
    count, right, confidence = np.asarray(calibration)
    return float(np.abs(right - confidence).sum() / count.sum())
