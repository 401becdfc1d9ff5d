"""Result files, one per run: finished, failed, or of another configuration.

    WORKDIR/runs/NAME/seedS/        the training's own workdir; beside its files, `final/` (the last epoch's weights),
                                    `final.smlp` (compiled to integers) and `sweep.log` (its output)
    WORKDIR/results/NAME/seedS.json {"status": "done" or "failed", "config", "measured", "latency", "error"}

A result stores its complete configuration. Unlike a hash, it shows which fields differ from the sweep file, and stays
valid when a later version adds fields at their defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.sweep.plan import Run, Sweep
from spiking_mlp_jax.sweep.table import MEASURES
from spiking_mlp_jax.train.checkpoint import FREE_FIELDS
from spiking_mlp_jax.train.config import migrate_config, to_dict
from spiking_mlp_jax.utils.files import read_json, write_whole

AGAIN = "delete it to measure the run again"

# Fields that change where and how fast a run is computed, not its result.
_FREE = {*FREE_FIELDS, "workers"} - {"max_steps"}
_SHOWN = 4


def result_file(workdir: Path, run: Run) -> Path:
    """The file of a run's result."""
    return workdir / "results" / f"{run.key}.json"


def run_folder(workdir: Path, run: Run) -> Path:
    """The workdir of a run's training."""
    return workdir / "runs" / run.key


def write_result(workdir: Path, run: Run, document: Mapping[str, Any]) -> None:
    """Writes a run's result atomically.

    Args:
        workdir: of the sweep.
        run: its name, seed and configuration are added.
        document: "status" and the rest, JSON values.
    """
    file = result_file(workdir, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {"format": 1, "run": run.name, "seed": run.seed, **document, "config": to_dict(run.config)}
    write_whole(file, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def differences(saved: Mapping[str, Any], run: Run) -> list[str]:
    """The fields in which a saved configuration differs from a run's, in words."""
    then, now = migrate_config(dict(saved)), migrate_config(to_dict(run.config))
    names = [name for name in sorted({*then, *now} - _FREE) if then.get(name) != now.get(name)]
    return [f"{name}: {then.get(name)!r} there, {now.get(name)!r} now" for name in names]


def refuse_stale(sweep: Sweep, workdirs: Iterable[Path]) -> None:
    """Refuses results and unfinished trainings of other configurations than the sweep file's.

    Raises:
        InputError: there are some; the message names them and the fields that differ.
    """
    for workdir in workdirs:
        stale = {}
        for run in sweep.runs:
            result = read_json(result_file(workdir, run), AGAIN)
            if result is None or result.get("status") != "done":
                result = {"config": read_json(run_folder(workdir, run) / "config.json", AGAIN)}
            saved = result.get("config", {})
            if saved is not None and not isinstance(saved, dict):
                raise InputError(f"{result_file(workdir, run)} is corrupt; {AGAIN}")
            if saved is not None and (different := differences(saved, run)):
                stale[run.key] = ", ".join(different[:_SHOWN]) + (" and more" if len(different) > _SHOWN else "")
        if stale:
            listed = "; ".join(f"{key} ({words})" for key, words in list(stale.items())[:_SHOWN])
            more = f" and {len(stale) - _SHOWN} more" if len(stale) > _SHOWN else ""
            raise InputError(
                f"{workdir} has runs of another configuration than {sweep.file} describes: {listed}{more}; use another "
                "--workdir, pass the --config fields they were trained with, or delete their folders in runs/ and "
                "files in results/"
            )


def gather(sweep: Sweep, workdirs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Results of a sweep from the files of one or several workdirs.

    Args:
        sweep: the sweep.
        workdirs: where to look. Of several results of a run the first finished one with latency is preferred.

    Returns:
        {Run.key: result}, in the sweep's order; runs without a file are missing.

    Raises:
        InputError: a file is corrupt, or of another configuration.
    """
    refuse_stale(sweep, workdirs)
    found: dict[str, dict[str, Any]] = {}
    for run in sweep.runs:
        files = [result_file(workdir, run) for workdir in workdirs]
        results = [_checked(x, file, run) for file in files if (x := read_json(file, AGAIN)) is not None]
        # A run that failed with another configuration is tried again with this one.
        results = [x for x in results if not differences(x.get("config", {}), run)]
        if results:
            found[run.key] = max(results, key=lambda x: (x.get("status") == "done", "latency" in x))
    return found


def _checked(result: dict[str, Any], file: Path, run: Run) -> dict[str, Any]:
    """The result, after checking the types that tables need."""
    measured: Any = result.get("measured")
    latency = result.get("latency", {})
    fits = (result.get("run"), result.get("seed")) == (run.name, run.seed) and isinstance(latency, dict)
    if fits and result.get("status") == "done":
        fits = isinstance(measured, dict) and "not_integer" in measured
        fits = fits and all(isinstance(measured.get(name), dict) for name in ("by_time_steps", "not_by_time_steps"))
    if fits and measured is not None:
        values = [result.get(part, {}).get(name) for name, (part, *_) in MEASURES.items()]
        fits = all(isinstance(value, int | float | None) for value in [*values, *measured["by_time_steps"].values()])
    if not fits:
        raise InputError(f"{file} is corrupt; {AGAIN}")
    return result
