"""The engine's compiled loops. Additions, shifts, comparisons and selections: no multiplication, not even of addresses.

Arrays are flat; every position advances by addition. Spikes are bits, 32 channels to a uint32 word, and channels are
padded to whole words ("lanes"). An image in flight is a slot; a kernel runs over the active slots, the tokens from
`first` to `last` and `steps` time steps. All steps of one token run together: the rows of weights that its spikes
select are summed in registers, 128 channels at a time, and the neuron follows in the same registers.
"""

from __future__ import annotations

from typing import Any

import numba

from spiking_mlp_jax.deploy.engine.simd import (
    add,
    at_least,
    at_most,
    both,
    choose,
    element,
    fill,
    lanes32,
    lanes64,
    lanes128,
    left_shift,
    list_spikes,
    load,
    load_mask,
    narrow,
    onward,
    right_shift,
    store,
    store_mask,
    subtract,
)

# Sums of this many int8 weights always fit into 16 bits.
ROWS = 256

OPTIONS: dict[str, Any] = dict(nogil=True, boundscheck=False, error_model="numpy")
part = numba.njit(forceinline=True, **OPTIONS)


@part
def charge_and_fire(like, v, x, neuron, level, reset, below):
    """(mask of spikes, next potential)."""
    if neuron.usual:
        charged = add(v, x)
        fired = at_most(charged, level) if below else at_least(charged, level)
        return fired, choose(fired, like, right_shift(charged, 1))
    charged = subtract(left_shift(v, neuron.leak), both(v, neuron.keep))
    charged = add(add(charged, left_shift(x, neuron.gain)), reset & neuron.pull)
    fired = at_most(charged, level) if below else at_least(charged, level)
    after = fill(like, reset)
    if neuron.soft:
        after = right_shift(subtract(charged, level), neuron.leak)
    return fired, choose(fired, after, right_shift(charged, neuron.leak))


@part
def sum_rows(like, kernel, base, found, i, end):
    """The sum of the rows that start at base + found[i:end]."""
    total = like
    while i < end:
        stop = min(i + ROWS, end)
        partial = narrow(like)
        while i + 4 <= stop:
            a = load(partial, kernel, base + element(found, i))
            b = load(partial, kernel, base + element(found, i + 1))
            c = load(partial, kernel, base + element(found, i + 2))
            d = load(partial, kernel, base + element(found, i + 3))
            partial = add(partial, add(add(a, b), add(c, d)))
            i += 4
        while i < stop:
            partial = add(partial, load(partial, kernel, base + element(found, i)))
            i += 1
        total = add(total, partial)
    return total


@part
def scaled(like, total, synapses, at):
    """A layer's result from its sum: shifted, halves rounded up, plus the bias."""
    x = left_shift(total, load(like, synapses.left, at))
    x = right_shift(add(x, load(like, synapses.half, at)), load(like, synapses.right, at))
    return add(x, load(like, synapses.bias, at))


@part
def normed(like, z, norm, at):
    """A token's scale as signed powers of two."""
    total = like
    for _ in range(norm.terms):
        sign = norm.sign[at]
        if sign != 0:
            term = right_shift(add(left_shift(z, norm.left[at]), norm.half[at]), norm.right[at])
            total = add(total, term) if sign > 0 else subtract(total, term)
        at += 1
    return total


@part
def lanes_of_layer(
    like, lane, word, steps, found, ends, synapses, kernel_at, shift_at, norm, norm_at, offset_at, silent,
    neuron, neuron_at, addend, addend_at, also, also_at, result, result_at, out, out_at, state, state_at,
):  # fmt: skip
    """All steps of one token, for the channels from `lane` on."""
    level, reset = neuron.level[neuron_at], neuron.reset[neuron_at]
    below = neuron.below[neuron_at] != 0
    v = fill(like, reset)
    if not state.begin:
        v = load(like, state.values, state_at + lane)
    left, half = load(like, synapses.left, shift_at), load(like, synapses.half, shift_at)
    right, bias = load(like, synapses.right, shift_at), load(like, synapses.bias, shift_at)
    start = 0
    for t in range(steps):
        end = element(ends, t)
        x = like
        if not silent:
            if synapses.step:
                left, half = load(like, synapses.left, shift_at), load(like, synapses.half, shift_at)
                right, bias = load(like, synapses.right, shift_at), load(like, synapses.bias, shift_at)
            total = sum_rows(like, synapses.kernel, kernel_at + lane, found, start, end)
            x = add(right_shift(add(left_shift(total, left), half), right), bias)
        if norm.terms:
            x = normed(like, x, norm, norm_at)
        if norm.has_offset:
            x = add(x, norm.offset[offset_at])
        if addend.used:
            x = add(x, load(like, addend.values, addend_at))
        if also.used:
            x = add(x, load(like, also.values, also_at))
        if result.used:
            store(result.values, result_at, x)
        if out.used:
            fired, v = charge_and_fire(like, v, x, neuron, level, reset, below)
            store_mask(out.words, out_at, fired, out.valid, word)
        start = end
        kernel_at = onward(kernel_at, synapses.kernel_step)
        shift_at = onward(shift_at, synapses.step)
        offset_at = onward(offset_at, norm.offset_step)
        addend_at = onward(addend_at, addend.step)
        also_at = onward(also_at, also.step)
        result_at = onward(result_at, result.step)
        out_at = onward(out_at, out.step)
    if state.keep:
        store(state.values, state_at + lane, v)


