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

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.infer import artifact, reference
from spiking_mlp_jax.infer.network import Format, IntegerNet

LINE = 120
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
    writer = _Writer(net, identifier(Path(path).stem))
    artifact.write_whole(path, [writer.text().encode()])
    return writer.memory()


def to_c(net: IntegerNet, name: str = "net") -> str:
    """The C file of a network, as text.

    Args:
        net: any integer network.
        name: what its functions' names begin with, made an identifier.

    Raises:
        InputError: as `export_c`.
    """
    return _Writer(net, identifier(name)).text()


def memory(net: IntegerNet) -> Memory:
    """The bytes that the exported program needs: its constant arrays, and its static buffers.

    Raises:
        InputError: as `export_c`.
    """
    writer = _Writer(net, "net")
    writer.text()
    return writer.memory()


def identifier(name: str) -> str:
    """A C identifier that is like a name: at most 40 ASCII letters, digits and underscores.

    One that would begin with a digit or an underscore, which C reserves, gets "net" in front.
    """
    found = re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9]", "_", name)).rstrip("_")[:40].rstrip("_")
    if not found:
        return "net"
    return f"net{found}" if found[0] == "_" else f"net_{found}" if found[0].isdigit() else found


class _Layer(NamedTuple):
    """A map of spikes in the C file: its arrays' names, and what one of its steps and one of its rows take."""

    name: str
    rows: int
    out: int
    width: int
    # Bytes and numbers from one time step's constants to the next's; 0 where all share them.
    kernel_step: int
    out_step: int

    def kernel(self, row: int = 0) -> str:
        at = [f"{self.name}_k"] * bool(self.kernel_step) + [str(row * self.width)] * bool(row)
        return " + ".join([f"{self.name}_kernel", *at])

    def scale(self) -> str:
        at = f" + {self.name}_o" * bool(self.out_step)
        return f"{self.name}_shift{at}, {self.name}_bias{at}"

    def counters(self) -> list[tuple[str, str, int]]:
        """Variables that follow the time steps: name, start, step."""
        return [(f"{self.name}_{key}", "0", n) for key, n in (("k", self.kernel_step), ("o", self.out_step)) if n]


