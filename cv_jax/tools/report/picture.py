"""Pictures inside of a page: figures as SVG in its colours, images as PNG."""

import base64
import io
import re
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from cv_jax.workdir.figures import INK, STYLE

_REFERENCE = re.compile(r'(\bid="|href="#|url\(#)')


def to_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an SVG element with the page's colour of text, and no background.

    Args:
        figure: drawn with `figures.STYLE`.
        name: leads its ids, so that no other figure of the page has them.
        label: says to those who do not see it what it is.
    """
    text = io.StringIO()
    with rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)

    def in_page(tag):
        return _REFERENCE.sub(rf"\g<1>{name}-", tag[0]).replace(INK, "currentColor")

    svg = text.getvalue()
    svg = re.sub("<[^>]*>", in_page, svg[svg.index("<svg") :])
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def to_img(image: np.ndarray, alt: str) -> str:
    """An image (h, w, c), uint8 or in [0, 1], as an <img> element that holds it."""
    if image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    h, w, c = image.shape
    data = io.BytesIO()
    Image.fromarray(image[..., :3] if c >= 3 else image[..., 0]).save(data, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<img src="{source}" width="{w}" height="{h}" alt="{escape(alt)}">'
