"""Pieces of HTML. Whatever comes from outside - names of classes, paths, settings - goes through `text`."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

# Blue for what is positive, red for what is negative; Okabe and Ito's, as in `probe.plots`.
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
PHOTOGRAPH = 64 * 64  # pixels above which a picture is stored as JPEG


def text(value: object) -> str:
    """A value as text, in an element or in an attribute between double quotes."""
    # Characters that HTML does not allow, such as lone surrogates of file names, become question marks.
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8").replace("\0", "?"), quote=True)


def number(value: float, shown: str, name: str = "") -> str:
    """A number as it is shown, with all its digits for programs.

    Args:
        value: the number itself.
        shown: such as "90.24 %".
        name: of the element, unique in the page.
    """
    own = f' id="{text(name)}"' if name else ""
    return f'<data{own} value="{text(value)}">{text(shown)}</data>'


def percent(share: float, digits: int = 1) -> str:
    """A share in [0, 1] as per cent; small ones keep two digits, so that few is not none."""
    value = 100 * share
    # The space does not break: the sign stays with its number.
    return f"{value:.{digits}f}\u00a0%" if value >= 10.0**-digits or not value else f"{value:.2g}\u00a0%"


def bar(share: float, second: float = 0.0, kind: str = "") -> str:
    """A bar that fills a share of its cell, and behind it a fainter one that fills another.

    Args:
        share: 0 to 1.
        second: likewise.
        kind: class of CSS for another colour, such as "warn".
    """
    faint = f'<i class="faint" style="width:{_width(second)}"></i>' if second else ""
    return f'<span class="bar {kind}" aria-hidden="true">{faint}<i style="width:{_width(share)}"></i></span>'


def _width(share):
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, kind: str = "", tall: bool = False
) -> str:
    """A table whose rows begin with their names; too wide for the page, it scrolls within itself.

    Args:
        head: HTML of the columns' titles.
        rows: HTML of the cells.
        caption: HTML.
        kind: class of CSS.
        tall: whether it also scrolls up and down.
    """
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return scrolling(
        f'<table class="{kind}"><caption><span>{caption}</span></caption><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>",
        html.unescape(re.sub("<[^>]*>", "", caption)),
        tall,
    )


def scrolling(content: str, label: str, tall: bool = False) -> str:
    """Content that scrolls within itself, also by the keyboard; the label is for whoever cannot see it."""
    kind = "scroll tall" if tall else "scroll"
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{text(label.strip())}">{content}</div>'


def dotted(name: str) -> str:
    """A name such as "stage0.block0.channel" as text whose lines may break after a dot."""
    return text(name).replace(".", ".<wbr>")


def missing(sentence: str) -> str:
    """Says why something is not shown."""
    return f'<p class="missing">{text(sentence)}</p>'


def picture(pixels: UInt8[np.ndarray, "H W C"], alt: str, kind: str = "") -> str:
    """An image of pixels in the page itself.

    Args:
        pixels: grey (C = 1), RGB or RGBA.
        alt: what it shows, for whoever cannot see it.
        kind: class of CSS.
    """
    height, width = pixels.shape[:2]
    return (
        f'<img class="{kind}" src="{data_uri(pixels)}" alt="{text(alt)}" width="{width}" height="{height}" '
        'decoding="sync">'
    )


def small_map(values: Float[np.ndarray, "H W"], name: str, told: str, most: float | None = None) -> str:
    """A figure of a `signed_map`, to stand beside others in an element of the class "fields".

    Args:
        values, most: as for `signed_map`.
        name: of a layer or block.
        told: what follows it in the caption.
    """
    shown = picture(signed_map(values, most), f"{name}{told}", "pixels tint")
    return f'<figure class="map">{shown}<figcaption>{dotted(name)}{text(told)}</figcaption></figure>'


def data_uri(pixels: UInt8[np.ndarray, "H W C"]) -> str:
    """Pixels as the address of a picture that holds them itself: PNG, but JPEG for photographs of many pixels."""
    stream = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    kind = "jpeg" if pixels.shape[-1] < 4 and pixels.shape[0] * pixels.shape[1] > PHOTOGRAPH else "png"
    picture.save(stream, format=kind.upper(), **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def signed_map(values: Float[np.ndarray, "H W"], most: float | None = None) -> UInt8[np.ndarray, "H W 4"]:
    """Values as blue (positive) and red (negative) that shows the page behind where they are small.

    So a map is readable on white and on black.

    Args:
        values: finite.
        most: the absolute value of full colour; None: the largest.
    """
    values = np.asarray(values, np.float64)
    most = float(np.abs(values).max(initial=0)) if most is None else most
    strength = np.clip(np.abs(values) / most, 0, 1) if most > 0 else np.zeros(values.shape)
    colours = np.where(values[..., None] < 0, NEGATIVE, POSITIVE)
    return np.concatenate([colours, np.rint(255 * strength)[..., None]], -1).astype(np.uint8)
