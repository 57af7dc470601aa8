"""Measures cv_jax on one GPU, in sections; benchmarks/gpu.sh installs and runs them all.

    python -m benchmarks.gpu record --out=runs/gpu
    python -m benchmarks.gpu record --out=runs/gpu --small     # seconds on a CPU

    section         what is measured
    check           nothing; the section exits with 2 unless JAX sees a GPU
    data            loading CIFAR-10, with the download if it is missing
    digits          configs/digits.py, 32 seeds side by side in one program
    record          seconds to 94 % on CIFAR-10, one run at a time; see benchmarks/timed_runs.py
    record_batched  the same, four seeds side by side
    step            training steps beside PyTorch's; see benchmarks/step.py
    simclr          configs/cifar10_simclr.py with a ResNet-18: nearest neighbours over time
    summary         nothing; the section prints all records in short

Each section writes its record to OUT/SECTION.json, anew with every number that it gets. A section
that is stopped leaves the numbers so far.

Exit codes: 0 done; 1 failed, the message says why; 2 no GPU; 143 stopped by SIGTERM. SIGTERM is a
regular end of simclr, which exits with 0.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections

from benchmarks import step, timed_runs
from benchmarks.machine import ROOT, record
from configs import cifar10
from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.runtime.signals import Stopped, raise_when_signalled
from cv_jax.runtime.startup import check_platform, prepare_jax
from cv_jax.workdir.files import read_json, write_json
from cv_jax.workdir.result import device_name

Write = Callable[[dict[str, Any]], None]

SIDE_BY_SIDE = 4  # seeds in a program of record_batched
ROUNDS = {"record": 20, "record_batched": 5, "step": 5}  # timed, of each section
POLL = 0.5  # seconds between two looks at the metrics of train.py
# Arguments of train.py: with --small, and without.
DIGITS = {
    False: ["--config=configs/digits.py", "--config.num_seeds=32"],
    True: [
        "--config=configs/digits.py:smoke",
        "--config.num_seeds=2",
        "--config.model=n94(widths=(4,))",
    ],
}
SIMCLR = {
    False: [
        "--config=configs/cifar10_simclr.py",
        "--config.model=resnet18",
        "--config.data.num_val=5000",
        "--config.eval_every=1 epoch",
    ],
    True: [
        "--config=configs/cifar10_simclr.py:smoke",
        "--config.model=n94(widths=(4,))",
        "--config.progressive_resizing=",
        "--config.data.num_val=32",
    ],
}


def check(args: argparse.Namespace, write: Write) -> None:
    """Exits with 2 unless JAX sees a GPU; --small needs none."""
    with contextlib.suppress(UserError):
        check_platform()
        if args.small or jax.default_backend() == "gpu":
            write({"gpus": nvidia_smi(), "device": device_name()})
            return
    print(
        "JAX sees no GPU: install NVIDIA's driver for CUDA 13, unset JAX_PLATFORMS, or try the "
        "script on a CPU with --small.",
        file=sys.stderr,
    )
    sys.exit(2)


def nvidia_smi() -> list[dict[str, str]]:
    """Returns name, driver and memory of each GPU; [] where there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    try:
        text = subprocess.check_output([*command, "--format=csv,noheader"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    names = ("name", "driver", "memory")
    return [dict(zip(names, line.split(", "), strict=True)) for line in text.splitlines()]


def data(args: argparse.Namespace, write: Write) -> None:
    """Loads CIFAR-10, so that no other section has to download and decode the images."""
    raise_when_signalled()  # a download that is cut leaves nothing
    start = time.perf_counter()
    spec = load_dataset(record_config(args.small).data).spec
    seconds = time.perf_counter() - start
    write({"train": spec.num_train, "test": spec.num_test, "seconds": seconds})


def record_config(small: bool) -> ml_collections.ConfigDict:
    """Returns the config of the record; `small`: four epochs of a narrow network."""
    config = cifar10.get_config("smoke" if small else "")
    if small:
        config.model = "n94(widths=(4,))"
        config.progressive_resizing = "size(20, until=0.5)"
        config.steps = 4 * config.data.limit // config.batch_size
        config.seeds.mode = "batched"  # as on a GPU
    return config


def time_record(args: argparse.Namespace, write: Write, num_seeds: int = 1) -> None:
    """Times trainings on CIFAR-10, `num_seeds` side by side; see benchmarks/timed_runs.py."""
    prepare_jax()
    config = record_config(args.small)
    config.num_seeds = num_seeds
    timed_runs.measure(config, load_dataset(config.data), args.rounds, write)


def digits(args: argparse.Namespace, write: Write) -> None:
    """Trains configs/digits.py for many seeds in one program."""
    run_training(DIGITS[args.small], new_workdir(args.out, "digits"), write)


def simclr(args: argparse.Namespace, write: Write) -> None:
    """Trains without labels until the end or SIGTERM, and follows the nearest neighbours on val."""
    with contextlib.suppress(Stopped):
        run_training(SIMCLR[args.small], new_workdir(args.out, "simclr"), write)


def new_workdir(out: Path, section: str) -> Path:
    """Returns a work directory that no earlier call has used."""
    return out / f"{section}-{time.strftime('%Y%m%d-%H%M%S')}"


def run_training(arguments: Sequence[str], workdir: Path, write: Write) -> None:
    """Runs train.py, and writes `reached` after every row of metrics.jsonl.

    SIGTERM stops train.py, which saves a checkpoint.

    Raises:
        Stopped: by SIGTERM, once train.py has ended.
        UserError: train.py has failed.
    """
    raise_when_signalled()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments, f"--workdir={workdir}"], cwd=ROOT
    )
    rows: list[dict[str, Any]] = []

    def look() -> None:
        if new := read_rows(workdir)[len(rows) :]:
            rows.extend({"seconds": time.perf_counter() - start, **row} for row in new)
            write(reached(workdir, rows))

    try:
        while process.poll() is None:
            time.sleep(POLL)
            look()
    finally:
        process.terminate()  # has no effect on a process that has ended
        code = process.wait()
        look()
        write(reached(workdir, rows))
    if code:
        raise UserError(f"train.py has failed with exit code {code}; see its message above.")
    write({**reached(workdir, rows), "wall_seconds": time.perf_counter() - start})


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl with the means over the runs; [] where there is no file."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half there
    return [{key: row[key] for key in ("split", "step", "epoch", "values")} for row in rows]


