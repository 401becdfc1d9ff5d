"""Limits of an artifact's description and numbers; anything beyond them raises `InputError`."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any, NoReturn

from spiking_mlp_jax.deploy.network import Description, Format, IntegerNet, format_names
from spiking_mlp_jax.errors import InputError

# Larger than any known network, and small enough to check a file in little time and memory.
MAX_STAGES = 8
MAX_BLOCKS = 256
MAX_NEURONS = 1 << 24
MAX_TERMS = 16
MAX_SHIFT = 31
_LIMITS = {
    "image_size": (1, 1 << 13),
    "in_channels": (1, 1 << 10),
    "num_classes": (1, 1 << 20),
    "patch_size": (1, 1 << 13),
    "dim": (1, 1 << 14),
    "expansion": (1, 64),
    "time_steps": (1, 256),
    "leak": (0, 16),
    "bits": (2, 8),
}
_CHOICES = {"encoding": ("spe", "plain"), "neuron": ("lif", "if")}
# Far above statistics of pixels in [0, 1], and JSON integers below it convert to floats.
_LARGE = 1e9
_FLAGS = ("per_token", "decay_input", "soft_reset")
# Smallest and largest value of an array's entries, where its dtype allows more. Kernels: `check_values`.
_VALUES = {"shift": (-MAX_SHIFT, MAX_SHIFT), "exponents": (-MAX_SHIFT, MAX_SHIFT), "signs": (-1, 1)}


def description_from_json(document: Any) -> Description:
    """A description from JSON values, every one of them checked.

    Args:
        document: a `Description` as a dict (`dataclasses.asdict`), after JSON or before.

    Raises:
        InputError: a field is missing, unknown, of another type or out of its limits, or they do not fit together.
    """
    fields = json_object("the description", document, [field.name for field in dataclasses.fields(Description)])
    for name, (low, high) in _LIMITS.items():
        _integer(name, fields[name], low, high)
    for name, known in _CHOICES.items():
        if not isinstance(fields[name], str) or fields[name] not in known:
            refuse(f"{name} must be one of {', '.join(known)}", fields[name])
    for name in _FLAGS:
        if not isinstance(fields[name], bool):
            refuse(f"{name} must be true or false", fields[name])
    depths = fields["depths"]
    if not isinstance(depths, list | tuple) or not 1 <= len(depths) <= MAX_STAGES:
        refuse(f"depths must list the blocks of 1 to {MAX_STAGES} stages", depths)
    for depth in depths:
        _integer("depths", depth, 1, MAX_BLOCKS)
    if sum(depths) > MAX_BLOCKS:
        refuse(f"depths must not sum to more than {MAX_BLOCKS}", depths)
    c = Description(**{**fields, "depths": tuple(depths), "formats": {}, "data": {}})
    _check_geometry(c)
    # With the formats' names known: they follow from the geometry.
    formats = json_object("formats", fields["formats"], format_names(c))
    _check_data(c, fields["data"])
    return dataclasses.replace(
        c, formats={name: _format(name, formats[name]) for name in format_names(c)}, data=fields["data"]
    )


def _check_geometry(c: Description) -> None:
    if c.neuron == "if" and c.leak:
        refuse('leak must be 0 with neuron "if"', c.leak)
    step = c.patch_size << (c.stages - 1)
    if c.image_size % step:
        refuse(f"image_size must be a multiple of {step}, its patches over all stages", c.image_size)
    if c.encoding == "spe" and c.stages > 1 and c.dim % 3:
        refuse('dim must be a multiple of 3 with encoding "spe"', c.dim)
    for i in range(c.stages):
        neurons = c.stage_side(i) ** 2 * c.stage_dim(i) * c.expansion
        if neurons > MAX_NEURONS:
            refuse(f"no layer may have more than {MAX_NEURONS} neurons", neurons)


def _format(place: str, document: Any) -> Format:
    names = [field.name for field in dataclasses.fields(Format)]
    fields = json_object(f"the format of {place}", document, names)
    _integer(f"fraction of {place}", fields["fraction"], 0, 30)
    if type(fields["word"]) is not int or fields["word"] not in (16, 32):
        refuse(f"word of {place} must be 16 or 32", fields["word"])
    top = (1 << (fields["word"] - 1)) - 1
    for name in ("threshold", "reset"):
        _integer(f"{name} of {place}", fields[name], -top - 1, top)
    return Format(**fields)


def _check_data(c: Description, data: Any) -> None:
    """Check how images become pixels; the resize mode is checked where it is used."""
    if not isinstance(data, dict):
        refuse("data must be an object", data)
    for name, kind in (("dataset", str), ("resize_mode", str), ("eval_resize", int)):
        if type(data.get(name, kind())) is not kind:
            refuse(f'"{name}" of data must be a {"number" if kind is int else "string"}', data[name])
    for name, least in (("mean", -_LARGE), ("std", 0)):
        values = data.get(name, [1.0] * c.in_channels)
        if not isinstance(values, list) or len(values) != c.in_channels:
            refuse(f'"{name}" of data must be {c.in_channels} numbers, one for each channel', values)
        for value in values:
            if type(value) not in (int, float) or not least < value < _LARGE:
                refuse(f'"{name}" of data must hold numbers above {least:g} and below {_LARGE:g}', value)
    names = data.get("class_names", [""] * c.num_classes)
    if not isinstance(names, list) or len(names) != c.num_classes or not all(type(name) is str for name in names):
        refuse(f'"class_names" of data must be {c.num_classes} strings, one for each class', names)


def check_values(net: IntegerNet) -> None:
    """Check the limits of each array's values; `ranges.check` checks biases, thresholds and offsets."""
    for name, x in net.arrays.items():
        entry = name.rpartition(".")[2]
        limits = _VALUES.get(entry)
        if entry == "kernel":
            top = (1 << (net.description.bits - 1)) - 1
            limits = (-top, top)
        if limits and (x.min() < limits[0] or x.max() > limits[1]):
            raise InputError(f"{name} must hold {limits[0]} to {limits[1]}, got {x.min()} to {x.max()}")


def json_object(what: str, value: Any, names: list[str]) -> dict[str, Any]:
    """A JSON object with exactly these names."""
    if not isinstance(value, dict):
        refuse(f"{what} must be an object", value)
    for name in names:
        if name not in value:
            raise InputError(f'{what} lacks "{name}"')
    for name in value:
        if name not in names:
            raise InputError(f"{what} has an unknown {reprlib.repr(name)}")
    return value


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        refuse(f"{name} must be a whole number from {low} to {high}", value)


def refuse(requirement: str, value: Any) -> NoReturn:
    """Raise the InputError of a value that does not meet a requirement."""
    # Shortened: values from a file can be of any length.
    raise InputError(f"{requirement}, got {reprlib.repr(value)}")
