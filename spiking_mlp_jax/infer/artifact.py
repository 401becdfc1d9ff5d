"""Artifacts: an integer network in one file, `NAME.smlp`. Data only, hashed, memory-mapped; NumPy alone.

    bytes 0-7      magic, b"\\x89SMLP\\r\\n\\x1a": a file that was sent as text does not survive with it
          8-11     version of the format, 1
          12-15    bytes of the JSON header
          16-23    bytes of the file
          24-31    zeros
          32-63    BLAKE2b, 32 bytes, of all other bytes of the file
          64-      JSON header: {"description": {...}, "arrays": [...]}, see `description_to_json` and `_table`
          then, each at the next multiple of 64 and between zeros, the arrays in the order of `network.array_shapes`

Numbers are little-endian. Nothing of a file is believed: whatever can be loaded describes a network that can exist,
holds exactly its arrays with values in their limits, and has passed `ranges.check`; all else is one `InputError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import reprlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.infer import ranges
from spiking_mlp_jax.infer.network import Description, Format, IntegerNet, array_shapes, format_names

MAGIC = b"\x89SMLP\r\n\x1a"
VERSION = 1
ALIGNMENT = 64
# Beyond any network known, and small enough that a file within them is judged in little time and memory.
MAX_FILE = 1 << 32
MAX_HEADER = 1 << 20
MAX_STAGES = 8
MAX_BLOCKS = 256
MAX_NEURONS = 1 << 24
MAX_TERMS = 16
MAX_SHIFT = 31
_PREFIX = struct.Struct("<8sIIQ8s32s")
_HASHED = _PREFIX.size - 32
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
# No statistics of pixels in [0, 1] are near it, and no JSON integer below it is too long for a float.
_LARGE = 1e9
_FLAGS = ("per_token", "decay_input", "soft_reset")
# Smallest and largest value of an array's entries, where its dtype allows more. Kernels: `_kernel_limit`.
_VALUES = {"shift": (-MAX_SHIFT, MAX_SHIFT), "exponents": (-MAX_SHIFT, MAX_SHIFT), "signs": (-1, 1)}


def save(net: IntegerNet, path: str | os.PathLike[str]) -> None:
    """Writes an artifact, over an older one if need be; a reader never sees half a file.

    Args:
        net: any integer network.
        path: of the file; folders above it are made.

    Raises:
        InputError: the network would not pass `load`, or the file cannot be written.
    """
    prefix, header, parts = _encode(net)
    write_whole(path, [prefix, header, *parts])


def write_whole(path: str | os.PathLike[str], parts: Iterable[bytes]) -> None:
    """Writes a file under a temporary name and renames it, so that a reader never sees half of it.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}): give another place") from error


def size(net: IntegerNet) -> int:
    """Bytes of the file that `save` writes.

    Raises:
        InputError: as `save`.
    """
    prefix, header, parts = _encode(net)
    return len(prefix) + len(header) + sum(len(part) for part in parts)


def load(path: str | os.PathLike[str]) -> IntegerNet:
    """Reads an artifact.

    Args:
        path: a file that `save` wrote. As long as the network is in use it must not be written to; `save` replaces it
            by another file, which is safe.

    Returns:
        the network. Its arrays are read-only and lie in the mapped file; only kernels of at most 4 bits, which are
        packed there, are in memory.

    Raises:
        InputError: the file is missing, damaged, cut short, of another kind or version, or holds no network that can
            run without overflow; the sentence names it.
    """
    path = Path(path)
    data = _map(path)
    prefix, header_size = _read_prefix(path, data)
    # First of all that is in it, so that an accident on the way is called that.
    if _digest(prefix[:_HASHED], data[_PREFIX.size :]) != prefix[_HASHED:]:
        raise InputError(f"{path} is damaged, because its hash does not fit: copy it or compile the network again")
    try:
        document = _parse(data[_PREFIX.size : _PREFIX.size + header_size].tobytes())
        c, entries = _read_header(document)
        arrays = _read_arrays(c, entries, data, _aligned(_PREFIX.size + header_size))
        net = IntegerNet(c, arrays)
        _check_values(net)
        ranges.check(net)
    except InputError as error:
        raise InputError(f"{path} holds no network that can run: {error}") from error
    return net


def check(net: IntegerNet) -> None:
    """Checks a network as `save` and `load` do.

    Raises:
        InputError: its description is of no possible network, its arrays are not those of the description, a value is
            out of its limits, or a potential could leave its word.
    """
    _checked(net)


def description_to_json(c: Description) -> dict[str, Any]:
    """A description as JSON values: its fields by name, formats as objects of theirs."""
    return dataclasses.asdict(c)


