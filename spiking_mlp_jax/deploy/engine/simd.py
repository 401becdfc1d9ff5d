"""Vectors of 16- or 32-bit integers for numba, and the few operations that the engine needs on them.

numba often cannot prove that it may vectorise a loop. Here each operation is one LLVM instruction on a vector in
registers, and none of them multiplies. LLVM splits vectors that are wider than the machine's, so one source serves
every CPU. Arrays are flat and contiguous, positions count elements, and bounds are not checked.

`like`, a vector, carries its lanes and bits through the generic kernels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

POSITION = types.int64


def instruction(function) -> Any:
    """numba's `intrinsic`, typed for callers, who do not pass its first parameter."""
    return intrinsic(function)


class Vector(types.Type):
    """A vector of integers, or of single bits from a comparison."""

    def __init__(self, bits: int, lanes: int):
        self.bits, self.lanes = bits, lanes
        super().__init__(f"Vector({lanes} x i{bits})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(ir.IntType(kind.bits), kind.lanes))


def _pointer(context, builder, kind, array, position, element):
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [position]), element.as_pointer())


def _resized(builder, vector, bits, unsigned=False):
    """The vector with elements of `bits` bits."""
    now, wanted = vector.type.element.width, ir.VectorType(ir.IntType(bits), vector.type.count)
    if now == bits:
        return vector
    if now > bits:
        return builder.trunc(vector, wanted)
    return builder.zext(vector, wanted) if unsigned else builder.sext(vector, wanted)


def _filled(builder, kind, scalar):
    """The scalar, truncated or extended to the vector's bits, in every lane."""
    element, place = ir.IntType(kind.bits), ir.IntType(32)
    if scalar.type.width > kind.bits:
        scalar = builder.trunc(scalar, element)
    elif scalar.type.width < kind.bits:
        scalar = builder.sext(scalar, element)
    none = ir.Constant(ir.VectorType(element, kind.lanes), ir.Undefined)
    one = builder.insert_element(none, scalar, place(0))
    zeros = ir.Constant(ir.VectorType(place, kind.lanes), [0] * kind.lanes)
    return builder.shuffle_vector(one, none, zeros)


def _of_lanes(lanes):
    @instruction
    def like(typing, array):
        """A vector of zeros as wide as the array's elements."""
        kind = Vector(array.dtype.bitwidth, lanes)

        def generate(context, builder, signature, arguments):
            return ir.Constant(context.get_value_type(kind), [0] * lanes)

        return kind(array), generate

    return like


lanes32, lanes64, lanes128 = _of_lanes(32), _of_lanes(64), _of_lanes(128)


@instruction
def narrow(typing, like):
    """A vector of 16-bit zeros with as many lanes."""
    kind = Vector(16, like.lanes)
    return kind(like), lambda context, builder, signature, arguments: ir.Constant(
        context.get_value_type(kind), [0] * kind.lanes
    )


@instruction
def fill(typing, like, scalar):
    """The scalar in every lane."""
    return like(like, scalar), lambda context, builder, signature, arguments: _filled(builder, like, arguments[1])


def _binary(operation):
    @instruction
    def apply(typing, a, b):
        # The second operand may be a scalar, which is broadcast, or a vector of fewer bits.
        def generate(context, builder, signature, arguments):
            left, right = arguments
            right = _resized(builder, right, a.bits) if isinstance(b, Vector) else _filled(builder, a, right)
            return getattr(builder, operation)(left, right)

        return a(a, b), generate

    return apply


add, subtract, left_shift, right_shift, both = map(_binary, ("add", "sub", "shl", "ashr", "and_"))


def _comparison(sign):
    @instruction
    def apply(typing, a, b):
        def generate(context, builder, signature, arguments):
            left, right = arguments
            right = right if isinstance(b, Vector) else _filled(builder, a, right)
            return builder.icmp_signed(sign, left, right)

        return Vector(1, a.lanes)(a, b), generate

    return apply


at_least, at_most = _comparison(">="), _comparison("<=")


@instruction
def choose(typing, mask, a, b):
    """a where the mask is set, b elsewhere."""
    return a(mask, a, b), lambda context, builder, signature, arguments: builder.select(*arguments)


