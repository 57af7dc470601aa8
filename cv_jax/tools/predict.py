"""Says what is in images, by a network that train.py has trained.

    python -m cv_jax.tools.predict --workdir=runs/a cat.jpg dog.png
    python -m cv_jax.tools.predict --workdir=runs/a --dir=photos --json > answers.jsonl

A line an image: its classes with their probabilities, the most probable first. Images of any kind
and size are brought to the network's by `cv_jax.trained.read_image`, and it sees the views of the
run's final evaluation; --tta=none looks once at each, which is faster. What is not a readable image
gets a line of its own on stderr, or with --json its "error", and the others go on: a text file, a
pipe, a link to nothing, a directory that is not looked into. Control characters and bytes that are
not UTF-8 are escaped in names.

A network answers any image with one of its classes. So stderr says first what it was trained on,
an image unlike its training images is marked (see cv_jax/data/typical.py), and --inputs=DIR writes
the images that the network was given.

Exit codes: 0 all images were read; 1 some were not; 2 nothing could begin or the network's answers
are not finite, the message says which.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from cv_jax.config.errors import UserError, first_line
from cv_jax.config.paths import path_argument
from cv_jax.data import DataSpec
from cv_jax.data.typical import score
from cv_jax.runtime.startup import check_platform, num_cores, prepare_jax
from cv_jax.tasks.classification.views import find_tta
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.trained.load import Trained, check_answers, in_words, load_trained, make_classify
from cv_jax.trained.read_image import read_file
from cv_jax.workdir.bucket import work_directory

# Images that are classified at once, while as many are read.
MOST_AT_ONCE = 1000
PART = 50  # files that a thread reads at a time


class Answer(NamedTuple):
    """What the network makes of a file.

    Attributes:
        image: (h, w, c) uint8, what it was given.
        probabilities: (n,).
        score: see `data.typical.score`; None of a run that has not measured its training images.
    """

    image: np.ndarray
    probabilities: np.ndarray
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
        raise UserError("There are no images: name some, or a --dir that holds some.")
    return files


def predict(
    files: Sequence[Path],
    spec: DataSpec,
    classify: Callable[[Sequence[np.ndarray]], jax.Array],
    at_once: int,
) -> Iterator[tuple[Path, Answer | str]]:
    """Yields each file, in order, with its answer, or with what is wrong with it.

    Raises UserError where the network answers with numbers that are not finite.

    Args:
        files: in which the images are.
        spec: of the data that the network was trained on.
        classify: see `trained.make_classify`.
        at_once: images that it takes at most.
    """
    chunks = [files[start : start + at_once] for start in range(0, len(files), at_once)]
    before = ()
    # Half of the cores: the network has the others, and more threads wait for each other.
    with ThreadPoolExecutor(max(1, num_cores() // 2)) as pool:
        ahead = _begin_reading(pool, chunks[0], spec.image_shape)
        for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
            images = [image for part in ahead for image in part.result()]
            ahead = _begin_reading(pool, following, spec.image_shape)
            sound = [image for image in images if not isinstance(image, str)]
            probabilities = classify(sound) if sound else ()  # of a device that is still at it
            yield from _answers(spec, *before)
            before = chunk, images, probabilities
    yield from _answers(spec, *before)


def _begin_reading(
    pool: ThreadPoolExecutor, files: Sequence[Path], image_shape: tuple[int, int, int]
) -> list[Future]:
    def read(part):
        return [_read(file, image_shape) for file in part]

    return [pool.submit(read, files[i : i + PART]) for i in range(0, len(files), PART)]


def _read(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray | str:
    try:
        return read_file(path, image_shape)
    except UserError as error:
        return str(error)


def _answers(
    spec: DataSpec,
    files: Sequence[Path] = (),
    images: Sequence = (),
    probabilities: Sequence = (),
) -> Iterator[tuple[Path, Answer | str]]:
    probabilities = np.asarray(probabilities)
    check_answers(probabilities)
    sound = [image for image in images if not isinstance(image, str)]
    scores = [None] * len(sound)
    if spec.typical and sound:
        scores = score(np.stack(sound), spec.typical).tolist()
    answers = map(Answer, sound, probabilities, scores)
    for file, image in zip(files, images, strict=True):
        yield file, image if isinstance(image, str) else next(answers)


def describe(file: Path, answer: Answer | str, spec: DataSpec, top: int, as_json: bool) -> str:
    """Returns the line of a file: its `top` most probable classes, or what is wrong with it."""
    name = os.fsencode(file).decode("utf-8", "backslashreplace")  # JSON holds no other bytes
    if isinstance(answer, str):
        return json.dumps({"file": name, "error": answer}) if as_json else _line(name, answer)
    best = np.argsort(-answer.probabilities, kind="stable")[:top]
    classes = {spec.class_names[i]: float(answer.probabilities[i]) for i in best}
    unlike = answer.score is not None and answer.score > spec.typical.threshold
    if as_json:
        values = {"file": name, "class": spec.class_names[best[0]]}
        values["probabilities"] = {key: round(value, 6) for key, value in classes.items()}
        if answer.score is not None:
            values |= {"score": round(answer.score, 3), "unlike": unlike}
        return json.dumps(values)
    text = ", ".join(f"{key} {100 * value:.1f} %" for key, value in classes.items())
    return _line(name, f"{text}; unlike (score {answer.score:.1f})" if unlike else text)


def _about(trained: Trained) -> str:
    """Returns what the network was trained on, and when an image is called unlike that."""
    if not trained.spec.typical:
        return in_words(trained)
    split = "val" if trained.spec.num_val else "the training images"
    return (
        f"{in_words(trained)}; unlike: a score above {trained.spec.typical.threshold:.2f}, "
        f"as 1 % of {split} have"
    )


def _write_input(folder: Path, position: int, file: Path, image: np.ndarray) -> None:
    """Writes what the network was given as a PNG file, led by the file's place in the order."""
    path = folder / f"{position:06}-{file.stem[:40]}.png"
    try:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
    except OSError as error:
        raise UserError(f"--inputs={folder} cannot be written ({first_line(error)}).") from error


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
    parser.add_argument("images", nargs="*", type=path_argument, help="image files")
    parser.add_argument("--dir", type=path_argument, help="a directory whose files are images, too")
    add_run_arguments(parser)
    parser.add_argument("--top", type=int, default=3, help="classes that are told of an image")
    parser.add_argument(
        "--inputs", type=path_argument, help="a directory for what the network was given"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, a line an image")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error(f"--top={arguments.top} must be above 0")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once
    files = find_files(arguments.images, arguments.dir)
    prepare_jax()
    check_platform()
    trained = load_trained(work_directory(arguments.workdir), arguments.run)
    tta = trained.config.tta if arguments.tta is None else arguments.tta
    find_tta(tta)
    sys.exit(_print_answers(files, trained, tta, arguments))


def _print_answers(
    files: Sequence[Path], trained: Trained, tta: str, arguments: argparse.Namespace
) -> int:
    """Prints all lines and returns the exit code."""
    inputs, as_json = arguments.inputs, arguments.json
    if inputs:
        try:
            inputs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--inputs={inputs} cannot be made ({first_line(error)}).") from error
    print(_line("predict", _about(trained)), file=sys.stderr)
    at_once = min(len(files), MOST_AT_ONCE)
    answers = predict(files, trained.spec, make_classify(trained, tta, at_once), at_once)
    watched = sys.stderr.isatty() and len(files) > at_once
    bar = tqdm(answers, total=len(files), unit="image", dynamic_ncols=True, disable=not watched)
    num_bad = 0
    for position, (file, answer) in enumerate(bar, 1):
        bad = isinstance(answer, str)
        num_bad += bad
        if inputs and not bad:
            _write_input(inputs, position, file, answer.image)
        line = describe(file, answer, trained.spec, arguments.top, as_json)
        stream = sys.stderr if bad and not as_json else sys.stdout
        if watched and stream.isatty():
            bar.write(line, file=stream)  # above the bar
        else:
            print(line, file=stream)
    if num_bad:
        print(f"predict: {num_bad:,} of {len(files):,} files could not be read", file=sys.stderr)
    return 1 if num_bad else 0


if __name__ == "__main__":
    main()