def description_from_json(document: Any) -> Description:
    """A description from JSON values, every one of them checked.

    Args:
        document: what `description_to_json` gave, after JSON or before.

    Raises:
        InputError: a field is missing, unknown, of another type or out of its limits, or they do not fit together.
    """
    fields = _object("the description", document, [field.name for field in dataclasses.fields(Description)])
    for name, (low, high) in _LIMITS.items():
        _integer(name, fields[name], low, high)
    for name, known in _CHOICES.items():
        if not isinstance(fields[name], str) or fields[name] not in known:
            _refuse(f"{name} must be one of {', '.join(known)}", fields[name])
    for name in _FLAGS:
        if not isinstance(fields[name], bool):
            _refuse(f"{name} must be true or false", fields[name])
    depths = fields["depths"]
    if not isinstance(depths, list | tuple) or not 1 <= len(depths) <= MAX_STAGES:
        _refuse(f"depths must list the blocks of 1 to {MAX_STAGES} stages", depths)
    for depth in depths:
        _integer("depths", depth, 1, MAX_BLOCKS)
    if sum(depths) > MAX_BLOCKS:
        _refuse(f"depths must not sum to more than {MAX_BLOCKS}", depths)
    c = Description(**{**fields, "depths": tuple(depths), "formats": {}, "data": {}})
    _check_geometry(c)
    # With the formats' names known: they follow from the geometry.
    formats = _object("formats", fields["formats"], format_names(c))
    _check_data(c, fields["data"])
    return dataclasses.replace(
        c, formats={name: _format(name, formats[name]) for name in format_names(c)}, data=fields["data"]
    )


def _check_geometry(c: Description) -> None:
    if c.neuron == "if" and c.leak:
        _refuse('leak must be 0 with neuron "if"', c.leak)
    step = c.patch_size << (c.stages - 1)
    if c.image_size % step:
        _refuse(f"image_size must be a multiple of {step}, its patches over all stages", c.image_size)
    if c.encoding == "spe" and c.stages > 1 and c.dim % 3:
        _refuse('dim must be a multiple of 3 with encoding "spe"', c.dim)
    for i in range(c.stages):
        neurons = c.stage_side(i) ** 2 * c.stage_dim(i) * c.expansion
        if neurons > MAX_NEURONS:
            _refuse(f"no layer may have more than {MAX_NEURONS} neurons", neurons)


def _format(place: str, document: Any) -> Format:
    names = [field.name for field in dataclasses.fields(Format)]
    fields = _object(f"the format of {place}", document, names)
    _integer(f"fraction of {place}", fields["fraction"], 0, 30)
    if type(fields["word"]) is not int or fields["word"] not in (16, 32):
        _refuse(f"word of {place} must be 16 or 32", fields["word"])
    top = (1 << (fields["word"] - 1)) - 1
    for name in ("threshold", "reset"):
        _integer(f"{name} of {place}", fields[name], -top - 1, top)
    return Format(**fields)


def _check_data(c: Description, data: Any) -> None:
    """What is known of a picture's way to pixels; how it is resized is judged where that is done."""
    if not isinstance(data, dict):
        _refuse("data must be an object", data)
    for name, kind in (("dataset", str), ("resize_mode", str), ("eval_resize", int)):
        if type(data.get(name, kind())) is not kind:
            _refuse(f'"{name}" of data must be a {"number" if kind is int else "string"}', data[name])
    for name, least in (("mean", -_LARGE), ("std", 0)):
        values = data.get(name, [1.0] * c.in_channels)
        if not isinstance(values, list) or len(values) != c.in_channels:
            _refuse(f'"{name}" of data must be {c.in_channels} numbers, one for each channel', values)
        for value in values:
            if type(value) not in (int, float) or not least < value < _LARGE:
                _refuse(f'"{name}" of data must hold numbers above {least:g} and below {_LARGE:g}', value)
    names = data.get("class_names", [""] * c.num_classes)
    if not isinstance(names, list) or len(names) != c.num_classes or not all(type(name) is str for name in names):
        _refuse(f'"class_names" of data must be {c.num_classes} strings, one for each class', names)


# The layout: every array's place follows from the description, S and k. The header states it, for readers without
# this package, and is compared.


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An array in the file; dtype, shape and encoding of what it stands for, offset and size of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    encoding: str


