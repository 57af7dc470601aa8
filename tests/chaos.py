"""Disturbs a training again and again, and checks that nothing is lost and nothing is different.

    python -m tests.chaos --rounds=50 --seed=0 --out=results/chaos.json

In each round the same command is started in the same work directory, and at a random moment (it
starts, compiles, trains, saves, evaluates, ends) one of EVENTS happens. After each round: the exit
code is a documented one, no output has a traceback, and the newest whole checkpoint is as new as
before or newer. A run that reaches its end is compared with one that nothing disturbed: arrays,
result.json and metrics.jsonl, to the bit apart from measured times; then another one is begun, and
the last one is finished undisturbed. A full disk is a tmpfs that is made smaller in a namespace of
its own; where that is not permitted, it is a limit on the size of a file.
"""

import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, make_parser, record
from cv_jax.workdir.checkpoints import damage
from cv_jax.workdir.files import write_json
from tests.test_resume import assert_same_run, command

EVENTS = ("SIGKILL", "SIGTERM", "SIGINT", "full disk", "damaged checkpoint", "two processes")
# What a start may end with, beside 0, if it came to its end before, and 2, if it says why. Before
# train.py takes signals over they kill, which a shell reports as the same numbers, 130 and 143.
EXIT_CODES = {
    "SIGKILL": {-signal.SIGKILL},
    "SIGTERM": {143, -signal.SIGTERM},
    "SIGINT": {130, -signal.SIGINT},
    "full disk": set(),
    "damaged checkpoint": {-signal.SIGKILL},
    "two processes": {-signal.SIGKILL},
}
DISK = 64 << 20  # bytes
PATIENCE = 60  # seconds until a start counts as hanging


class Chaos:
    """One work directory, disturbed round by round.

    Args:
        home: a directory; a tmpfs of its own where `mounted`.
        epochs: length of the run.
        seed: of what happens when.
    """

    def __init__(self, home: Path, mounted: bool, epochs: int, seed: int):
        self._home, self._mounted, self._epochs = home, mounted, epochs
        self._random = random.Random(seed)
        self._number = 0
        self.failures: list[str] = []
        self.rounds: list[dict[str, Any]] = []
        begun = time.perf_counter()
        process = self._start(home / "whole")
        output = self._end(process)
        if process.returncode:
            raise SystemExit(f"The undisturbed run fails:\n{output}")
        result = json.loads((home / "whole" / "result.json").read_text())
        # The others find what this one has compiled.
        self.seconds_whole = time.perf_counter() - begun - result["seconds"]["compile"]

    @property
    def workdir(self) -> Path:
        return self._home / f"run{self._number}"

    def _start(self, workdir: Path) -> subprocess.Popen:
        return subprocess.Popen(
            command(workdir, self._epochs),
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _end(self, process: subprocess.Popen) -> str:
        """Waits for the process; returns and checks its output."""
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            self._fail("hangs", output)
        if "Traceback" in output or "Exception ignored" in output:
            self._fail("prints a traceback", output)
        return output

    def _fail(self, what: str, output: str = "") -> None:
        self.failures.append(f"round {len(self.rounds) + 1}: {what}\n{output}")

    def round(self, event: str) -> None:
        """Starts the run and lets `event` happen to it."""
        begun = time.perf_counter()
        codes: list[int] = []
        output = ""
        before = _newest_whole(self.workdir)
        log = self.workdir / "metrics.jsonl"
        written = log.stat().st_mtime_ns if log.exists() else None
        lost = 0
        if event == "damaged checkpoint":
            lost, before = self._damage(before)
        # Also when an earlier round damaged it and was killed before it looked.
        all_damaged = before == 0 and any(self.workdir.glob("checkpoints/[0-9]*"))
        process = self._start(self.workdir)
        time.sleep(self._random.uniform(0.5, self.seconds_whole))
        if event.startswith("SIG"):
            process.send_signal(signal.Signals[event])
        elif event == "full disk":
            self._fill(process)
        elif event == "two processes":
            other = self._start(self.workdir)
            output = self._end(other)
            codes.append(other.returncode)
        if event in ("damaged checkpoint", "two processes"):
            process.kill()
        output += self._end(process)
        codes.append(process.returncode)
        if self._mounted:
            self._resize(DISK)
        refused = {
            "two processes": "is in use by",
            "full disk": "No space left on device" if self._mounted else "File too large",
        }
        reasons = [refused[event]] if event in refused else []
        if all_damaged:
            reasons.append("None of the checkpoints")
        for code in codes:
            explained = code == 2 and any(reason in output for reason in reasons)
            if code != 0 and code not in EXIT_CODES[event] and not explained:
                self._fail(f"{event}: exit code {code}", output)

        after = _newest_whole(self.workdir)
        if after < before:
            self._fail(f"{event}: the newest whole checkpoint was {before} and is {after}", output)
        if "resumes after step " in output:
            step = int(output.partition("resumes after step ")[2].split()[0].replace(",", ""))
            if step < before:
                self._fail(f"{event}: resumes after {step}, not {before}", output)
        done = "written " in output or "this run is complete" in output
        if not done and log.exists() and log.stat().st_mtime_ns != written:
            lost += max(0, _newest_logged(log) - after)
        self.rounds.append(
            {
                "event": event,
                "exit_codes": codes,
                "steps_lost": lost,
                "reached": after,
                "seconds": round(time.perf_counter() - begun, 2),
            }
        )
        if done:
            self._compare()

    def finish(self) -> None:
        """Brings the last run to its end, undisturbed."""
        if self.workdir.exists():
            process = self._start(self.workdir)
            output = self._end(process)
            if process.returncode:
                self._fail(f"does not finish: exit code {process.returncode}", output)
            else:
                self._compare()

    @property
    def runs(self) -> int:
        """How many were brought to their end."""
        return self._number

    def _compare(self) -> None:
        try:
            assert_same_run(self._home / "whole", self.workdir)
        except AssertionError as error:
            self._fail(f"{self.workdir.name} is another run: {error}")
        shutil.rmtree(self.workdir)
        self._number += 1

    def _damage(self, newest: int) -> tuple[int, int]:
        """Damages a file of the newest checkpoint; returns (steps lost, newest whole one)."""
        if not newest:
            return 0, 0
        folder = self.workdir / "checkpoints" / str(newest)
        file = self._random.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        kind = self._random.choice(("truncate", "flip", "delete"))
        data = bytearray(file.read_bytes())
        if kind == "delete" or not data:
            file.unlink()
        elif kind == "truncate":
            file.write_bytes(data[: self._random.randrange(len(data))])
        else:
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            file.write_bytes(data)
        left = _newest_whole(self.workdir)
        return newest - left, left

    def _fill(self, process: subprocess.Popen) -> None:
        """Leaves the run a few kilobytes, or files of a few kilobytes."""
        left = self._random.randrange(0, 128 << 10)
        if self._mounted:
            used = shutil.disk_usage(self._home).used
            self._resize(used + left)
        elif process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (left // 8, left // 8))

    def _resize(self, size: int) -> None:
        # What is written meanwhile may be more than that: then there is no space at all.
        for _ in range(100):
            options = ["-o", f"remount,size={size}"]
            if not subprocess.run(["mount", *options, self._home], capture_output=True).returncode:
                return
            size += 16 << 10
        raise SystemExit("The tmpfs cannot be made smaller.")


def _newest_whole(workdir: Path) -> int:
    steps = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    return max((int(path.name) for path in steps if damage(path) is None), default=0)


def _newest_logged(log: Path) -> int:
    lines = log.read_text().splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith("}\n")), default=0)


