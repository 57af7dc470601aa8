"""Turns pictures into HTML: figures into SVG in the page's colours, images into PNG."""

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
    """Returns a figure as an SVG element, in the page's text colour and without background.

    Args:
        figure: a figure drawn with `figures.STYLE`.
        name: the prefix of all ids, unique in the page.
        label: the description for screen readers.
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
    """Returns an image (h, w, c), uint8 or in [0, 1], as an <img> element with its data."""
    if image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    h, w, c = image.shape
    data = io.BytesIO()
    Image.fromarray(image[..., :3] if c >= 3 else image[..., 0]).save(data, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<img src="{source}" width="{w}" height="{h}" alt="{escape(alt)}">'
