"""What each primitive is to the audit: its kind, how many scalar operations it takes, and what its results can be.

A primitive that is not in the table is unknown: the audit reports it and fails. A rule takes an equation and what is
known of its operands, and returns what is known of its results (a list, or one value for all of them); without a rule
results may be anything. Rules follow XLA: integers wrap, indices out of bounds are clipped or filled, shifts by more
than the width leave 0 or the sign, division of integers truncates.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from spiking_mlp_jax.deploy.audit.values import (
    CONSTANT_SIZE,
    EXACT_BITS,
    Power,
    Value,
    integers,
    join,
    kind_of,
    like,
    limits,
    of_array,
    reals,
    top,
)

Kind = Literal["accumulate", "shift", "add_or_compare", "multiplication", "unknown"]
Rule = Callable[..., Value | list[Value]]

# Elementary functions are computed with multiplications.
MULTIPLICATIONS = """
    acos acosh asin asinh atan atan2 atanh cbrt cholesky cos cosh cumlogsumexp digamma erf erf_inv erfc exp exp2 expm1
    fft lgamma log log1p logistic pow rsqrt scatter-mul sin sinh sqrt tan tanh
"""
# By primitive: a Kind, or "movement", or "product", "self_product" or "quotient", whose operands decide. The decorator
# `rule` adds more.
KINDS: dict[str, str] = {
    **dict.fromkeys(MULTIPLICATIONS.split(), "multiplication"),
    **dict.fromkeys(("cumprod", "integer_pow", "reduce_prod", "square"), "self_product"),
    **dict.fromkeys(("bitcast_convert_type", "complex", "platform_index"), "movement"),
    "conv_general_dilated": "product",
    "scatter-add": "add_or_compare",
}
RULES: dict[str, Rule] = {}


def rule(kind: str, *names: str) -> Callable[[Rule], Rule]:
    """Decorate the rule of the named primitives."""

    def register(function: Rule) -> Rule:
        assert not KINDS.keys() & set(names), names
        KINDS.update(dict.fromkeys(names, kind))
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def dtype_of(variable: Any) -> Any:
    """A variable's dtype; None where it is not an array (a token, a reference to memory)."""
    aval = variable.aval
    return None if hasattr(aval, "inner_aval") else getattr(aval, "dtype", None)


def transfer(equation: Any, values: list[Value]) -> list[Value]:
    """What is known of each result of an equation, given what is known of its operands."""
    function = RULES.get(equation.primitive.name)
    if function is None or any(kind_of(value.dtype) is None for value in values):
        return [top(dtype_of(variable)) for variable in equation.outvars]
    results = function(equation, *values)
    return results if isinstance(results, list) else [results] * len(equation.outvars)


def classify(equation: Any, values: list[Value]) -> tuple[Kind, int] | None:
    """An equation's kind and its number of scalar operations; None for data movement.

    Args:
        equation: without jaxprs inside that would have to be read.
        values: what is known of its operands.
    """
    name, p = equation.primitive.name, equation.params
    kind: Any = KINDS.get(name, "unknown")
    if kind == "movement" or (name == "integer_pow" and p["y"] == 1):
        return None
    sizes = [math.prod(getattr(variable.aval, "shape", ())) for variable in equation.invars]
    # A callback may have no results, but is an operation.
    count = sum(math.prod(getattr(x.aval, "shape", ())) for x in equation.outvars) if equation.outvars else 1
    if name.startswith("scatter"):
        count = sizes[2]
    elif name == "reduce_window_max":
        count *= math.prod(p["window_dimensions"])
    elif name == "sort" or name.startswith(("reduce_", "arg")):
        count = sum(sizes)
    elif name == "dot_general":
        count *= _contracted(equation)
    elif name == "conv_general_dilated":
        count *= sizes[1] // _shape(equation, 1)[p["dimension_numbers"].rhs_spec[0]] if sizes[1] else 0
    elif name == "integer_pow":
        count *= max(abs(p["y"]).bit_length() - 1, 1)  # by squaring

    if kind == "product":
        a, b = values
        shifts = "shift" if a.power or b.power else "multiplication"
        kind = "accumulate" if a.binary or b.binary else shifts
    elif kind == "self_product":
        # Of 0 and 1 it is what a gate computes.
        kind = "accumulate" if values[0].binary and p.get("y", 2) > 0 else "multiplication"
    elif name == "scatter-mul":
        # Only the updates count: after the first, the operand is no longer what it was.
        kind = "accumulate" if values[2].binary else "multiplication"
    elif kind == "quotient":
        # A quotient of floats by 2^k changes the exponent. Shifts round down and integer division truncates, which
        # differs for negative numbers.
        a, b = values
        exact = name == "div" if kind_of(a.dtype) == "float" else a.low >= 0
        kind = "shift" if exact and b.power == Power.YES else "multiplication"
    elif name in ("abs", "sign") and equation.invars[0].aval.dtype.kind == "c":
        kind = "multiplication"  # squares and a root
    return kind, count


