"""Builds the pieces of HTML of a page. Arguments called text are escaped; html is not."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from cv_jax.tools.report.picture import to_img

# (figure, name, description in words) -> the figure as HTML.
Show = Callable[[Figure, str, str], str]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], label: str) -> str:
    """Returns a table of texts; the first cell of each row is its heading."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    return (
        f'<div class="wide" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def tiles(kind: str, images: Any, captions: Sequence[str], visible: bool = False) -> str:
    """Returns images side by side.

    Args:
        kind: a class of page.css.
        images: (h, w, c) arrays, see `to_img`.
        captions: the alternative text of each image.
        visible: whether the captions are also shown.
    """
    figures = "".join(
        f"<figure>{to_img(image, caption)}"
        + (f"<figcaption>{escape(caption)}</figcaption>" if visible else "")
        + "</figure>"
        for image, caption in zip(images, captions, strict=True)
    )
    return f'<div class="images {kind}">{figures}</div>'


def beside(figure: str, html: str) -> str:
    """Returns a figure with text at its side, or below it on a narrow screen."""
    return f'<div class="pair">{figure}<div>{html}</div></div>'


def h2(text: str) -> str:
    """Returns the heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def h3(text: str) -> str:
    """Returns the heading of a part of a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    """Returns a paragraph of text."""
    return f"<p>{escape(text)}</p>"


def soft(html: str) -> str:
    """Returns a paragraph of HTML in a quieter colour; "" for ""."""
    return f'<p class="soft">{html}</p>' if html else ""


def code(text: str) -> str:
    """Returns text in the font of code."""
    return f"<code>{escape(text)}</code>"
