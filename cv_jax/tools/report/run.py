"""Reads the files of a work directory; the run is complete or still training."""

import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from cv_jax.config.errors import UserError
from cv_jax.workdir.figures import Curve
from cv_jax.workdir.files import read_json
from cv_jax.workdir.metric import Metric, headline_of, metric_of
from cv_jax.workdir.result import best_runs, measured_config


class Run(NamedTuple):
    """The content of a work directory.

    Attributes:
        path: the directory, which names the run.
        config: the content of config.json.
        env: the content of env.json; {} without the file.
        records: the complete lines of metrics.jsonl.
        result: the content of result.json; None if the run is not complete.
        task: the content of task.json; None without the file, which older code did not write.
    """

    path: epath.Path
    config: dict[str, Any]
    env: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any] | None
    task: dict[str, Any] | None = None

    @property
    def headline(self) -> str:
        """Returns the name of the metric that ranks runs."""
        return headline_of(self.result or self.task or {})

    def metric(self, name: str) -> Metric:
        """Returns the unit, direction and protocol of a metric."""
        return metric_of(self.result or self.task or {}, name)


def read_run(path: epath.Path) -> Run:
    """Reads a work directory; the run may still be training.

    Raises:
        UserError: the directory has no run, or one of its files is damaged.
    """

    def optional(name):
        return read_json(path / name) if (path / name).exists() else None

    config = read_json(path / "config.json")
    if not {"model", "data", "num_seeds"} <= config.keys():
        raise UserError(
            f"{path / 'config.json'} is not a config: choose the work directory of a run."
        )
    env = optional("env.json") or {}
    records = _read_records(path / "metrics.jsonl")
    return Run(path, config, env, records, optional("result.json"), optional("task.json"))


def measured(run: Run) -> dict[str, Any]:
    """Returns the config that gave the run's numbers, see `measured_config`."""
    return measured_config({"config": run.config, "best": (run.result or {}).get("best")})


def _read_records(path: epath.Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # a line that a kill cut off, or that is being written
            continue
        if isinstance(record, dict) and record.keys() >= {"step", "epoch", "split", "values"}:
            records.append(record)
    return records


def curve(run: Run, split: str, name: str) -> Curve | None:
    """Returns the curve of a metric of metrics.jsonl; None if no record has the metric.

    Mean and std are over the seeds; in a sweep, over those of the best setting once it is known.

    Args:
        run: the run.
        split: "train" or "val"; "final_val" or "final_test" for the newest value only.
        name: the metric's name, such as "loss", "accuracy" or "lr".
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
    """Returns the calibration error sum_b (n_b / n) |accuracy_b - confidence_b| over bins b.

    C. Guo et al., arXiv 1706.04599, with the mean confidence of a bin.

    Args:
        calibration: (3, bins): predictions n_b, correct predictions, sum of the confidences.
    """
    count, right, confidence = np.asarray(calibration)
    return float(np.abs(right - confidence).sum() / count.sum())