def _dtype(equation: Any) -> Any:
    return equation.outvars[0].aval.dtype


def _shape(equation: Any, operand: int = 0) -> tuple[int, ...]:
    return equation.invars[operand].aval.shape


# Movement: entries stay what they are.


@rule("movement", "copy", "device_put", "optimization_barrier", "pbroadcast", "pvary", "stop_gradient")
def _same(equation, *values):
    return list(values)


@rule("movement", "dynamic_slice", "rev", "split", "tile")
def _rearranged(equation, x, *indices):
    return x.forget_constant()


@rule("add_or_compare", "sort")
def _sort(equation, *values):
    return [value.forget_constant() for value in values]


@rule("movement", "broadcast_in_dim", "reshape", "slice", "squeeze", "transpose")
def _moved(equation, x, *sizes):
    p, shape = equation.params, equation.outvars[0].aval.shape
    a = x.constant
    if a is None or sizes or (equation.primitive.name == "reshape" and p["dimensions"] is not None):
        return x.forget_constant()
    match equation.primitive.name:
        case "broadcast_in_dim":
            at = p["broadcast_dimensions"]
            a = np.broadcast_to(a.reshape([a.shape[at.index(i)] if i in at else 1 for i in range(len(shape))]), shape)
        case "slice":
            a = a[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * len(shape)))]
        case "transpose":
            a = a.transpose(p["permutation"])
        case _:
            a = a.reshape(shape)
    # A part of a constant may be more regular than all of it.
    return of_array(a) if 0 < a.size <= CONSTANT_SIZE else x.forget_constant()


@rule("movement", "concatenate", "pad", "stack")
def _joined(equation, *values):
    return join(*values).forget_constant()


@rule("movement", "dynamic_update_slice")
def _update(equation, operand, update, *indices):
    return join(operand, update).forget_constant()


@rule("add_or_compare", "select_n")
def _select(equation, which, *cases):
    # An index out of bounds is clipped.
    first, last = (min(max(int(bound), 0), len(cases) - 1) for bound in (which.low, which.high))
    return join(*cases[first : last + 1])


@rule("movement", "gather")
def _gather(equation, operand, indices):
    p, operand = equation.params, operand.forget_constant()
    # XLA clips even where the caller promises that indices are in bounds.
    if getattr(p["mode"], "name", "") in ("CLIP", "PROMISE_IN_BOUNDS"):
        return operand
    mapped = p["dimension_numbers"].start_index_map
    if indices.low >= 0 and all(indices.high <= _shape(equation)[i] - p["slice_sizes"][i] for i in mapped):
        return operand
    if p["fill_value"] is None:
        return top(_dtype(equation))
    return join(operand, of_array(np.asarray(p["fill_value"]).astype(operand.dtype))).forget_constant()


@rule("movement", "iota")
def _iota(equation):
    return integers(_dtype(equation), 0, max(equation.outvars[0].aval.shape[equation.params["dimension"]] - 1, 0))


@rule("movement", "convert_element_type")
def _convert(equation, x):
    new, kind = _dtype(equation), kind_of(_dtype(equation))
    if new == x.dtype:
        return x
    if kind == "bool":
        return integers(new, int(x.integer and (x.low > 0 or x.high < 0)), int(x.low != 0 or x.high != 0 or x.nan))
    if kind == "int" and not x.integer:
        smallest, largest = limits(new)
        if x.nan or not (smallest <= x.low and x.high <= largest):
            return top(new)
        return integers(new, math.trunc(x.low), math.trunc(x.high))
    if x.integer:
        value = integers(new, x.low, x.high)
        exact = (value.low, value.high) == (x.low, x.high)
        return like(new, x.low, x.high, x, power=x.power) if exact else value
    wider = kind and EXACT_BITS[new.name] > EXACT_BITS[x.dtype.name]
    if wider and jnp.finfo(new).maxexp >= jnp.finfo(x.dtype).maxexp:
        return reals(new, x.low, x.high, x.nan, x.power)
    return top(new)


