"""A block of the exported C: mixing along columns and rows, then token by token fuse, expand and project."""

from __future__ import annotations

import numpy as np

from spiking_mlp_jax.deploy.c.source import Source, declared, loop


def block(source: Source, i: int, j: int) -> str:
    """The function that runs a stage's block: from spikes to spikes."""
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
    identity, identity_fill = (
        f"gather(sum, spikes, from, {channels}, {fuse.kernel()}, {fuse.width}, {channels});",
        "",
    )
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
            // Fuse the three.
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
    """What each token's neurons and its second norm are made of."""
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
