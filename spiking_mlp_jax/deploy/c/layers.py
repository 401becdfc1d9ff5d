"""The layers of the exported C: a stage's encoding, and its blocks."""

from __future__ import annotations

import re

import numpy as np

from spiking_mlp_jax.deploy.c.source import Source, declared, loop


def encode(source: Source, i: int) -> str:
    """The function of a stage's encoding, from pixels or the spikes of the stage before to potentials and spikes."""
    body = _stem(source) if i == 0 else _nodes(source, i) if source.nodes else _plain(source, i)
    c, channels = source.c, source.c.stage_dim(i)
    fire = (
        f"    fire_grid(spikes, steps, {c.stage_side(i) ** 2}, {channels}, 0, {channels}, {source.held_step(i)}, "
        f"{source.grid(i)}, {source.neurons(c.formats[f'stage{i}'])});\n}}\n"
    )
    return body + fire


def _stem(source: Source) -> str:
    c, layer = source.c, source.layer("stage0.encode")
    channels, side = c.stage_dim(0), c.stage_side(0)
    line = c.image_size * c.in_channels
    across = c.patch_size * c.in_channels
    several = bool(layer.kernel_step)
    indent = "    " * several
    step = loop("t", "0", "steps", layer.counters())
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
            for (i = 0; i < {channels}; i++) held[to + i] = ({source.potential})sum[i];
        }}
    }}
"""
    if several:
        body = f"    {step} {{\n" + re.sub("^", indent, body, flags=re.M).rstrip(" ") + "    }\n"
    return f"""\
