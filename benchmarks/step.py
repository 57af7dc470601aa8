"""Compares the training step with the same network in PyTorch, on the CPU or a GPU.

    python -m benchmarks.step --model=n94 --batch_size=500 --rounds=10 --steps=4
    python -m benchmarks.step --model=n94 --batch_size=500,2000       # cost of an image in each
    python -m benchmarks.step --model=n94 --check_loss                # against plain lax
    python -m benchmarks.step --model=resnet50 --batch_size=16        # needs torchvision
    python -m benchmarks.step --model=resnet18 --batch_size=512 --device=gpu --steps=20

Every variant is a process. In each round, each process in turn makes one uncounted step, then
`steps` steps, with all cores to itself while the others sleep. Both sides take random resident
uint8 images, normalise them in the step, and train by SGD with Nesterov momentum on the
cross-entropy. A step's seconds are the wall time of `steps` steps in a row, divided by their
number, without compilation. On a GPU the clock is read when the GPU has ended its work. There, both
sides leave float32 convolutions to TF32, which is their default.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.machine import ROOT, make_parser, paired_ratio, save
from benchmarks.worker import IMAGES

OURS = ("cv_jax-float32", "cv_jax-bfloat16")
TORCH_FLOAT32 = ("torch-float32", "torch-float32-channels_last")
TORCH_BFLOAT16 = ("torch-bfloat16", "torch-bfloat16-channels_last")
# Variants that are timed unless --variants names others, by device.
VARIANTS = {
    "cpu": (*OURS, *TORCH_FLOAT32, *TORCH_BFLOAT16),
    "gpu": (*OURS, TORCH_BFLOAT16[1], f"{TORCH_BFLOAT16[1]}-compile"),
}
KNOWN = (*VARIANTS["cpu"], *(f"{variant}-compile" for variant in TORCH_FLOAT32 + TORCH_BFLOAT16))
# Environment of a worker by device. On a GPU the workers share the memory.
ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    "gpu": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


class Case(NamedTuple):
    """A variant at a batch size."""

    variant: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.variant}/{self.batch_size}"


class WorkerEnded(Exception):
    """A worker ended without an answer.

    Attributes:
        case: the case of the worker.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(f"The worker of {case} ended; see its message above.")
        self.case = case


class Worker:
    """A process that makes the steps of one case; see benchmarks/worker.py."""

    def __init__(self, case: Case, model: str, device: str) -> None:
        self._case = case
        arguments = [case.variant, model, str(case.batch_size), device]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT[device]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        """Waits until the process is ready."""
        self._answer()

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def run(self, num_steps: int, limit: float = threading.TIMEOUT_MAX) -> dict | None:
        """Makes the steps and returns the worker's answer; None after `limit` seconds."""
        killed = threading.Event()
        timer = threading.Timer(limit, lambda: (killed.set(), self._process.kill()))
        timer.start()
        try:
            self._process.stdin.write(f"{num_steps}\n")
            self._process.stdin.flush()
            return self._answer()
        except WorkerEnded:
            if killed.is_set():
                return None
            raise
        finally:
            timer.cancel()

    def _answer(self) -> dict:
        if line := self._process.stdout.readline():
            return json.loads(line)
        self.stop()
        raise WorkerEnded(self._case)


def measure(cases: Sequence[Case], args: argparse.Namespace) -> dict[Case, dict[str, Any]]:
    """Warms up every case and times those that are not far too slow; see `summarize`."""
    answers: dict[Case, list[dict]] = {}
    too_slow: dict[Case, dict[str, Any]] = {}
    fastest = float("inf")  # seconds per image
    with contextlib.ExitStack() as stack:
        started, workers = {}, {}
        for case in cases:
            started[case] = Worker(case, args.model, args.device)
            stack.callback(started[case].stop)
        for worker in started.values():
            worker.wait()
        for case, worker in started.items():
            warm_up = worker.run(1, args.limit)
            seconds = warm_up["seconds"] if warm_up else args.limit
            fastest = min(fastest, seconds / case.batch_size)
            if warm_up and seconds / case.batch_size <= args.cap * fastest:
                workers[case], answers[case] = worker, []
            else:
                worker.stop()
                too_slow[case] = {"warm_up_seconds": seconds, "given_up": warm_up is None}
        for _ in range(args.rounds):
            for case, worker in workers.items():
                answers[case].append(worker.run(args.steps))
    timed = {case: summarize(rows, args.steps, case) for case, rows in answers.items()}
    return {case: (timed | too_slow)[case] for case in cases}


def summarize(rows: Sequence[dict[str, float]], steps: int, case: Case) -> dict[str, Any]:
    """Summarizes the rounds of one case: seconds of a step in each round, their median, and more.

    A case that is too slow to time has other entries: warm_up_seconds of its last step, and
    given_up, whether that step was ended early.
    """
    seconds = [row["seconds"] / steps for row in rows]
    median = statistics.median(seconds)
    return {
        "seconds_per_step": median,
        "images_per_second": case.batch_size / median,
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "loss": rows[-1]["loss"],
        "rounds": seconds,
    }


