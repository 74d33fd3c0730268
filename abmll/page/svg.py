"""A matplotlib figure as an inline SVG: text stays text, colours follow the page's, nothing of it can act."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK = "#010203"  # stands for the page's text colour, which differs in the dark
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a task's name may hold dollar signs
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# all that XML 1.0 cannot hold
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def inline_svg(draw: Callable[[], Figure | None], name: str, alternative: str) -> Markup | None:
    """The figure that `draw` makes, None where it makes none.

    `name` begins every id in it, so that several figures share a page; the same figure gives the same text.
    `alternative` is what a screen reader says of it.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = draw()
        if figure is None:
            return None
        stream = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text, and the browser has more fonts
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text, alternative = (NOT_XML.sub("\ufffd", one) for one in (stream.getvalue().decode(), alternative))
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):  # its style would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.attrib = {key: value for old in element.attrib.items() for key, value in [_attribute(*old, name)]}
    root.attrib |= {"role": "img", "aria-label": alternative, "style": "stroke-linejoin: round; stroke-linecap: butt"}
    ElementTree.register_namespace("", SVG)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # escapes what it writes


def _attribute(key: str, value: str, name: str) -> tuple[str, str]:
    """With the ids, and what refers to them, made the figure's own."""
    if key == "id":
        return key, f"{name}-{value}"
    if key == f"{{{XLINK}}}href":
        return "href", value.replace("#", f"#{name}-", 1) if value.startswith("#") else value
    return key, value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")


def label(text: str) -> str:
    """As an entry of a legend: matplotlib leaves out those that begin with an underscore, or are empty."""
    return f" {text}" if not text or text.startswith("_") else text
