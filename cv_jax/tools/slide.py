"""Runs a classifier or a segmenter over a whole slide: a heat map of one class.

    python -m cv_jax.tools.slide --workdir=runs/a --positive=tumour --out=heat SLIDE.svs
    python -m cv_jax.tools.slide --workdir=runs/a --positive=tumour --out=heat --level=1 SLIDE.tif

SLIDE is a pyramidal TIFF or any other file that OpenSlide opens. It is read at one level of its
pyramid, in tiles of the size of the network's input. Only tiles with tissue are predicted: those of
which a tenth or more is coloured, by Otsu's threshold of the saturation in an overview. Transparent
pixels are white. Memory holds one row of tiles at a time.

A classifier gives a tile the probability of the class `--positive`, by the temperature of
cv_jax.tools.assess if there is one. A segmenter gives every square of 16x16 pixels the share of its
pixels that are of the class. The directory --out gets

    heat.png    the heat map over an overview of the slide, red for 1
    heat.tif    the heat map as a tiled, pyramidal TIFF of float32; no tissue is -1. Its description
                says how many pixels of the slide's level 0 a value covers
    tiles.csv   x, y, width and height of each tile in pixels of level 0, and its highest value

Rows of tiles are kept in --out while the program runs. If it is stopped or killed, the same command
goes on, and ends with the same files.

Exit codes: 0 done; 2 user error (see the message).
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from etils import epath
from PIL import Image
from scipy.special import softmax
from tqdm import trange

from cv_jax.config.errors import UserError, first_line, nearest
from cv_jax.config.paths import path_argument
from cv_jax.data.cache import replaced
from cv_jax.runtime.startup import check_platform, prepare_jax
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.trained.load import Trained, check_finite_predictions, load_trained, make_predict
from cv_jax.trained.point import read_point
from cv_jax.workdir.bucket import work_directory

TISSUE = 0.1  # share of a tile that must be tissue
CELL = 16  # pixels a side of a segmenter's value
PART = 64  # tiles that are predicted at a time
OVERVIEW = 2048  # pixels of the longer side of the overview
NO_TISSUE = -1.0

# (k, h, w, c) uint8 -> (k, rows, columns) float32, values from 0 to 1
Score = Callable[[np.ndarray], np.ndarray]


class Grid(NamedTuple):
    """The tiles of a slide at one level.

    Attributes:
        level: the level of the pyramid.
        size: height and width of a tile, in pixels of the level.
        shape: rows and columns of tiles; the last ones may reach beyond the slide.
        scale: pixels of level 0 for a pixel of the level, along y and x: the ratio of the sizes.
    """

    level: int
    size: tuple[int, int]
    shape: tuple[int, int]
    scale: tuple[float, float]

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Returns (x, y) of the upper left corner of a tile, in pixels of level 0."""
        y, x = (
            round(i * side * scale)
            for i, side, scale in zip((row, column), self.size, self.scale, strict=True)
        )
        return x, y


def open_slide(path: Path) -> Any:
    """Opens a slide with OpenSlide.

    Raises:
        UserError: the packages are missing, or the file is no slide.
    """
    try:
        import openslide
    except ImportError as error:
        raise UserError(
            "Slides need further packages: pip install -r requirements-slide.txt"
        ) from error
    try:
        return openslide.OpenSlide(path)
    except (OSError, openslide.OpenSlideError) as error:
        raise UserError(
            f"{path} is no slide that OpenSlide opens ({first_line(error)})."
        ) from error


def make_grid(slide: Any, level: int, size: tuple[int, int]) -> Grid:
    """Lays tiles of `size` (h, w) over a level of a slide.

    Raises:
        UserError: the slide has no such level.
    """
    if not 0 <= level < slide.level_count:
        sizes = ", ".join(f"{i}: {w}x{h}" for i, (w, h) in enumerate(slide.level_dimensions))
        raise UserError(f"--level={level} is not one of this slide's levels. There are: {sizes}.")
    # Of sizes, since a level's stated scale may be rounded, such as 4.00015.
    sides = [dimensions[::-1] for dimensions in slide.level_dimensions]
    scale = tuple(a / b for a, b in zip(sides[0], sides[level], strict=True))
    shape = tuple(-(-a // b) for a, b in zip(sides[level], size, strict=True))
    return Grid(level, size, shape, scale)


def read_tile(slide: Any, grid: Grid, row: int, column: int, channels: int = 3) -> np.ndarray:
    """Reads a tile as (h, w, c) uint8; what is transparent or beyond the slide is white."""
    # OpenSlide counts places in pixels of level 0, and sizes in those of the level.
    corner = grid.corner(row, column)
    image = slide.read_region(corner, grid.level, grid.size[::-1])
    width, height = slide.level_dimensions[grid.level]
    pixels = np.asarray(_on_white(image).convert("L" if channels == 1 else "RGB")).copy()
    pixels[max(0, height - row * grid.size[0]) :] = 255
    pixels[:, max(0, width - column * grid.size[1]) :] = 255
    return pixels.reshape(*grid.size, channels)


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))