def _table(c: Description, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Entry]:
    """Where each array lies, from the start of the first, in the order of `array_shapes`.

    Raises:
        InputError: a shape is not what the description needs, or a layer's arrays differ in their steps or terms.
    """
    end = 0
    counts: dict[tuple[str, str], int] = {}
    for name, (dtype, needed) in array_shapes(c).items():
        shape = shapes[name]
        layer = name.rpartition(".")[0]
        allowed = [(1, c.time_steps) if n == "S" else range(1, MAX_TERMS + 1) if n == "k" else (n,) for n in needed]
        if len(shape) != len(needed) or not all(n in known for n, known in zip(shape, allowed, strict=True)):
            _refuse(f"{name} must have the shape [{', '.join(map(str, needed))}]", list(shape))
        for n, symbol in zip(shape, needed, strict=True):
            if isinstance(symbol, str) and n != counts.setdefault((layer, symbol), n):
                raise InputError(f"the arrays of {layer} do not have one number of {symbol}")
        count = math.prod(shape)
        packed = _is_packed(c, name)
        nbytes = (count + 1) // 2 if packed else count * np.dtype(dtype).itemsize
        offset = _aligned(end)
        yield _Entry(name, dtype, shape, offset, nbytes, "nibbles" if packed else "raw")
        end = offset + nbytes


