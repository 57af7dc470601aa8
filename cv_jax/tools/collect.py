"""Joins runs that differ only in their seeds into one record.

    python -m cv_jax.tools.collect runs/a runs/b runs/c --out=results/digits.json

Writes the value of each seed with the statistics over all seeds, and prints a row for README.
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
from cv_jax.workdir.metric import headline_text, metric_of
from cv_jax.workdir.result import (
    check_no_seed_diverged,
    measured_config,
    statistics_of,
    summarize,
)


def collect(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the contents of result.json files, each of one or more seeds.

    Returns:
        For val and test: `result.summarize` of each metric over all seeds, and count. The mean
        seconds of a seed. The facts that all runs share: the headline, the descriptions of the
        metrics, the config, and the best setting of a sweep.

    Raises:
        UserError: the runs differ in more than their seeds, come from different code, or a run
            has diverged.
    """
    first = results[0]
    for other in results[1:]:
        apart = differences(measured_config(first), measured_config(other)).keys() - SEED_KEYS
        apart |= {key for key in ("commit", "device", "steps") if first[key] != other[key]}
        if apart:
            raise UserError(
                f"The runs differ in {', '.join(sorted(apart))}, not only in their seeds. Collect "
                "runs that differ only in their seeds."
            )
    record = {key: first[key] for key in ("commit", "device", "steps", "epochs", "examples")}
    record["dirty"] = any(result["dirty"] for result in results)
    record["flops"] = first["flops"]
    record["seeds"] = [seed for result in results for seed in result["seeds"]]
    record |= {key: first[key] for key in ("headline", "metrics", "examples_are") if key in first}
    for split in ("val", "test"):
        if first[split]:
            metrics = list(statistics_of(first[split]))
            for result in results:
                for name in metrics:
                    if name not in statistics_of(result[split]):
                        raise UserError(f"One of the runs has no {name} on {split}.")
                    check_no_seed_diverged("One of the runs", result, split, name)
            record[split] = {
                name: summarize(
                    [v for result in results for v in result[split][name]["values"]],
                    metric_of(first, name).unit == "%",
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
    """Returns a row of README's table: config, headline, n, seconds, hardware, commit."""
    headline, seconds = headline_text(record, "test"), record["seconds"]["train"]
    return (
        f"| {name} | {headline} | {len(record['seeds'])} | {seconds:.{0 if seconds >= 10 else 1}f} "
        f"| {record['device']} | {record['commit'][:7]} |"
    )


@command("collect")
def main() -> None:
    """Reads the command line, writes the record and prints the row."""
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
