"""What each stage of the exported C begins with: patches of pixels, or windows of the spikes of the stage before."""

from __future__ import annotations

import re

from spiking_mlp_jax.deploy.c.source import Source, declared, loop


def encode(source: Source, i: int) -> str:
    """The function that runs a stage's encoding: its potentials into held, their spikes into spikes."""
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
// Patches of pixels, bit by bit from the highest: what is summed so far is doubled by adding it to itself.
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
    uint32_t t, to, i{declared(counters)};
{first}{fire(0)}{second}{fire(node)}{third}"""
