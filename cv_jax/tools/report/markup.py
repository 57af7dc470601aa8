"""The pieces of HTML that a page is made of. What is called text is escaped here, HTML is not."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from cv_jax.tools.report.picture import to_img

# (figure, name, what it is, in words) -> the figure as HTML.
Show = Callable[[Figure, str, str], str]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], label: str) -> str:
    """A table of texts; the first of each row is its heading."""
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
    """Images beside each other, a class of page.css; captions are seen, or only read out."""
    figures = "".join(
        f"<figure>{to_img(image, caption)}"
        + (f"<figcaption>{escape(caption)}</figcaption>" if visible else "")
        + "</figure>"
        for image, caption in zip(images, captions, strict=True)
    )
    return f'<div class="images {kind}">{figures}</div>'


def beside(figure: str, html: str) -> str:
    """A figure and, where there is room, what is said of it at its side."""
    return f'<div class="pair">{figure}<div>{html}</div></div>'


def h2(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def h3(text: str) -> str:
    """The heading of a part of a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>"


def soft(html: str) -> str:
    """A paragraph in a quieter colour, of HTML; nothing of nothing."""
    return f'<p class="soft">{html}</p>' if html else ""


def code(text: str) -> str:
    """Text as it stands in a config or a program."""
    return f"<code>{escape(text)}</code>"
