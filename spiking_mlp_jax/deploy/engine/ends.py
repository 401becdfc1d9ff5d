"""The kernels from pixels to the first potentials and from the last spikes to logits; see `kernels`."""

from __future__ import annotations

from spiking_mlp_jax.deploy.engine.kernels import scaled, sum_rows
from spiking_mlp_jax.deploy.engine.simd import (
    add,
    element,
    lanes32,
    lanes64,
    lanes128,
    list_spikes,
    onward,
    plane,
    store,
)


def stem(active, first, last, steps, images, image_size, corners, pixels, table, synapses, result, found, ends, patch):
    """The first layer, by bit planes from the highest: the sum is doubled, then the rows of set bits are added.

    Args:
        images: uint8 [slots * image_size].
        corners: int64 [tokens], a patch's first byte; pixels: int64 [fan_in], its bytes from there.
        table: uint32 [whole words of 32], where the kernel's row of a byte starts.
        found: uint32, room for 8 bits of each byte and 16 more; ends: int64 [8]; patch: uint8 [table.size], zeros.
    """
    like = lanes64(synapses.bias)
    image_at, result_slot = 0, result.at
    for slot in range(active.size):
        if active[slot]:
            result_token = result_slot
            for token in range(last):
                if token >= first:
                    corner = image_at + element(corners, token)
                    for p in range(pixels.size):
                        patch[p] = element(images, corner + element(pixels, p))
                    count, bit, value = 0, 0, 128
                    while value:
                        at = 0
                        while at < table.size:
                            count = list_spikes(found, count, plane(patch, at, value), table, at)
                            at += 32
                        ends[bit] = count
                        bit += 1
                        value >>= 1
                    lane = 0
                    while lane < synapses.row:
                        kernel_at, shift_at, result_at = lane, lane, result_token + lane
                        for _ in range(steps):
                            total, begin, n = like, 0, 0
                            while n < 8:
                                end = element(ends, n)
                                n = onward(n, 1)
                                total = add(
                                    add(total, total), sum_rows(like, synapses.kernel, kernel_at, found, begin, end)
                                )
                                begin = end
                            store(result.values, result_at, scaled(like, total, synapses, shift_at))
                            kernel_at = onward(kernel_at, synapses.kernel_step)
                            shift_at = onward(shift_at, synapses.step)
                            result_at = onward(result_at, result.step)
                        lane += 64
                result_token += result.token
        image_at += image_size
        result_slot += result.slot


def head(active, first, last, steps, source, tokens, synapses, kernel_start, shift_start, result, found):
    """The sum of the rows of all spikes of an image; `first` and `last` are channels, multiples of 128 except the end.

    Args:
        found: uint32, room for all spikes of a step and 16 more.
    """
    source_slot, result_slot = 0, result.at
    for slot in range(active.size):
        if active[slot]:
            step_at, kernel_at, shift_at, result_at = source_slot, kernel_start, shift_start, result_slot
            for _ in range(steps):
                count = 0
                for token in range(tokens):
                    at, entry = step_at + element(source.near, token), 0
                    for i in range(source.width):
                        count = list_spikes(found, count, element(source.words, at + i), source.table, entry)
                        entry += 32
                lane = first
                while lane < last:
                    if lane + 128 <= last:
                        like = lanes128(synapses.bias)
                        total = sum_rows(like, synapses.kernel, kernel_at + lane, found, 0, count)
                        store(result.values, result_at + lane, scaled(like, total, synapses, shift_at + lane))
                        lane += 128
                    else:
                        small = lanes32(synapses.bias)
                        total = sum_rows(small, synapses.kernel, kernel_at + lane, found, 0, count)
                        store(result.values, result_at + lane, scaled(small, total, synapses, shift_at + lane))
                        lane += 32
                step_at = onward(step_at, source.step)
                kernel_at = onward(kernel_at, synapses.kernel_step)
                shift_at = onward(shift_at, synapses.step)
                result_at = onward(result_at, result.step)
        source_slot += source.slot
        result_slot += result.slot
