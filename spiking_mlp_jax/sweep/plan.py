"""Sweep files: which networks are trained, with which seeds, and on which machine.

A sweep file is flat Python with a function `get_sweep`, which returns a dict (or a ConfigDict):

    base              the experiment that all runs start from, as for train.py: "FILE.py" or "FILE.py:ARGUMENT"
    runs              {name: {field: value, ...}}, the fields in which each run differs; {} is the base itself
    common            fields that differ from the base in all runs; optional, as everything below
    seeds             default: (0, 1, 2)
    test_time_steps   time steps to test each trained network with; default: those of the runs
    x                 the field on the x axis of the accuracy figure; default: the field that varies, if it is a number
    title             of the tables
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.train.config import (
    call_function,
    check_names,
    load_config,
    shipped_config,
    to_dict,
    validate,
)
from spiking_mlp_jax.utils.paths import user_path

KEYS = ("base", "runs", "common", "seeds", "test_time_steps", "x", "title")
# Fields that do not describe the experiment, or that the sweep sets itself.
_RESERVED = {
    "seed": "list the seeds in seeds",
    "dry_run": "leave it out",
    "eval_only": "leave it out",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_MOST_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: of the run in the sweep.
        seed: of weights and data.
        config: a ConfigDict, the complete experiment as for train.py.
    """

    name: str
    seed: int
    config: Any

    @property
    def key(self) -> str:
        """The path of its files below `runs` and `results`."""
        return f"{self.name}/seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file's contents.

    Attributes:
        file: its path, as given.
        title: of the tables.
        names: of the runs, in the file's order.
        seeds: of each run.
        runs: every name with every seed, seed by seed, so that a stopped sweep has compared something.
        varied: fields in which the runs differ, in the order in which the file names them.
        values: {name: the run's values of `varied`}.
        x: the field on the x axis of the accuracy figure; None: names.
        test_time_steps: ascending.
    """

    file: str
    title: str
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    varied: tuple[str, ...]
    values: dict[str, tuple[Any, ...]]
    x: str | None
    test_time_steps: tuple[int, ...]

    def of(self, name: str) -> list[Run]:
        """The runs of a name, one for each seed."""
        return [run for run in self.runs if run.name == name]


def load_sweep(file: str, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Sweep:
    """Reads a sweep file and checks every run.

    Args:
        file: path of the sweep file.
        overrides: "--config.NAME=VALUE", fields set in all runs, after the file's own.
        seeds: instead of the file's.

    Raises:
        InputError: the file is missing or raises; a field does not exist or has an invalid value. The message names
            the file and the run.
    """
    file = str(user_path(file))
    if not os.path.isfile(file):
        file = shipped_config(file) or shipped_config(f"sweeps/{file}") or file
    if not os.path.isfile(file):
        folder = os.path.dirname(file) or "."
        there = sorted(x for x in os.listdir(folder) if x.endswith(".py")) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(file), there, 1, 0.4)
        raise InputError(
            f'there is no sweep file "{file}"; '
            + (f'did you mean "{os.path.join(folder, near[0])}"?' if near else "e.g. sweeps/time_steps")
        )
    found = call_function(file, "get_sweep", "sweep file")
    if isinstance(found, config_dict.ConfigDict):
        found = found.to_dict()
    if not isinstance(found, Mapping):
        raise InputError(f'get_sweep of "{file}" must return a dict, got {type(found).__name__}')
    try:
        return _sweep(file, found, overrides, seeds)
    except InputError as error:
        raise InputError(f'the sweep file "{file}": {error}') from error


def shard(sweep: Sweep, index: int, count: int) -> list[Run]:
    """The runs that one of several machines trains.

    Every run is in exactly one shard, and their sizes differ by at most one. Names rotate from seed to seed, so that no
    machine gets all seeds of the largest network.

    Args:
        sweep: the sweep, with the same seeds on every machine.
        index: of the shard, 1 to `count`.
        count: number of shards.
    """
    size = len(sweep.names)

    def position(run):
        seed, name = sweep.seeds.index(run.seed), sweep.names.index(run.name)
        return seed * size + (name + seed) % size

    return [run for run in sweep.runs if position(run) % count == index - 1]


def _sweep(file, found, overrides, seeds) -> Sweep:
    for key in found:
        if key not in KEYS:
            raise InputError(f'get_sweep returns an unknown key "{key}"; {nearest(key, KEYS)}')
    for key, kind in (("base", str), ("runs", Mapping)):
        if not isinstance(found.get(key), kind) or not found[key]:
            wanted = 'a config, e.g. "configs/fashion_mnist.py:demo"' if kind is str else "{name: {field: value}}"
            raise InputError(f"get_sweep must return {key}, {wanted}")
    title = found.get("title", os.path.splitext(os.path.basename(file))[0])
    if not isinstance(title, str):
        raise InputError(f"title must be a string, got {title!r}")
    common, runs = found.get("common", {}), found["runs"]
    seeds = _numbers("seeds", found.get("seeds", (0, 1, 2)) if seeds is None else seeds, 0, 2**31 - 1)
    base = _with_fields(load_config(found["base"]), common, "common")
    given = _overridden(found["base"], overrides)
    varied = list(dict.fromkeys(name for fields in runs.values() if isinstance(fields, Mapping) for name in fields))
    for name in given:
        if name in varied or name in _RESERVED:
            instead = (
                "it varies that field itself" if name in varied else _RESERVED[name].replace("in seeds", "with --seeds")
            )
            raise InputError(f"--config.{name} does not go with this sweep: {instead}")
    base = _with_fields(base, given, "the command line")
    lower = [str(name).lower() for name in runs]
    configs = {}
    for name, fields in runs.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f'invalid run name "{name}"; use at most 100 letters, digits and . _ + -, as for a folder')
        if lower.count(name.lower()) > 1:
            raise InputError(f'two run names differ from "{name}" only in case, which some file systems ignore')
        configs[name] = _with_fields(base, fields, f'run "{name}"')
        _refuse_twin(name, configs)
    varied = [name for name in varied if len({repr(config[name]) for config in configs.values()}) > 1]
    steps = found.get("test_time_steps", sorted({config.time_steps for config in configs.values()}))
    return Sweep(
        file=file,
        title=title,
        names=tuple(configs),
        seeds=seeds,
        runs=tuple(Run(name, seed, _seeded(config, seed)) for seed in seeds for name, config in configs.items()),
        varied=tuple(varied),
        values={name: tuple(config[field] for field in varied) for name, config in configs.items()},
        x=_x_field(found.get("x"), varied, configs),
        test_time_steps=tuple(sorted(_numbers("test_time_steps", steps, 1, _MOST_STEPS))),
    )


def _with_fields(config, fields, where):
    """A copy of an experiment with other values, validated as by the trainer."""
    if not isinstance(fields, Mapping):
        raise InputError(f"{where} must be {{field: value}}, got {fields!r}")
    config = config.copy_and_resolve_references()
    try:
        check_names(fields, config.keys())
        for name, value in fields.items():
            if name in _RESERVED:
                raise InputError(f"{name} cannot be set in a sweep; {_RESERVED[name]}")
            kind = config.get_type(name)
            try:
                if isinstance(value, bool) and kind in (int, float):
                    raise TypeError("ConfigDict would convert it to 0 or 1")
                config[name] = value
            except (TypeError, ValueError) as error:
                wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
                raise InputError(f"{name} must be {wanted.get(kind, kind.__name__)}, got {value!r}") from error
        # The trainer checks batch sizes against the number of devices.
        validate(config, 1)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return config


def _overridden(base: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Fields and values of "--config.NAME=VALUE", read as train.py reads them."""
    if not overrides:
        return {}
    config = load_config(base, overrides)
    words = [word.lstrip("-") for word in overrides if word.startswith("-")]
    names = {word.partition("=")[0].partition(".")[2] for word in words}
    return {name: config[name] for name in sorted(names)}


def _refuse_twin(name, configs):
    new = to_dict(configs[name])
    for other, config in configs.items():
        if other != name and to_dict(config) == new:
            raise InputError(f'runs "{other}" and "{name}" are the same experiment; remove one')


def _seeded(config, seed):
    config = config.copy_and_resolve_references()
    config.seed = seed
    return config


def _x_field(given, varied, configs):
    def is_number(field):
        values = [config[field] for config in configs.values()]
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

    if given is None:
        return varied[0] if len(varied) == 1 and is_number(varied[0]) else None
    if given not in varied or not is_number(given):
        numbers = ", ".join(filter(is_number, varied)) or "none"
        raise InputError(f'x must be a numeric field that varies ({numbers} here), got "{given}"')
    return given


def _numbers(what, values, least, most) -> tuple[int, ...]:
    listed = isinstance(values, list | tuple) and values
    if not listed or not all(isinstance(x, int) and not isinstance(x, bool) and least <= x <= most for x in values):
        raise InputError(f"{what} must list whole numbers from {least} to {most}, got {values!r}")
    if len(set(values)) < len(values):
        raise InputError(f"{what} lists a number twice: {values!r}")
    return tuple(values)
