"""Compares the loading of training photographs with torch's DataLoader and with grain.

    python -m benchmarks.photos --dir=PHOTOS --cores=1,2 --out=results/photos.json

Every loader reads the JPEG files of a directory again and again, decodes each, cuts out a random
part of 8 to 100 % of the area, resizes it to 224 x 224 and makes batches of 128 uint8 images.
DataLoader decodes by Pillow and torchvision (RandomResizedCrop and PILToTensor, antialiased); ours
and grain by `cv_jax.data.decode`. Each has as many threads or processes as cores. Every loader is a
process; in each round each of them in turn loads `batches` batches, while the others sleep. "files"
are the files themselves, "records" one array_record file with their contents. Needs PyTorch and
`pip install torchvision grain`.

A row shows medians over rounds: images a second; the ratio to DataLoader's of the same round; and
processor milliseconds per image, on which other programs of the machine have less influence. The
load is the machine's 1-minute average.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, make_parser, paired_ratio, save
from benchmarks.photo_loaders import LOADERS

BASE = "DataLoader"


class Loader:
    """A process that loads photographs on the first cores; see benchmarks/photo_loaders.py."""

    def __init__(self, name: str, source: str, cores: int) -> None:
        own = sorted(os.sched_getaffinity(0))[:cores]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.photo_loaders", name, source],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, own),
        )
        self._answer()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()  # closes stdin, which ends the process

    def run(self, num_batches: int) -> dict[str, float]:
        """Loads the batches and returns the process's answer."""
        self._process.stdin.write(f"{num_batches}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A loader ended without an answer: see its message above.")
        return json.loads(line)


def write_records(photos: Path, file: Path) -> None:
    """Writes the contents of all files of a directory as records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), "group_size:1")
    for photo in sorted(photos.iterdir()):
        writer.write(photo.read_bytes())
    writer.close()


def compare(
    loaders: list[str], source: str, cores: int, num_batches: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Measures all loaders in turn, `rounds` times: {loader: its medians and rounds}."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Loader(name, source, cores)) for name in loaders}
        for _ in range(rounds):
            for name, process in processes.items():
                load = os.getloadavg()[0]
                found[name].append({**process.run(num_batches), "load": load})
    return {name: _summary(of_loader, found[BASE]) for name, of_loader in found.items()}


def _summary(found: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    speeds, base_speeds = ([row["images_per_second"] for row in rows] for rows in (found, base))
    return {
        **{key: statistics.median(row[key] for row in found) for key in found[0]},
        "ratio": paired_ratio(speeds, base_speeds),
        "rounds": found,
    }


def main() -> None:
    """Measures and prints; writes the record if --out is given."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--dir", required=True, help="directory of JPEG files")
    parser.add_argument("--cores", default="1,2", help="numbers of processor cores")
    parser.add_argument("--sources", default="files,records")
    parser.add_argument("--batches", type=int, default=12, help="batches a round")
    parser.add_argument("--loaders", default=";".join(LOADERS), help=f"separated by ;, with {BASE}")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / "photos.array_record"
        write_records(Path(args.dir), records)
        sources = {"files": args.dir, "records": str(records)}
        print(f"{'':<34} images/s   ratio   ms of cpu   load")
        for cores in map(int, args.cores.split(",")):
            for source in args.sources.split(","):
                case = sources[source], cores, args.batches, args.rounds
                found = compare(args.loaders.split(";"), *case)
                results[f"{cores}/{source}"] = found
                for name, row in found.items():
                    print(
                        f"{cores} core{'s' if cores > 1 else ' '} {source:<8} {name:<17}"
                        f"{row['images_per_second']:10,.0f}{row['ratio']['median']:8.2f}"
                        f"{1000 * row['cpu_seconds']:12.2f}{row['load']:7.1f}",
                        flush=True,
                    )
    save("photos", args, results)


if __name__ == "__main__":
    main()
