"""Predicts what is in files, by a network that train.py has trained.

    python -m cv_jax.tools.predict --workdir=runs/a cat.jpg dog.png
    python -m cv_jax.tools.predict --workdir=runs/a --dir=photos --json > predictions.jsonl

A line for each file: for a classifier its classes with their probabilities, the most probable
first. Images of any kind and size are brought to the network's by `cv_jax.data.read_image`. The
network sees the views of the run's final evaluation; --tta=none looks once at each, which is
faster. A file that cannot be read gets a line of its own on stderr, or with --json its "error", and
the others go on: a text file, a pipe, a broken link, a directory that is not looked into. Control
characters and bytes that are not UTF-8 are escaped in names.

A network predicts something for any input. So stderr says first what it was trained on, an image
unlike its training images is marked (see cv_jax/data/typical.py), --inputs=DIR writes the images
that the network was given, and --pictures=DIR pictures of its predictions.

Exit codes: 0 all files were read; 1 some were not; 2 nothing could begin or the predictions are not
finite, the message says which.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from cv_jax.config.errors import UserError, first_line
from cv_jax.config.paths import path_argument
from cv_jax.data.read_image import read_bytes
from cv_jax.data.typical import score
from cv_jax.runtime.startup import check_platform, num_cores, prepare_jax
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.trained.load import (
    Trained,
    check_finite_predictions,
    in_words,
    load_trained,
    make_predict,
)
from cv_jax.trained.words import in_text, rounded
from cv_jax.workdir.bucket import work_directory

# Files that are predicted at once, while as many are read.
MOST_AT_ONCE = 1000
PART = 50  # files that a thread reads at a time


class Predicted(NamedTuple):
    """What the network makes of an example.

    Attributes:
        example: what it was given, by field.
        prediction: arrays by name, see `tasks.Task`.
        back: the way back to the coordinates of the file.
        score: how unlike the training images it is, see `data.typical.score`; None where that is
            not known.
    """

    example: dict[str, np.ndarray]
    prediction: dict[str, np.ndarray]
    back: Any
    score: float | None


def find_files(images: Sequence[Path], directory: Path | None) -> list[Path]:
    """Returns the images, and all files in a directory and below it, but for the hidden ones.

    Among the files are directories that cannot be listed and links to directories, which are not
    followed: reading each says so.

    Raises:
        UserError: there is no such directory, or nothing at all.
    """
    files = list(images)
    if directory:
        if not os.path.isdir(directory):  # Path.is_dir raises where it may not look
            raise UserError(f"--dir={directory} is not a directory.")
        closed = []
        for folder, folders, names in os.walk(directory, onerror=closed.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names += [name for name in folders if os.path.islink(os.path.join(folder, name))]
            files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        files += [Path(error.filename) for error in closed]
    if not files:
        raise UserError("There are no files: name some, or a --dir that holds some.")
    return files


def predict(
    files: Sequence[Path],
    trained: Trained,
    program: Callable[[dict[str, np.ndarray]], dict[str, Any]],
    at_once: int,
) -> Iterator[tuple[Path, list[Predicted] | str]]:
    """Yields each file, in order, with the predictions of its examples, or what is wrong with it.

    Raises UserError where predictions are not finite.

    Args:
        files: to read.
        trained: the network.
        program: see `trained.make_predict`.
        at_once: examples that it takes at most.
    """
    chunks = [files[start : start + at_once] for start in range(0, len(files), at_once)]
    before = None
    # Half of the cores: the network has the others, and more threads wait for each other.
    with ThreadPoolExecutor(max(1, num_cores() // 2)) as pool:
        ahead = _begin_reading(pool, chunks[0], trained)
        for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
            found = [one for part in ahead for one in part.result()]
            ahead = _begin_reading(pool, following, trained)
            read = [example for one in found if not isinstance(one, str) for example, _ in one]
            predictions = [
                program(_stack(read[i : i + at_once])) for i in range(0, len(read), at_once)
            ]  # of a device that is still at it
            if before:
                yield from _matched(trained, *before)
            before = chunk, found, read, predictions
    yield from _matched(trained, *before)


def _begin_reading(
    pool: ThreadPoolExecutor, files: Sequence[Path], trained: Trained
) -> list[Future]:
    def read(part):
        return [_read(file, trained) for file in part]

    return [pool.submit(read, files[i : i + PART]) for i in range(0, len(files), PART)]


def _read(path: Path, trained: Trained) -> list[tuple[dict[str, np.ndarray], Any]] | str:
    try:
        return trained.task.read(read_bytes(path))
    except UserError as error:
        return str(error)


def _stack(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _matched(
    trained: Trained, files: Sequence[Path], found: list, read: list, predictions: list
) -> Iterator[tuple[Path, list[Predicted] | str]]:
    """Yields each file with its part of the predictions."""
    rows = []
    for part in map(jax.device_get, predictions):
        check_finite_predictions(part)
        count = len(next(iter(part.values())))
        rows += [{name: x[i] for name, x in part.items()} for i in range(count)]
    scores: list[float | None] = [None] * len(read)
    if trained.spec.typical and read and "image" in read[0]:
        images = np.stack([example["image"] for example in read])
        scores = score(images, trained.spec.typical).tolist()
    left = iter(zip(rows, scores, strict=True))
    for file, one in zip(files, found, strict=True):
        if isinstance(one, str):
            yield file, one
        else:
            pairs = [(example, back, *next(left)) for example, back in one]
            yield file, [Predicted(e, prediction, back, s) for e, back, prediction, s in pairs]


def describe(file: Path, one: Predicted | str, trained: Trained, top: int, as_json: bool) -> str:
    """Returns the line of an example: its prediction, or what is wrong with its file.

    Args:
        file: the name that leads the line.
        one: what the network makes of it, or the problem.
        trained: the network.
        top: entries of each list or table of the prediction that are shown, the first ones.
        as_json: whether the line is JSON.
    """
    name = os.fsencode(file).decode("utf-8", "backslashreplace")  # JSON holds no other bytes
    if isinstance(one, str):
        return json.dumps({"file": name, "error": one}) if as_json else _line(name, one)
    values = trained.task.describe(one.example, one.prediction, one.back)
    values = {key: _cut(value, top) for key, value in values.items()}
    unlike = one.score is not None and one.score > trained.spec.typical.threshold
    if as_json:
        about = {"score": one.score, "unlike": unlike} if one.score is not None else {}
        return json.dumps(rounded({"file": name, **values, **about}))
    text = in_text(values)
    return _line(name, f"{text}; unlike (score {one.score:.1f})" if unlike else text)


def _cut(value: Any, top: int) -> Any:
    if isinstance(value, dict):
        return dict(list(value.items())[:top])
    return value[:top] if isinstance(value, list) else value


def _about(trained: Trained) -> str:
    """Returns what the network was trained on, and when an image is called unlike that."""
    if not trained.spec.typical:
        return in_words(trained)
    split = "val" if trained.spec.num_val else "the training images"
    return (
        f"{in_words(trained)}; unlike: a score above {trained.spec.typical.threshold:.2f}, "
        f"as 1 % of {split} have"
    )


def _write(folder: Path, flag: str, position: int, file: Path, picture: np.ndarray) -> None:
    """Writes a picture as a PNG file, led by the file's place in the order."""
    path = folder / f"{position:06}-{file.stem[:40]}.png"
    try:
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path)
    except OSError as error:
        raise UserError(f"--{flag}={folder} cannot be written ({first_line(error)}).") from error


