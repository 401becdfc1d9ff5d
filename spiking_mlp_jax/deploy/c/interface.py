"""The ends of the exported C: its introduction, its head, the functions that others call, and its own program."""

from __future__ import annotations

from spiking_mlp_jax.deploy.c.source import Layer, Source, declared, loop
from spiking_mlp_jax.deploy.network import Description


def introduction(source: Source, name: str, ram: int) -> str:
    """What stands at the top of the file: what it is, its bytes, its functions; ram is the bytes of its buffers."""
    c = source.c
    sizes = f"const uint8_t pixels[{_pixels(c)}]"
    logits = f"int32_t logits[{c.time_steps}][{c.num_classes}]"
    picture = f"{c.image_size} x {c.image_size} x {c.in_channels}"
    return f"""\
// {name}: a spiking MLP in integers. {picture} pixels, {c.num_classes} classes, {c.time_steps} time steps,
// weights of {c.bits} bits. Written by spiking_mlp_jax from an artifact: change that, not this file.
//
// C99 with nothing but <stdint.h>. Sums, comparisons and shifts are all it computes with; a row of weights is added
// where there is a spike. Not for two threads at once: its buffers are static.
//
// Bytes of constants: {source.constant_bytes}. Bytes of buffers: {ram}.
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


def interface(source: Source, name: str) -> str:
    """The head, which runs the layers for a step's logits, and the functions that others call."""
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


def main(c: Description, name: str) -> str:
    """The program that the file is with -DSMLP_MAIN."""
    pixels = _pixels(c)
    return f"""\
#ifdef SMLP_MAIN
#include <stdio.h>

// Reads pictures from standard input, {pixels} bytes each; prints a line for each, its class and its scores.
int main(void)
{{
    static uint8_t pixels[{pixels}];
    static int32_t scores[{c.num_classes}];
    while (fread(pixels, 1, {pixels}, stdin) == {pixels}) {{
        int i;
        printf("%d", {name}_classify(pixels, scores));
        for (i = 0; i < {c.num_classes}; i++) printf(" %ld", (long)scores[i]);
        printf("\\n");
    }}
    return 0;
}}
#endif
"""


def _pixels(c: Description) -> int:
    return c.image_size * c.image_size * c.in_channels
