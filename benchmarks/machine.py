"""The command line, the record and the paired ratios shared by all benchmarks."""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cv_jax.config.paths import expand
from cv_jax.workdir.files import write_json
from cv_jax.workdir.result import git_commit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch")
# CPU flags that decide the speed of float32 and bfloat16 products.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def make_parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """Builds a parser with --rounds and --out, which every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds behind each median")
    parser.add_argument("--out", help="JSON file for the record")
    return parser


def timed_run(command: Sequence[str], **environment: str) -> tuple[float, str]:
    """Runs a Python program to its end; returns the seconds of wall time and its output.

    Exits with what the program says if it fails.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, done.stdout


def save(name: str, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes the record of a benchmark to the file --out, if given."""
    if args.out:
        write_json(Path(expand(args.out)), record(name, vars(args), results))
        print(f"written {args.out}")


def record(name: str, settings: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Returns the record: results, number of rounds (n), settings, versions and machine."""
    info = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"model name\s*: (.*)", info)
    commit, dirty = git_commit()
    return {
        "benchmark": name,
        "command": ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]],
        "settings": settings,
        "n": settings["rounds"],
        "machine": {
            "cpu": cpu[1] if cpu else platform.processor(),
            "cpu_flags": [flag for flag in CPU_FLAGS if re.search(rf"\b{flag}\b", info)],
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "commit": commit,
        "dirty": dirty,
        "results": results,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """Computes numerator / denominator of each round, and the median over rounds.

    A round measures both one after the other, so a slower machine cancels out.
    """
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {"median": statistics.median(ratios), "rounds": ratios}