// Patches of pixels, bit by bit from the highest: the partial sums are doubled by adding them to themselves.
static void stage0_encode(const uint8_t pixels[], uint32_t steps)
{{
    uint32_t row, column, top, from, start, to = 0, y, i, k, bit{declared(layer.counters(), "t" * several)};
{body}"""


def _plain(source: Source, i: int) -> str:
    c, layer = source.c, source.layer(f"stage{i}.encode")
    before, channels, side = c.stage_dim(i - 1), c.stage_dim(i), c.stage_side(i)
    line = 2 * side * before
    counters = [("first", "0", 4 * side * side * before), *layer.counters()]
    return f"""\
// Windows of 2 x 2 tokens.
static void stage{i}_encode(uint32_t steps)
{{
    uint32_t t, row, column, top, from, to = 0, i{declared(counters)};
    {loop("t", "0", "steps", counters)} {{
        for (row = 0, top = first; row < {side}; row++, top += {2 * line}) {{
            for (column = 0, from = top; column < {side}; column++, from += {2 * before}, to += {channels}) {{
                fill(sum, {channels}, 0);
                gather(sum, spikes, from, {2 * before}, {layer.kernel()}, {layer.width}, {channels});
                gather(sum, spikes, from + {line}, {2 * before}, {layer.kernel(2 * before)}, {layer.width}, {channels});
                finish(sum, {layer.scale()}, {channels});
                for (i = 0; i < {channels}; i++) held[to + i] = ({source.potential})sum[i];
            }}
        }}
    }}
"""


def _nodes(source: Source, i: int) -> str:
    c = source.c
    cells, edge1, edge2 = (source.layer(f"stage{i}.encode.{key}") for key in ("cells", "edge1", "edge2"))
    before, channels, side = c.stage_dim(i - 1), c.stage_dim(i), c.stage_side(i)
    node, grid = channels // 3, side * side * channels
    neurons = source.neurons(c.formats[f"stage{i}"])

    def windows(layer, bits, inside, grid_side, stride, store):
        line = grid_side * inside
        counters = [("start", str(-line - inside), grid_side * line), *layer.counters()]
        return f"""\
    to = 0;
    {loop("t", "0", "steps", counters)} {{
        for (row = -1, top = start; row < {grid_side - 1}; row += {stride}, top += {stride * line}) {{
            for (column = -1, from = top; column < {grid_side - 1}; column += {stride}, from += {stride * inside}) {{
                fill(sum, {layer.out}, 0);
                window(sum, {bits}, from, row, column, {grid_side}, {line}, {inside}, {layer.kernel()},
                       {inside * layer.width}, {layer.width}, {layer.out});
                finish(sum, {layer.scale()}, {layer.out});
                {store}
                to += {channels};
            }}
        }}
    }}
"""

    cast = f"({source.potential})"
    each = f"for (i = 0; i < {node}; i++)"
    n2, n3 = (f"held[to + {k * node} + i]" for k in (1, 2))
    first = windows(
        cells, "spikes", before, 2 * side, 2, f"for (i = 0; i < {channels}; i++) held[to + i] = {cast}sum[i];"
    )
    second = windows(edge1, "height_spikes", node, side, 1, f"{each} {n2} = {cast}({n2} + sum[i]);")
    deeper = "\n" + 20 * " "
    third = windows(
        edge2, "height_spikes", node, side, 1, f"{each}{deeper}{n3} = {cast}({n3} + held[to + i] + sum[i]);"
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
    uint32_t t, to, i{declared(counters)};
{first}{fire(0)}{second}{fire(node)}{third}"""


def block(source: Source, i: int, j: int) -> str:
    """The function of a block, from spikes to spikes: row and column mixing, then fuse, expand, project per token."""
    c, key = source.c, f"stage{i}.block{j}"
    name = key.replace(".", "_")
    channels, side = c.stage_dim(i), c.stage_side(i)
    wide, tokens = c.expansion * channels, side * side
    grid = tokens * channels
    here, hidden = c.formats[f"stage{i}"], c.formats[f"{key}.hidden"]
    height, width, fuse, expand, project = (
        source.layer(f"{key}.{part}") for part in ("height", "width", "fuse", "expand", "project")
    )
    counters = [("from", "at", grid), ("kept", "at", source.held_step(i))]
    for layer in (fuse, expand, project):
        counters += layer.counters()
    counts = ["n", "at", "i"]
    walks, offsets = "", {}
    identity_fill = ""
    identity = f"gather(sum, spikes, from, {channels}, {fuse.kernel()}, {fuse.width}, {channels});"
    if c.encoding == "plain":
        low, high = (source.arrays[f"{key}.identity.{entry}"] for entry in ("low", "high"))
        source.constant("int32_t", f"{name}_identity_low", low)
        source.constant("int32_t", f"{name}_identity_high", high)
        at = ""
        if len(low) > 1:
            counters.append(("identity_at", "0", channels))
            at = "identity_at + "
        place = c.formats[f"{key}.identity"]
        identity_fill = f"        fill(v_identity, {channels}, {place.reset});\n"
        identity = f"""\
for (i = 0; i < {channels}; i++)
                sum[i] = bit_of(spikes, from + i) ? {name}_identity_high[{at}i] : {name}_identity_low[{at}i];
            fire(sum, v_identity, {channels}, token, 0, 1, {source.neurons(place)});
            fill(sum, {channels}, 0);
            gather(sum, token, 0, {channels}, {fuse.kernel()}, {fuse.width}, {channels});"""
    hidden_neurons, hidden_reset = source.neurons(hidden), str(hidden.reset)
    shifted, joined = "", "sum[i]"
    if c.per_token:
        _per_token_constants(source, key, name)
        for part in ("expand", "project"):
            offset = source.arrays[f"{key}.{part}.offset"]
            if len(offset) > 1:
                counters.append((f"{part}_at", "0", tokens))
            offsets[part] = f"{name}_{part}_offset[{f'{part}_at + ' * (len(offset) > 1)}n]"
        terms = source.arrays[f"{key}.project.signs"].shape[1]
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
            f"{layer.name}_bias, {layer.out_step}, {source.neurons(c.formats[f'{key}.{part}'])});\n"
        )

    begin = ", term = 0" * c.per_token
    return f"""\
static void {name}(uint32_t steps)
{{
    uint32_t t, {", ".join(counts)}{declared(counters)};
    // Along each column, then along each row.
{mix(height, "height", 1, 0, side * channels, side * channels)}\
{mix(width, "width", side, side * channels, channels, channels)}\
    for (n = 0, at = 0{begin}; n < {tokens}; n++, at += {channels}{walks}) {{
{identity_fill}\
        fill(v_first, {channels}, {here.reset});
        fill(v_hidden, {wide}, {hidden_reset});
        fill(v_last, {channels}, {here.reset});
        {loop("t", "0", "steps", counters)} {{
            // Fuse identity, height and width.
            fill(sum, {channels}, 0);
            {identity}
            gather(sum, height_spikes, from, {channels}, {fuse.kernel(channels)}, {fuse.width}, {channels});
            gather(sum, width_spikes, from, {channels}, {fuse.kernel(2 * channels)}, {fuse.width}, {channels});
            finish(sum, {fuse.scale()}, {channels});
            for (i = 0; i < {channels}; i++) joined[i] = held[kept + i] + sum[i];
            fire(joined, v_first, {channels}, token, 0, 1, {source.neurons(here)});
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
            fire(joined, v_last, {channels}, spikes, from, 1, {source.neurons(here)});
        }}
    }}
}}
"""


def _per_token_constants(source: Source, key: str, name: str) -> None:
    """The constants of each token's neurons and second norm."""
    a = {
        entry: source.arrays[f"{key}.{entry}"]
        for entry in ("expand.threshold", "expand.reset", "expand.below", "expand.constant")
    }
    source.constant("int32_t", f"{name}_level", a["expand.threshold"].astype(np.int64) << source.c.leak)
    source.constant("int32_t", f"{name}_reset", a["expand.reset"])
    turned = a["expand.below"].astype(np.uint8) | a["expand.constant"].astype(np.uint8) << 1
    source.constant("uint8_t", f"{name}_turned", turned, "1: fires at or below its level; 2: sees its offset alone")
    for part in ("expand", "project"):
        source.constant("int32_t", f"{name}_{part}_offset", source.arrays[f"{key}.{part}.offset"])
    for entry in ("exponents", "signs"):
        source.constant("int8_t", f"{name}_{entry}", source.arrays[f"{key}.project.{entry}"])
