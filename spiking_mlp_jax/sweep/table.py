"""Results of a sweep as tables: means over seeds with their spread, as CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiking_mlp_jax.sweep.plan import Sweep

# Each measure: its part of a result, and its factor, heading and decimals in tables for people.
MEASURES: dict[str, tuple[str, float, str, int]] = {
    "accuracy": ("measured", 100, "accuracy, %", 2),
    "best_accuracy": ("measured", 100, "best epoch, %", 2),
    "integer_accuracy": ("measured", 100, "int8, %", 2),
    "synaptic_operations": ("measured", 1e-6, "synaptic operations, million", 3),
    "firing_rate": ("measured", 100, "firing rate, %", 2),
    "parameters": ("measured", 1e-3, "parameters, thousand", 1),
    "float_ms": ("latency", 1, "float, ms", 2),
    "integer_ms": ("latency", 1, "int8, ms", 3),
    "float_batch_ms": ("latency", 1, "float in batches, ms", 3),
    "integer_batch_ms": ("latency", 1, "int8 in batches, ms", 3),
}


@dataclasses.dataclass(frozen=True)
class Spread:
    """A measure over seeds.

    Attributes:
        values: one for each seed that has the measure.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n - 1 in the denominator); None for a single value."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def low(self) -> float:
        """The minimum."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The maximum."""
        return max(self.values)


@dataclasses.dataclass(frozen=True)
class Row:
    """A run over its seeds.

    Attributes:
        name, values: its name, and its values of the sweep's varied fields.
        time_steps: number trained with.
        done, missing: seeds.
        failed: {seed: error}; a seed of which only the timing failed is also in `done`.
        measures: {name: Spread}, of those that some seed has.
        by_time_steps: {test time steps: Spread}.
        reasons: {measure or "T=N": why it is missing}.
    """

    name: str
    values: tuple[Any, ...]
    time_steps: int
    done: tuple[int, ...]
    missing: tuple[int, ...]
    failed: dict[int, str]
    measures: dict[str, Spread]
    by_time_steps: dict[int, Spread]
    reasons: dict[str, str]


