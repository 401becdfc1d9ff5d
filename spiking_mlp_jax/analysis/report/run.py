"""The input of a report: a trained network, the files of its run, and its test images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mlp_jax.data.sources import Chosen, Source, spread
from spiking_mlp_jax.data.trained import Trained, open_trained
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.train.logging import read_metrics
from spiking_mlp_jax.utils.files import read_json

AGAIN = "copy it again or remove it"


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network and the files beside it.

    Attributes:
        where: as the user gave it: a workdir, a weights folder or the name of a shipped network.
        trained: the network.
        folder: the weights folder.
        source: the test images, or None.
        without: why `source` is None; else "".
        settings: WORKDIR/config.json, {} if it is missing.
        versions: WORKDIR/versions.json, {} if it is missing.
        metrics: the lines of WORKDIR/metrics.jsonl, [] if it is missing.
        evaluation: WORKDIR/evaluation.json if it is about these weights, else {}.
    """

    where: str
    trained: Trained
    folder: Path
    source: Source | None
    without: str
    settings: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the workdir, or of the weights folder where there is no workdir."""
        folder = self.folder.absolute()
        return (folder.parent if folder.name == "weights" else folder).name

    def position(self, index: int) -> int:
        """The index among all test images of an image of `source`."""
        return self.source.positions[index] if isinstance(self.source, Chosen) else index


def open_run(where: str, dataset: str | None = None, data_dir: str | None = None, limit: int | None = None) -> Run:
    """Opens everything that a report needs.

    Args:
        where: a training run's workdir, a weights folder, or the name of a shipped network.
        dataset: whose test images to use; None: that of the training.
        data_dir: folder of the data; None: the one in the workdir's config.json.
        limit: use at most this many test images, evenly spaced.

    Raises:
        InputError: there is no such network, one of its files is corrupt, or the given data cannot be opened. The
            training's own data may be missing: `Run.without` says why.
    """
    trained = open_trained(where)
    folder, classes = trained.folder, trained.model.config.num_classes
    assert folder is not None
    source, without = None, ""
    try:
        source = spread(trained.source("test", dataset, data_dir), limit)
    except InputError as error:
        if dataset is not None or data_dir is not None:
            raise
        without = str(error)
    own = folder.name == "weights"
    around = folder.parent if own else folder
    return Run(
        where=where,
        trained=trained,
        folder=folder,
        source=source,
        without=without,
        # A weights folder's own config.json describes the network, not a run.
        settings=(read_json(around / "config.json", AGAIN) or {}) if own else {},
        versions=read_json(around / "versions.json", AGAIN) or {},
        metrics=_metrics(around),
        evaluation=_evaluation(around, (trained.meta.get("result") or {}).get("step"), classes),
    )


def _metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    try:
        lines = read_metrics(workdir)
        fits = all(
            isinstance(line["step"], int)
            and isinstance(line["split"], str)
            and all(isinstance(line.get(name), int | float | None) for name in ("loss", "accuracy"))
            for line in lines
        )
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"{workdir / 'metrics.jsonl'} is corrupt; {AGAIN}")
    return lines


def _evaluation(workdir: Path, step: int | None, classes: int) -> dict[str, Any]:
    """WORKDIR/evaluation.json; {} if it is about other weights (only the best evaluation saves its weights)."""
    path = workdir / "evaluation.json"
    found = read_json(path, AGAIN) or {}
    if step is None or found.get("step") != step:
        return {}
    try:
        confusion = np.asarray(found["confusion"], dtype=np.float64)
        fits = confusion.shape == (classes, classes) and np.isfinite(confusion).all() and (confusion >= 0).all()
        fits = fits and 0 <= found["accuracy"] <= 1
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"{path} has no valid accuracy and confusion matrix of {classes} classes; {AGAIN}")
    return found