def compare(results: dict[Case, dict[str, Any]]) -> dict[str, Any]:
    """Computes paired ratios over the rounds; the best of several cases has the least median.

    Returns:
        "speed": for each of our cases, the time of the best PyTorch float32 variant of the same
            batch size, divided by ours.
        "best_speed": the time of the best PyTorch variant divided by that of our best, any dtype.
        "image_cost": for each of our cases beyond a variant's first batch size, seconds per image
            divided by those at the first batch size.
    """
    timed = {case: result for case, result in results.items() if "rounds" in result}
    ours = [case for case in timed if case.variant in OURS]

    def best(cases):
        return min(cases, key=lambda case: timed[case]["seconds_per_step"])

    def speed(case, rivals):
        rival = best(rivals)
        ratio = paired_ratio(timed[rival]["rounds"], timed[case]["rounds"])
        return {"against": str(rival), **ratio}

    ratios: dict[str, dict] = {"speed": {}, "best_speed": {}, "image_cost": {}}
    for size in dict.fromkeys(case.batch_size for case in ours):
        mine = [case for case in ours if case.batch_size == size]
        theirs = [case for case in timed if case.batch_size == size and case not in ours]
        if rivals := [case for case in theirs if "float32" in case.variant]:
            ratios["speed"] |= {str(case): speed(case, rivals) for case in mine}
        if any("bfloat16" in case.variant for case in theirs):
            ratios["best_speed"][str(best(mine))] = speed(best(mine), theirs)
    for case in ours:
        first = next(c for c in ours if c.variant == case.variant)
        if first != case:
            per_image = [[s / c.batch_size for s in timed[c]["rounds"]] for c in (case, first)]
            ratios["image_cost"][str(case)] = {"against": str(first), **paired_ratio(*per_image)}
    return ratios


def report(results: dict[Case, dict[str, Any]], ratios: dict[str, Any]) -> str:
    """Formats a table of the cases, and a line for each ratio."""
    lines = [f"{'case':<34} {'s/step':>8} {'images/s':>9} {'peak GB':>8} {'loss':>8}"]
    for case, result in results.items():
        if "rounds" in result:
            lines.append(
                f"{case!s:<34} {result['seconds_per_step']:8.4f} "
                f"{result['images_per_second']:9.1f} {result['peak_bytes'] / 1e9:8.2f} "
                f"{result['loss']:8.4f}"
            )
        else:
            took = "took more than" if result["given_up"] else "took"
            lines.append(f"{case!s:<34} the warm-up step {took} {result['warm_up_seconds']:.1f} s")
    texts = {
        "speed": "is {:.3f} times as fast",
        "best_speed": "is {:.3f} times as fast",
        "image_cost": "costs {:.3f} times",
    }
    for kind, what in texts.items():
        for name, ratio in ratios[kind].items():
            spread = f"{min(ratio['rounds']):.3f} to {max(ratio['rounds']):.3f}"
            lines.append(f"{name} {what.format(ratio['median'])} as {ratio['against']} ({spread})")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `batch_size` and `variants` become lists."""
    parser = make_parser(__doc__, rounds=10)
    parser.add_argument("--model", choices=tuple(IMAGES), default="n94")
    parser.add_argument("--batch_size", default="500", help="images a step; several: A,B")
    parser.add_argument("--steps", type=int, default=4, help="steps of a variant in a round")
    parser.add_argument("--device", choices=tuple(VARIANTS), default="cpu")
    parser.add_argument("--variants", help=f"some of {','.join(KNOWN)}")
    parser.add_argument(
        "--cap", type=float, default=10, help="slowest timed case, in times fastest"
    )
    parser.add_argument("--limit", type=float, default=300, help="most seconds of a warm-up step")
    parser.add_argument("--check_loss", action="store_true", help="compare losses with plain lax")
    args = parser.parse_args(argv)
    args.batch_size = [int(size) for size in args.batch_size.split(",")]
    default = VARIANTS[args.device] if len(args.batch_size) == 1 else OURS[:1]
    args.variants = args.variants.split(",") if args.variants else list(default)
    if unknown := set(args.variants) - set(KNOWN):
        parser.error(f"there is no variant {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    """Measures and prints; writes the record if --out is given."""
    args = parse()
    if args.check_loss:
        from benchmarks.ours import check_loss

        args.rounds = 1
        save("loss", args, check_loss(args.model, args.batch_size[0]))
        return
    cases = [Case(variant, size) for variant in args.variants for size in args.batch_size]
    results = measure(cases, args)
    ratios = compare(results)
    print(report(results, ratios))
    named = {str(case): result for case, result in results.items()}
    save("step", args, {"cases": named, **ratios})


if __name__ == "__main__":
    main()
