"""Predicts with a network that train.py has trained, from files.

    python -m cv_jax.tools.predict --workdir=runs/a cat.jpg dog.png
    python -m cv_jax.tools.predict --workdir=runs/a --dir=photos --json > predictions.jsonl

Prints a line for each file. For a classifier the line has the classes with their probabilities, the
most probable first; for a detector the objects with their boxes, the highest score first.
`cv_jax.data.read_image` fits images of any kind and size to the network.
Predictions use the test-time views of the run's final evaluation; --tta=none uses one view, which
is faster. A detector's objects have at least the score --threshold, or that of config.method.
A file that cannot be read, for example a text file, a pipe, a broken link or a directory, gets a
line on stderr, or with --json an "error"; the other files are predicted. Control characters and
bytes that are not UTF-8 are escaped in names.

A network predicts something for any input. Therefore stderr first says what the network was trained
on, and an image unlike the training images is marked (see cv_jax/data/typical.py). --inputs=DIR
writes the input images of the network, --pictures=DIR pictures of the predictions, and --masks=DIR
the masks of a segmenter: PNG files of the size of the image, whose pixels are the classes.

Exit codes: 0 all files were read; 1 some files could not be read; 2 user error, or predictions that
are not finite (see the message).
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
from cv_jax.data.fields import num_examples, take
from cv_jax.data.read_image import read_bytes
from cv_jax.data.typical import score
from cv_jax.runtime.startup import check_platform, num_cores, prepare_jax
from cv_jax.tasks import Task
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.trained.load import (
    Trained,
    check_finite_predictions,
    in_words,
    load_trained,
    make_predict,
)
from cv_jax.trained.point import Point, read_point, with_point
from cv_jax.trained.words import in_text, rounded
from cv_jax.workdir.bucket import work_directory

# Files in a call of the network; the next files are read meanwhile.
MOST_AT_ONCE = 1000
MOST_JOINED = 16  # the same for a task that cuts files into parts
PART = 50  # files that a thread reads at a time
MOST_SHOWN = 3  # entries of a table, such as the probabilities of classes


class Predicted(NamedTuple):
    """An example with the network's prediction.

    Attributes:
        example: the network's input, by field.
        prediction: arrays by name, see `tasks.Task`.
        back: maps coordinates of the example to those of the file.
        score: the distance from the training images, see `data.typical.score`; None: unknown.
    """

    example: dict[str, np.ndarray]
    prediction: dict[str, np.ndarray]
    back: Any
    score: float | None


def find_files(images: Sequence[Path], directory: Path | None) -> list[Path]:
    """Returns the images, and all files in and below a directory, without hidden ones.

    The files include directories that cannot be listed, and links to directories, which are not
    followed; reading one of them gives an error.

    Raises:
        UserError: `directory` is not a directory, or there are no files.
    """
    files = list(images)
    if directory:
        if not os.path.isdir(directory):  # Path.is_dir raises where it may not look
            raise UserError(f"--dir={directory} is not a directory: choose another.")
        closed = []
        for folder, folders, names in os.walk(directory, onerror=closed.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names += [name for name in folders if os.path.islink(os.path.join(folder, name))]
            files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        files += [Path(error.filename) for error in closed]
    if not files:
        raise UserError("There are no files: name files, or a --dir that contains files.")
    return files


def predict(
    files: Sequence[Path],
    trained: Trained,
    program: Callable[[dict[str, np.ndarray]], dict[str, Any]],
    at_once: int,
) -> Iterator[tuple[Path, list[Predicted] | str]]:
    """Yields each file, in order, with the predictions of its examples, or with its error.

    Args:
        files: the files to read.
        trained: the network.
        program: see `trained.make_predict`.
        at_once: the most examples that `program` takes.

    Raises:
        UserError: predictions are not finite.
    """
    chunks = [files[start : start + at_once] for start in range(0, len(files), at_once)]
    before = None
    # Half of the cores: the network uses the others, and more threads would only wait.
    with ThreadPoolExecutor(max(1, num_cores() // 2)) as pool:
        ahead = _begin_reading(pool, chunks[0], trained)
        for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
            found = [one for part in ahead for one in part.result()]
            ahead = _begin_reading(pool, following, trained)
            read = [example for one in found if not isinstance(one, str) for example, _ in one]
            predictions = [
                program(_stack(read[i : i + at_once])) for i in range(0, len(read), at_once)
            ]  # the device may still be computing them
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
    """Yields each file with its predictions, or with its error."""
    rows = []
    for part in map(jax.device_get, predictions):
        check_finite_predictions(part)
        rows += [take(part, i) for i in range(num_examples(part))]
    scores: list[float | None] = [None] * len(read)
    if trained.spec.typical and read and "image" in read[0]:
        parts = [read[i : i + PART] for i in range(0, len(read), PART)]  # windows take memory
        images = (np.stack([example["image"] for example in part]) for part in parts)
        scores = [x for part in images for x in score(part, trained.spec.typical).tolist()]
    left = iter(zip(rows, scores, strict=True))
    for file, one in zip(files, found, strict=True):
        if isinstance(one, str):
            yield file, one
        else:
            parts = [(example, *next(left), back) for example, back in one]
            yield file, _joined(trained, [Predicted(e, p, back, s) for e, p, s, back in parts])


def _joined(trained: Trained, parts: list[Predicted]) -> list[Predicted]:
    """Returns the predictions of a file, as one if its task joins them."""
    if trained.task.join is None:
        return parts
    whole = trained.task.join([(one.example, one.prediction, one.back) for one in parts])
    scores = [one.score for one in parts if one.score is not None]
    return [Predicted(*whole, sum(scores) / len(scores) if scores else None)]


def describe(
    file: Path, one: Predicted | str, trained: Trained, top: int | None, as_json: bool
) -> str:
    """Returns the line of an example: its prediction, or the error of its file.

    Args:
        file: the file, whose name leads the line.
        one: the prediction, or the error.
        trained: the network.
        top: the most entries to show of each list or table of the prediction; None: MOST_SHOWN of
            a table, and whole lists.
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