class _Writer:
    """Builds the file from the end: what a part needs is noted when it is written."""

    def __init__(self, net: IntegerNet, name: str):
        artifact.check(net)
        self.net, self.c, self.name = net, net.description, name
        c = self.c
        largest = _largest_scores(net)
        if largest > _TOP:
            raise InputError(
                f"the scores, sums over {c.time_steps} steps, can reach {largest}, which 32 bits do not hold: quantise "
                "the network with fewer bits after the point of its head"
            )
        if max(c.stage_side(i) ** 2 * c.stage_dim(i) for i in range(c.stages)) * c.time_steps > _TOP:
            raise InputError("a layer has more spikes over all steps than the C program can count in 31 bits")
        self.constants: list[str] = []
        self.constant_bytes = self.ram_bytes = 0
        self.sides = [c.stage_side(i) for i in range(c.stages)]
        self.dims = [c.stage_dim(i) for i in range(c.stages)]
        self.pixels = c.image_size * c.image_size * c.in_channels
        self.nodes = c.encoding == "spe" and c.stages > 1
        self.potential = f"int{max(c.formats[f'stage{i}'].word for i in range(c.stages))}_t"

    def text(self) -> str:
        self.constants, self.constant_bytes, self.ram_bytes = [], 0, 0
        stages = [self.stage(i) for i in range(self.c.stages)]
        head = self.head()
        buffers = self.buffers()
        return "\n".join(
            [
                _wrapped(self.introduction()),
                "// The network's constants.\n",
                *self.constants,
                *map(_wrapped, [buffers, self.helpers(), *stages, head, self.interface(), self.main()]),
            ]
        )

    def memory(self) -> Memory:
        return Memory(self.constant_bytes, self.ram_bytes)

    # Constants.

    def constant(self, ctype: str, name: str, values: np.ndarray, comment: str = "") -> None:
        numbers = values.reshape(-1).tolist()
        self.constant_bytes += values.size * np.dtype(ctype.removesuffix("_t")).itemsize
        words = [str(number) for number in numbers]
        count = (LINE - 4) // (max(map(len, words)) + 2)
        lines = [", ".join(words[i : i + count]) for i in range(0, len(words), count)]
        self.constants.append(
            f"{f'// {comment}' + chr(10) if comment else ''}static const {ctype} {name}[{len(words)}] = {{\n    "
            + ",\n    ".join(lines)
            + "\n};\n"
        )

    def layer(self, key: str) -> _Layer:
        """Writes a layer's constants."""
        kernel, by, bias = (self.net.arrays[f"{key}.{entry}"] for entry in ("kernel", "shift", "bias"))
        name = key.replace(".", "_")
        steps, rows, out = kernel.shape
        width = out
        note = f"{key}: {rows} rows of {out}"
        if self.c.bits <= 4:
            # Two weights a byte, the first in the low half; each row begins with a byte of its own.
            width = (out + 1) // 2
            even = np.zeros((steps, rows, 2 * width), np.int8)
            even[..., :out] = kernel
            kernel = artifact._pack(even)
            note += ", two weights a byte, low half first"
        note += f", for each of {steps} steps" * (steps > 1)
        self.constant("uint8_t" if self.c.bits <= 4 else "int8_t", f"{name}_kernel", kernel, note)
        self.constant("int8_t", f"{name}_shift", by)
        self.constant("int32_t", f"{name}_bias", bias)
        several = steps > 1
        return _Layer(name, rows, out, width, several * rows * width, several * out)

    # Memory that is written to.

    def buffers(self) -> str:
        c, dims, sides = self.c, self.dims, self.sides
        grids = [dim * side * side for dim, side in zip(dims, sides, strict=True)]
        stem_steps = len(self.net.arrays["stage0.encode.kernel"])
        held = max([stem_steps * grids[0], *(c.time_steps * grid for grid in grids[1:])])
        bits = (c.time_steps * max(grids) + 7) // 8
        widest = max(c.expansion * dims[-1], sides[0], c.num_classes)
        found = [
            ("The potentials of a stage's encoding, which its skip connection adds in each block.", ""),
            (self.potential, "held", held),
            ("Spikes of a stage, a bit each: [step][token][channel].", ""),
            ("uint8_t", "spikes", bits),
            ("uint8_t", "height_spikes", bits),
            ("uint8_t", "width_spikes", bits),
            ("Spikes of one token.", ""),
            ("uint8_t", "token", (dims[-1] + 7) // 8),
            ("uint8_t", "hidden", (c.expansion * dims[-1] + 7) // 8),
            ("Sums and potentials of one token, or of one row or column.", ""),
            ("int32_t", "sum", widest),
            ("int32_t", "joined", dims[-1]),
            ("int32_t", "v_first", max(dims[-1], sides[0])),
            ("int32_t", "v_hidden", c.expansion * dims[-1]),
            ("int32_t", "v_last", dims[-1]),
        ]
        if c.encoding == "plain":
            found.append(("int32_t", "v_identity", dims[-1]))
        lines = []
        for entry in found:
            if len(entry) == 2:
                lines.append(f"// {entry[0]}")
                continue
            ctype, name, count = entry
            self.ram_bytes += count * np.dtype(ctype.removesuffix("_t")).itemsize
            lines.append(f"static {ctype} {name}[{count}];")
        return "\n".join(lines) + "\n"

    # The program.

    def stage(self, i: int) -> str:
        c, name = self.c, f"stage{i}"
        place, channels, side = c.formats[name], self.dims[i], self.sides[i]
        grid = side * side * channels
        if i == 0:
            body, held_step = self.stem(), 0
            if len(self.net.arrays["stage0.encode.kernel"]) > 1:
                held_step = grid
        else:
            body, held_step = (self.nodes_encoding(i) if self.nodes else self.plain_encoding(i)), grid
        fire = (
            f"    fire_grid(spikes, steps, {side * side}, {channels}, 0, {channels}, {held_step}, {grid}, "
            f"{self.neurons(place)});\n}}\n"
        )
        blocks = [self.block(i, f"{name}.block{j}", held_step) for j in range(c.depths[i])]
        return "\n".join([body + fire, *blocks])

    def neurons(self, place: Format) -> str:
        """Level (the threshold times 2^leak) and reset of a place's neurons."""
        return f"{place.threshold << self.c.leak}, {place.reset}" + ", 0" * self.c.per_token

    def stem(self) -> str:
        c, layer = self.c, self.layer("stage0.encode")
        channels, side = self.dims[0], self.sides[0]
        line = c.image_size * c.in_channels
        across = c.patch_size * c.in_channels
        several = bool(layer.kernel_step)
        indent = "    " * several
        step = _for("t", "0", "steps", layer.counters())
        body = f"""\
    for (row = 0, top = 0; row < {side}; row++, top += {line * c.patch_size}) {{
        for (column = 0, from = top; column < {side}; column++, from += {across}, to += {channels}) {{
            fill(sum, {channels}, 0);
            for (bit = 8; bit-- > 0;) {{
                for (i = 0; i < {channels}; i++) sum[i] += sum[i];
                for (y = 0, start = from, k = 0; y < {c.patch_size}; y++, start += {line}) {{
                    for (i = 0; i < {across}; i++, k += {layer.width}) {{
                        if (pixels[start + i] >> bit & 1) add(sum, {layer.kernel()} + k, {channels});
                    }}
                }}
            }}
            finish(sum, {layer.scale()}, {channels});
            for (i = 0; i < {channels}; i++) held[to + i] = ({self.potential})sum[i];
        }}
    }}
"""
        if several:
            body = f"    {step} {{\n" + re.sub("^", indent, body, flags=re.M).rstrip(" ") + "    }\n"
        return f"""\
// Patches of pixels, bit by bit from the highest: what is summed so far is doubled by adding it to itself.
static void stage0_encode(const uint8_t pixels[], uint32_t steps)
{{
    uint32_t row, column, top, from, start, to = 0, y, i, k, bit{_declared(layer.counters(), "t" * several)};
{body}"""

    def plain_encoding(self, i: int) -> str:
        layer = self.layer(f"stage{i}.encode")
        before, channels, side = self.dims[i - 1], self.dims[i], self.sides[i]
        line = 2 * side * before
        counters = [("first", "0", 4 * side * side * before), *layer.counters()]
        return f"""\
// Windows of 2 x 2 tokens.
static void stage{i}_encode(uint32_t steps)
{{
    uint32_t t, row, column, top, from, to = 0, i{_declared(counters)};
    {_for("t", "0", "steps", counters)} {{
        for (row = 0, top = first; row < {side}; row++, top += {2 * line}) {{
            for (column = 0, from = top; column < {side}; column++, from += {2 * before}, to += {channels}) {{
                fill(sum, {channels}, 0);
                gather(sum, spikes, from, {2 * before}, {layer.kernel()}, {layer.width}, {channels});
                gather(sum, spikes, from + {line}, {2 * before}, {layer.kernel(2 * before)}, {layer.width}, {channels});
                finish(sum, {layer.scale()}, {channels});
                for (i = 0; i < {channels}; i++) held[to + i] = ({self.potential})sum[i];
            }}
        }}
    }}
"""

    def nodes_encoding(self, i: int) -> str:
        cells, edge1, edge2 = (self.layer(f"stage{i}.encode.{key}") for key in ("cells", "edge1", "edge2"))
        before, channels, side = self.dims[i - 1], self.dims[i], self.sides[i]
        node, grid = channels // 3, side * side * channels
        neurons = self.neurons(self.c.formats[f"stage{i}"])

        def windows(layer, source, inside, grid_side, stride, store):
            line = grid_side * inside
            counters = [("start", str(-line - inside), grid_side * line), *layer.counters()]
            return f"""\
    to = 0;
    {_for("t", "0", "steps", counters)} {{
        for (row = -1, top = start; row < {grid_side - 1}; row += {stride}, top += {stride * line}) {{
            for (column = -1, from = top; column < {grid_side - 1}; column += {stride}, from += {stride * inside}) {{
                fill(sum, {layer.out}, 0);
                window(sum, {source}, from, row, column, {grid_side}, {line}, {inside}, {layer.kernel()},
                       {inside * layer.width}, {layer.width}, {layer.out});
                finish(sum, {layer.scale()}, {layer.out});
                {store}
                to += {channels};
            }}
        }}
    }}
"""

        cast = f"({self.potential})"
        first = windows(
            cells,
            "spikes",
            before,
            2 * side,
            2,
            f"for (i = 0; i < {channels}; i++) held[to + i] = {cast}sum[i];",
        )
        second = windows(
            edge1,
            "height_spikes",
            node,
            side,
            1,
            f"for (i = 0; i < {node}; i++) held[to + {node} + i] = {cast}(held[to + {node} + i] + sum[i]);",
        )
        third = windows(
            edge2,
            "height_spikes",
            node,
            side,
            1,
            f"for (i = 0; i < {node}; i++)\n                    held[to + {2 * node} + i] = "
            f"{cast}(held[to + {2 * node} + i] + held[to + i] + sum[i]);",
        )
        counters = [*cells.counters(), *edge1.counters(), *edge2.counters()]

        def fire(offset):
            return (
                f"    fire_grid(height_spikes, steps, {side * side}, {node}, {offset}, {channels}, {grid}, "
                f"{side * side * node}, {neurons});\n"
            )

        return f"""\
// Windows of 3 x 3 tokens for three nodes, and edges from the first to the second and from it to the third.
static void stage{i}_encode(uint32_t steps)
{{
    int32_t start, top, from, row, column;
    uint32_t t, to, i{_declared(counters)};
{first}{fire(0)}{second}{fire(node)}{third}"""

    def block(self, i: int, key: str, held_step: int) -> str:
        c, name = self.c, key.replace(".", "_")
        channels, side = self.dims[i], self.sides[i]
        wide, tokens = c.expansion * channels, side * side
        grid = tokens * channels
        here, hidden = c.formats[f"stage{i}"], c.formats[f"{key}.hidden"]
        height, width, fuse, expand, project = (
            self.layer(f"{key}.{part}") for part in ("height", "width", "fuse", "expand", "project")
        )
        counters = [("from", "at", grid), ("kept", "at", held_step)]
        for layer in (fuse, expand, project):
            counters += layer.counters()
        counts = ["n", "at", "i"]
        walks, offsets = "", {}
        identity, identity_fill = (
            f"gather(sum, spikes, from, {channels}, {fuse.kernel()}, {fuse.width}, {channels});",
            "",
        )
        if c.encoding == "plain":
            low, high = (self.net.arrays[f"{key}.identity.{entry}"] for entry in ("low", "high"))
            self.constant("int32_t", f"{name}_identity_low", low)
            self.constant("int32_t", f"{name}_identity_high", high)
            at = ""
            if len(low) > 1:
                counters.append(("identity_at", "0", channels))
                at = "identity_at + "
            place = c.formats[f"{key}.identity"]
            identity_fill = f"        fill(v_identity, {channels}, {place.reset});\n"
            identity = f"""\
for (i = 0; i < {channels}; i++)
                sum[i] = bit_of(spikes, from + i) ? {name}_identity_high[{at}i] : {name}_identity_low[{at}i];
            fire(sum, v_identity, {channels}, token, 0, 1, {self.neurons(place)});
            fill(sum, {channels}, 0);
            gather(sum, token, 0, {channels}, {fuse.kernel()}, {fuse.width}, {channels});"""
        hidden_neurons, hidden_reset = self.neurons(hidden), str(hidden.reset)
        shifted, joined = "", "sum[i]"
        if c.per_token:
            self.per_token_constants(key, name)
            for part in ("expand", "project"):
                offset = self.net.arrays[f"{key}.{part}.offset"]
                if len(offset) > 1:
                    counters.append((f"{part}_at", "0", tokens))
                offsets[part] = f"{name}_{part}_offset[{f'{part}_at + ' * (len(offset) > 1)}n]"
            terms = self.net.arrays[f"{key}.project.signs"].shape[1]
            counts.append("term")
            walks = f", term += {terms}"
            hidden_neurons = f"{name}_level[n], {name}_reset[n], {name}_turned[n] & 1"
            hidden_reset = f"{name}_reset[n]"
            shifted = f"""\
            if ({name}_turned[n] & 2) fill(sum, {wide}, 0);
            for (i = 0; i < {wide}; i++) sum[i] += {offsets["expand"]};
"""
            joined = (
                f"scaled(sum[i], {name}_exponents + term, {name}_signs + term, {terms})\n"
                f"                             + {offsets['project']}"
            )

        def mix(layer, part, outer, outer_stride, inner, stride):
            return (
                f"    mix({part}_spikes, steps, {grid}, {outer}, {outer_stride}, {inner}, {side}, {stride},\n"
                f"        {layer.name}_kernel, {layer.kernel_step}, {layer.width}, {layer.name}_shift, "
                f"{layer.name}_bias, {layer.out_step}, {self.neurons(c.formats[f'{key}.{part}'])});\n"
            )

        begin = ", term = 0" * c.per_token
        return f"""\
static void {name}(uint32_t steps)
{{
    uint32_t t, {", ".join(counts)}{_declared(counters)};
    // Along each column, then along each row.
{mix(height, "height", 1, 0, side * channels, side * channels)}\
{mix(width, "width", side, side * channels, channels, channels)}\
    for (n = 0, at = 0{begin}; n < {tokens}; n++, at += {channels}{walks}) {{
{identity_fill}\
        fill(v_first, {channels}, {here.reset});
        fill(v_hidden, {wide}, {hidden_reset});
        fill(v_last, {channels}, {here.reset});
        {_for("t", "0", "steps", counters)} {{
            // Fuse the three.
            fill(sum, {channels}, 0);
            {identity}
            gather(sum, height_spikes, from, {channels}, {fuse.kernel(channels)}, {fuse.width}, {channels});
            gather(sum, width_spikes, from, {channels}, {fuse.kernel(2 * channels)}, {fuse.width}, {channels});
            finish(sum, {fuse.scale()}, {channels});
            for (i = 0; i < {channels}; i++) joined[i] = held[kept + i] + sum[i];
            fire(joined, v_first, {channels}, token, 0, 1, {self.neurons(here)});
            // Channels.
            fill(sum, {wide}, 0);
            gather(sum, token, 0, {channels}, {expand.kernel()}, {expand.width}, {wide});
            finish(sum, {expand.scale()}, {wide});
{shifted}\
            fire(sum, v_hidden, {wide}, hidden, 0, 1, {hidden_neurons});
            fill(sum, {channels}, 0);
            gather(sum, hidden, 0, {wide}, {project.kernel()}, {project.width}, {channels});
            finish(sum, {project.scale()}, {channels});
            for (i = 0; i < {channels}; i++) joined[i] += {joined};
            fire(joined, v_last, {channels}, spikes, from, 1, {self.neurons(here)});
        }}
    }}
}}
"""

    def per_token_constants(self, key: str, name: str) -> None:
        """What each token's neurons and its second norm are made of."""
        a = {
            entry: self.net.arrays[f"{key}.{entry}"]
            for entry in ("expand.threshold", "expand.reset", "expand.below", "expand.constant")
        }
        self.constant("int32_t", f"{name}_level", a["expand.threshold"].astype(np.int64) << self.c.leak)
        self.constant("int32_t", f"{name}_reset", a["expand.reset"])
        turned = a["expand.below"].astype(np.uint8) | a["expand.constant"].astype(np.uint8) << 1
        self.constant("uint8_t", f"{name}_turned", turned, "1: fires at or below its level; 2: sees its offset alone")
        for part in ("expand", "project"):
            self.constant("int32_t", f"{name}_{part}_offset", self.net.arrays[f"{key}.{part}.offset"])
        for entry in ("exponents", "signs"):
            self.constant("int8_t", f"{name}_{entry}", self.net.arrays[f"{key}.project.{entry}"])

    def head(self) -> str:
        layer = self.layer("head")
        c, last = self.c, self.c.stages - 1
        channels, tokens = self.dims[last], self.sides[last] ** 2
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

    def interface(self) -> str:
        c, last = self.c, self.c.stages - 1
        grid = self.dims[last] * self.sides[last] ** 2
        several = len(self.net.arrays["head.kernel"]) > 1
        counters = [("from", "0", grid)]
        call = "head(from)"
        if several:
            bits = self.c.bits
            width = (c.num_classes + 1) // 2 if bits <= 4 else c.num_classes
            counters += [("k", "0", self.dims[last] * width), ("o", "0", c.num_classes)]
            call = "head(from, k, o)"
        sizes = f"const uint8_t pixels[{self.pixels}]"
        return f"""\
void {self.name}_run({sizes}, uint32_t steps, int32_t logits[{c.time_steps}][{c.num_classes}])
{{
    uint32_t t, i{_declared(counters)};
    run_blocks(pixels, steps);
    {_for("t", "0", "steps", counters)} {{
        {call};
        for (i = 0; i < {c.num_classes}; i++) logits[t][i] = sum[i];
    }}
}}

void {self.name}_logits({sizes}, int32_t logits[{c.time_steps}][{c.num_classes}])
{{
    {self.name}_run(pixels, {c.time_steps}, logits);
}}

int {self.name}_classify({sizes}, int32_t scores[{c.num_classes}])
{{
    uint32_t t, i{_declared(counters)};
    int best = 0;
    run_blocks(pixels, {c.time_steps});
    for (i = 0; i < {c.num_classes}; i++) scores[i] = 0;
    {_for("t", "0", str(c.time_steps), counters)} {{
        {call};
        for (i = 0; i < {c.num_classes}; i++) scores[i] += sum[i];
    }}
    for (i = 1; i < {c.num_classes}; i++)
        if (scores[i] > scores[best]) best = (int)i;
    return best;
}}
"""

    def introduction(self) -> str:
        c, name = self.c, self.name
        sizes = f"const uint8_t pixels[{self.pixels}]"
        logits = f"int32_t logits[{c.time_steps}][{c.num_classes}]"
        picture = f"{c.image_size} x {c.image_size} x {c.in_channels}"
        return f"""\
// {name}: a spiking MLP in integers. {picture} pixels, {c.num_classes} classes, {c.time_steps} time steps,
// weights of {c.bits} bits. Written by spiking_mlp_jax from an artifact: change that, not this file.
//
// C99 with nothing but <stdint.h>. Sums, comparisons and shifts are all it computes with; a row of weights is added
// where there is a spike. Not for two threads at once: its buffers are static.
//
// Bytes of constants: {self.constant_bytes}. Bytes of buffers: {self.ram_bytes}.
//
// pixels: bytes from 0 to 255 as they are in the picture, [row][column][channel], each row from the left, rows from
//     the top; the network's own scaling of pixels is in its weights.
// logits: [step][class], in units of 2^-{c.formats["head"].fraction}.
// scores: [class], their sums over all steps.
#include <stdint.h>

// The logits of the first steps, 1 to {c.time_steps}; those of later steps are left as they are.
void {name}_run({sizes}, uint32_t steps, {logits});

// The logits of all steps.
void {name}_logits({sizes}, {logits});

// The scores; returns the class of the highest, the first if there are several.
int {name}_classify({sizes}, int32_t scores[{c.num_classes}]);
"""

    def helpers(self) -> str:
        """The operations; those that the network does not need are left out."""
        c = self.c
        v, x = "(uint32_t)v[i]", "(uint32_t)input[i]"
        if c.neuron == "if":
            charge = f"{v} + {x}"
        else:
            driven = x if c.decay_input else f"({x} << {c.leak})"
            charge = f"({v} << {c.leak}) - {v} + {driven} + (uint32_t)reset"
        after = f"down(charged - level, {c.leak})" if c.soft_reset else "reset"
        # "if" with a soft reset looks at its reset only at the start.
        unused = "    (void)reset;\n" * (c.neuron == "if" and c.soft_reset)
        turned, below = (", int below", ", below") if c.per_token else ("", "")
        fired = "below ? charged <= level : charged >= level" if c.per_token else "charged >= level"
        weight = "uint8_t" if c.bits <= 4 else "int8_t"
        if c.bits <= 4:
            add = """\
    uint32_t i;
    for (i = 0; i + 1 < count; i += 2) {
        const uint32_t pair = row[i >> 1];
        sum[i] += (int32_t)((pair & 15u) ^ 8u) - 8;
        sum[i + 1] += (int32_t)((pair >> 4) ^ 8u) - 8;
    }
    if (i < count) sum[i] += (int32_t)((row[i >> 1] & 15u) ^ 8u) - 8;
"""
        else:
            add = """\
    uint32_t i;
    for (i = 0; i < count; i++) sum[i] += row[i];
"""
        text = f"""\
// The signed number that has these bits.
static int32_t as_signed(uint32_t x)
{{
    return x <= 0x7fffffffu ? (int32_t)x : -1 - (int32_t)~x;
}}

// x times 2^-by, rounded down.
static int32_t down(int32_t x, uint32_t by)
{{
    return x >= 0 ? (int32_t)((uint32_t)x >> by) : -1 - (int32_t)(~(uint32_t)x >> by);
}}

// x times 2^by, halves rounded up.
static int32_t shift(int32_t x, int by)
{{
    if (by >= 0) return as_signed((uint32_t)x << by);
    return down(x + as_signed((uint32_t)1 << (-by - 1)), (uint32_t)-by);
}}

static uint32_t bit_of(const uint8_t bits[], uint32_t at)
{{
    return (uint32_t)bits[at >> 3] >> (at & 7u) & 1u;
}}

static void fill(int32_t x[], uint32_t count, int32_t value)
{{
    uint32_t i;
    for (i = 0; i < count; i++) x[i] = value;
}}

static void add(int32_t sum[], const {weight} row[], uint32_t count)
{{
{add}}}

// Adds the kernel's row of every spike among the bits from ... from + rows - 1; a row has width bytes, for count sums.
static void gather(int32_t sum[], const uint8_t bits[], uint32_t from, uint32_t rows, const {weight} kernel[],
                   uint32_t width, uint32_t count)
{{
    const uint32_t end = from + rows;
    uint32_t k = 0;
    while (from < end) {{
        if ((from & 7u) == 0 && end - from >= 8 && bits[from >> 3] == 0) {{
            from += 8;
            k += width << 3;
            continue;
        }}
        if (bit_of(bits, from)) add(sum, kernel + k, count);
        from++;
        k += width;
    }}
}}

static void finish(int32_t sum[], const int8_t shifts[], const int32_t biases[], uint32_t count)
{{
    uint32_t i;
    for (i = 0; i < count; i++) sum[i] = shift(sum[i], shifts[i]) + biases[i];
}}

// One step of count neurons with potentials v; their spikes go to the bits at, at + stride, ...
static void fire(const int32_t input[], int32_t v[], uint32_t count, uint8_t bits[], uint32_t at, uint32_t stride,
                 int32_t level, int32_t reset{turned})
{{
    uint32_t i;
{unused}\
    for (i = 0; i < count; i++, at += stride) {{
        const int32_t charged = as_signed({charge});
        const int fired = {fired};
        const uint32_t mask = (uint32_t)1 << (at & 7u);
        v[i] = fired ? {after} : down(charged, {c.leak});
        bits[at >> 3] = (uint8_t)(fired ? bits[at >> 3] | mask : bits[at >> 3] & ~mask);
    }}
}}

// All steps of the neurons that see a part of what is held: count channels of each token from the first of stride.
static void fire_grid(uint8_t bits[], uint32_t steps, uint32_t tokens, uint32_t count, uint32_t first, uint32_t stride,
                      uint32_t held_step, uint32_t bits_step, int32_t level, int32_t reset{turned})
{{
    uint32_t n, t, i, from, to, at = 0;
    for (n = 0; n < tokens; n++, first += stride, at += count) {{
        fill(v_first, count, reset);
        for (t = 0, from = first, to = at; t < steps; t++, from += held_step, to += bits_step) {{
            for (i = 0; i < count; i++) sum[i] = held[from + i];
            fire(sum, v_first, count, bits, to, 1, level, reset{below});
        }}
    }}
}}

// A map and its neurons along lines of side tokens, which lie stride bits apart. The lines come in groups outer_stride
// bits apart, and those of a group begin side by side.
static void mix(uint8_t bits[], uint32_t steps, uint32_t bits_step, uint32_t outer, uint32_t outer_stride,
                uint32_t inner, uint32_t side, uint32_t stride, const {weight} kernel[], uint32_t kernel_step,
                uint32_t width, const int8_t shifts[], const int32_t biases[], uint32_t out_step, int32_t level,
                int32_t reset{turned})
{{
    uint32_t o, n, t, p, line, first = 0, at, from, k, row, out;
    for (o = 0; o < outer; o++, first += outer_stride) {{
        for (n = 0, line = first; n < inner; n++, line++) {{
            fill(v_first, side, reset);
            for (t = 0, at = line, k = 0, out = 0; t < steps;
                 t++, at += bits_step, k += kernel_step, out += out_step) {{
                fill(sum, side, 0);
                for (p = 0, from = at, row = k; p < side; p++, from += stride, row += width)
                    if (bit_of(spikes, from)) add(sum, kernel + row, side);
                finish(sum, shifts + out, biases + out, side);
                fire(sum, v_first, side, bits, at, stride, level, reset{below});
            }}
        }}
    }}
}}
"""
        if self.nodes:
            text += f"""
// Adds the rows of the spikes in a window of 3 x 3 tokens, but for those beyond the edges. Its first token is at
// (row, column) and has its bits at from; a token has inside bits, a line of them line, and block bytes of the kernel.
static void window(int32_t sum[], const uint8_t bits[], int32_t from, int32_t row, int32_t column, int32_t side,
                   int32_t line, int32_t inside, const {weight} kernel[], uint32_t block, uint32_t width,
                   uint32_t count)
{{
    int32_t y, x, at;
    for (y = row; y < row + 3; y++, from += line) {{
        for (x = column, at = from; x < column + 3; x++, at += inside, kernel += block) {{
            if (y >= 0 && y < side && x >= 0 && x < side)
                gather(sum, bits, (uint32_t)at, (uint32_t)inside, kernel, width, count);
        }}
    }}
}}
"""
        if c.per_token:
            text += """
// z times a sum of signed powers of two.
static int32_t scaled(int32_t z, const int8_t exponents[], const int8_t signs[], uint32_t terms)
{
    int32_t total = 0;
    uint32_t d;
    for (d = 0; d < terms; d++) {
        if (signs[d] > 0) total += shift(z, exponents[d]);
        if (signs[d] < 0) total -= shift(z, exponents[d]);
    }
    return total;
}
"""
        return text

    def main(self) -> str:
        c = self.c
        return f"""\
#ifdef SMLP_MAIN
#include <stdio.h>

// Reads pictures from standard input, {self.pixels} bytes each; prints a line for each, its class and its scores.
int main(void)
{{
    static uint8_t pixels[{self.pixels}];
    static int32_t scores[{c.num_classes}];
    while (fread(pixels, 1, {self.pixels}, stdin) == {self.pixels}) {{
        int i;
        printf("%d", {self.name}_classify(pixels, scores));
        for (i = 0; i < {c.num_classes}; i++) printf(" %ld", (long)scores[i]);
        printf("\\n");
    }}
    return 0;
}}
#endif
"""


def _largest_scores(net: IntegerNet) -> int:
    """A bound of what the sum of a class's logits over the first steps can be, either way."""
    c = net.description
    kernel, by, bias = (net.arrays[f"head.{entry}"] for entry in ("kernel", "shift", "bias"))
    tokens = c.stage_side(c.stages - 1) ** 2
    sides = (side(kernel, 0).sum(1, dtype=np.int64) * tokens for side in (np.minimum, np.maximum))
    logits = np.maximum(*(np.abs(reference.shift(side, by) + bias.astype(np.int64)) for side in sides))
    return int(np.broadcast_to(logits, (c.time_steps, c.num_classes)).sum(0).max())


def _for(variable: str, start: str, end: str, counters: list[tuple[str, str, int]]) -> str:
    """The head of a loop with more variables that grow beside its own."""
    begin = ", ".join([f"{variable} = {start}", *(f"{name} = {first}" for name, first, _ in counters)])
    grow = ", ".join([f"{variable}++", *(f"{name} += {step}" for name, _, step in counters)])
    return f"for ({begin}; {variable} < {end}; {grow})"


def _declared(counters: list[tuple[str, str, int]], *more: str) -> str:
    """These variables, to follow others in a declaration."""
    return "".join(f", {name}" for name in (*filter(None, more), *(name for name, _, _ in counters)))


def _wrapped(code: str) -> str:
    """Code whose long lines go on in further ones, deeper by four; comments stay."""
    found = []
    for line in code.split("\n"):
        deep = len(line) - len(line.lstrip()) + 4
        while len(line) > LINE and "//" not in line:
            cut = line.rfind(" ", deep, LINE)
            found.append(line[:cut])
            line = " " * deep + line[cut + 1 :]
        found.append(line)
    return "\n".join(found)