# Arithmetic. Functions that rise or fall with each operand have their extremes at those of the operands.


def _corners(function, *bounds):
    results = [function(*corner) for corner in itertools.product(*bounds)]
    return min(results), max(results)


def _bounds(*values):
    return [(value.low, value.high) for value in values]


INTEGERS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


@rule("add_or_compare", "add", "sub")
@rule("product", "mul")
def _sum(equation, a, b):
    if not (a.integer and b.integer):
        return top(_dtype(equation))
    return integers(_dtype(equation), *_corners(INTEGERS[equation.primitive.name], *_bounds(a, b)))


@rule("quotient", "div")
def _div(equation, a, b):
    if kind_of(_dtype(equation)) != "int" or b.low <= 0 <= b.high:
        return top(_dtype(equation))
    return integers(_dtype(equation), *_corners(_truncated, *_bounds(a, b)))


def _truncated(x, y):
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


@rule("quotient", "rem")
def _rem(equation, a, b):
    if kind_of(_dtype(equation)) != "int" or b.low <= 0 <= b.high:
        return top(_dtype(equation))
    most = max(abs(b.low), abs(b.high)) - 1
    return integers(_dtype(equation), max(min(a.low, 0), -most), min(max(a.high, 0), most))


@rule("add_or_compare", "neg")
def _neg(equation, x):
    signed = kind_of(x.dtype) == "float" or limits(x.dtype)[0] < 0
    return like(x.dtype, -x.high, -x.low, x, power=x.power if signed else Power.NO)


@rule("add_or_compare", "abs")
def _abs(equation, x):
    return like(x.dtype, max(x.low, -x.high, 0), max(-x.low, x.high), x, power=x.power)


@rule("add_or_compare", "sign")
def _sign(equation, x):
    low, high = (int(bound > 0) - int(bound < 0) for bound in (x.low, x.high))
    return reals(x.dtype, low, high, True) if x.nan else integers(x.dtype, low, high)


@rule("add_or_compare", "ceil", "floor", "round")
def _round(equation, x):
    if x.nan or math.isinf(x.low) or math.isinf(x.high):
        return top(x.dtype)
    name = equation.primitive.name
    return integers(
        x.dtype,
        math.ceil(x.low) if name == "ceil" else math.floor(x.low),
        math.floor(x.high) if name == "floor" else math.ceil(x.high),
    )


@rule("add_or_compare", "clamp", "max", "min")
def _extreme(equation, *values):
    pick = {"max": max, "min": min}.get(equation.primitive.name, lambda least, x, most: min(max(x, least), most))
    bounds = _corners(pick, *_bounds(*values))
    return like(_dtype(equation), *bounds, *values, power=min(value.power for value in values))


@rule("add_or_compare", "eq", "ge", "gt", "le", "lt", "ne")
def _compare(equation, a, b):
    name = equation.primitive.name
    if name in ("gt", "ge"):
        a, b = b, a
    if not (a.integer and b.integer):
        low, high = False, True  # NaN, or values that rounding makes equal
    elif name in ("lt", "gt"):
        low, high = a.high < b.low, a.low < b.high
    elif name in ("le", "ge"):
        low, high = a.high <= b.low, a.low <= b.high
    else:
        low, high = a.low == a.high == b.low == b.high, a.low <= b.high and b.low <= a.high
        low, high = (low, high) if name == "eq" else (not high, not low)
    return integers(_dtype(equation), int(low), int(high))


# Bits.


def _magnitude(*values: Value) -> int:
    """The smallest 2**n such that all entries, integers, are in -2**n ... 2**n - 1."""
    return 1 << max(max(int(v.high), ~int(v.low) if v.low < 0 else 0).bit_length() for v in values)


@rule("add_or_compare", "and")
def _and(equation, a, b):
    if kind_of(a.dtype) == "bool":
        return integers(a.dtype, min(a.low, b.low), min(a.high, b.high))
    nonnegative = [v.high for v in (a, b) if v.low >= 0]
    if nonnegative:
        return integers(_dtype(equation), 0, min(nonnegative))
    n = _magnitude(a, b)
    return integers(_dtype(equation), -n, n - 1)


@rule("add_or_compare", "or", "xor")
def _or(equation, a, b):
    n = _magnitude(a, b)
    if min(a.low, b.low) < 0:
        return integers(_dtype(equation), -n, n - 1)
    return integers(_dtype(equation), max(a.low, b.low) if equation.primitive.name == "or" else 0, n - 1)


