"""Where an artifact's arrays lie, and two small weights in a byte.

Every array's place follows from the description, S and k. The header states it, for readers without this package, and
is compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from spiking_mlp_jax.deploy.artifact_check import MAX_TERMS, refuse
from spiking_mlp_jax.deploy.network import Description, array_shapes
from spiking_mlp_jax.errors import InputError

ALIGNMENT = 64


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
                raise InputError(f"the arrays of {layer} do not have one number of {symbol}")
        count = math.prod(shape)
        packed = _is_packed(c, name)
        nbytes = (count + 1) // 2 if packed else count * np.dtype(dtype).itemsize
        offset = aligned(end)
        yield Entry(name, dtype, shape, offset, nbytes, "nibbles" if packed else "raw")
        end = offset + nbytes


def _is_packed(c: Description, name: str) -> bool:
    return c.bits <= 4 and name.endswith(".kernel")


def aligned(position: int) -> int:
    """The first place at or after a position where an array may begin."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def pack(values: np.ndarray) -> np.ndarray:
    """int8 in -8..7, two a byte in C order, the first in the low half; a last odd one beside 0."""
    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, np.int8)).view(np.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The int8 values of this shape that `pack` packed."""
    values = np.empty((packed.size, 2), np.int8)
    # To the top of a byte and back down again, which brings the sign along.
    values[:, 0] = packed << 4
    values[:, 1] = packed
    values >>= 4
    return values.reshape(-1)[: math.prod(shape)].reshape(shape)