def layer(
    active, first, last, steps, source, synapses, kernel_start, shift_start, norm, offset_start,
    neuron, addend, also, result, out, state, found, ends,
):  # fmt: skip
    """A linear layer, the token's norm, additions, and the neuron.

    Args:
        active: uint8 [slots].
        first, last, steps: see the module.
        kernel_start, shift_start, offset_start: where the constants of the first step are.
        addend, also, result: what is added, and where the sum is stored.
        found: uint32 scratch for the spikes of all steps and 16 more; ends: int64 [steps].
    """
    source_slot, addend_slot, also_slot = 0, addend.at, also.at
    result_slot, out_slot, state_slot = result.at, out.at, 0
    for slot in range(active.size):
        if active[slot]:
            near_at, norm_at, token_at, neuron_at, offset_at = 0, 0, 0, 0, offset_start
            addend_token, also_token, result_token = addend_slot, also_slot, result_slot
            out_token, state_token = out_slot, state_slot
            for token in range(last):
                if token >= first:
                    silent = norm.constant[token_at] != 0
                    count, step_at = 0, source_slot
                    for t in range(steps):
                        entry = 0
                        for p in range(source.positions):
                            near = element(source.near, near_at + p)
                            if near >= 0:
                                at = step_at + near
                                for i in range(source.width):
                                    word = element(source.words, at + i)
                                    count = list_spikes(found, count, word, source.table, entry)
                                    entry += 32
                            else:
                                entry += source.lanes
                        ends[t] = count
                        step_at = onward(step_at, source.step)
                    lane, group = 0, 0
                    while lane + 128 <= synapses.row:
                        lanes_of_layer(
                            lanes128(synapses.bias), lane, group, steps, found, ends, synapses, kernel_start,
                            shift_start + lane, norm, norm_at, offset_at, silent, neuron, neuron_at,
                            addend, addend_token + lane, also, also_token + lane, result, result_token + lane,
                            out, out_token + group, state, state_token,
                        )  # fmt: skip
                        lane += 128
                        group += 4
                    if lane + 64 <= synapses.row:
                        lanes_of_layer(
                            lanes64(synapses.bias), lane, group, steps, found, ends, synapses, kernel_start,
                            shift_start + lane, norm, norm_at, offset_at, silent, neuron, neuron_at,
                            addend, addend_token + lane, also, also_token + lane, result, result_token + lane,
                            out, out_token + group, state, state_token,
                        )  # fmt: skip
                        lane += 64
                        group += 2
                    if lane < synapses.row:
                        lanes_of_layer(
                            lanes32(synapses.bias), lane, group, steps, found, ends, synapses, kernel_start,
                            shift_start + lane, norm, norm_at, offset_at, silent, neuron, neuron_at,
                            addend, addend_token + lane, also, also_token + lane, result, result_token + lane,
                            out, out_token + group, state, state_token,
                        )  # fmt: skip
                near_at += source.positions
                norm_at += norm.terms
                offset_at += 1
                token_at += norm.pitch
                neuron_at += neuron.pitch
                addend_token += addend.token
                also_token += also.token
                result_token += result.token
                out_token += out.token
                state_token += state.token
        source_slot += source.slot
        addend_slot += addend.slot
        also_slot += also.slot
        result_slot += result.slot
        out_slot += out.slot
        state_slot += state.slot


def fire(active, first, last, steps, potential, lanes, zero, neuron, out, state):
    """Neurons on `lanes` potentials in memory; zero: an array of the dtype to compute in."""
    like = lanes32(zero)
    level, reset = neuron.level[0], neuron.reset[0]
    potential_slot, out_slot, state_slot = potential.at, out.at, 0
    for slot in range(active.size):
        if active[slot]:
            potential_token, out_token, state_token = potential_slot, out_slot, state_slot
            for token in range(last):
                if token >= first:
                    lane, group = 0, 0
                    while lane < lanes:
                        v = fill(like, reset)
                        if not state.begin:
                            v = load(like, state.values, state_token + lane)
                        at, out_at = potential_token + lane, out_token + group
                        for _ in range(steps):
                            x = load(like, potential.values, at)
                            fired, v = charge_and_fire(like, v, x, neuron, level, reset, False)
                            store_mask(out.words, out_at, fired, out.valid, group)
                            at = onward(at, potential.step)
                            out_at = onward(out_at, out.step)
                        if state.keep:
                            store(state.values, state_token + lane, v)
                        lane += 32
                        group += 1
                potential_token += potential.token
                out_token += out.token
                state_token += state.token
        potential_slot += potential.slot
        out_slot += out.slot
        state_slot += state.slot


