"""An integer network as one C99 file: weights in, <stdint.h> alone, no allocation, no recursion, no floating point.

The file has no asterisk at all: what it computes are sums, comparisons and shifts, arrays are walked by offsets that
grow, and everything it calls gets arrays, not pointers. It runs layer by layer over all time steps, so that a neuron's
potential lives only while its own steps are run; what stays between layers are spikes, a bit each, and the potentials
that a stage's skip connection joins. Every shift is of an unsigned number and every conversion is within range, so
that nothing in it is undefined or left to the implementation.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spiking_mlp_jax.deploy import artifact, reference
from spiking_mlp_jax.deploy.c.block import block
from spiking_mlp_jax.deploy.c.buffers import buffers
from spiking_mlp_jax.deploy.c.encode import encode
from spiking_mlp_jax.deploy.c.helpers import helpers
from spiking_mlp_jax.deploy.c.interface import interface, introduction, main
from spiking_mlp_jax.deploy.c.source import Source, wrapped
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.files import write_whole

# Bit positions and sums over steps are held in 32 bits.
_TOP = (1 << 31) - 1


class Memory(NamedTuple):
    """Bytes that the exported program needs, beside its code and half a kilobyte of stack."""

    constants: int
    ram: int


def export_c(net: IntegerNet, path: str | os.PathLike[str]) -> Memory:
    """Writes the C file of a network; its functions are named after the file, see `identifier`.

    Args:
        net: any integer network.
        path: of the file, over an older one if need be.

    Returns:
        the bytes that the program needs.

    Raises:
        InputError: the network would not pass `artifact.check`, the scores could need more than 32 bits, or the file
            cannot be written.
    """
    text, needed = _written(net, identifier(Path(path).stem))
    write_whole(path, [text.encode()])
    return needed


def to_c(net: IntegerNet, name: str = "net") -> str:
    """The C file of a network, as text.

    Args:
        net: any integer network.
        name: what its functions' names begin with, made an identifier.

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
    """A C identifier that is like a name: at most 40 ASCII letters, digits and underscores.

    One that would begin with a digit or an underscore, which C reserves, gets "net" in front.

    Examples:
        >>> identifier("fashion mnist-4bit"), identifier("4bit")
        ('fashion_mnist_4bit', 'net_4bit')
    """
    found = re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9]", "_", name)).rstrip("_")[:40].rstrip("_")
    if not found:
        return "net"
    return f"net{found}" if found[0] == "_" else f"net_{found}" if found[0].isdigit() else found


def _written(net: IntegerNet, name: str) -> tuple[str, Memory]:
    """The file's text, and what it needs."""
    _check(net)
    source = Source(net)
    # In the file's order, which is that of the constants too; how many there are is known at the end.
    stages = []
    for i, depth in enumerate(source.c.depths):
        stages += [encode(source, i), *(block(source, i, j) for j in range(depth))]
    ends = interface(source, name)
    static, ram = buffers(source)
    program = [static, helpers(source), *stages, ends, main(source.c, name)]
    top = [wrapped(introduction(source, name, ram)), "// The network's constants.\n"]
    return "\n".join([*top, *source.constants, *map(wrapped, program)]), Memory(source.constant_bytes, ram)


def _check(net: IntegerNet) -> None:
    """Refuses what could not run, or not within 32 bits."""
    artifact.check(net)
    c = net.description
    largest = _largest_scores(net)
    if largest > _TOP:
        raise InputError(
            f"the scores, sums over {c.time_steps} steps, can reach {largest}, which 32 bits do not hold: quantise "
            "the network with fewer bits after the point of its head"
        )
    if max(c.stage_side(i) ** 2 * c.stage_dim(i) for i in range(c.stages)) * c.time_steps > _TOP:
        raise InputError("a layer has more spikes over all steps than the C program can count in 31 bits")


def _largest_scores(net: IntegerNet) -> int:
    """A bound of what the sum of a class's logits over the first steps can be, either way."""
    c = net.description
    kernel, by, bias = (net.arrays[f"head.{entry}"] for entry in ("kernel", "shift", "bias"))
    tokens = c.stage_side(c.stages - 1) ** 2
    sides = (side(kernel, 0).sum(1, dtype=np.int64) * tokens for side in (np.minimum, np.maximum))
    logits = np.maximum(*(np.abs(reference.shift(side, by) + bias.astype(np.int64)) for side in sides))
    return int(np.broadcast_to(logits, (c.time_steps, c.num_classes)).sum(0).max())
