"""Writes a page about one or more runs: result, curves, mistakes, calibration, facts.

    python -m cv_jax.tools.report runs/a
    python -m cv_jax.tools.report runs/a runs/b --out=report.html --png=figures

A run is a work directory, and may still be training. The page is one file, without scripts and
without links to other files. With several runs the page compares their results, curves and configs,
and shows the first run in full.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from cv_jax.config.errors import UserError, first_line
from cv_jax.config.paths import path_argument
from cv_jax.runtime.startup import check_platform, prepare_jax
from cv_jax.tools.command import command, make_parser
from cv_jax.tools.report.page import build_page
from cv_jax.tools.report.picture import to_svg
from cv_jax.tools.report.run import read_run
from cv_jax.workdir.bucket import work_directory
from cv_jax.workdir.figures import STYLE


def report(runs: list[str], out: Path, images: int = 2000, png: Path | None = None) -> None:
    """Writes the page.

    Args:
        runs: names of work directories; the first is shown in full.
        out: the file to write.
        images: number of test images to predict.
        png: a directory for the plots as images of 200 dpi on white.

    Raises:
        UserError: a run cannot be read, or a file cannot be written.
    """

    read = [read_run(path) for path in dict.fromkeys(map(work_directory, runs))]
    figures: dict[str, Figure] = {}

    def show(figure: Figure, name: str, label: str) -> str:
        figures[name] = figure
        return f"<figure>{to_svg(figure, name, label)}</figure>"

    page = build_page(read, images, show)
    try:
        out.write_text(page, encoding="utf-8")
        if png:
            png.mkdir(parents=True, exist_ok=True)
            with rc_context(STYLE):
                for name, figure in figures.items():
                    figure.savefig(png / f"{name}.png", dpi=200, facecolor="white")
    except OSError as error:
        raise UserError(
            f"The report cannot be written: {first_line(error)}. Choose another --out or --png."
        ) from error


@command("report")
def main() -> None:
    """Reads the command line, writes the page and prints its path."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work directories")
    parser.add_argument(
        "--out", type=path_argument, default=Path("report.html"), help="the page to write"
    )
    parser.add_argument("--png", type=path_argument, help="a directory for the plots as PNG files")
    parser.add_argument("--images", type=int, default=2000, help="test images to predict")
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error("--images must be 1 or more")
    prepare_jax()
    check_platform()
    report(arguments.runs, arguments.out, arguments.images, arguments.png)
    print(f"written {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
