"""Figures and images for the page: SVG in the page's own font and colours, pixels as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from spiking_mlp_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, RED, curve

WIDTH, HEIGHT = 4.2, 3.0  # inches
# Blue for positive values, red for negative ones: Okabe and Ito's colours, as in `analysis.plots`.
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
PHOTOGRAPH = 64 * 64  # pixels above which an image is stored as JPEG

_INK = "#010203"  # stands for the page's text colour
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


def learning_curve(records: Sequence[Mapping[str, Any]], key: str) -> Figure:
    """Loss or accuracy over the training steps, as `analysis.plots.learning_curves` draws them.

    Args:
        records: lines of metrics.jsonl.
        key: "loss" or "accuracy".
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    curve(figure.subplots(), records, key)
    return figure


def accuracy_by_step(accuracy: Sequence[float]) -> Figure:
    """Accuracy if only the first 1, 2, ... T time steps are counted.

    Args:
        accuracy: [T], 0 to 1.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    steps, values = range(1, len(accuracy) + 1), [100 * value for value in accuracy]
    axes.plot(steps, values, "o-", color=BLUE, linewidth=1.8, markersize=6)
    for step, value in zip(steps, values, strict=True):
        if len(values) <= 8 or step in (1, len(values)):
            # Below a point from which the line rises, so that it does not cross the number.
            below = step < len(values) and values[step] > value
            place = (10, -14) if below else (0, 7)
            axes.annotate(f"{value:.1f}", (step, value), xytext=place, textcoords="offset points", ha="center")
    axes.set(xlabel="time steps counted", ylabel="test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.1, y=0.2)
    axes.grid(alpha=0.3)
    return figure


def svg(draw: Callable[[], Figure], name: str, alt: str) -> Markup:
    """An <svg> element.

    Args:
        draw: makes the figure. About 4.2 inches wide: the page shows it 320 points wide on a phone.
        name: prefix of the ids within it; unique in the page.
        alt: what it shows, for screen readers.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        draw().savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = stream.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = text[text.index(">", text.index("<svg")) + 1 :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    # Text takes the page's font and weight, at its own size.
    text = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*(; )?", "", text)
    for colour, own in _COLOURS.items():
        text = text.replace(colour, own)
    start = Markup('<svg role="img" aria-label="{}" {} xmlns:xlink="http://www.w3.org/1999/xlink">')
    return start.format(alt, Markup(box.group())) + Markup(text)


def data_uri(pixels: UInt8[np.ndarray, "H W C"]) -> str:
    """Grey, RGB or RGBA pixels as a data URI: PNG, or JPEG above `PHOTOGRAPH` pixels without alpha."""
    stream = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    kind = "jpeg" if pixels.shape[-1] < 4 and pixels.shape[0] * pixels.shape[1] > PHOTOGRAPH else "png"
    image.save(stream, format=kind.upper(), **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def signed_map(values: Float[np.ndarray, "H W"], most: float | None = None) -> UInt8[np.ndarray, "H W 4"]:
    """Blue (positive) and red (negative) pixels, transparent where values are small: readable on white and on black.

    Args:
        values: finite.
        most: the absolute value of full colour; None: the largest.
    """
    values = np.asarray(values, np.float64)
    most = float(np.abs(values).max(initial=0)) if most is None else most
    strength = np.clip(np.abs(values) / most, 0, 1) if most > 0 else np.zeros(values.shape)
    colours = np.where(values[..., None] < 0, NEGATIVE, POSITIVE)
    return np.concatenate([colours, np.rint(255 * strength)[..., None]], -1).astype(np.uint8)


def percent(share: float, digits: int = 1) -> str:
    """A share in [0, 1] in per cent; a small one with two significant digits, so that it does not look like zero."""
    value = 100 * share
    # A no-break space: the sign stays with its number.
    return f"{value:.{digits}f}\u00a0%" if value >= 10.0**-digits or not value else f"{value:.2g}\u00a0%"