def rows(sweep: Sweep, results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row for each name of a sweep, in its order, also without results.

    Args:
        sweep: the sweep.
        results: {Run.key: result}, from `results.gather`.
    """
    return [_row(sweep, name, results) for name in sweep.names]


def _row(sweep, name, results) -> Row:
    runs = sweep.of(name)
    found = {run.seed: results[run.key] for run in runs if run.key in results}
    done = {seed: result for seed, result in found.items() if result.get("status") == "done"}
    measures = {}
    for measure, (part, *_) in MEASURES.items():
        values = [result.get(part, {}).get(measure) for result in done.values()]
        if values := tuple(value for value in values if value is not None):
            measures[measure] = Spread(values)
    by_steps, reasons = {}, {}
    for steps in sweep.test_time_steps:
        values = [result["measured"]["by_time_steps"].get(str(steps)) for result in done.values()]
        if values := tuple(value for value in values if value is not None):
            by_steps[steps] = Spread(values)
    for result in done.values():
        reasons |= {f"T={steps}": why for steps, why in result["measured"]["not_by_time_steps"].items()}
        if why := result["measured"]["not_integer"]:
            reasons["integer"] = why
    return Row(
        name=name,
        values=sweep.values[name],
        time_steps=runs[0].config.time_steps,
        done=tuple(done),
        missing=tuple(run.seed for run in runs if run.seed not in found),
        failed={seed: str(result["error"]) for seed, result in found.items() if "error" in result},
        measures=measures,
        by_time_steps=by_steps,
        reasons=reasons,
    )


def to_csv(sweep: Sweep, table: Sequence[Row]) -> str:
    """Names, fields, seeds, and mean, deviation, extremes and number of each measure, in the units of the results.

    Shares are in [0, 1], operations per image, times in milliseconds.
    """
    kinds = ("mean", "std", "min", "max", "n")
    head = ["run", *sweep.varied, "seeds", "missing", "failed"]
    lines: list[list[Any]] = [head + [f"{measure}_{kind}" for measure in MEASURES for kind in kinds]]
    for row in table:
        line = [row.name, *map(_shown, row.values), len(row.done), _listed(row.missing), _listed(row.failed)]
        for measure in MEASURES:
            spread = row.measures.get(measure)
            of = (spread.mean, spread.std, spread.low, spread.high, len(spread.values)) if spread else ("",) * 4 + (0,)
            line += ["" if value is None else value for value in of]
        lines.append(line)
    return _csv(lines)


def runs_csv(sweep: Sweep, results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each run and seed of the plan, with every measure."""
    lines: list[list[Any]] = [
        ["run", "seed", *sweep.varied, "status", *MEASURES, "cores", "load", "processor", "error"]
    ]
    for run in sweep.runs:
        result = results.get(run.key, {"status": "missing"})
        line = [run.name, run.seed, *map(_shown, sweep.values[run.name]), result.get("status")]
        line += [_blank(result.get(part, {}).get(measure)) for measure, (part, *_) in MEASURES.items()]
        line += [_blank(result.get("latency", {}).get(key)) for key in ("cores", "load", "processor")]
        lines.append([*line, _blank(result.get("error"))])
    return _csv(lines)


def matrix_csv(sweep: Sweep, table: Sequence[Row]) -> str:
    """Accuracy in [0, 1] by time steps in training and in test, a line for each pair."""
    lines: list[list[Any]] = [
        ["run", "train_time_steps", "test_time_steps", "n", "mean", "std", "min", "max", "why_not"]
    ]
    for row in table:
        for steps in sweep.test_time_steps:
            spread = row.by_time_steps.get(steps)
            line: list[Any] = [row.name, row.time_steps, steps]
            if spread:
                line += [len(spread.values), spread.mean, _blank(spread.std), spread.low, spread.high, ""]
            else:
                line += [0, "", "", "", "", row.reasons.get(f"T={steps}", "no result")]
            lines.append(line)
    return _csv(lines)


def to_markdown(sweep: Sweep, table: Sequence[Row], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Both tables for people, then what is missing, failed or not applicable, and how it was measured."""
    present = [measure for measure in MEASURES if any(measure in row.measures for row in table)]
    head = ["run", *sweep.varied, "seeds", *(MEASURES[measure][2] for measure in present)]
    body = []
    for row in table:
        # Extremes of every column would make the table unreadable; table.csv has them.
        cells = [_cell(row.measures.get(measure), measure, measure == "accuracy") for measure in present]
        body.append([row.name, *map(_shown, row.values), str(len(row.done)), *cells])
    parts = [f"## {sweep.title}", _markdown(head, body)]
    if len(sweep.test_time_steps) > 1 and any(row.by_time_steps for row in table):
        parts.append("Accuracy in %, tested with T time steps (columns):")
        head = ["run", "trained with T", *(f"T={steps}" for steps in sweep.test_time_steps)]
        body = []
        for row in table:
            cells = [_cell(row.by_time_steps.get(steps), "accuracy") for steps in sweep.test_time_steps]
            body.append([row.name, str(row.time_steps), *cells])
        parts.append(_markdown(head, body))
    notes = [*incomplete(table), *_not_applicable(table), *_how(results)]
    return "\n\n".join(parts) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def incomplete(table: Sequence[Row]) -> list[str]:
    """What is missing or failed, in words; empty if the table is complete."""
    found = [
        f"{row.name}: no result of seed{'s' * (len(row.missing) > 1)} {_listed(row.missing)}"
        for row in table
        if row.missing
    ]
    return found + [f"{row.name}, seed {seed} failed: {why}" for row in table for seed, why in row.failed.items()]


def _not_applicable(table):
    notes = {}
    for row in table:
        for what, why in row.reasons.items():
            notes.setdefault(("int8" if what == "integer" else what, why), []).append(row.name)
    return [f"n/a at {what} for {', '.join(names)}: {why}" for (what, why), names in notes.items()]


def _how(results) -> list[str]:
    done = [result for result in results.values() if result.get("status") == "done"]
    if not done:
        return []
    measured, timed = [x["measured"] for x in done], [x["latency"] for x in done if "latency" in x]
    images, counted = _range(x["test_images"] for x in measured), _range(x["cost_images"] for x in measured)
    notes = [
        f"accuracy: of the weights after the last epoch, on {images} test images; best epoch: the best of all epochs, "
        "chosen on the same images; int8: the last epoch's network, compiled to integers. Mean ± sample standard "
        "deviation over seeds (minimum to maximum); table.csv has the extremes of every column",
        f"synaptic operations: effective ones per image, all time steps, mean over the first {counted} test images; "
        "firing rate: mean over all neurons and time steps",
    ]
    if timed:
        loads = [x["load"] for x in timed if x["load"] is not None]
        load = f", load average before it {min(loads):.1f} to {max(loads):.1f}" if loads else ""
        machines = sorted({f"{x['processor']}, {x['cores']} cores" for x in timed})
        several = " (several machines: compare with care)" if len(machines) > 1 else ""
        batch = _range(x["batch"] for x in timed)
        notes.append(
            f"ms: median time per image, one at a time or {batch} in a batch, of the jitted float network and the "
            "integer engine, measured after the trainings, one run at a time, on "
            f"{'; '.join(machines)}{several}{load}"
        )
    return notes


def _cell(spread: Spread | None, measure: str, extremes: bool = False) -> str:
    if spread is None:
        return "n/a"
    _, factor, _, decimals = MEASURES[measure]

    def shown(value):
        return f"{factor * value:,.{decimals}f}"

    if spread.std is None or spread.low == spread.high:
        return shown(spread.mean)
    ends = f" ({shown(spread.low)} to {shown(spread.high)})" if extremes else ""
    return f"{shown(spread.mean)} ± {shown(spread.std)}{ends}"


def _markdown(head, body) -> str:
    lines = [head, ["---"] * len(head), *body]
    # Names and values are the user's: on one line, never markup.
    escaped = [[" ".join(re.sub(r"([\\`*<>|$])", r"\\\1", cell).split()) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def _csv(lines) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _range(values) -> str:
    values = sorted(set(values))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _listed(values) -> str:
    return " ".join(map(str, values))


def _shown(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _blank(value):
    return "" if value is None else value
