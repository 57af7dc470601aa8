"""Says what is in images, by a network that train.py has trained.

    python -m cv_jax.tools.predict --workdir=runs/a cat.jpg dog.png
    python -m cv_jax.tools.predict --workdir=runs/a --dir=photos --json > answers.jsonl

A line an image: its classes with their probabilities, the most probable first. Images of any kind
and size are brought to the network's by `cv_jax.images.read_image`, and it sees the views of the
run's final evaluation; --tta=none looks once at each, which is faster. What is not a readable image
gets a line of its own on stderr, or with --json its "error", and the others go on: a text file, a
pipe, a link to nothing, a directory that is not looked into. Control characters and bytes that are
not UTF-8 are escaped in names.

Exit codes: 0 all images were read; 1 some were not; 2 nothing could begin or the network's answers
are not finite, the message says which.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from cv_jax.config.errors import UserError
from cv_jax.config.paths import path_argument
from cv_jax.runtime.startup import check_platform, num_cores, prepare_jax
from cv_jax.tasks.classification.views import find_tta
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.trained.load import check_answers, load_trained, make_classify
from cv_jax.trained.read_image import read_file
from cv_jax.workdir.bucket import work_directory

# Images that are classified at once, while as many are read.
MOST_AT_ONCE = 1000
PART = 50  # files that a thread reads at a time


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
    image_shape: tuple[int, int, int],
    classify: Callable[[Sequence[np.ndarray]], jax.Array],
    at_once: int,
) -> Iterator[tuple[Path, np.ndarray | str]]:
    """Yields each file, in order, with its probabilities (n,), or with what is wrong with it.

    Raises UserError where the network answers with numbers that are not finite.

    Args:
        files: in which the images are.
        image_shape: that of the network's images.
        classify: see `trained.make_classify`.
        at_once: images that it takes at most.
    """
    chunks = [files[start : start + at_once] for start in range(0, len(files), at_once)]
    before = ()
    # Half of the cores: the network has the others, and more threads wait for each other.
    with ThreadPoolExecutor(max(1, num_cores() // 2)) as pool:
        ahead = _begin_reading(pool, chunks[0], image_shape)
        for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
            images = [image for part in ahead for image in part.result()]
            ahead = _begin_reading(pool, following, image_shape)
            sound = [image for image in images if not isinstance(image, str)]
            probabilities = classify(sound) if sound else ()  # of a device that is still at it
            yield from _answers(*before)
            before = chunk, images, probabilities
    yield from _answers(*before)


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
    files: Sequence[Path] = (), images: Sequence = (), probabilities: Sequence = ()
) -> Iterator[tuple[Path, np.ndarray | str]]:
    probabilities = np.asarray(probabilities)
    check_answers(probabilities)
    rows = iter(probabilities)
    for file, image in zip(files, images, strict=True):
        yield file, image if isinstance(image, str) else next(rows)


def describe(
    file: Path, answer: np.ndarray | str, class_names: Sequence[str], top: int, as_json: bool
) -> str:
    """Returns the line of a file: its `top` most probable classes, or what is wrong with it."""
    name = os.fsencode(file).decode("utf-8", "backslashreplace")  # JSON holds no other bytes
    if isinstance(answer, str):
        return json.dumps({"file": name, "error": answer}) if as_json else _line(name, answer)
    best = np.argsort(-answer, kind="stable")[:top]
    if as_json:
        probabilities = {class_names[i]: round(float(answer[i]), 6) for i in best}
        best_class = class_names[best[0]]
        return json.dumps({"file": name, "class": best_class, "probabilities": probabilities})
    return _line(name, ", ".join(f"{class_names[i]} {100 * answer[i]:.1f} %" for i in best))


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
    sys.exit(_print_answers(files, trained, tta, arguments.top, arguments.json))


def _print_answers(files, trained, tta, top, as_json) -> int:
    """Prints all lines and returns the exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # of letters that the terminal lacks
    at_once = min(len(files), MOST_AT_ONCE)
    answers = predict(
        files, trained.spec.image_shape, make_classify(trained, tta, at_once), at_once
    )
    watched = sys.stderr.isatty() and len(files) > at_once
    bar = tqdm(answers, total=len(files), unit="image", dynamic_ncols=True, disable=not watched)
    num_bad = 0
    for file, answer in bar:
        bad = isinstance(answer, str)
        num_bad += bad
        line = describe(file, answer, trained.spec.class_names, top, as_json)
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