def _line(name: str, text: str) -> str:
    """Returns both as one line: whatever would break it or command the terminal is escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in f"{name}: {text}"
    )


@command("predict")
def main() -> None:
    """Reads the command line and prints a line for each image."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", type=path_argument, help="files to read")
    parser.add_argument("--dir", type=path_argument, help="a directory whose files are read, too")
    add_run_arguments(parser)
    parser.add_argument("--top", type=int, default=3, help="entries of a prediction that are shown")
    for flag, what in (("inputs", "the images that the network was given"), *_PICTURES):
        parser.add_argument(f"--{flag}", type=path_argument, help=f"a directory for {what}")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each file")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error(f"--top={arguments.top} must be above 0")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once
    files = find_files(arguments.files, arguments.dir)
    prepare_jax()
    check_platform()
    trained = load_trained(work_directory(arguments.workdir), arguments.run, arguments.tta)
    sys.exit(_print_predictions(files, trained, arguments))


_PICTURES = (("pictures", "pictures of the predictions"),)


def _print_predictions(
    files: Sequence[Path], trained: Trained, arguments: argparse.Namespace
) -> int:
    """Prints all lines and returns the exit code."""
    folders = {flag: getattr(arguments, flag) for flag in ("inputs", "pictures")}
    for flag, folder in folders.items():
        try:
            folder and folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--{flag}={folder} cannot be made ({first_line(error)}).") from error
    print(_line("predict", _about(trained)), file=sys.stderr)
    at_once = min(len(files), MOST_AT_ONCE)
    found = predict(files, trained, make_predict(trained, at_once), at_once)
    watched = sys.stderr.isatty() and len(files) > at_once
    bar = tqdm(found, total=len(files), unit="file", dynamic_ncols=True, disable=not watched)
    num_bad = 0
    for position, (file, found) in enumerate(bar, 1):
        bad = isinstance(found, str)
        num_bad += bad
        for one in [found] if bad else found:
            if not bad and folders["inputs"] and "image" in one.example:
                _write(folders["inputs"], "inputs", position, file, one.example["image"])
            if not bad and folders["pictures"]:
                picture = trained.task.draw(one.example, one.prediction, one.back)
                _write(folders["pictures"], "pictures", position, file, picture)
            line = describe(file, one, trained, arguments.top, arguments.json)
            stream = sys.stderr if bad and not arguments.json else sys.stdout
            if watched and stream.isatty():
                bar.write(line, file=stream)  # above the bar
            else:
                print(line, file=stream)
    if num_bad:
        print(f"predict: {num_bad:,} of {len(files):,} files could not be read", file=sys.stderr)
    return 1 if num_bad else 0


if __name__ == "__main__":
    main()