def _is_packed(c: Description, name: str) -> bool:
    return c.bits <= 4 and name.endswith(".kernel")


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _pack(values: np.ndarray) -> np.ndarray:
    """int8 in -8..7, two a byte in C order, the first in the low half; a last odd one beside 0."""
    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, np.int8)).view(np.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def _unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    values = np.empty((packed.size, 2), np.int8)
    # To the top of a byte and back down again, which brings the sign along.
    values[:, 0] = packed << 4
    values[:, 1] = packed
    values >>= 4
    return values.reshape(-1)[: math.prod(shape)].reshape(shape)


# Writing.


def _checked(net: IntegerNet) -> tuple[bytes, list[_Entry]]:
    """The header of a network that has passed all checks, and where its arrays lie."""
    try:
        text = json.dumps(description_to_json(net.description), allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the description cannot be written as JSON ({error}): use plain finite numbers, strings and lists"
        ) from error
    c = description_from_json(_parse(text.encode()))
    known = array_shapes(c)
    for name in net.arrays:
        if name not in known:
            raise InputError(f'there is an array "{name}", which the network does not have')
    for name, (dtype, _) in known.items():
        if name not in net.arrays:
            raise InputError(f'the array "{name}" is missing')
        if net.arrays[name].dtype != dtype:
            raise InputError(f"{name} must be {dtype}, but it is {net.arrays[name].dtype}")
    entries = list(_table(c, {name: x.shape for name, x in net.arrays.items()}))
    _check_values(net)
    ranges.check(net)
    document = {"description": description_to_json(c), "arrays": [dataclasses.asdict(entry) for entry in entries]}
    header = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER:
        raise InputError(f"the header has {len(header)} bytes, but at most {MAX_HEADER} are read: keep data short")
    return header, entries


def _encode(net: IntegerNet) -> tuple[bytes, bytes, list[bytes]]:
    """The file's prefix, header and arrays, the latter two with the zeros after and before them."""
    header, entries = _checked(net)
    start = _aligned(_PREFIX.size + len(header))
    padded = header.ljust(start - _PREFIX.size, b"\0")
    parts, end = [], 0
    for entry in entries:
        values = np.asarray(net.arrays[entry.name])
        stored = _pack(values) if entry.encoding == "nibbles" else values
        parts += [bytes(entry.offset - end), stored.astype(stored.dtype.newbyteorder("<")).tobytes()]
        end = entry.offset + entry.size
    if start + end > MAX_FILE:
        raise InputError(f"the artifact would have {start + end} bytes, but at most {MAX_FILE} are read")
    opening = _PREFIX.pack(MAGIC, VERSION, len(header), start + end, bytes(8), bytes(32))[:_HASHED]
    return opening + _digest(opening, padded, *parts), padded, parts


def _plain(value):
    """JSON's value for a NumPy scalar."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _digest(*parts) -> bytes:
    found = hashlib.blake2b(digest_size=32)
    for part in parts:
        found.update(part)
    return found.digest()


# Reading.


def _map(path: Path) -> np.ndarray:
    """The file as read-only uint8, mapped."""
    # Only a file's size is known before it is read; a pipe would be waited for.
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}: give an artifact that was compiled from trained weights")
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length < _PREFIX.size:
                raise InputError(f"{path} is no artifact or cut short, because it has only {length} bytes")
            return np.asarray(np.memmap(file, np.uint8, "r"))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({error})") from error


def _read_prefix(path: Path, data: np.ndarray) -> tuple[bytes, int]:
    """The first bytes of a file and the length of its header."""
    prefix = data[: _PREFIX.size].tobytes()
    magic, version, header_size, length, zeros, _ = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise InputError(f"{path} is no artifact: give a .smlp file that was compiled from trained weights")
    if version != VERSION:
        raise InputError(
            f"{path} has format {version}, but this version reads format {VERSION}: use the version that wrote it"
        )
    if length != data.size or length > MAX_FILE:
        raise InputError(f"{path} has {data.size} bytes, but declares {length}: copy it or compile the network again")
    if header_size > min(MAX_HEADER, length - _PREFIX.size):
        raise InputError(f"{path} is damaged, because its header would have {header_size} bytes: copy it again")
    if any(zeros):
        raise InputError(f"{path} is damaged, because bytes that must be 0 are not: copy it again")
    return prefix, header_size


def _parse(header: bytes) -> Any:
    def pairs(items):
        found = dict(items)
        if len(found) != len(items):
            raise InputError("the header has an object with one name twice")
        return found

    def number(text):
        value = float(text)
        if not math.isfinite(value):
            raise InputError(f"the header has a number that is not finite, {reprlib.repr(text)}")
        return value

    try:
        # Not a byte beyond UTF-8, and no half of a pair of surrogates that no one could print.
        document = json.loads(
            header.decode(), object_pairs_hook=pairs, parse_float=number, parse_constant=number, strict=True
        )
        json.dumps(document, ensure_ascii=False).encode()
        return document
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the header is no JSON ({error})") from error


def _read_header(document: Any) -> tuple[Description, list[_Entry]]:
    fields = _object("the header", document, ["description", "arrays"])
    c = description_from_json(fields["description"])
    stated = fields["arrays"]
    names = list(array_shapes(c))
    if not isinstance(stated, list) or len(stated) != len(names):
        count = len(stated) if isinstance(stated, list) else stated
        _refuse(f"arrays must list the {len(names)} arrays of the network", count)
    shapes = {}
    for name, entry in zip(names, stated, strict=True):
        _object(f"the entry of {name}", entry, [field.name for field in dataclasses.fields(_Entry)])
        shape = entry["shape"]
        if not isinstance(shape, list) or not all(type(n) is int for n in shape):
            _refuse(f"the shape of {name} must be a list of whole numbers", shape)
        shapes[name] = tuple(shape)
    entries = list(_table(c, shapes))
    for entry, found in zip(entries, stated, strict=True):
        for key, expected in dataclasses.asdict(entry).items():
            # True is 1 and 1.0 is 1, but neither is what is written.
            if key != "shape" and (type(found[key]) is not type(expected) or found[key] != expected):
                _refuse(f"{key} of {entry.name} must be {reprlib.repr(expected)}", found[key])
    return c, entries


def _read_arrays(c: Description, entries: list[_Entry], data: np.ndarray, start: int) -> dict[str, np.ndarray]:
    length = start + entries[-1].offset + entries[-1].size
    if length != data.size:
        raise InputError(f"its arrays end at byte {length}, but the file at {data.size}")
    arrays, end = {}, 0
    for entry in entries:
        if data[start + end : start + entry.offset].any():
            raise InputError(f"the bytes before {entry.name} must be 0")
        end = entry.offset + entry.size
        stored = data[start + entry.offset : start + entry.offset + entry.size]
        if entry.encoding == "nibbles":
            values = _unpack(stored, entry.shape)
            values.flags.writeable = False
        else:
            if entry.dtype == "bool" and stored.max() > 1:
                raise InputError(f"{entry.name} must hold 0 and 1, but it holds {stored.max()}")
            values = stored.view(np.dtype(entry.dtype).newbyteorder("<")).reshape(entry.shape)
        arrays[entry.name] = values
    return arrays


def _check_values(net: IntegerNet) -> None:
    """The limits of each array's values; those of biases, thresholds and offsets are `ranges.check`'s matter."""
    for name, x in net.arrays.items():
        entry = name.rpartition(".")[2]
        limits = _VALUES.get(entry)
        if entry == "kernel":
            top = (1 << (net.description.bits - 1)) - 1
            limits = (-top, top)
        if limits and (x.min() < limits[0] or x.max() > limits[1]):
            raise InputError(f"{name} must hold {limits[0]} to {limits[1]}, but it holds {x.min()} to {x.max()}")


def _object(what: str, value: Any, names: list[str]) -> dict[str, Any]:
    """A JSON object with exactly these names."""
    if not isinstance(value, dict):
        _refuse(f"{what} must be an object", value)
    for name in names:
        if name not in value:
            raise InputError(f'{what} lacks "{name}"')
    for name in value:
        if name not in names:
            raise InputError(f"{what} has the unknown {reprlib.repr(name)}")
    return value


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        _refuse(f"{name} must be a whole number from {low} to {high}", value)


def _refuse(sentence: str, value: Any) -> NoReturn:
    # Shortened: what a file holds can be of any length.
    raise InputError(f"{sentence}, but it is {reprlib.repr(value)}")