@rule("add_or_compare", "not")
def _not(equation, x):
    smallest, largest = limits(x.dtype)
    flip = -1 if smallest < 0 else largest
    return integers(x.dtype, flip - x.high, flip - x.low)


@rule("add_or_compare", "population_count")
def _count_bits(equation, x):
    return integers(x.dtype, 0, int(x.high).bit_length() if x.low >= 0 else jnp.iinfo(x.dtype).bits)


@rule("shift", "shift_left")
def _shift_left(equation, x, n):
    if n.low < 0 or n.high >= jnp.iinfo(x.dtype).bits:
        return top(x.dtype)
    return integers(x.dtype, *_corners(operator.lshift, *_bounds(x, n)))


@rule("shift", "shift_right_logical")
def _shift_right_logical(equation, x, n):
    width = jnp.iinfo(x.dtype).bits
    low, high = (x.low, x.high) if x.low >= 0 else (0, (1 << width) - 1)
    # A negative amount is a large one, and a large one leaves 0.
    if n.low < 0 or n.high >= width:
        return integers(x.dtype, 0, high)
    return integers(x.dtype, int(low) >> int(n.high), int(high) >> int(n.low))


@rule("shift", "shift_right_arithmetic")
def _shift_right_arithmetic(equation, x, n):
    width, (smallest, largest) = jnp.iinfo(x.dtype).bits, limits(x.dtype)
    if smallest == 0 and x.high > largest // 2:
        return top(x.dtype)  # the first bit is read as a sign
    by = (n.low, n.high) if n.low >= 0 and n.high < width else (0, width - 1)
    return integers(x.dtype, *_corners(operator.rshift, (x.low, x.high), by))


# Sums, extremes and sums of products.


def _reduced(equation) -> int:
    """How many entries go into one."""
    return math.prod(_shape(equation)[axis] for axis in equation.params["axes"])


def _contracted(equation) -> int:
    return math.prod(_shape(equation)[axis] for axis in equation.params["dimension_numbers"][0][0])


def _sum_of(dtype, n: int, low: float, high: float) -> Value:
    """Sums of n integers between low and high, added in any order."""
    return integers(dtype, n * low, n * high, (n * min(low, 0), n * max(high, 0)))


@rule("add_or_compare", "reduce_sum")
def _reduce_sum(equation, x):
    return _sum_of(x.dtype, _reduced(equation), x.low, x.high) if x.integer else top(x.dtype)


@rule("add_or_compare", "cumsum")
def _cumsum(equation, x):
    n = _shape(equation)[equation.params["axis"]]
    if not (x.integer and n):
        return top(x.dtype)
    return integers(x.dtype, min(x.low, n * x.low), max(x.high, n * x.high), (n * min(x.low, 0), n * max(x.high, 0)))


@rule("add_or_compare", "reduce_and", "reduce_max", "reduce_min", "reduce_or")
def _reduce_max(equation, x):
    # Bits of several integers make others.
    one_of = equation.primitive.name.endswith(("max", "min")) or kind_of(x.dtype) == "bool"
    return x.forget_constant() if one_of and _reduced(equation) else top(x.dtype)


@rule("add_or_compare", "argmax", "argmin")
def _argmax(equation, x):
    return integers(_dtype(equation), 0, max(_reduced(equation) - 1, 0))


@rule("add_or_compare", "reduce_window_max")
def _reduce_window_max(equation, x):
    p = equation.params
    dense = all(d == 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    each = zip(_shape(equation), p["window_dimensions"], p["padding"], strict=True)
    # A window larger than the padding on either side sees an entry.
    sees = dense and all(
        size and 0 <= before < window and 0 <= after < window for size, window, (before, after) in each
    )
    return x.forget_constant() if sees else top(x.dtype)


@rule("product", "dot_general")
def _dot_general(equation, a, b):
    floating = "float" in (kind_of(a.dtype), kind_of(b.dtype))
    # Matrix units may round their operands to bfloat16.
    exact = not floating or all(max(-v.low, v.high) <= 2 ** EXACT_BITS["bfloat16"] for v in (a, b))
    if not (a.integer and b.integer and exact):
        return top(_dtype(equation))
    return _sum_of(_dtype(equation), _contracted(equation), *_corners(operator.mul, *_bounds(a, b)))
