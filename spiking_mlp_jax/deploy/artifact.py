"""Artifacts: an integer network in one file, `NAME.smlp`. Data only, hashed, memory-mapped; NumPy alone.

    bytes 0-7      magic, b"\\x89SMLP\\r\\n\\x1a", which a transfer as text would change
          8-11     version of the format, 1
          12-15    bytes of the JSON header
          16-23    bytes of the file
          24-31    zeros
          32-63    BLAKE2b, 32 bytes, of all other bytes of the file
          64-      JSON header: {"description": {...}, "arrays": [...]}, see `Description` and `Entry`
          then, each at the next multiple of 64 and between zeros, the arrays in the order of `network.array_shapes`

Numbers are little-endian. A file is not trusted: what loads describes a network that can exist, holds exactly its
arrays with values within their limits, and has passed `ranges.check`; everything else raises `InputError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import reprlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mlp_jax.deploy import ranges
from spiking_mlp_jax.deploy.limits import MAX_TERMS, check_values, description_from_json, json_object, refuse
from spiking_mlp_jax.deploy.network import Description, IntegerNet, array_shapes
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.files import write_whole
from spiking_mlp_jax.utils.paths import user_path

ALIGNMENT = 64
MAGIC = b"\x89SMLP\r\n\x1a"
VERSION = 1
# Larger than any known network, and small enough to check a file in little time and memory.
MAX_FILE = 1 << 32
MAX_HEADER = 1 << 20
_PREFIX = struct.Struct("<8sIIQ8s32s")
_HASHED = _PREFIX.size - 32


def is_compiled(where: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a compiled network, by its ending (.smlp) or its first bytes."""
    path = user_path(where)
    if path.suffix == ".smlp":
        return not os.path.isdir(path)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def save(net: IntegerNet, path: str | os.PathLike[str]) -> None:
    """Write an artifact atomically, replacing an older one.

    Args:
        net: any integer network.
        path: of the file; missing parent folders are created.

    Raises:
        InputError: the network would not pass `load`, or the file cannot be written.
    """
    if not isinstance(net, IntegerNet):
        raise InputError(f"save takes an integer network, quantize(...), got a {type(net).__name__}")
    prefix, header, parts = _encode(net)
    write_whole(path, [prefix, header, *parts])


def size(net: IntegerNet) -> int:
    """Bytes of the file that `save` writes.

    Raises:
        InputError: as `save`.
    """
    prefix, header, parts = _encode(net)
    return len(prefix) + len(header) + sum(len(part) for part in parts)


