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
from spiking_mlp_jax.deploy.c.layers import block, encode
from spiking_mlp_jax.deploy.c.operations import operations
from spiking_mlp_jax.deploy.c.source import Layer, Source, declared, itemsize, loop, wrapped
from spiking_mlp_jax.deploy.network import Description, IntegerNet
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.files import write_whole

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
    source = Source(net)
    # In the order of the file: each part adds its constants, whose size is known at the end.
    stages = []
    for i, depth in enumerate(source.c.depths):
        stages += [encode(source, i), *(block(source, i, j) for j in range(depth))]
    ends = _interface(source, name)
    static, ram = _buffers(source)
    program = [static, operations(source), *stages, ends, _main(source.c, name)]
    top = [wrapped(_introduction(source, name, ram)), "// The network's constants.\n"]
    return "\n".join([*top, *source.constants, *map(wrapped, program)]), Memory(source.constant_bytes, ram)


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


def _introduction(source: Source, name: str, ram: int) -> str:
    """The top of the file: what it is, its bytes, its functions; ram is the bytes of its buffers."""
    c = source.c
    sizes = f"const uint8_t pixels[{_pixels(c)}]"
    logits = f"int32_t logits[{c.time_steps}][{c.num_classes}]"
    image = f"{c.image_size} x {c.image_size} x {c.in_channels}"
    return f"""\
// {name}: a spiking MLP in integers. {image} pixels, {c.num_classes} classes, {c.time_steps} time steps,
// weights of {c.bits} bits. Generated by spiking_mlp_jax from a .smlp file: do not edit.
//
// C99, only <stdint.h>. Computes with additions, comparisons and shifts: each spike adds a row of weights. Not
// thread-safe: its buffers are static.
//
// Bytes of constants: {source.constant_bytes}. Bytes of buffers: {ram}.
//
// pixels: bytes from 0 to 255 of the image, [row][column][channel], from the top left; the weights include the
//     normalization of pixels.
// logits: [step][class], in units of 2^-{c.formats["head"].fraction}.
// scores: [class], their sums over all steps.
#include <stdint.h>

// The logits of the first steps, 1 to {c.time_steps}; those of later steps are not written.
void {name}_run({sizes}, uint32_t steps, {logits});

// The logits of all steps.
void {name}_logits({sizes}, {logits});

// The scores; returns the argmax, the first one in a tie.
int {name}_classify({sizes}, int32_t scores[{c.num_classes}]);
"""


def _interface(source: Source, name: str) -> str:
    """The head and the public functions."""
    c, layer = source.c, source.layer("head")
    counters = [("from", "0", source.grid(c.stages - 1))]
    call = "head(from)"
    if layer.kernel_step:
        counters += [("k", "0", layer.kernel_step), ("o", "0", layer.out_step)]
        call = "head(from, k, o)"
    sizes = f"const uint8_t pixels[{_pixels(c)}]"
    return f"""\
{_head(c, layer)}
void {name}_run({sizes}, uint32_t steps, int32_t logits[{c.time_steps}][{c.num_classes}])
{{
    uint32_t t, i{declared(counters)};
    run_blocks(pixels, steps);
    {loop("t", "0", "steps", counters)} {{
        {call};
        for (i = 0; i < {c.num_classes}; i++) logits[t][i] = sum[i];
    }}
}}

void {name}_logits({sizes}, int32_t logits[{c.time_steps}][{c.num_classes}])
{{
    {name}_run(pixels, {c.time_steps}, logits);
}}

int {name}_classify({sizes}, int32_t scores[{c.num_classes}])
{{
    uint32_t t, i{declared(counters)};
    int best = 0;
    run_blocks(pixels, {c.time_steps});
    for (i = 0; i < {c.num_classes}; i++) scores[i] = 0;
    {loop("t", "0", str(c.time_steps), counters)} {{
        {call};
        for (i = 0; i < {c.num_classes}; i++) scores[i] += sum[i];
    }}
    for (i = 1; i < {c.num_classes}; i++)
        if (scores[i] > scores[best]) best = (int)i;
    return best;
}}
"""


def _head(c: Description, layer: Layer) -> str:
    last = c.stages - 1
    channels, tokens = c.stage_dim(last), c.stage_side(last) ** 2
    calls = []
    for i in range(c.stages):
        calls.append("    stage0_encode(pixels, steps);" if i == 0 else f"    stage{i}_encode(steps);")
        calls += [f"    stage{i}_block{j}(steps);" for j in range(c.depths[i])]
    listed = "\n".join(calls)
    after = ", uint32_t k, uint32_t o" if layer.kernel_step else ""
    kernel = f"head_kernel{' + k' * bool(after)}"
    scale = ", ".join(f"head_{key}{' + o' * bool(after)}" for key in ("shift", "bias"))
    return f"""\
// All spikes of the last block.
static void run_blocks(const uint8_t pixels[], uint32_t steps)
{{
{listed}
}}

// The logits of the step whose spikes begin at a bit, into sum.
static void head(uint32_t from{after})
{{
    uint32_t n;
    fill(sum, {c.num_classes}, 0);
    for (n = 0; n < {tokens}; n++, from += {channels})
        gather(sum, spikes, from, {channels}, {kernel}, {layer.width}, {c.num_classes});
    finish(sum, {scale}, {c.num_classes});
}}
"""


def _main(c: Description, name: str) -> str:
    """The file's own program, compiled with -DSMLP_MAIN."""
    pixels = _pixels(c)
    return f"""\
#ifdef SMLP_MAIN
#include <stdio.h>

// Reads images from standard input, {pixels} bytes each (`spiking-mlp pixels`); prints one line per image: class,
// scores. Returns 1 if the input is not one or more whole images, or cannot be read.
int main(void)
{{
    static uint8_t pixels[{pixels}];
    static int32_t scores[{c.num_classes}];
    size_t got;
    unsigned long images = 0;
    while ((got = fread(pixels, 1, {pixels}, stdin)) == {pixels}) {{
        int i;
        images++;
        printf("%d", {name}_classify(pixels, scores));
        for (i = 0; i < {c.num_classes}; i++) printf(" %ld", (long)scores[i]);
        printf("\\n");
    }}
    if (got || !images || ferror(stdin)) {{
        fprintf(stderr, "error: expected images of {pixels} bytes each, got %lu and %lu bytes more\\n", images,
                (unsigned long)got);
        return 1;
    }}
    return 0;
}}
#endif
"""


def _pixels(c: Description) -> int:
    return c.image_size * c.image_size * c.in_channels
