"""Time and memory of cv_jax.tools.slide on a large synthetic slide with planted tumours.

    python -m benchmarks.slide --side=20000 --out=results/slide.json

Draws a slide of side x side pixels with three levels, a disc of tissue and planted tumours; trains
a small network on patches of it; and runs the tool as a user would, to its end, and again with a
kill in the middle. Reports the seconds, the largest resident memory of training and tool, how many
tiles are right, and whether the run that was killed and went on has the same bytes.
"""

import argparse
import csv
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from benchmarks.machine import ROOT, make_parser, save

TILE = 512  # pixels a side of the file's tiles
PATCH = 64  # of the network's input
GLASS, TISSUE, TUMOUR = (244, 244, 244), (226, 160, 196), (120, 60, 150)


def tumours(side: int) -> list[tuple[int, int]]:
    """Returns the upper left corners (y, x) of the tumours, squares of 512 pixels."""
    return [
        (side // 2 + a, side // 2 + b) for a, b in ((0, 0), (-TILE * 8, 1024), (2048, -TILE * 6))
    ]


def draw(side: int, y: int, x: int, step: int) -> np.ndarray:
    """Returns a tile of the file whose pixels are `step` pixels of level 0 apart."""
    place = step * np.arange(TILE)
    rows, cols = (y + place)[:, None], (x + place)[None]
    image = np.empty((TILE, TILE, 3), np.uint8)
    image[:] = GLASS
    inside = (rows - side / 2) ** 2 + (cols - side / 2) ** 2 < (0.4 * side) ** 2
    image[inside & (rows >= 0)] = TISSUE
    for top, left in tumours(side):
        hot = (rows >= top) & (rows < top + TILE) & (cols >= left) & (cols < left + TILE)
        image[hot] = TUMOUR
    coarse = np.random.default_rng([y, x]).integers(0, 24, (TILE // 4, TILE // 4, 3), np.uint8)
    return np.clip(image.astype(int) - coarse.repeat(4, 0).repeat(4, 1), 0, 255).astype(np.uint8)


def write_slide(path: Path, side: int) -> None:
    """Writes the slide, a tile at a time."""

    def tiles(step: int) -> Iterator[np.ndarray]:
        count = -(-side // step // TILE)
        for row in range(count):
            for column in range(count):
                yield draw(side, row * TILE * step, column * TILE * step, step)

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level, step in enumerate((1, 4, 16)):
            tiff.write(
                tiles(step),
                shape=(side // step, side // step, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="zlib",
                subfiletype=1 if level else 0,
            )


def write_patches(folder: Path, side: int) -> None:
    """Writes patches of both classes, as class folders."""
    rng = np.random.default_rng(0)
    top, left = tumours(side)[0]
    hot = draw(side, top, left, 1)
    cold = draw(side, side // 2 - 4 * TILE, side // 2 - 4 * TILE, 1)
    for split, count in (("train", 100), ("test", 20)):
        for name, image in (("tumour", hot), ("tissue", cold)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                y, x = rng.integers(0, TILE - PATCH, 2)
                patch = Image.fromarray(image[y : y + PATCH, x : x + PATCH])
                patch.save(folder / split / name / f"{i}.png")


def run_tool(workdir: Path, slide: Path, out: Path, kill_after: int = 0) -> float:
    """Runs the tool and returns the seconds; kills it after so many rows of tiles, if above 0."""
    arguments = [f"--workdir={workdir}", "--positive=tumour", f"--out={out}", str(slide)]
    start = time.perf_counter()
    tool = subprocess.Popen([sys.executable, "-m", "cv_jax.tools.slide", *arguments], cwd=ROOT)
    while kill_after and tool.poll() is None:
        if len(list(out.glob("rows/*.npy"))) >= kill_after:
            os.kill(tool.pid, signal.SIGKILL)
        time.sleep(0.05)
    code = tool.wait()
    if code != (-signal.SIGKILL if kill_after else 0):
        sys.exit(f"The tool ended with the code {code}.")
    return time.perf_counter() - start


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Draws, trains and runs; returns the results."""
    slide, workdir = folder / "slide.tif", folder / "run"
    write_slide(slide, args.side)
    write_patches(folder / "patches", args.side)
    train = ["--config=configs/folder.py", f"--config.data.dir={folder / 'patches'}"]
    train += [f"--config.data.size={PATCH}", "--config.model=n94(widths=(4, 8))"]
    train += ["--config.epochs=4", "--config.batch_size=20", f"--workdir={workdir}"]
    subprocess.run([sys.executable, "train.py", *train], cwd=ROOT, check=True)
    seconds = run_tool(workdir, slide, folder / "whole")
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the training, or the tool
    run_tool(workdir, slide, folder / "parts", kill_after=args.side // PATCH // 2)
    run_tool(workdir, slide, folder / "parts")
    with (folder / "whole/tiles.csv").open() as file:
        rows = [(int(r["y"]), int(r["x"]), float(r["value"])) for r in csv.DictReader(file)]
    right = [_in_tumour(args.side, y, x) == (value >= 0.5) for y, x, value in rows]
    same = [
        (folder / "whole" / name).read_bytes() == (folder / "parts" / name).read_bytes()
        for name in ("heat.tif", "heat.png", "tiles.csv")
    ]
    return {
        "slide_bytes": slide.stat().st_size,
        "tiles_with_tissue": len(rows),
        "tiles_of_tumour": sum(_in_tumour(args.side, y, x) for y, x, _ in rows),
        "tiles_right": sum(right),
        "seconds": seconds,
        "largest_resident_bytes": most * 1024,
        "same_bytes_after_kill": all(same),
    }


def _in_tumour(side: int, y: int, x: int) -> bool:
    """Returns whether half or more of the patch at (y, x) is tumour."""
    areas = [
        max(0, min(y + PATCH, top + TILE) - max(y, top))
        * max(0, min(x + PATCH, left + TILE) - max(x, left))
        for top, left in tumours(side)
    ]
    return 2 * sum(areas) >= PATCH**2


def main() -> None:
    """Reads the command line, measures and saves the record."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--side", type=int, default=20_000, help="pixels a side of the slide")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    print(results)
    save("slide", args, results)


if __name__ == "__main__":
    main()