def identity(active, first, last, steps, lanes, low, high, start, constant_step, neuron, out, state):
    """Neurons that replace spikes in place: input `high` for a spike, else `low`, [S, lanes] from `start` on."""
    like = lanes32(low)
    level, reset = neuron.level[0], neuron.reset[0]
    out_slot, state_slot = out.at, 0
    for slot in range(active.size):
        if active[slot]:
            out_token, state_token = out_slot, state_slot
            for token in range(last):
                if token >= first:
                    lane, group = 0, 0
                    while lane < lanes:
                        v = fill(like, reset)
                        if not state.begin:
                            v = load(like, state.values, state_token + lane)
                        at, out_at = start + lane, out_token + group
                        for _ in range(steps):
                            x = choose(load_mask(like, out.words, out_at), load(like, high, at), load(like, low, at))
                            fired, v = charge_and_fire(like, v, x, neuron, level, reset, False)
                            store_mask(out.words, out_at, fired, out.valid, group)
                            at = onward(at, constant_step)
                            out_at = onward(out_at, out.step)
                        if state.keep:
                            store(state.values, state_token + lane, v)
                        lane += 32
                        group += 1
                out_token += out.token
                state_token += state.token
        out_slot += out.slot
        state_slot += state.slot


@part
def mixed(total, mixture, at):
    """Potentials of 32 channels from their sums, as `scaled`, with one output's constants for all lanes."""
    x = left_shift(total, mixture.left[at])
    return add(right_shift(add(x, mixture.half[at]), mixture.right[at]), mixture.bias[at])


def mix(active, first, last, steps, words, axis, mixture, kernel_start, shift_start, neuron, valid, state):
    """Row and column mixing: a lane for each of 32 channels, masked by its spike.

    An axis has few outputs, but all channels share the weights. So lanes are channels here, and spikes mask the
    addition of a weight. `first` and `last` are positions of the other axis.
    """
    level, reset = neuron.level[0], neuron.reset[0]
    like = lanes32(mixture.bias)
    slot_at, state_slot = 0, 0
    for slot in range(active.size):
        if active[slot]:
            other_at, state_at = slot_at, state_slot
            for other in range(last):
                if other < first:
                    state_at += state.token
                else:
                    for group in range(axis.groups):
                        block_start, shift_block, r = kernel_start, shift_start, 0
                        out_block = other_at + axis.to + group
                        while r < axis.side:
                            v0 = v1 = v2 = v3 = fill(like, reset)
                            if not state.begin:
                                v0 = load(like, state.values, state_at)
                                v1 = load(like, state.values, state_at + 32)
                                v2 = load(like, state.values, state_at + 64)
                                v3 = load(like, state.values, state_at + 96)
                            step_at, kernel_at, shift_at = other_at + group, block_start, shift_block
                            out_at = out_block
                            for _ in range(steps):
                                a0 = a1 = a2 = a3 = like
                                i, k = step_at, kernel_at
                                for _ in range(axis.side):
                                    fires = load_mask(like, words, i)
                                    a0 = choose(fires, add(a0, element(mixture.kernel, k)), a0)
                                    a1 = choose(fires, add(a1, element(mixture.kernel, k + 1)), a1)
                                    a2 = choose(fires, add(a2, element(mixture.kernel, k + 2)), a2)
                                    a3 = choose(fires, add(a3, element(mixture.kernel, k + 3)), a3)
                                    i = onward(i, axis.along)
                                    k += 4
                                at = out_at
                                x = mixed(a0, mixture, shift_at)
                                fired, v0 = charge_and_fire(like, v0, x, neuron, level, reset, False)
                                store_mask(words, at, fired, valid, group)
                                at = onward(at, axis.along)
                                x = mixed(a1, mixture, shift_at + 1)
                                fired, v1 = charge_and_fire(like, v1, x, neuron, level, reset, False)
                                if r + 1 < axis.side:
                                    store_mask(words, at, fired, valid, group)
                                at = onward(at, axis.along)
                                x = mixed(a2, mixture, shift_at + 2)
                                fired, v2 = charge_and_fire(like, v2, x, neuron, level, reset, False)
                                if r + 2 < axis.side:
                                    store_mask(words, at, fired, valid, group)
                                at = onward(at, axis.along)
                                x = mixed(a3, mixture, shift_at + 3)
                                fired, v3 = charge_and_fire(like, v3, x, neuron, level, reset, False)
                                if r + 3 < axis.side:
                                    store_mask(words, at, fired, valid, group)
                                step_at = onward(step_at, axis.step)
                                out_at = onward(out_at, axis.step)
                                kernel_at = onward(kernel_at, mixture.kernel_step)
                                shift_at = onward(shift_at, mixture.step)
                            if state.keep:
                                store(state.values, state_at, v0)
                                store(state.values, state_at + 32, v1)
                                store(state.values, state_at + 64, v2)
                                store(state.values, state_at + 96, v3)
                            state_at += 128
                            out_block += axis.along << 2
                            block_start += mixture.block
                            shift_block += 4
                            r += 4
                other_at += axis.other
        slot_at += axis.slot
        state_slot += state.slot
