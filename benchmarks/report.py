"""Shared by the benchmarks: parsers, markdown tables, JSON files of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import PEER, Case
from spiking_mlp_jax.utils.files import write_whole

COLUMNS = (
    "task",
    "side",
    "s per batch",
    "images/s",
    "times as fast",
    "peak memory, GB",
    "share of it",
    "temporaries, GB",
    "compile, s",
)


def make_parser(doc: str | None, name: str = "") -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, with the module's docstring as help."""
    prog = f"python -m benchmarks{'.' * bool(name)}{name}"
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def fail(message: object, status: int = 2) -> int:
    """Print an error and return the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return status


def write_json(path: str | os.PathLike[str], document: object) -> None:
    """Write JSON atomically."""
    write_whole(path, json.dumps(document, indent=1) + "\n")


def line(cells: Iterable[str]) -> str:
    """A row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(columns: Sequence[str]) -> str:
    """The first two lines of a markdown table."""
    return line(columns) + "\n" + line(["---"] * len(columns))


def refusal(path: Path) -> str | None:
    """Why a file cannot be written there, or None; checked before anything is measured.

    Files are renamed into place, which would also replace a device or a pipe.
    """
    folder = path.parent
    try:
        if path.is_dir():
            return f'"{path}" is a folder: name a file'
        if path.exists() and not path.is_file():
            return f'"{path}" is not a regular file: name another'
        if not folder.is_dir():
            return f'there is no folder "{folder}" for {path.name}: make it first'
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f'"{path}" cannot be written: {error.strerror}'
    return None


class Results:
    """All results so far; the file is rewritten after each."""

    def __init__(self, arguments: dict[str, Any], path: str):
        self.path = Path(path)
        self.machine = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
        self.arguments, self.compared = arguments, {}
        self.rows: list[dict[str, Any]] = []

    def add(self, case: str, task: str, batch: int, results: list[dict[str, Any]]) -> None:
        """Add the results of one task's sides and write the file."""
        self.rows += [{"case": case, "task": task, **result, **summary(result, results, batch)} for result in results]
        document = {
            "machine": self.machine,
            "arguments": self.arguments,
            "largest_relative_difference": self.compared,
            "rows": self.rows,
        }
        write_json(self.path, document)

    def table(self, cases: dict[str, Case]) -> str:
        """All results as markdown, a table for each case."""
        # JAX knows a GPU's name, but calls every CPU "cpu".
        devices = {row["device"]: None for row in self.rows if "device" in row and row.get("platform") != "cpu"}
        machine = ", ".join([*devices, self.machine["cpu"]])
        lines = [f"{machine}, {self.machine['cores']} cores, allocator {self.arguments['allocator']}", ""]
        for case in dict.fromkeys(row["case"] for row in self.rows):
            title = cases[case].title
            if self.arguments.get("batch"):
                title += f", but B={self.arguments['batch']}"
            lines += [f"**{title}**" + self._agreement(case), "", head(COLUMNS)]
            for row in self.rows:
                if row["case"] == case:
                    lines.append(line(_cells(row)))
            lines.append("")
        return "\n".join(lines)

    def _agreement(self, case):
        if case not in self.compared:
            return " (not compared with a peer)"
        return f" (float64 outputs and gradients agree within {self.compared[case]:.0e})"


def summary(result: dict[str, Any], results: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Median seconds, images/s, speed relative to the peer (median over rounds), share of its peak memory."""
    median = statistics.median(result["seconds"])
    values: dict[str, Any] = {"median_s": median, "images_per_s": batch / median}
    peers = [other for other in results if other["side"] == PEER.title]
    if peers and result is not peers[0]:
        rounds = zip(peers[0]["seconds"], result["seconds"], strict=True)
        values["faster"] = statistics.median(theirs / ours for theirs, ours in rounds)
        # Device memory and resident memory are not comparable.
        if ("device_peak_bytes" in result) == ("device_peak_bytes" in peers[0]):
            values["memory_share"] = _peak(result) / _peak(peers[0])
    return values


def _peak(result):
    return result.get("device_peak_bytes", result["peak_bytes"])


def _cells(row):
    def shown(name, form, factor=1.0):
        return form.format(row[name] * factor) if row.get(name) is not None else "-"

    return [
        row["task"],
        row["side"],
        shown("median_s", "{:.3f}"),
        shown("images_per_s", "{:.1f}"),
        shown("faster", "{:.2f}"),
        f"{_peak(row) / 1e9:.2f}",
        shown("memory_share", "{:.2f}"),
        shown("temporary_bytes", "{:.2f}", 1e-9),
        shown("compile_s", "{:.1f}"),
    ]


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