def reached(workdir: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what a training has reached so far.

    Args:
        workdir: of the training.
        rows: of metrics.jsonl, with the seconds since the start of train.py.

    Returns:
        workdir; images_per_second of the training steps, the median over the rows; val_accuracy,
        the last one, and its seconds; rows; result, a part of result.json, None before the end.
    """
    speed = "images_per_second"
    speeds = [row["values"][speed] for row in rows if speed in row["values"]]
    on_val = [row for row in rows if row["split"] == "val" and "accuracy" in row["values"]]
    result = None
    if (workdir / "result.json").exists():
        whole = read_json(workdir / "result.json")
        keys = ("seconds", "epochs", "examples", "flops", "device")
        result = {"test_accuracy": whole["test"]["accuracy"], **{key: whole[key] for key in keys}}
    return {
        "workdir": str(workdir),
        speed: statistics.median(speeds) if speeds else None,
        "val_accuracy": on_val[-1]["values"]["accuracy"] if on_val else None,
        "val_seconds": on_val[-1]["seconds"] if on_val else None,
        "rows": list(rows),
        "result": result,
    }


def time_steps(args: argparse.Namespace, write: Write) -> None:
    """Times training steps beside PyTorch's, as benchmarks.step does.

    Raises:
        UserError: a case could not be timed. The other cases are in the record.
    """
    raise_when_signalled()
    options = ["--device=gpu", "--steps=20", "--cap=1e9", "--limit=90", f"--rounds={args.rounds}"]
    sizes = [("n94", 500), ("resnet18", 512), ("n94", 2000)]
    if args.small:
        variants = "cv_jax-float32,torch-float32-channels_last"
        options = ["--steps=2", f"--rounds={args.rounds}", f"--variants={variants}"]
        sizes = [("n94", 4)]
    results: dict[str, dict[str, Any]] = {}
    ended: list[str] = []
    for model, size in sizes:
        chosen = step.parse([*options, f"--model={model}", f"--batch_size={size}"])
        timed = time_what_runs([step.Case(v, size) for v in chosen.variants], chosen, ended)
        ratios = step.compare(timed)
        print(f"{model}\n{step.report(timed, ratios)}", flush=True)
        named = {str(case): result for case, result in timed.items()}
        results[f"{model}/{size}"] = {"cases": named, **ratios}
        write({"models": results, "ended": ended})
    if ended:
        raise UserError(f"Not timed: {', '.join(ended)}; see the messages above.")


def time_what_runs(
    cases: Sequence[step.Case], chosen: argparse.Namespace, ended: list[str]
) -> dict[step.Case, dict[str, Any]]:
    """Returns `step.measure` of the cases whose worker does not end; adds the others to `ended`.

    Without PyTorch its cases are left out.
    """
    if not importlib.util.find_spec("torch"):
        cases = [case for case in cases if case.variant in step.OURS]
        print("PyTorch is not installed: only cv_jax is timed", flush=True)
    while cases:
        try:
            return step.measure(cases, chosen)
        except step.WorkerEnded as error:
            print(error, file=sys.stderr)
            ended.append(f"{chosen.model} {error.case}")
            cases = [case for case in cases if case != error.case]
    return {}


def summary(args: argparse.Namespace, write: Write) -> None:
    """Prints and writes how each section of --ended has ended, and its main figures."""
    sections = {}
    for name, state in (text.split("=") for text in args.ended):
        sections[name] = {"state": state, "figures": figures(name, read(args.out, name))}
    write({"machine": read(args.out, "check"), "sections": sections})
    print(describe(read_json(args.out / "summary.json")))


def read(out: Path, section: str) -> dict[str, Any]:
    """Returns the results of a section; {} where there is no record."""
    path = out / f"{section}.json"
    return read_json(path)["results"] if path.exists() else {}


def figures(section: str, results: dict[str, Any]) -> dict[str, float]:
    """Returns the main figures of a section's results by name; accuracies are in [0, 1]."""
    if not results:
        return {}
    if section in ("record", "record_batched"):
        of_runs = {
            "accuracy": results["accuracy"]["mean"],
            "std": results["accuracy"]["std"],
            "runs": results["accuracy"]["n"],
            f"runs at {results['target']:.0%}": results["reached"],
            "seconds of a run": results["seconds"]["mean"],
            "images/s": results["images_per_second"],
        }
        return {name: value for name, value in of_runs.items() if value is not None}
    if section == "step":
        return {
            f"{model} {case.partition('/')[0]} images/s": result["images_per_second"]
            for model, of_model in results["models"].items()
            for case, result in of_model["cases"].items()
            if "rounds" in result
        }
    if section in ("digits", "simclr"):
        found = {
            "images/s": results["images_per_second"],
            "val accuracy": results["val_accuracy"],
            "after seconds": results["val_seconds"],
        }
        if result := results["result"]:
            test = result["test_accuracy"]
            found |= {"test accuracy": test["mean"], "std": test["std"], "runs": test["n"]}
            found["training seconds of a run"] = result["seconds"]["train"] / test["n"]
        return {name: value for name, value in found.items() if value is not None}
    return {name: value for name, value in results.items() if isinstance(value, int | float)}


def describe(saved: dict[str, Any]) -> str:
    """Formats the record of `summary` as a table."""
    machine, versions = saved["results"]["machine"], saved["versions"]
    gpus = [", ".join(gpu.values()) for gpu in machine.get("gpus", ())]
    known = ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "torch"))
    lines = [
        f"machine  {'; '.join(gpus) or machine.get('device')}",
        f"versions {known}; commit {saved['commit']}{', with changes' * bool(saved['dirty'])}",
    ]
    for name, section in saved["results"]["sections"].items():
        found = [f"{key} {number(value)}" for key, value in section["figures"].items()]
        lines.append(f"{name:<15} {section['state']:<7} {found[0] if found else 'nothing'}")
        lines += [f"{'':<24}{text}" for text in found[1:]]
    return "\n".join(lines)


