"""Whole slides: tiles from the right places, tissue, a heat map that goes on after a kill."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from cv_jax.config.errors import UserError
from cv_jax.tools import slide as tool
from tests.conftest import ROOT

SIZE = 640, 832  # height, width
TISSUE = 64, 128, 512, 640  # rows and columns from, to
TUMOURS = ((128, 256), (384, 384))  # upper left corners of squares
SIDE = 128
PINK, PURPLE = (230, 150, 190), (90, 30, 120)


def paint() -> np.ndarray:
    image = np.full((*SIZE, 3), 255, np.uint8)
    top, left, bottom, right = TISSUE
    image[top:bottom, left:right] = PINK
    for y, x in TUMOURS:
        image[y : y + SIDE, x : x + SIDE] = PURPLE
    return image


def write_slide(path: Path, image: np.ndarray, levels: int = 3) -> Path:
    """Writes a tiled TIFF of several levels, each a mean of 2x2 pixels of the one before."""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            kind = {"subfiletype": 1} if level else {}
            tiff.write(image, tile=(64, 64), photometric="rgb", compression="zlib", **kind)
            h, w = (side // 2 * 2 for side in image.shape[:2])
            blocks = image[:h, :w].reshape(h // 2, 2, w // 2, 2, -1)
            image = blocks.mean((1, 3)).round().astype(np.uint8)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slide") / "slide.tif", paint())


@pytest.fixture(scope="module")
def slide(path):
    return openslide.OpenSlide(path)


def redness(tiles):
    """A stand-in for a network: 1 where a tile is purple, 0 where it is pink or white."""
    return ((tiles[..., 0].mean((1, 2)) < 160)[:, None, None]).astype(np.float32)


def test_a_tile_of_a_level_is_that_of_the_same_place_on_level_0(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (512, 640, 3), np.uint8)
    slide = openslide.OpenSlide(write_slide(tmp_path / "noise.tif", noise))
    grid = tool.make_grid(slide, 1, (64, 64))
    assert grid.shape == (4, 5)
    assert grid.scale == (2, 2)
    assert grid.corner(1, 1) == (128, 128)
    tile = tool.read_tile(slide, grid, 1, 1)
    of_level_0 = noise[128:256, 128:256].reshape(64, 2, 64, 2, 3).mean((1, 3)).round()
    np.testing.assert_array_equal(tile, of_level_0)


def test_a_scale_that_is_not_whole_is_the_ratio_of_the_sizes():
    class Odd:
        level_count = 2
        level_dimensions = ((50_001, 40_002), (12_500, 10_000))
        level_downsamples = (1.0, 4.0)

    grid = tool.make_grid(Odd, 1, (100, 100))
    assert grid.scale == (40_002 / 10_000, 50_001 / 12_500)
    x, y = grid.corner(99, 124)
    assert (x, y) == (round(12_400 * 4.00008), round(9_900 * 4.0002))
    assert abs(x - 12_400 * 4) == 1  # a whole 4 is off by a pixel here


def test_what_is_transparent_or_beyond_the_slide_is_white():
    class Glass:
        level_count = 1
        level_dimensions = ((100, 80),)

        def read_region(self, corner, level, size):
            image = Image.new("RGBA", size, (0, 0, 0, 0))  # OpenSlide's own padding
            image.paste((10, 20, 30, 255), (0, 0, 32, 32))
            return image

    grid = tool.make_grid(Glass, 0, (64, 64))
    assert grid.shape == (2, 2)
    tile = tool.read_tile(Glass(), grid, 0, 0)
    assert (tile[:32, :32] == [10, 20, 30]).all()
    assert (tile[32:] == 255).all()
    last = tool.read_tile(Glass(), grid, 1, 1)
    assert (last[16:] == 255).all()
    assert (last[:, 36:] == 255).all()


def test_tissue_is_found_and_glass_is_not(slide):
    grid = tool.make_grid(slide, 0, (64, 64))
    tissue = tool.find_tissue(tool.overview(slide), grid, slide)
    expected = np.zeros((10, 13), bool)
    expected[1:8, 2:10] = True
    np.testing.assert_array_equal(tissue, expected)
    blank = np.full((640, 832, 3), 250, np.uint8)
    assert not tool.find_tissue(blank, grid, slide).any()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_heat_map_finds_tumours_on_every_level(slide, tmp_path, level):
    grid = tool.make_grid(slide, level, (32, 32))
    tool.run(slide, tmp_path, {"level": level}, grid, redness, (1, 1))
    covers = 32 * 2**level
    with tifffile.TiffFile(tmp_path / "heat.tif") as tiff:
        about = json.loads(tiff.pages[0].description)
        heat = tiff.pages[0].asarray()
        assert all(page.is_tiled for page in tiff.pages)
    assert about == {"pixels_of_level_0": {"y": covers, "x": covers}}
    assert heat.shape == grid.shape
    assert heat[0, 0] == tool.NO_TISSUE
    found = {(int(y * covers), int(x * covers)) for y, x in np.argwhere(heat == 1)}
    steps = range(0, SIDE, covers)
    assert found == {(y + b, x + a) for y, x in TUMOURS for b in steps for a in steps}
    with (tmp_path / "tiles.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (heat != tool.NO_TISSUE).sum()
    assert {(int(row["y"]), int(row["x"])) for row in rows if float(row["value"]) == 1} == found
    picture = np.asarray(Image.open(tmp_path / "heat.png"))
    assert picture.shape == (*SIZE, 3)
    np.testing.assert_array_equal(picture[0, 0], [255, 255, 255])


def test_every_level_of_the_heat_map_keeps_a_small_tumour(slide, tmp_path):
    heat = np.zeros((700, 900), np.float32)
    heat[333, 777] = 1
    tool._write_tiff(tmp_path / "heat.tif", heat, {})
    with tifffile.TiffFile(tmp_path / "heat.tif") as tiff:
        shapes = [page.shape for page in tiff.pages]
        assert all(page.asarray().max() == 1 for page in tiff.pages)
    assert shapes == [(700, 900), (350, 450), (175, 225)]


def test_a_segmenter_has_values_of_16_pixels(slide, tmp_path):
    grid = tool.make_grid(slide, 0, (64, 64))

    def score(tiles):
        dark = tiles[..., 0] < 160
        return dark.reshape(len(tiles), 4, 16, 4, 16).mean((2, 4))

    tool.run(slide, tmp_path, {}, grid, score, (4, 4))
    heat = tifffile.imread(tmp_path / "heat.tif")
    assert heat.shape == (40, 52)
    for y, x in TUMOURS:
        assert (heat[y // 16 : y // 16 + 8, x // 16 : x // 16 + 8] == 1).all()
    assert (heat == 1).sum() == 2 * 8 * 8


KILLED = """
import sys, os, signal
from pathlib import Path
import openslide
from cv_jax.tools import slide as tool
from tests.test_slide import redness
slide = openslide.OpenSlide(sys.argv[1])
calls = []
def score(tiles):
    calls.append(0)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return redness(tiles)
