"""Row and column mixing, compiled; see `kernels`."""

from __future__ import annotations

from spiking_mlp_jax.deploy.engine.kernels import charge_and_fire, part
from spiking_mlp_jax.deploy.engine.simd import (
    add,
    choose,
    element,
    fill,
    lanes32,
    left_shift,
    load,
    load_mask,
    onward,
    right_shift,
    store,
    store_mask,
)


@part
def mixed(total, mixture, at):
    """Potentials of 32 channels from their sums: shifted left, then right with halves rounded up, plus the bias."""
    x = left_shift(total, mixture.left[at])
    return add(right_shift(add(x, mixture.half[at]), mixture.right[at]), mixture.bias[at])


def mix(active, first, last, steps, words, axis, mixture, kernel_start, shift_start, neuron, valid, state):
    """Mixes tokens along an axis: a lane for each of 32 channels, into which a spike lets the weight.

    A token has few outputs along an axis, but all channels have the same weights: lanes are channels here, and a
    spike is a lane's leave to add. `first` and `last` are positions of the other axis.
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
                        block_start, shift_block, out_block, r = (
                            kernel_start,
                            shift_start,
                            other_at + axis.to + group,
                            0,
                        )
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
