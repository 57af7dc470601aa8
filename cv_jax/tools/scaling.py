"""Estimates how the training step of a config scales over many chips, without having them.

    python -m cv_jax.tools.scaling --config=configs/cifar10.py --topologies v5e:2x4 v5e:8x8 \\
        --images_per_chip 64 256 --out=scaling.json

Compiles the step for one chip and for each topology, with each number of images a chip. The
docstring of `cv_jax.tools.aot` tells facts of the compiled program from estimates. Prints the table
of docs/scaling.md; the command there wrote results/scaling.json.
"""

import argparse
import importlib.metadata
import shlex
import sys
from typing import Any

import jax

from cv_jax.config.paths import path_argument
from cv_jax.tools import aot
from cv_jax.tools.command import command, make_parser
from cv_jax.workdir.files import write_json
from cv_jax.workdir.result import git_commit


@command("scaling")
def main() -> None:
    """Reads the command line, compiles, writes the file and prints its table."""
    parser = make_parser(__doc__, allow_abbrev=False)
    parser.add_argument("--topologies", nargs="+", required=True, help="v5e:2x4 v5e:8x8 ...")
    parser.add_argument("--images_per_chip", nargs="+", type=int, required=True)
    aot.add_data_arguments(parser)
    parser.add_argument("--out", type=path_argument, help="a JSON file to write")
    arguments, rest = parser.parse_known_args()
    aot.prepare_compiler()
    report = examine(rest, arguments)
    if arguments.out:
        write_json(arguments.out, report)
    print(table(report["rows"]))


def examine(rest: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Compiles every combination; returns the content of the JSON file."""
    config = aot.read_config([sys.argv[0], *rest])
    data = aot.find_data(config, arguments)
    one_chip = arguments.topologies[0].partition(":")[0]
    rows = []
    for topology in [one_chip, *arguments.topologies]:
        chip, devices = aot.find_devices(topology)
        for images_per_chip in arguments.images_per_chip:
            config.batch_size = images_per_chip * len(devices)
            print(f"{topology}, {images_per_chip} images a chip", file=sys.stderr, flush=True)
            cost = aot.training_cost(config, data, chip, devices)
            del cost["costliest"]
            row = {"chips": len(devices), "images_per_chip": images_per_chip}
            rows.append({**row, "topology": topology, **cost})
    commit, changed = git_commit()
    return {
        "command": shlex.join(["python", "-m", "cv_jax.tools.scaling", *sys.argv[1:]]),
        "commit": commit,
        "changed": changed,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "rows": rows,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as Markdown, a line for each number of images a chip.

    Efficiency is relative to one chip.
    """
    by_size = {(row["images_per_chip"], row["chips"]): row for row in rows}
    counts = sorted({chips for _, chips in by_size} - {1})
    efficient = [f"efficiency of {count}" for count in counts]
    head = ["images a chip", "memory, GB", "step of one chip, ms", "images/s", "utilisation"]
    lines = [head + efficient, ["---"] * (len(head) + len(efficient))]
    for size in sorted({size for size, _ in by_size}):
        alone = by_size[size, 1]
        seconds = alone["estimated"]["step_seconds"]
        line = [
            f"{size}",
            f"{alone['peak_memory_bytes'] / 1e9:.1f}",
            f"{1e3 * seconds:.1f}",
            f"{size / seconds:,.0f}",
            f"{alone['estimated']['utilisation']:.1%}",
        ]
        for count in counts:
            line.append(f"{seconds / by_size[size, count]['estimated']['step_seconds']:.1%}")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
