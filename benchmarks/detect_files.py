"""Measures a detector on image files beside torchvision's, from the command to its end.

    python -m benchmarks.detect_files --workdir=runs/bccd --dir=BCCD/JPEGImages --size=256,192

In turn: predict of a trained detector, which prints JSON, and a program with torchvision's FCOS on
ResNet-18 (not trained; all that it finds is printed), which reads by Pillow, resizes to `size` and
works on 32 images at a time. The first run of each, which may compile, is not counted. Needs
PyTorch and torchvision.
"""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import make_parser, paired_ratio, save, timed_run

AT_ONCE = 32


def detect_with_torchvision(files: Sequence[Path], size: tuple[int, int]) -> None:
    """Prints a line of JSON for each file: boxes in pixels of the file, scores and classes."""
    import numpy as np
    import torch
    from PIL import Image

    from benchmarks.torch_models import fcos

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = fcos(size[::-1]).eval()
    for start in range(0, len(files), AT_ONCE):
        chunk = files[start : start + AT_ONCE]
        opened = [Image.open(file).convert("RGB") for file in chunk]
        small = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in opened]
        images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            results = network(list(images))
        for file, image, found in zip(chunk, opened, results, strict=True):
            boxes = found["boxes"] * (image.width / size[0])
            objects = {"boxes": boxes.tolist(), "scores": found["scores"].tolist()}
            print(json.dumps({"file": str(file), **objects}))


def main() -> None:
    """Measures and prints; with --torch this is torchvision's program itself."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--workdir", help="of a detector that train.py has trained")
    parser.add_argument("--dir", required=True, help="a directory of image files")
    parser.add_argument("--size", default="256,192", help="width and height for FCOS")
    parser.add_argument("--torch", action="store_true", help="run FCOS on the files")
    args = parser.parse_args()
    size = tuple(int(side) for side in args.size.split(","))
    files = sorted(Path(args.dir).iterdir())
    if args.torch:
        detect_with_torchvision(files, size)
        return
    commands = {
        "cv_jax": [
            *("-m", "cv_jax.tools.predict", f"--workdir={Path(args.workdir).absolute()}"),
            *(f"--dir={Path(args.dir).absolute()}", "--json"),
        ],
        "torchvision": [
            *("-m", "benchmarks.detect_files", f"--dir={Path(args.dir).absolute()}"),
            *(f"--size={args.size}", "--torch"),
        ],
    }
    for command in commands.values():
        timed_run(command)
    rounds = [{name: timed_run(c)[0] for name, c in commands.items()} for _ in range(args.rounds)]
    results = {
        name: {"seconds": [of_round[name] for of_round in rounds], "files": len(files)}
        for name in commands
    }
    for name, result in results.items():
        median = statistics.median(result["seconds"])
        print(f"{name:<12} {median:6.2f} s  {len(files) / median:6.1f} files/s")
    ratio = paired_ratio(results["torchvision"]["seconds"], results["cv_jax"]["seconds"])
    print(f"cv_jax is {ratio['median']:.2f} times as fast")
    save("detect_files", args, {**results, "speed": ratio})


if __name__ == "__main__":
    main()
