"""The operations that the layers of the exported C call: arrays, spikes of one bit, neurons, mixing."""

from __future__ import annotations

from spiking_mlp_jax.deploy.c.source import Source


def operations(source: Source) -> str:
    """The operations that the network needs."""
    c = source.c
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

// All time steps of neurons that read a slice of the stored potentials: count of stride channels of each token.
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

// A linear layer and its neurons along lines of side tokens, stride bits apart. Groups of lines are outer_stride bits
// apart; the lines of a group start at consecutive bits.
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
    if source.nodes:
        text += f"""
// Adds the rows of the spikes in a window of 3 x 3 tokens, except those outside the grid. Its first token is at
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