tool.run(slide, Path(sys.argv[2]), {"a": 1}, tool.make_grid(slide, 0, (32, 32)), score, (1, 1))
"""


@pytest.mark.slow
def test_after_a_kill_it_goes_on_and_ends_with_the_same_bytes(path, slide, tmp_path):
    grid = tool.make_grid(slide, 0, (32, 32))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tool.run(slide, whole, {"a": 1}, grid, redness, (1, 1))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, path, parts],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == -signal.SIGKILL
    before = sorted((parts / "rows").glob("*.npy"))
    assert 0 < len(before) < grid.shape[0]
    seen = []
    tool.run(slide, parts, {"a": 1}, grid, lambda x: seen.append(0) or redness(x), (1, 1))
    assert len(seen) < 20  # only the rows that were missing
    for name in ("heat.tif", "heat.png", "tiles.csv"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    with pytest.raises(UserError, match="holds the rows of another slide, network, class or level"):
        tool.run(slide, parts, {"a": 2}, grid, redness, (1, 1))


@pytest.fixture
def run_tool(digits_run, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slide", f"--workdir={digits_run}", *map(str, arguments)])
        try:
            tool.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_a_trained_classifier_on_a_slide(run_tool, tmp_path):
    small = write_slide(tmp_path / "small.tif", paint()[:96, :160], levels=1)
    code, out, _ = run_tool(small, "--positive=3", f"--out={tmp_path / 'out'}")
    assert code == 0
    assert "heat.png, heat.tif and tiles.csv" in out
    heat = tifffile.imread(tmp_path / "out/heat.tif")
    assert heat.shape == (12, 20)
    assert (heat[8:, 16:] >= 0).all()  # the corner with tissue
    assert (heat[:7] == tool.NO_TISSUE).all()
    assert heat.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--positive=3", "--level=7"],
            "--level=7 is not one of this slide's levels. There are: 0",
        ),
        (["--positive=33"], "--positive='33' is not a class. Did you mean '3'?"),
    ],
)
def test_a_mistake_gets_a_sentence(run_tool, path, tmp_path, arguments, says):
    code, _, err = run_tool(path, *arguments, f"--out={tmp_path / 'out'}")
    assert code == 2
    assert says in err


@pytest.mark.slow
def test_a_file_that_is_no_slide_is_named(run_tool, tmp_path):
    (tmp_path / "a.tif").write_text("no slide")
    code, _, err = run_tool(tmp_path / "a.tif", "--positive=3", f"--out={tmp_path / 'out'}")
    assert code == 2
    assert "a.tif is no slide that OpenSlide opens" in err
    assert "\n" not in err.strip()
