"""Exports an integer network as one C99 file with its weights: <stdint.h> alone, no allocation, recursion or floats.

The file contains no asterisk: it computes with sums, comparisons and shifts, walks arrays by growing offsets, and
passes arrays, not pointers. It runs layer by layer over all time steps, so that potentials live only while their layer
runs; between layers it stores spikes, one bit each, and the potentials of a stage's skip connection. Shifts are of
unsigned numbers and conversions are in range, so that nothing is undefined or implementation-defined.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spiking_mlp_jax.deploy import artifact, reference
from spiking_mlp_jax.deploy.c.layers import stage
from spiking_mlp_jax.deploy.c.source import Source, declared, itemsize, loop, wrapped
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.files import write_whole
from spiking_mlp_jax.utils.templates import render

# Bit positions and sums over steps have 32 bits.
_TOP = (1 << 31) - 1


class Memory(NamedTuple):
    """Bytes that the exported program needs, besides its code and half a kilobyte of stack."""

    constants: int
    ram: int


def export_c(net: IntegerNet, path: str | os.PathLike[str]) -> Memory:
    """Write the C file of a network. Its functions are named after the file, see `identifier`.

    Args:
        net: any integer network.
        path: of the file; an existing one is replaced.

    Returns:
        the bytes that the program needs.

    Raises:
        InputError: the network does not pass `artifact.check`, a score could exceed 32 bits, or the file cannot be
            written.
    """
    text, needed = _written(net, identifier(Path(path).stem))
    write_whole(path, [text.encode()])
    return needed


def to_c(net: IntegerNet, name: str = "net") -> str:
    """The C file of a network, as text.

    Args:
        net: any integer network.
        name: prefix of its functions' names; `identifier` is applied.

    Raises:
        InputError: as `export_c`.
    """
    return _written(net, identifier(name))[0]


def memory(net: IntegerNet) -> Memory:
    """The bytes that the exported program needs: its constant arrays, and its static buffers.

    Raises:
        InputError: as `export_c`.
    """
    return _written(net, "net")[1]


def identifier(name: str) -> str:
    """A C identifier for a name: at most 40 ASCII letters, digits and underscores.

    "net" is prepended before a digit or an underscore, which C reserves.

    Examples:
        >>> identifier("fashion mnist-4bit"), identifier("4bit")
        ('fashion_mnist_4bit', 'net_4bit')
    """
    found = re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9]", "_", name)).rstrip("_")[:40].rstrip("_")
    if not found:
        return "net"
    return f"net{found}" if found[0] == "_" else f"net_{found}" if found[0].isdigit() else found


def _written(net: IntegerNet, name: str) -> tuple[str, Memory]:
    """The file's text, and the bytes that it needs."""
    _check(net)
    source, c = Source(net), net.description
    # In the order of the file: each part adds its constants, whose size is known at the end.
    stages = [stage(source, i) for i in range(c.stages)]
    head = source.layer("head")
    counters = [("from", "0", source.grid(c.stages - 1))]
    counters += [("k", "0", head.kernel_step), ("o", "0", head.out_step)] if head.kernel_step else []
    static, ram = _buffers(source)
    values = {
        "name": name,
        "c": c,
        "ram": ram,
        "constant_bytes": source.constant_bytes,
        "constants": "\n".join(source.constants),
        "static": static,
        "nodes": source.nodes,
        "potential": source.potential,
        "neurons": source.neurons,
        "stages": stages,
        "head": head,
        "tokens": c.stage_side(c.stages - 1) ** 2,
        "channels": c.stage_dim(c.stages - 1),
        "counters": counters,
        "declared": declared,
        "loop_head": loop,
    }
    text = render("spiking_mlp_jax.deploy.c", "network.c.jinja", values)
    return wrapped(text), Memory(source.constant_bytes, ram)


def _check(net: IntegerNet) -> None:
    """Refuse a network that is damaged or needs more than 32 bits."""
    artifact.check(net)
    c = net.description
    largest = _largest_scores(net)
    if largest > _TOP:
        raise InputError(
            f"the scores, sums over {c.time_steps} steps, can reach {largest}, which 32 bits do not hold; quantize the "
            "head with fewer fraction bits"
        )
    if max(c.stage_side(i) ** 2 * c.stage_dim(i) for i in range(c.stages)) * c.time_steps > _TOP:
        raise InputError("a layer has more spikes over all steps than 31 bits can count")


def _largest_scores(net: IntegerNet) -> int:
    """A bound of the magnitude of a class's sum of logits over any number of steps."""
    c = net.description
    kernel, by, bias = (net.arrays[f"head.{entry}"] for entry in ("kernel", "shift", "bias"))
    tokens = c.stage_side(c.stages - 1) ** 2
    sides = (side(kernel, 0).sum(1, dtype=np.int64) * tokens for side in (np.minimum, np.maximum))
    logits = np.maximum(*(np.abs(reference.shift(side, by) + bias.astype(np.int64)) for side in sides))
    return int(np.broadcast_to(logits, (c.time_steps, c.num_classes)).sum(0).max())


def _buffers(source: Source) -> tuple[str, int]:
    """The static arrays that the file writes to, and their bytes."""
    c = source.c
    grids = [source.grid(i) for i in range(c.stages)]
    dim, side = c.stage_dim(c.stages - 1), c.stage_side(0)
    stem_steps = len(source.arrays["stage0.encode.kernel"])
    held = max([stem_steps * grids[0], *(c.time_steps * grid for grid in grids[1:])])
    bits = (c.time_steps * max(grids) + 7) // 8
    wide = c.expansion * dim
    # A comment, and the arrays that it is of: type, name, count.
    groups = [
        (
            "The potentials of a stage's encoding, which the skip connection of each block adds.",
            [(source.potential, "held", held)],
        ),
        (
            "Spikes of a stage, one bit each: [step][token][channel].",
            [("uint8_t", name, bits) for name in ("spikes", "height_spikes", "width_spikes")],
        ),
        (
            "Spikes of one token.",
            [("uint8_t", "token", (dim + 7) // 8), ("uint8_t", "hidden", (wide + 7) // 8)],
        ),
        (
            "Sums and potentials of one token, or of one row or column.",
            [
                ("int32_t", "sum", max(wide, side, c.num_classes)),
                ("int32_t", "joined", dim),
                ("int32_t", "v_first", max(dim, side)),
                ("int32_t", "v_hidden", wide),
                ("int32_t", "v_last", dim),
                *[("int32_t", "v_identity", dim)] * (c.encoding == "plain"),
            ],
        ),
    ]
    lines, size = [], 0
    for comment, arrays in groups:
        lines.append(f"// {comment}")
        for ctype, name, count in arrays:
            lines.append(f"static {ctype} {name}[{count}];")
            size += count * itemsize(ctype)
    return "\n".join(lines) + "\n", size