def number(value: float) -> str:
    """Formats a number with four digits; large numbers whole."""
    return f"{value:,.0f}" if value >= 1000 or isinstance(value, int) else f"{value:.4g}"


SECTIONS = {
    "check": check,
    "data": data,
    "digits": digits,
    "record": time_record,
    "record_batched": partial(time_record, num_seeds=SIDE_BY_SIDE),
    "step": time_steps,
    "simclr": simclr,
    "summary": summary,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `out` becomes an absolute path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=tuple(SECTIONS))
    parser.add_argument("--out", required=True, help="directory of the records")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a try on a CPU")
    parser.add_argument("--rounds", type=int, help="timed rounds")
    parser.add_argument("--ended", nargs="*", default=(), help="of summary: SECTION=STATE, ...")
    args = parser.parse_args(argv)
    args.out = Path(args.out).resolve()
    args.rounds = args.rounds or (2 if args.small else ROUNDS.get(args.section, 1))
    return args


def main() -> None:
    """Runs a section."""
    args = parse()
    settings = {**vars(args), "out": str(args.out)}

    def write(results: dict[str, Any]) -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"{args.section}.json", record(args.section, settings, results))

    try:
        SECTIONS[args.section](args, write)
    except UserError as error:
        sys.exit(f"{args.section}: {error}")
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
