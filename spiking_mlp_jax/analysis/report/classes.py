"""What a network gets right and what wrong: time steps, classes, confusions, the worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from spiking_mlp_jax.analysis.report import figures
from spiking_mlp_jax.analysis.report.markup import (
    bar,
    missing,
    number,
    percent,
    picture,
    scrolling,
    signed_map,
    table,
    text,
)
from spiking_mlp_jax.analysis.report.measure import Measured, Mistake
from spiking_mlp_jax.analysis.report.vector import drawn

CELLS = 20  # classes up to which the confusion matrix is a table
PAIRS = 8
NAMED = 40  # classes up to which all are listed


def time_steps(measured: Measured) -> str:
    """Accuracy after 1, ..., T steps."""
    accuracy = (measured.right_after / measured.images).tolist()
    steps = len(accuracy)
    if steps == 1:
        return missing(
            "The network was trained for one time step, so there is no curve: after it "
            f"{percent(accuracy[0], 2)} of the test images are right."
        )
    svg = drawn(lambda: figures.accuracy_by_step(accuracy), "by-step", "test accuracy over the number of steps counted")
    rows = []
    for t, share in enumerate(accuracy):
        gain = "" if not t else f"{100 * (share - accuracy[t - 1]):+.2f}"
        alone, settled = (int(count[t]) / measured.images for count in (measured.right_alone, measured.settled))
        right = number(share, percent(share, 2), f"after-{t + 1}")
        rows.append((str(t + 1), right, gain, percent(alone, 2), percent(settled, 2)))
    head = ("steps", "right", "gain, points", "last step alone", "same class as at the end")
    return (
        f"<p>An image's class is the one with the largest mean logit. If only the first step counted, "
        f"{percent(accuracy[0], 2)} of the test images would be right; over all {steps} steps "
        f"{percent(accuracy[-1], 2)} are.</p>"
        f'<div class="plots"><figure class="plot">{svg}<figcaption>Accuracy if the network stopped '
        f"early.</figcaption></figure>{table(head, rows, 'Accuracy after each step')}</div>"
    )


def accuracy_by_class(confusion: Int[np.ndarray, "K K"], names: Sequence[str]) -> str:
    """A bar for each class; of many classes, the worst."""
    confusion = np.asarray(confusion)
    totals = confusion.sum(1)
    share = np.diagonal(confusion) / np.maximum(totals, 1)
    chosen, caption = np.arange(len(names)), "Accuracy of each class"
    if len(names) > NAMED:
        known = np.flatnonzero(totals)
        chosen = known[np.argsort(share[known], kind="stable")][: NAMED // 2]
        caption = f"Accuracy of the {len(chosen)} worst of {len(names)} classes"
    rows = []
    for k in chosen.tolist():
        if not totals[k]:
            rows.append((text(names[k]), "", "-", "0"))
            continue
        value = float(share[k])
        rows.append((text(names[k]), bar(value), number(value, percent(value), f"class-{k}"), f"{totals[k]:,}"))
    return table(("class", "", "right", "images"), rows, caption, kind="bars")


def confusion_matrix(confusion: Int[np.ndarray, "K K"], names: Sequence[str]) -> str:
    """Who is taken for whom: as a table, or of many classes as a picture; and the most frequent confusions."""
    confusion = np.asarray(confusion)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    return (_cells if len(names) <= CELLS else _map)(confusion, share, names) + _pairs(confusion, share, names)


def _cells(confusion, share, names):
    columns = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    lines = []
    for row, name in enumerate(names):
        cells = []
        for column in range(len(names)):
            part, count = float(share[row, column]), int(confusion[row, column])
            # The square root keeps errors of a few per cent visible beside the diagonal.
            kind = "right" if row == column else "wrong"
            shown = "" if not count else "&lt;1" if part < 0.0095 else f"{100 * part:.0f}"
            cells.append(f'<td class="{kind}" style="--p:{part**0.5:.3f}" data-count="{count}">{shown}</td>')
        lines.append(f'<tr><th scope="row">{text(name)}</th>{"".join(cells)}</tr>')
    return scrolling(
        '<table class="confusion" id="confusion"><caption><span>Confusion matrix: rows are true classes, columns '
        "predicted ones, in per cent of the true class's images</span></caption>"
        f"<thead><tr><td></td>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
        "Confusion matrix",
    )


def _map(confusion, share, names):
    pixels = signed_map(np.sqrt(share), 1.0)
    alt = f"Confusion matrix of {len(names)} classes: a row for each true, a column for each predicted class"
    shown = picture(pixels, alt, "pixels tint")
    return (
        f'<figure class="wide">{shown}<figcaption>Confusion matrix: rows are true classes, '
        "columns predicted ones, in the data set's order; the stronger, the larger the share of the true class's "
        "images.</figcaption></figure>"
    )


def _pairs(confusion, share, names):
    wrong = confusion * (1 - np.eye(len(names), dtype=confusion.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    found = [(int(i // len(names)), int(i % len(names))) for i in order if wrong.flat[i]]
    if not found:
        return missing("No image was taken for another class.")
    rows = []
    for a, b in found:
        part = float(share[a, b])
        rows.append((f"{text(names[a])} as {text(names[b])}", bar(part, kind="bad"), percent(part), f"{wrong[a, b]:,}"))
    return table(("true class as another", "", "of the class", "images"), rows, "Most frequent confusions", kind="bars")


def mistakes(found: Sequence[Mistake], names: Sequence[str]) -> str:
    """The images of which the network was surest and wrong."""
    if not found:
        return missing("The network classified every test image correctly.")
    cards = []
    for mistake in found:
        true, taken = text(names[mistake.label]), text(names[mistake.predicted])
        alt = f"Test image {mistake.position}: {names[mistake.label]}, taken for {names[mistake.predicted]}"
        cards.append(
            f'<li class="card">{picture(mistake.image, alt, "pixels")}<p><strong>{taken}</strong> '
            f"{number(mistake.probability, percent(mistake.probability))}</p>"
            f'<p class="quiet">is {true}, to which it gave {percent(mistake.of_label)} '
            f"(image {mistake.position})</p></li>"
        )
    return (
        "<p>The wrong answers of which the network was surest, by the softmax of its mean logits. In bold what it "
        f'said, below it what the label says.</p><ul class="cards">{"".join(cards)}</ul>'
    )