def _cut(value: Any, top: int | None) -> Any:
    if isinstance(value, dict):
        return dict(list(value.items())[: top or MOST_SHOWN])
    return value[:top] if isinstance(value, list) else value


def _about(trained: Trained) -> str:
    """Returns a line on the network's training data, and on the score that marks an image."""
    if not trained.spec.typical:
        return in_words(trained)
    split = "val" if trained.spec.num_val else "the training images"
    return (
        f"{in_words(trained)}; unlike: a score above {trained.spec.typical.threshold:.2f}, "
        f"exceeded by 1 % of {split}"
    )


def _pictures(
    task: Task, one: Predicted, folders: dict[str, Path | None]
) -> Iterator[tuple[str, Image.Image]]:
    """Yields (flag, picture) for every folder that is to be written."""
    if folders["inputs"] and "image" in one.example:
        pixels = one.example["image"]
        yield "inputs", Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if folders["pictures"]:
        yield "pictures", Image.fromarray(task.draw(one.example, one.prediction, one.back))
    if folders["masks"]:
        yield "masks", task.mask(one.prediction, one.back)


def _write(folder: Path, flag: str, position: int, file: Path, picture: Image.Image) -> None:
    """Writes a picture as a PNG file; its name begins with the file's position."""
    path = folder / f"{position:06}-{file.stem[:40]}.png"
    try:
        picture.save(path)
    except OSError as error:
        raise UserError(
            f"--{flag}={folder} cannot be written ({first_line(error)}): choose another."
        ) from error


def _line(name: str, text: str) -> str:
    """Returns "name: text" as one line; escapes line breaks and control characters."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in f"{name}: {text}"
    )


@command("predict")
def main() -> None:
    """Reads the command line and prints a line for each file."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", type=path_argument, help="files to read")
    parser.add_argument("--dir", type=path_argument, help="a directory of more files to read")
    add_run_arguments(parser)
    parser.add_argument("--top", type=int, help="entries of a prediction to show")
    for flag, what in _FOLDERS.items():
        parser.add_argument(f"--{flag}", type=path_argument, help=f"a directory for {what}")
    parser.add_argument("--threshold", type=float, help="least score of an object, 0 to 1")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each file")
    arguments = parser.parse_args()
    if arguments.top is not None and arguments.top < 1:
        parser.error(f"--top={arguments.top} must be above 0")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold={arguments.threshold} must be between 0 and 1")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
    files = find_files(arguments.files, arguments.dir)
    prepare_jax()
    check_platform()
    trained = load_trained(work_directory(arguments.workdir), arguments.run, arguments.tta)
    if arguments.threshold is not None:
        trained = _at_threshold(trained, arguments.threshold)
    if point := read_point(work_directory(arguments.workdir), trained):
        trained = _at_point(trained, point)
    sys.exit(_print_predictions(files, trained, arguments))


def _at_threshold(trained: Trained, threshold: float) -> Trained:
    if trained.task.at_threshold is None:
        raise UserError(
            f"--threshold={threshold} has no effect: config.task={trained.config.task!r} predicts "
            "no objects with scores. Leave it out."
        )
    return trained._replace(task=trained.task._replace(**trained.task.at_threshold(threshold)))


def _at_point(trained: Trained, point: Point) -> Trained:
    """Returns the network with descriptions that say whether an image is positive."""

    def describe(*arguments):
        return with_point(trained.task.describe(*arguments), point)

    return trained._replace(task=trained.task._replace(describe=describe))


_FOLDERS = {
    "inputs": "the input images of the network",
    "pictures": "pictures of the predictions",
    "masks": "masks of the predicted classes",
}


def _print_predictions(
    files: Sequence[Path], trained: Trained, arguments: argparse.Namespace
) -> int:
    """Prints all lines and returns the exit code."""
    folders = {flag: getattr(arguments, flag) for flag in _FOLDERS}
    if folders["masks"] and trained.task.mask is None:
        raise UserError(
            f"--masks: config.task={trained.config.task!r} predicts no masks: leave it out, or use "
            "--pictures."
        )
    for flag, folder in folders.items():
        try:
            folder and folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--{flag}={folder} cannot be created ({first_line(error)}): choose another."
            ) from error
    print(_line("predict", _about(trained)), file=sys.stderr)
    # A large file may be hundreds of windows.
    at_once = min(len(files), MOST_JOINED if trained.task.join else MOST_AT_ONCE)
    found = predict(files, trained, make_predict(trained, at_once), at_once)
    watched = sys.stderr.isatty() and len(files) > at_once
    bar = tqdm(found, total=len(files), unit="file", dynamic_ncols=True, disable=not watched)
    num_bad = 0
    for position, (file, found) in enumerate(bar, 1):
        bad = isinstance(found, str)
        num_bad += bad
        for one in [found] if bad else found:
            for flag, picture in () if bad else _pictures(trained.task, one, folders):
                _write(folders[flag], flag, position, file, picture)
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
