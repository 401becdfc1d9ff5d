"""Figures of matplotlib as SVG inside a page, in the page's own font and colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from spiking_mlp_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, RED
from spiking_mlp_jax.analysis.report.markup import text

_INK = "#010203"  # a colour that nobody uses; in the page it becomes that of text
_STYLE: Any = {
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), _INK
    ),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), "inherit"),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "spiking_mlp_jax",  # ids that are the same each time
}
_COLOURS = {_INK: "currentColor", "#000000": "currentColor"} | {
    colour.lower(): f"var(--{name})"
    for name, colour in {"blue": BLUE, "orange": ORANGE, "green": GREEN, "red": RED, "grey": GREY}.items()
}


def drawn(draw: Callable[[], Figure], name: str, alt: str) -> str:
    """Draws a figure as an element <svg>.

    Args:
        draw: makes the figure. On a phone it is 320 points wide, on paper its own width: draw it about 4.2 inches wide.
        name: what the ids within it begin with; unique in the page.
        alt: what it shows, for whoever cannot see it.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        draw().savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    # Text is in the page's font, bold or not, at its own size.
    svg = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    for colour, own in _COLOURS.items():
        svg = svg.replace(colour, own)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    start = f'<svg role="img" aria-label="{text(alt)}" {box.group()} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return start + svg[svg.index(">") + 1 :].strip()