def load(path: str | os.PathLike[str]) -> IntegerNet:
    """Read an artifact.

    Args:
        path: a file that `save` wrote. It must not be modified while the network is in use; `save` replaces the file,
            which is safe.

    Returns:
        the network. Its arrays are read-only views of the mapped file; only kernels of at most 4 bits, which are
        packed there, are copies.

    Raises:
        InputError: the file is missing, damaged, truncated, of another kind or version, or its network could overflow.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"load takes a path, got a {type(path).__name__}")
    path = user_path(path)
    data = _map(path)
    prefix, header_size = _read_prefix(path, data)
    # Before the content, so that damage is reported as damage.
    if digest(prefix[:_HASHED], data[_PREFIX.size :]) != prefix[_HASHED:]:
        raise InputError(f"{path} is damaged (its hash does not match): copy it or compile the network again")
    try:
        document = _parse(data[_PREFIX.size : _PREFIX.size + header_size].tobytes())
        c, entries = _read_header(document)
        arrays = _read_arrays(c, entries, data, aligned(_PREFIX.size + header_size))
        net = IntegerNet(c, arrays)
        check_values(net)
        ranges.check(net)
    except InputError as error:
        raise InputError(f"{path} is not a valid network: {error}") from error
    return net


def check(net: IntegerNet) -> None:
    """Check a network as `save` and `load` do.

    Raises:
        InputError: the description is invalid, the arrays are not those it needs, a value is out of its limits, or a
            potential could overflow.
    """
    _checked(net)


# Layout: every array's place follows from the description, S and k. The header repeats it, for readers without this
# package, and is compared.


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array in the file; dtype, shape and encoding of what it stands for, offset and size of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    encoding: str


def table(c: Description, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
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
            refuse(f"{name} must have the shape [{', '.join(map(str, needed))}]", list(shape))
        for n, symbol in zip(shape, needed, strict=True):
            if isinstance(symbol, str) and n != counts.setdefault((layer, symbol), n):
                raise InputError(f"the arrays of {layer} must have the same {symbol}")
        count = math.prod(shape)
        packed = _is_packed(c, name)
        nbytes = (count + 1) // 2 if packed else count * np.dtype(dtype).itemsize
        offset = aligned(end)
        yield Entry(name, dtype, shape, offset, nbytes, "nibbles" if packed else "raw")
        end = offset + nbytes


def _is_packed(c: Description, name: str) -> bool:
    return c.bits <= 4 and name.endswith(".kernel")


def aligned(position: int) -> int:
    """The first multiple of ALIGNMENT from a position on."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def pack(values: np.ndarray) -> np.ndarray:
    """int8 from -8 to 7, two per byte in C order, the first in the low half, padded with 0."""
    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, np.int8)).view(np.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The int8 values of this shape that `pack` packed."""
    values = np.empty((packed.size, 2), np.int8)
    # An arithmetic shift back from the top of the byte extends the sign.
    values[:, 0] = packed << 4
    values[:, 1] = packed
    values >>= 4
    return values.reshape(-1)[: math.prod(shape)].reshape(shape)


# Writing.


def _checked(net: IntegerNet) -> tuple[bytes, list[Entry]]:
    """The header of a network that has passed all checks, and where its arrays lie."""
    try:
        text = json.dumps(dataclasses.asdict(net.description), allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the description is not JSON ({error}): use finite numbers, strings and lists") from error
    c = description_from_json(_parse(text.encode()))
    known = array_shapes(c)
    for name in net.arrays:
        if name not in known:
            raise InputError(f'unexpected array "{name}"')
    for name, (dtype, _) in known.items():
        if name not in net.arrays:
            raise InputError(f'the array "{name}" is missing')
        if net.arrays[name].dtype != dtype:
            raise InputError(f"{name} must be {dtype}, got {net.arrays[name].dtype}")
    entries = list(table(c, {name: x.shape for name, x in net.arrays.items()}))
    check_values(net)
    ranges.check(net)
    document = {"description": dataclasses.asdict(c), "arrays": [dataclasses.asdict(entry) for entry in entries]}
    header = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER:
        raise InputError(f"the header has {len(header)} bytes, above the limit of {MAX_HEADER}: shorten data")
    return header, entries


def _encode(net: IntegerNet) -> tuple[bytes, bytes, list[bytes]]:
    """The file's prefix, its padded header and its arrays, each after its padding."""
    header, entries = _checked(net)
    start = aligned(_PREFIX.size + len(header))
    padded = header.ljust(start - _PREFIX.size, b"\0")
    parts, end = [], 0
    for entry in entries:
        values = np.asarray(net.arrays[entry.name])
        stored = pack(values) if entry.encoding == "nibbles" else values
        parts += [bytes(entry.offset - end), stored.astype(stored.dtype.newbyteorder("<")).tobytes()]
        end = entry.offset + entry.size
    if start + end > MAX_FILE:
        raise InputError(f"the artifact would have {start + end} bytes, above the limit of {MAX_FILE}")
    opening = _PREFIX.pack(MAGIC, VERSION, len(header), start + end, bytes(8), bytes(32))[:_HASHED]
    return opening + digest(opening, padded, *parts), padded, parts


def _plain(value):
    """JSON's value for a NumPy scalar."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def digest(*parts) -> bytes:
    """BLAKE2b of the concatenated parts."""
    found = hashlib.blake2b(digest_size=32)
    for part in parts:
        found.update(part)
    return found.digest()


# Reading.


def _map(path: Path) -> np.ndarray:
    """The file as read-only uint8, mapped."""
    # Opening a pipe would block.
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}: give a .smlp file, as spiking-mlp compile writes it")
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length < _PREFIX.size:
                raise InputError(f"{path} is not a .smlp file, or truncated: it has only {length} bytes")
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
        raise InputError(f"{path} is not a .smlp file: give one that spiking-mlp compile wrote")
    if version != VERSION:
        raise InputError(
            f"{path} has format {version}, but this version reads format {VERSION}: use the version that wrote it"
        )
    if length != data.size or length > MAX_FILE:
        raise InputError(f"{path} has {data.size} bytes, but declares {length}: copy it or compile the network again")
    if header_size > min(MAX_HEADER, length - _PREFIX.size):
        raise InputError(f"{path} is damaged (a header of {header_size} bytes): copy it again")
    if any(zeros):
        raise InputError(f"{path} is damaged (reserved bytes are not 0): copy it again")
    return prefix, header_size


def _parse(header: bytes) -> Any:
    def pairs(items):
        found = dict(items)
        if len(found) != len(items):
            raise InputError("the header has an object with a duplicate name")
        return found

    def number(text):
        value = float(text)
        if not math.isfinite(value):
            raise InputError(f"the header has a number that is not finite, {reprlib.repr(text)}")
        return value

    try:
        # Valid UTF-8 without lone surrogates, which cannot be printed.
        document = json.loads(
            header.decode(), object_pairs_hook=pairs, parse_float=number, parse_constant=number, strict=True
        )
        json.dumps(document, ensure_ascii=False).encode()
        return document
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the header is not JSON ({error})") from error


def _read_header(document: Any) -> tuple[Description, list[Entry]]:
    fields = json_object("the header", document, ["description", "arrays"])
    c = description_from_json(fields["description"])
    stated = fields["arrays"]
    names = list(array_shapes(c))
    if not isinstance(stated, list) or len(stated) != len(names):
        count = len(stated) if isinstance(stated, list) else stated
        refuse(f"arrays must list the {len(names)} arrays of the network", count)
    shapes = {}
    for name, entry in zip(names, stated, strict=True):
        json_object(f"the entry of {name}", entry, [field.name for field in dataclasses.fields(Entry)])
        shape = entry["shape"]
        if not isinstance(shape, list) or not all(type(n) is int for n in shape):
            refuse(f"the shape of {name} must be a list of whole numbers", shape)
        shapes[name] = tuple(shape)
    entries = list(table(c, shapes))
    for entry, found in zip(entries, stated, strict=True):
        for key, expected in dataclasses.asdict(entry).items():
            # True is 1 and 1.0 is 1, but neither is what is written.
            if key != "shape" and (type(found[key]) is not type(expected) or found[key] != expected):
                refuse(f"{key} of {entry.name} must be {reprlib.repr(expected)}", found[key])
    return c, entries


def _read_arrays(c: Description, entries: list[Entry], data: np.ndarray, start: int) -> dict[str, np.ndarray]:
    length = start + entries[-1].offset + entries[-1].size
    if length != data.size:
        raise InputError(f"its arrays end at byte {length}, but the file ends at {data.size}")
    arrays, end = {}, 0
    for entry in entries:
        if data[start + end : start + entry.offset].any():
            raise InputError(f"the bytes before {entry.name} must be 0")
        end = entry.offset + entry.size
        stored = data[start + entry.offset : start + entry.offset + entry.size]
        if entry.encoding == "nibbles":
            values = unpack(stored, entry.shape)
            values.flags.writeable = False
        else:
            if entry.dtype == "bool" and stored.max() > 1:
                raise InputError(f"{entry.name} must hold 0 and 1, got {stored.max()}")
            values = stored.view(np.dtype(entry.dtype).newbyteorder("<")).reshape(entry.shape)
        arrays[entry.name] = values
    return arrays