@instruction
def load(typing, like, array, position):
    """The elements from a position on, in like's bits."""

    def generate(context, builder, signature, arguments):
        _, data, start = arguments
        kind = ir.VectorType(ir.IntType(array.dtype.bitwidth), like.lanes)
        pointer = _pointer(context, builder, array, data, start, kind)
        return _resized(builder, builder.load(pointer, align=array.dtype.bitwidth // 8), like.bits)

    return like(like, array, POSITION), generate


@instruction
def store(typing, array, position, vector):
    """Write the vector from a position on, in the array's bits."""

    def generate(context, builder, signature, arguments):
        data, start, value = arguments
        value = _resized(builder, value, array.dtype.bitwidth)
        pointer = _pointer(context, builder, array, data, start, value.type)
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, POSITION, vector), generate


@instruction
def load_mask(typing, like, words, position):
    """The spikes, a bit each, of the uint32 words from a position on."""
    kind = Vector(1, like.lanes)

    def generate(context, builder, signature, arguments):
        _, data, start = arguments
        pointer = _pointer(context, builder, words, data, start, ir.IntType(like.lanes))
        return builder.bitcast(builder.load(pointer, align=4), context.get_value_type(kind))

    return kind(like, words, POSITION), generate


@instruction
def store_mask(typing, words, position, mask, valid, place):
    """Write a bit for each lane, masked by the words of `valid` from `place` on."""

    def generate(context, builder, signature, arguments):
        data, start, value, seen, second = arguments
        for first in range(0, mask.lanes, 32):
            part = ir.Constant(ir.VectorType(ir.IntType(32), 32), list(range(first, first + 32)))
            lanes = builder.bitcast(builder.shuffle_vector(value, value, part), ir.IntType(32))
            at, seen_at = (builder.add(x, ir.IntType(64)(first // 32)) for x in (start, second))
            allowed = builder.load(_pointer(context, builder, valid, seen, seen_at, ir.IntType(32)), align=4)
            pointer = _pointer(context, builder, words, data, at, ir.IntType(32))
            builder.store(builder.and_(lanes, allowed), pointer, align=4)
        return context.get_dummy_value()

    return types.void(words, POSITION, mask, valid, POSITION), generate


@instruction
def element(typing, array, position):
    """One element as a signed 64-bit integer; those of an unsigned array stay positive."""

    def generate(context, builder, signature, arguments):
        data, start = arguments
        bits = array.dtype.bitwidth
        value = builder.load(_pointer(context, builder, array, data, start, ir.IntType(bits)), align=bits // 8)
        if bits == 64:
            return value
        return (builder.sext if array.dtype.signed else builder.zext)(value, ir.IntType(64))

    return POSITION(array, POSITION), generate


@instruction
def plane(typing, array, position, bit):
    """A word of one bit of each of 32 bytes; the bit is given as its value."""

    def generate(context, builder, signature, arguments):
        data, start, value = arguments
        kind = ir.VectorType(ir.IntType(8), 32)
        values = builder.load(_pointer(context, builder, array, data, start, kind), align=1)
        seen = builder.and_(values, _filled(builder, Vector(8, 32), value))
        mask = builder.icmp_unsigned("!=", seen, ir.Constant(kind, [0] * 32))
        return builder.zext(builder.bitcast(mask, ir.IntType(32)), ir.IntType(64))

    return POSITION(array, POSITION, POSITION), generate


@instruction
def onward(typing, position, by):
    """position + by, opaque to LLVM, which would multiply `by` when it unrolls a loop."""

    def generate(context, builder, signature, arguments):
        i64 = ir.IntType(64)
        return builder.asm(ir.FunctionType(i64, [i64]), "", "=r,0", [builder.add(*arguments)], side_effect=True)

    return POSITION(POSITION, POSITION), generate


@instruction
def list_spikes(typing, found, count, word, table, position):
    """Appends table[position + lane] for every spike of a word of 32 lanes, from the lowest.

    Up to 16 elements past the last are overwritten.

    Returns:
        the new count.
    """

    def generate(context, builder, signature, arguments):
        if "+avx512f" in context.codegen().magic_tuple()[2]:
            return _compressed(context, builder, signature, arguments)
        return _one_by_one(context, builder, signature, arguments)

    return POSITION(found, POSITION, POSITION, table, POSITION), generate


def _compressed(context, builder, signature, arguments):
    found, count, word, table, position = arguments
    i16, i64 = ir.IntType(16), ir.IntType(64)
    lanes, bits = (ir.VectorType(ir.IntType(n), 16) for n in (32, 1))
    kind = ir.FunctionType(lanes, [lanes, bits, lanes])
    compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.experimental.vector.compress.v16i32")
    for first in (0, 16):
        half = builder.trunc(builder.lshr(word, i64(first)), i16)
        pointer = _pointer(context, builder, signature.args[3], table, builder.add(position, i64(first)), lanes)
        rows = builder.load(pointer, align=4)
        rows = builder.call(compress, [rows, builder.bitcast(half, bits), ir.Constant(lanes, ir.Undefined)])
        builder.store(rows, _pointer(context, builder, signature.args[0], found, count, lanes), align=4)
        count = builder.add(count, builder.zext(builder.ctpop(half), i64))
    return count


def _one_by_one(context, builder, signature, arguments):
    found, start, word, table, position = arguments
    i32, i64 = ir.IntType(32), ir.IntType(64)
    count, rest = (cgutils.alloca_once_value(builder, value) for value in (start, word))
    test, body, end = (builder.append_basic_block(name) for name in ("test", "body", "end"))
    builder.branch(test)
    builder.position_at_end(test)
    builder.cbranch(builder.icmp_unsigned("!=", builder.load(rest), i64(0)), body, end)
    builder.position_at_end(body)
    left, n = builder.load(rest), builder.load(count)
    lane = builder.cttz(left, ir.IntType(1)(1))
    row = builder.load(_pointer(context, builder, signature.args[3], table, builder.add(position, lane), i32), align=4)
    builder.store(row, _pointer(context, builder, signature.args[0], found, n, i32), align=4)
    builder.store(builder.add(n, i64(1)), count)
    builder.store(builder.and_(left, builder.sub(left, i64(1))), rest)
    builder.branch(test)
    builder.position_at_end(end)
    return builder.load(count)
