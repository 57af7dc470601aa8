"""Puts runs that differ in their seed alone together into one record.

    python -m cv_jax.tools.collect runs/a runs/b runs/c --out=results/digits.json

Writes the statistics over the runs, with the value of each, and prints README's row for them.
"""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from cv_jax.config.base import SEED_KEYS, differences
from cv_jax.config.errors import UserError
from cv_jax.config.paths import path_argument
from cv_jax.tools.command import command, make_parser
from cv_jax.workdir.bucket import work_directory
from cv_jax.workdir.files import write_json
from cv_jax.workdir.result import (
    check_no_seed_diverged,
    is_share,
    measured_config,
    percent,
    summarize,
)

_METRICS = ("accuracy", "loss", "linear_accuracy", "feature_rank", "feature_spread")


def collect(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the contents of result.json files, of one seed or several each.

    Returns:
        Of test and val: _METRICS as `result.summarize` gives them, and count; the seconds of all
        for each seed; and what all runs have in common, with the best setting of a sweep.

    Raises:
        UserError: the runs differ in more than their seed, come from different code, or one of them
            has diverged.
    """
    first = results[0]
    for other in results[1:]:
        apart = differences(measured_config(first), measured_config(other)).keys() - SEED_KEYS
        apart |= {key for key in ("commit", "device", "steps") if first[key] != other[key]}
        if apart:
            raise UserError(f"The runs differ in {', '.join(sorted(apart))}, not in seed alone.")
    record = {key: first[key] for key in ("commit", "device", "steps", "epochs", "examples")}
    record["dirty"] = any(result["dirty"] for result in results)
    record["flops"] = first["flops"]
    record["seeds"] = [seed for result in results for seed in result["seeds"]]
    for split in ("val", "test"):
        if first[split]:
            metrics = [name for name in _METRICS if name in first[split]]
            for result in results:
                for name in metrics:
                    check_no_seed_diverged("One of the runs", result, split, name)
            record[split] = {
                name: summarize(
                    [v for result in results for v in result[split][name]["values"]], is_share(name)
                )
                for name in metrics
            }
            record[split]["count"] = first[split]["count"]
    record["seconds"] = {
        name: round(sum(result["seconds"][name] for result in results) / len(record["seeds"]), 1)
        for name in first["seconds"]
    }
    if "best" in first:
        record["best"] = first["best"]
    config = first["config"].items()
    record["config"] = {key: value for key, value in config if key not in SEED_KEYS}
    return record


def row(name: str, record: dict[str, Any]) -> str:
    """A row of README's table: config, accuracy, n, seconds, hardware, commit."""
    accuracy, seconds = record["test"]["accuracy"], record["seconds"]["train"]
    return (
        f"| {name} | {percent(accuracy['mean'], accuracy['std'])} | {accuracy['n']} "
        f"| {seconds:.{0 if seconds >= 10 else 1}f} | {record['device']} | {record['commit'][:7]} |"
    )


@command("collect")
def main() -> None:
    """Reads the command line, writes the record, prints the row."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="work directories")
    parser.add_argument("--out", required=True, type=path_argument, help="the JSON file to write")
    arguments = parser.parse_args()
    record = collect([_read(work_directory(run) / "result.json") for run in arguments.runs])
    write_json(arguments.out, record)
    print(row(arguments.out.stem, record))


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: is the run complete? ({error})") from error


if __name__ == "__main__":
    main()
