"""Rules of what computes with entries one by one, in numbers and in bits; what every rule returns is in `rules.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from spiking_mlp_jax.deploy.audit.rules import Rule, Rules, bits, products, result_dtype, result_shape
from spiking_mlp_jax.deploy.audit.values import Power, Value, integers, kind_of, like, limits, of_array, reals, top

# Constants up to this size are computed with.
ARITHMETIC_SIZE = 4096

RULES = Rules()


def _arithmetic(exact: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Any]]):
    """Makes a rule compute with two small constants too, where no entry is rounded.

    Args:
        exact: of two arrays of float64 or int64, the result, and where it is exact.
    """

    def decorate(rule: Rule) -> Rule:
        def computing(equation, a, b):
            result = _computed(equation, exact, a, b)
            return rule(equation, a, b) if result is None else result

        return computing

    return decorate


def _computed(equation, exact, *values: Value) -> Value | None:
    dtype, shape = result_dtype(equation), result_shape(equation)
    arrays = []
    if math.prod(shape) > ARITHMETIC_SIZE:
        return None
    for value in values:
        # Sums and products of halves of the width are exact in the whole.
        small = value.integer and max(-value.low, value.high) < 2**26
        if value.constant is None or not (small or value.dtype.name in ("float16", "bfloat16", "float32")):
            return None
        arrays.append(value.constant.astype(np.float64 if kind_of(dtype) == "float" else np.int64))
    with np.errstate(all="ignore"):
        wide, is_exact = exact(*arrays)
        result = wide.astype(dtype)
        if not (np.all(is_exact) and np.array_equal(result.astype(wide.dtype), wide)):
            return None
    return of_array(np.broadcast_to(result, shape))


def _two_sum(a, b):
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part) == 0


def _quotient(a, b):
    powers = np.abs(np.frexp(b)[0]) == 0.5
    if a.dtype.kind != "f":
        return a, False
    return a / b, powers


@RULES.of("add", "add_any")
@_arithmetic(_two_sum)
def _add(equation, a, b):
    if not (a.integer and b.integer):
        return top(result_dtype(equation))
    return integers(result_dtype(equation), a.low + b.low, a.high + b.high)


@RULES.of("sub")
@_arithmetic(lambda a, b: _two_sum(a, -b))
def _sub(equation, a, b):
    if not (a.integer and b.integer):
        return top(result_dtype(equation))
    return integers(result_dtype(equation), a.low - b.high, a.high - b.low)


@RULES.of("mul")
@_arithmetic(lambda a, b: (a * b, True))
def _mul(equation, a, b):
    if not (a.integer and b.integer):
        return top(result_dtype(equation))
    return integers(result_dtype(equation), *products(a, b))


@RULES.of("div")
@_arithmetic(_quotient)
def _div(equation, a, b):
    dtype = result_dtype(equation)
    if kind_of(dtype) != "int" or (b.low <= 0 <= b.high):
        return top(dtype)
    corners = [_truncated(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    # Towards 0, quotients of any divisor lie between those of the nearest and the farthest.
    return integers(dtype, min(corners), max(corners))


def _truncated(x, y) -> int:
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


@RULES.of("rem")
def _rem(equation, a, b):
    dtype = result_dtype(equation)
    if kind_of(dtype) != "int" or (b.low <= 0 <= b.high):
        return top(dtype)
    most = max(abs(b.low), abs(b.high)) - 1
    return integers(dtype, max(min(a.low, 0), -most), min(max(a.high, 0), most))


@RULES.of("square")
def _square(equation, x):
    return _power_of(equation, x, 2)


@RULES.of("integer_pow")
def _integer_pow(equation, x):
    return _power_of(equation, x, equation.params["y"])


def _power_of(equation, x, y):
    # Bounds of high powers would be numbers of very many digits.
    if not x.integer or y < 0 or y > 64:
        return top(result_dtype(equation))
    corners = [x.low**y, x.high**y] + ([0] if x.low <= 0 <= x.high and y else [])
    return integers(result_dtype(equation), min(corners), max(corners))


@RULES.of("neg")
def _neg(equation, x):
    signed = kind_of(x.dtype) == "float" or limits(x.dtype)[0] < 0
    result = like(x.dtype, -x.high, -x.low, x, power=x.power if signed else Power.NO)
    return dataclasses.replace(result, constant=-x.constant) if signed and _small(x) else result


def _small(x: Value) -> bool:
    return x.constant is not None and x.constant.size <= ARITHMETIC_SIZE


@RULES.of("abs")
def _abs(equation, x):
    low = max(x.low, -x.high, 0)
    return like(x.dtype, low, max(-x.low, x.high), x, power=x.power)


@RULES.of("sign")
def _sign(equation, x):
    low, high = (int(bound > 0) - int(bound < 0) for bound in (x.low, x.high))
    return reals(x.dtype, low, high, True) if x.nan else integers(x.dtype, low, high)


@RULES.of("floor", "ceil", "round")
def _round(equation, x):
    if x.nan or math.isinf(x.low) or math.isinf(x.high):
        return top(x.dtype)
    down, up = {"floor": (math.floor,) * 2, "ceil": (math.ceil,) * 2}.get(
        equation.primitive.name, (math.floor, math.ceil)
    )
    return integers(x.dtype, down(x.low), up(x.high))


@RULES.of("max")
def _max(equation, a, b):
    return like(result_dtype(equation), max(a.low, b.low), max(a.high, b.high), a, b, power=min(a.power, b.power))


@RULES.of("min")
def _min(equation, a, b):
    return like(result_dtype(equation), min(a.low, b.low), min(a.high, b.high), a, b, power=min(a.power, b.power))


@RULES.of("clamp")
def _clamp(equation, least, x, most):
    low = min(max(x.low, least.low), most.low)
    high = min(max(x.high, least.high), most.high)
    return like(x.dtype, low, high, least, x, most, power=min(least.power, x.power, most.power))


@RULES.of("is_finite", "eq_to", "lt_to", "le_to")
def _ask(equation, *values):
    return integers(result_dtype(equation), 0, 1)


@RULES.of("eq", "ne", "lt", "le", "gt", "ge")
def _compare(equation, a, b):
    name = equation.primitive.name
    if name in ("gt", "ge"):
        a, b = b, a
    if not (a.integer and b.integer):
        low, high = False, True  # NaN, or values that rounding brings together
    elif name in ("lt", "gt"):
        low, high = a.high < b.low, a.low < b.high
    elif name in ("le", "ge"):
        low, high = a.high <= b.low, a.low <= b.high
    else:
        low, high = a.low == a.high == b.low == b.high, a.low <= b.high and b.low <= a.high
        low, high = (low, high) if name == "eq" else (not high, not low)
    return integers(result_dtype(equation), int(low), int(high))


# Bits.


@RULES.of("and")
def _and(equation, a, b):
    least = [v.high for v in (a, b) if v.low >= 0]
    if kind_of(a.dtype) == "bool":
        return integers(a.dtype, min(a.low, b.low), min(a.high, b.high))
    if least:
        return integers(result_dtype(equation), 0, min(least))
    n = bits(a, b)
    return integers(result_dtype(equation), -(2**n), 2**n - 1)


@RULES.of("or", "xor")
def _or(equation, a, b):
    n = bits(a, b)
    if min(a.low, b.low) < 0:
        return integers(result_dtype(equation), -(2**n), 2**n - 1)
    least = max(a.low, b.low) if equation.primitive.name == "or" else 0
    return integers(result_dtype(equation), least, 2**n - 1)


@RULES.of("not")
def _not(equation, x):
    smallest, largest = limits(x.dtype)
    flip = -1 if smallest < 0 else largest
    return integers(x.dtype, flip - x.high, flip - x.low)


@RULES.of("shift_left")
@_arithmetic(lambda a, b: (a << np.clip(b, 0, 32), (b >= 0) & (b <= 32)) if a.dtype.kind == "i" else (a, False))
def _shift_left(equation, x, n):
    width = jnp.iinfo(x.dtype).bits
    if n.low < 0 or n.high >= width:
        return top(x.dtype)
    corners = [a << b for a in (x.low, x.high) for b in (n.low, n.high)]
    return integers(x.dtype, min(corners), max(corners))


@RULES.of("shift_right_logical")
def _shift_right_logical(equation, x, n):
    width = jnp.iinfo(x.dtype).bits
    low, high = (int(x.low), int(x.high)) if x.low >= 0 else (0, 2**width - 1)
    # A negative amount is a large one, and a large one leaves 0.
    inside = n.low >= 0 and n.high < width
    least = min(max(int(n.low), 0), width)
    return integers(x.dtype, low >> int(n.high) if inside else 0, high >> (least if n.low >= 0 else 0))


@RULES.of("shift_right_arithmetic")
def _shift_right_arithmetic(equation, x, n):
    width, (smallest, largest) = jnp.iinfo(x.dtype).bits, limits(x.dtype)
    if smallest == 0 and x.high > largest // 2:
        return top(x.dtype)  # the first bit is a sign to it
    least, most = (int(n.low), int(n.high)) if n.low >= 0 and n.high < width else (0, width - 1)
    corners = [int(a) >> b for a in (x.low, x.high) for b in (least, most)]
    return integers(x.dtype, min(corners), max(corners))


@RULES.of("population_count")
def _count_bits(equation, x):
    return integers(x.dtype, 0, int(x.high).bit_length() if x.low >= 0 else jnp.iinfo(x.dtype).bits)


@RULES.of("clz")
def _count_zeros(equation, x):
    # XLA's compiler folds it wrongly for negative constants (-32 instead of 0).
    return integers(x.dtype, 0, jnp.iinfo(x.dtype).bits) if x.low >= 0 else top(x.dtype)
