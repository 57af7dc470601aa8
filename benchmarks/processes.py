"""Checks one program on several devices and processes: equal losses, one end, no silent wait.

    python -m benchmarks.processes --out=results/processes.json

curves      20 steps, each logged, on 1, 2, 4 and 8 CPU devices of one process, and on 2 and 4
            processes connected by gloo: the largest difference of the loss from one device's,
            relative to it, and the number of images in the final evaluation.
signalled   SIGTERM to one of two processes: the seconds until both have ended. Both must stop at
            the same step.
lost        seconds from the end of one of two processes to the end of the other. The process is
            killed, or stopped with SIGSTOP like a machine that hangs; process 0 and process 1.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, make_parser, save

STEPS = 20
CONFIGS = {
    "digits": ["--config=configs/digits.py"],
    "cifar10_lenet": ["--config=configs/cifar10_lenet.py", "--config.batch_size=64"],
}
# Takes minutes, in steps of milliseconds: a signal always arrives before its end.
LONG = ["--config=configs/digits.py", "--config.epochs=3000", "--config.checkpoint_every=never"]


@contextlib.contextmanager
def start(
    workdir: Path,
    arguments: list[str],
    processes: int = 1,
    devices: int = 1,
    last: tuple[str, ...] = (),
) -> Iterator[list[subprocess.Popen]]:
    """Starts train.py in several processes; kills the processes that are left at the end.

    Args:
        workdir: work directory of the run.
        arguments: arguments of every process.
        processes: number of processes.
        devices: CPU devices of each process.
        last: further arguments of the last process.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "train.py", f"--workdir={workdir}", *arguments]
    if processes > 1:
        command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    running = []
    for i in range(processes):
        own = [f"--process_id={i}"] if processes > 1 else []
        own += last if i == processes - 1 else ()
        with (workdir.parent / f"{workdir.name}-{i}.log").open("w") as output:
            running.append(
                subprocess.Popen(
                    [*command, *own],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def printed(workdir: Path, process: int = 0) -> str:
    """Reads the output of a process of `start`."""
    return (workdir.parent / f"{workdir.name}-{process}.log").read_text()


def free_port() -> int:
    """Returns a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(workdir: Path, arguments: list[str], processes: int = 1, devices: int = 1) -> None:
    """Runs `start` to its end; raises AssertionError with the output of a process that fails."""
    with start(workdir, arguments, processes, devices) as running:
        for i, process in enumerate(running):
            assert process.wait() == 0, printed(workdir, i)


def losses(workdir: Path) -> list[float]:
    """Reads the training loss of each row of metrics.jsonl."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record["values"]["loss"] for record in records if record["split"] == "train"]


def counts(workdir: Path) -> dict[str, int]:
    """Reads the number of images in the final evaluation, by split."""
    result = json.loads((workdir / "result.json").read_text())
    return {split: result[split]["count"] for split in ("val", "test") if result[split]}


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Computes the largest difference of two curves, relative to the second."""
    return max(abs(x - y) / abs(y) for x, y in zip(losses, reference, strict=True))


def curves(scratch: Path, config: str) -> dict[str, Any]:
    """Compares the loss curve of a config in each layout with the curve on one device."""
    arguments = [*CONFIGS[config], f"--config.steps={STEPS}", "--config.log_every=1 steps"]
    layouts = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (2, 4)]
    results, reference = {}, None
    for processes, devices in layouts:
        workdir = scratch / f"{config}-{processes}-{devices}"
        finish(workdir, arguments, processes, devices)
        reference = reference or losses(workdir)
        name = f"{processes} processes x {devices} devices"
        results[name] = {
            "largest_difference": largest_difference(losses(workdir), reference),
            "counts": counts(workdir),
        }
        print(f"{config:<14} {name:<24} {results[name]}", flush=True)
    return {"steps": STEPS, "losses": reference, "layouts": results}


def wait_until_it_trains(workdir: Path, running: list[subprocess.Popen], rows: int = 1) -> None:
    """Waits until metrics.jsonl has at least `rows` rows."""
    path = workdir / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= rows):
        assert all(process.poll() is None for process in running), printed(workdir)
        time.sleep(0.1)


def signalled(
    scratch: Path, process: int, *arguments: str, rows: int = 1, devices: int = 1
) -> dict[str, Any]:
    """Sends SIGTERM to one of two processes once metrics.jsonl has `rows` rows."""
    workdir = scratch / f"signalled-{process}"
    with start(workdir, [*LONG, *arguments], 2, devices) as running:
        wait_until_it_trains(workdir, running, rows)
        began = time.perf_counter()
        running[process].terminate()
        codes = [other.wait(timeout=120) for other in running]
        seconds = time.perf_counter() - began
    steps = [
        re.findall(r"Stopped by SIGTERM after step (\d+)", printed(workdir, i)) for i in (0, 1)
    ]
    saved = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert codes == [143, 143], codes
    assert steps[0] == steps[1] == saved, (steps, saved)
    return {"to": process, "seconds": round(seconds, 1), "step": int(steps[0][0])}


def lost(scratch: Path, process: int, signum: signal.Signals, *arguments: str) -> dict[str, Any]:
    """Kills or stops one of two processes; reports how and when the other ends."""
    workdir = scratch / f"lost-{process}-{signum.name}"
    with start(workdir, [*LONG, *arguments], processes=2) as running:
        wait_until_it_trains(workdir, running)
        began = time.perf_counter()
        running[process].send_signal(signum)
        code = running[1 - process].wait(timeout=120)
        seconds = time.perf_counter() - began
    said = [line for line in printed(workdir, 1 - process).splitlines() if "train.py:" in line]
    return {
        "signal": signum.name,
        "to": process,
        "seconds": round(seconds, 1),
        "exit_code": code,
        "said": said,
    }


def main() -> None:
    """Measures and prints everything; writes the record if --out is given."""
    args = make_parser(__doc__, rounds=1).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        results: dict[str, Any] = {"curves": {name: curves(scratch, name) for name in CONFIGS}}
        results["signalled"], results["lost"] = [], []
        for i in range(args.rounds):
            for process in (0, 1):
                results["signalled"].append(signalled(scratch / str(i), process))
                print(results["signalled"][-1], flush=True)
                for signum in (signal.SIGKILL, signal.SIGSTOP):
                    results["lost"].append(lost(scratch / str(i), process, signum))
                    print(results["lost"][-1], flush=True)
    save("processes", args, results)


if __name__ == "__main__":
    main()
