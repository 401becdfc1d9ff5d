"""The report: one page of HTML that holds everything it shows and fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template

import numpy as np

from spiking_mlp_jax.analysis.fields.receptive_field import EffectiveField
from spiking_mlp_jax.analysis.report import classes, fields, overview, spending, viewer
from spiking_mlp_jax.analysis.report.markup import missing, text
from spiking_mlp_jax.analysis.report.measure import Measured, Progress, measure
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.data.damaged import next_decodable
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.deploy.cost import Cost, cost
from spiking_mlp_jax.utils.files import write_whole

COST_IMAGES = 200
MISTAKES = 12
EXAMPLES = 8


def write_report(page: str, path: str | os.PathLike[str]) -> Path:
    """Writes a page under a temporary name that is then renamed.

    Args:
        page: from `make_page`.
        path: the file; its folder exists.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    write_whole(path, [page.encode("utf-8")])
    return path


def make_page(run: Run, command: str, batch_size: int, progress: Progress, say: Callable[[str], None]) -> str:
    """Measures a network and tells of it.

    Args:
        run: what the page is about; what it lacks, the page says instead of showing it.
        command: that makes this page.
        batch_size: images at a time.
        progress: called with what is done, how much of it and of how much.
        say: is told of images that cannot be decoded.

    Returns:
        HTML, the same each time for the same input.

    Raises:
        InputError: too many damaged images, or scores that are no numbers.
    """
    measured, counted, found, effective = None, None, [], []
    if run.source is not None:
        measured = measure(run, batch_size, MISTAKES, progress, say)
        found = viewer.examples(run, measured.mistakes, EXAMPLES, progress)
        effective = fields.effective_fields(run, progress)
        counted = _cost(run, batch_size, progress)
    policy, script = _script()
    sections = list(_sections(run, measured, counted, found, effective, command))
    return _file("page.html").substitute(
        policy=text(policy),
        title=text(f"{run.name}: report"),
        style=_file("page.css").template,
        head=overview.head(run, measured, counted, command),
        contents="".join(f'<li><a href="#{name}">{text(title)}</a></li>' for name, title, _ in sections),
        sections="".join(
            f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{text(title)}</h2>'
            f"{body}</section>"
            for name, title, body in sections
        ),
        data=viewer.viewer_data(run, found) if found else "null",
        script=script,
    )


def _sections(
    run: Run,
    measured: Measured | None,
    counted: Cost | None,
    found: list[viewer.Example],
    effective: list[EffectiveField],
    command: str,
) -> Iterator[tuple[str, str, str]]:
    names = run.data["class_names"]
    without = missing(f"This needs the test images, which cannot be read: {run.without}")
    yield "steps", "Step by step", _viewer(run, found) if found else without
    yield "time", "Time steps", without if measured is None else classes.time_steps(measured)
    confusion = run.evaluation.get("confusion") if measured is None else measured.confusion
    if confusion is None:
        yield "classes", "Classes", without
    else:
        confusion = np.array(confusion)
        body = classes.accuracy_by_class(confusion, names) + classes.confusion_matrix(confusion, names)
        yield "classes", "Classes", body
    yield "mistakes", "Mistakes", without if measured is None else classes.mistakes(measured.mistakes, names)
    yield "activity", "Activity", without if measured is None else spending.activity(measured)
    yield "fields", "Receptive fields", fields.receptive_fields(run, effective, without)
    yield "cost", "Cost", without if counted is None else spending.spending(counted)
    yield "curves", "Training", overview.curves(run)
    yield "settings", "Settings", overview.configuration(run, command)


def _viewer(run, found):
    return _file("viewer.html").substitute(
        choices=viewer.choices(run, found), steps=run.config.time_steps, still=viewer.still(run, found[0])
    )


def _cost(run: Run, batch_size: int, progress: Progress) -> Cost:
    source = run.source
    assert source is not None
    positions = np.linspace(0, len(source) - 1, min(COST_IMAGES, len(source))).round().astype(int).tolist()

    def batches():
        for at in range(0, len(positions), batch_size):
            progress("counting operations", at, len(positions))
            records = [next_decodable(source, i) for i in positions[at : at + batch_size]]
            yield np.stack([fit_image(record["image"], *run.fitting) for record in records])
        progress("counting operations", len(positions), len(positions))

    return cost(run.model, batches())


def _script() -> tuple[str, str]:
    """The policy that forbids every script but this one and every request, and the script."""
    script = _file("viewer.js").template
    # The page's template puts a line break before and after it.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode("ascii")
    allowed = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'", script


def _file(name: str) -> Template:
    return Template(
        importlib.resources.files("spiking_mlp_jax.analysis.report").joinpath(name).read_text(encoding="utf-8")
    )