def overview(slide: Any) -> np.ndarray:
    """Returns the whole slide in at most 2,048 pixels a side, (h, w, 3) uint8."""
    width, height = slide.dimensions
    scale = max(1, max(width, height) / OVERVIEW)
    level = slide.get_best_level_for_downsample(scale)
    image = _on_white(slide.read_region((0, 0), level, slide.level_dimensions[level]))
    size = max(1, round(width / scale)), max(1, round(height / scale))
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))


def find_tissue(picture: np.ndarray, grid: Grid, slide: Any) -> np.ndarray:
    """Returns which tiles, (rows, columns) bool, are to a tenth or more of coloured pixels."""
    saturation = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)[..., 1]
    threshold, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    # Of a slide without tissue, Otsu's threshold divides the noise.
    tissue = np.pad((saturation > max(threshold, 12)).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    ends = []
    for i, most in enumerate(picture.shape[:2]):
        pixels = slide.dimensions[1 - i] / most  # of level 0 for one of the overview
        begin = np.arange(grid.shape[i] + 1) * grid.size[i] * grid.scale[i] / pixels
        ends.append(np.minimum(np.round(begin).astype(int), most))
    (y0, y1), (x0, x1) = ((end[:-1, None], end[1:, None]) for end in ends)
    x0, x1 = x0.T, x1.T
    inside = tissue[y1, x1] - tissue[y0, x1] - tissue[y1, x0] + tissue[y0, x0]
    return inside >= TISSUE * np.maximum((y1 - y0) * (x1 - x0), 1)


def heat_row(
    slide: Any,
    grid: Grid,
    row: int,
    tissue: np.ndarray,
    score: Score,
    cells: tuple[int, int],
    channels: int,
) -> np.ndarray:
    """Returns the values of a row of tiles, (cells[0], columns * cells[1]) float32.

    Args:
        slide: the slide.
        grid: its tiles.
        row: the number of the row.
        tissue: (columns,) bool, which tiles to predict; the others have NO_TISSUE.
        score: see `Score`.
        cells: rows and columns of the values of a tile.
        channels: of the network's input.
    """
    values = np.full((grid.shape[1], *cells), NO_TISSUE, np.float32)
    columns = np.flatnonzero(tissue)
    for start in range(0, len(columns), PART):
        part = columns[start : start + PART]
        tiles = [read_tile(slide, grid, row, column, channels) for column in part]
        values[part] = score(np.stack(tiles))
    return values.transpose(1, 0, 2).reshape(cells[0], -1)


def make_score(trained: Trained, number: int, temperature: float) -> tuple[Score, tuple[int, int]]:
    """Returns the function that scores tiles for class `number`, and the shape of its values.

    Raises:
        UserError: the network predicts neither classes nor masks.
    """
    h, w, _ = trained.spec.image_shape
    predict = make_predict(trained, PART)
    if trained.config.task == "classification":

        def of_classes(tiles):
            found = np.asarray(predict({"image": tiles})["logits"], np.float64)
            check_finite_predictions({"logits": found})
            return softmax(found / temperature, axis=1)[:, number, None, None]

        return of_classes, (1, 1)
    if h % CELL or w % CELL:
        raise UserError(f"The network's input of {h}x{w} pixels is no multiple of {CELL} pixels.")

    def of_masks(tiles):
        mask = np.asarray(predict({"image": tiles})["mask"]) == number
        return mask.reshape(len(tiles), h // CELL, CELL, w // CELL, CELL).mean((2, 4))

    return of_masks, (h // CELL, w // CELL)


def write_outputs(
    out: Path, slide: Any, picture: np.ndarray, grid: Grid, cells: tuple[int, int], heat: np.ndarray
) -> None:
    """Writes heat.png, heat.tif and tiles.csv; the same arguments give the same bytes."""
    covers = [side * s / n for side, s, n in zip(grid.size, grid.scale, cells, strict=True)]
    _write_tiff(out / "heat.tif", heat, {"pixels_of_level_0": {"y": covers[0], "x": covers[1]}})
    _write_picture(out / "heat.png", slide, picture, heat, covers)
    rows, columns = grid.shape
    of_tile = heat.reshape(rows, cells[0], columns, cells[1]).max((1, 3))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("x", "y", "width", "height", "value"))
    height, width = (round(side * s) for side, s in zip(grid.size, grid.scale, strict=True))
    for row, column in np.argwhere(of_tile != NO_TISSUE):
        corner = grid.corner(row, column)
        writer.writerow((*corner, width, height, f"{of_tile[row, column]:.6f}"))
    with replaced(out / "tiles.csv") as file:
        file.write(text.getvalue().encode())


def _write_tiff(path: Path, heat: np.ndarray, about: dict[str, Any]) -> None:
    import tifffile  # here: only this tool needs it

    options = {"tile": (256, 256), "compression": "zlib", "metadata": None, "software": "cv_jax"}
    with replaced(path) as file, tifffile.TiffWriter(file, bigtiff=True) as tiff:
        tiff.write(heat, description=json.dumps(about), **options)
        while max(heat.shape) > 256:
            heat = np.pad(heat, [(0, side % 2) for side in heat.shape], mode="edge")
            parts = heat.reshape(heat.shape[0] // 2, 2, heat.shape[1] // 2, 2)
            heat = parts.max((1, 3))  # so that a small tumour is seen on every level
            tiff.write(heat, subfiletype=1, **options)


def _write_picture(
    path: Path, slide: Any, picture: np.ndarray, heat: np.ndarray, covers: list[float]
) -> None:
    h, w = picture.shape[:2]
    y, x = (
        np.minimum((np.arange(n) + 0.5) * side / n / cover, most - 1).astype(int)
        for n, side, cover, most in zip(
            (h, w), slide.dimensions[::-1], covers, heat.shape, strict=True
        )
    )
    values = heat[y[:, None], x[None]]
    colour = cv2.applyColorMap(np.uint8(255 * np.clip(values, 0, 1)), cv2.COLORMAP_TURBO)
    blended = (picture.astype(np.uint16) + colour[..., ::-1]) // 2
    drawn = np.where((values == NO_TISSUE)[..., None], picture, blended).astype(np.uint8)
    with replaced(path) as file:
        Image.fromarray(drawn).save(file, "PNG")


def run(
    slide: Any,
    out: Path,
    about: dict[str, Any],
    grid: Grid,
    score: Score,
    cells: tuple[int, int],
    channels: int = 3,
) -> None:
    """Computes all rows that `out` does not hold yet, then writes the outputs.

    Args:
        slide: the slide.
        out: the directory.
        about: what the values depend on; another `about` in `out` is refused.
        grid: the tiles.
        score, cells, channels: see `heat_row`.

    Raises:
        UserError: `out` holds the rows of another slide, network or level.
    """
    parts = out / "rows"
    parts.mkdir(parents=True, exist_ok=True)
    known = parts / "about.json"
    if known.exists() and json.loads(known.read_text()) != about:
        raise UserError(
            f"--out={out} holds the rows of another slide, network, class or level: choose another "
            "directory, or remove it."
        )
    with replaced(known) as file:
        file.write(json.dumps(about, indent=2).encode())
    picture = overview(slide)
    tissue = find_tissue(picture, grid, slide)
    for row in trange(grid.shape[0], desc="Rows of tiles", disable=not sys.stderr.isatty()):
        path = parts / f"{row:06}.npy"
        if not path.exists():
            values = heat_row(slide, grid, row, tissue[row], score, cells, channels)
            with replaced(path) as file:
                np.save(file, values)
    heat = np.concatenate([np.load(parts / f"{row:06}.npy") for row in range(grid.shape[0])])
    write_outputs(out, slide, picture, grid, cells, heat)


def _about(slide: Path, trained: Trained, workdir: epath.Path, number: int, level: int) -> dict:
    stat = slide.stat()
    text = f"{workdir} {trained.name} {int(trained.state.step)} {trained.tta}"
    return {
        "slide": [str(slide.resolve()), stat.st_size, stat.st_mtime_ns],
        "network": hashlib.sha256(text.encode()).hexdigest()[:16],
        "class": number,
        "level": level,
    }


@command("slide")
def main() -> None:
    """Reads the command line and writes the heat map."""
    parser = make_parser(__doc__)
    parser.add_argument("slide", type=path_argument, help="the file of the slide")
    add_run_arguments(parser)
    parser.add_argument("--positive", required=True, help="the class that is looked for")
    parser.add_argument("--out", type=path_argument, required=True, help="directory to write to")
    parser.add_argument("--level", type=int, default=0, help="level of the pyramid; 0: the largest")
    arguments = parser.parse_args()
    slide = open_slide(arguments.slide)
    prepare_jax()
    check_platform()
    workdir = work_directory(arguments.workdir)
    trained = load_trained(workdir, arguments.run, arguments.tta)
    names = _names(trained)
    if arguments.positive not in names:
        raise UserError(
            f"--positive={arguments.positive!r} is not a class."
            f"{nearest(arguments.positive, names)} There are: {', '.join(names)}."
        )
    number = names.index(arguments.positive)
    point = read_point(workdir, trained)
    h, w, channels = trained.spec.image_shape
    grid = make_grid(slide, arguments.level, (h, w))
    about = _about(Path(arguments.slide), trained, workdir, number, arguments.level)
    about["temperature"] = point.temperature if point else 1.0
    score, cells = make_score(trained, number, about["temperature"])
    run(slide, Path(arguments.out), about, grid, score, cells, channels)
    print(f"written {os.path.join(arguments.out, 'heat.png')}, heat.tif and tiles.csv")


def _names(trained: Trained) -> tuple[str, ...]:
    fields = {"classification": "label", "segmentation": "mask"}
    if trained.config.task not in fields:
        raise UserError(
            f"config.task={trained.config.task!r} of this run gives no value to a tile: choose a "
            "classification or a segmentation."
        )
    return trained.spec.fields[fields[trained.config.task]].names


if __name__ == "__main__":
    main()