def table(rounds: list[dict[str, Any]]) -> str:
    """A line for each event, and one for all."""
    lines = [f"{'event':<20} rounds starts  steps lost: median  most   seconds  exit codes"]
    for event in (*EVENTS, "all"):
        some = [row for row in rounds if event in (row["event"], "all")]
        if some:
            lost = [row["steps_lost"] for row in some]
            codes = Counter(code for row in some for code in row["exit_codes"])
            lines.append(
                f"{event:<20} {len(some):>6} {codes.total():>6} "
                f"{statistics.median(lost):>19.1f} {max(lost):>5} "
                f"{statistics.median(row['seconds'] for row in some):>9.1f}  "
                + ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
            )
    return "\n".join(lines)


def _in_a_namespace() -> bool:
    """Whether this process may mount; it starts itself again where it would be permitted to."""
    if "CV_JAX_CHAOS_HOME" in os.environ:
        return True
    home = tempfile.mkdtemp()
    mount = f'mount -t tmpfs -o size={DISK} none "{home}"'
    try:
        probe = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True)
    except OSError:
        return False
    if probe.returncode:
        return False
    again = [sys.executable, "-m", "tests.chaos", *sys.argv[1:]]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *again],
        env={**os.environ, "CV_JAX_CHAOS_HOME": home},
    )
    os.rmdir(home)
    sys.exit(done.returncode)


def main() -> None:
    """Runs the rounds, prints a table and every failure; exit code 1 if there is one."""
    parser = make_parser(__doc__, rounds=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10, help="length of the run, 19 steps each")
    args = parser.parse_args()
    mounted = _in_a_namespace()
    home = Path(os.environ.get("CV_JAX_CHAOS_HOME") or tempfile.mkdtemp())
    begun = time.perf_counter()
    chaos = Chaos(home, mounted, args.epochs, args.seed)
    order = random.Random(args.seed)
    events: list[str] = []
    for number in range(args.rounds):
        events = events or order.sample(EVENTS, len(EVENTS))
        chaos.round(events.pop())
        print(number + 1, chaos.rounds[-1], flush=True)
    chaos.finish()
    seconds = time.perf_counter() - begun
    print(table(chaos.rounds))
    print(
        f"{chaos.runs} runs ended where the undisturbed one did, in {seconds:.0f} s; an "
        f"undisturbed one takes {chaos.seconds_whole:.1f} s without compiling; full disk by "
        f"{'a tmpfs' if mounted else 'a limit on files'}; {len(chaos.failures)} failures"
    )
    for failure in chaos.failures:
        print(failure)
    if args.out:
        results = {
            "rounds": chaos.rounds,
            "runs": chaos.runs,
            "failures": chaos.failures,
            "seconds": round(seconds, 1),
            "seconds_undisturbed": round(chaos.seconds_whole, 2),
        }
        command_line = ["python", "-m", "tests.chaos", *sys.argv[1:]]
        write_json(
            Path(args.out), {**record("chaos", vars(args), results), "command": command_line}
        )
    sys.exit(1 if chaos.failures else 0)


if __name__ == "__main__":
    main()
