"""Rules of sums, extremes and sums of products; what every rule returns is in `rules.py`."""

from __future__ import annotations

import math

from spiking_mlp_jax.deploy.audit.rules import Rules, bits, operand_shape, products, result_dtype, sum_of, terms_of_conv
from spiking_mlp_jax.deploy.audit.values import EXACT_BITS, Value, integers, kind_of, top

# Matrix units may round their operands to bfloat16.
EXACT_FACTOR = 2 ** EXACT_BITS["bfloat16"]

RULES = Rules()


def _reduced(equation) -> int:
    """How many entries go into one."""
    shape = operand_shape(equation)
    return math.prod(shape[axis] for axis in equation.params["axes"])


@RULES.of("reduce_sum")
def _reduce_sum(equation, x):
    return sum_of(x.dtype, _reduced(equation), x.low, x.high) if x.integer else top(x.dtype)


@RULES.of("cumsum")
def _cumsum(equation, x):
    n = operand_shape(equation)[equation.params["axis"]]
    return sum_of(x.dtype, n, x.low, x.high, least=1) if x.integer and n else top(x.dtype)


@RULES.of("reduce_max", "reduce_min")
def _reduce_max(equation, x):
    return x.forget_constant() if _reduced(equation) else top(x.dtype)


@RULES.of("reduce_and", "reduce_or", "reduce_xor")
def _reduce_bits(equation, x):
    if not _reduced(equation):
        return top(x.dtype)
    n = bits(x)
    return integers(x.dtype, 0 if x.low >= 0 else -(2**n), 2**n - 1)


@RULES.of("reduce_prod", "cumprod")
def _reduce_prod(equation, x):
    return integers(x.dtype, 0, 1) if x.binary else top(x.dtype)


@RULES.of("argmax", "argmin")
def _argmax(equation, x):
    return integers(result_dtype(equation), 0, max(_reduced(equation) - 1, 0))


@RULES.of("top_k")
def _top_k(equation, x):
    n = operand_shape(equation)[equation.params.get("axis", -1)]
    return [x.forget_constant(), integers(equation.outvars[1].aval.dtype, 0, max(n - 1, 0))]


@RULES.of("reduce_window_sum")
def _reduce_window_sum(equation, x):
    n = math.prod(equation.params["window_dimensions"])
    # As few as none: the rest of a window is padding.
    return sum_of(x.dtype, n, x.low, x.high, least=0) if x.integer else top(x.dtype)


@RULES.of("reduce_window_max", "reduce_window_min")
def _reduce_window_max(equation, x):
    p = equation.params
    dense = all(d == 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    shape = operand_shape(equation)
    each = zip(shape, p["window_dimensions"], p["padding"], strict=True)
    # A window that no padding holds sees an entry.
    sees = dense and all(
        size and 0 <= before < window and 0 <= after < window for size, window, (before, after) in each
    )
    return x.forget_constant() if sees else top(x.dtype)


@RULES.of("dot_general")
def _dot_general(equation, a, b):
    contracted = equation.params["dimension_numbers"][0][0]
    return _dot(equation, math.prod(operand_shape(equation)[axis] for axis in contracted), *_factors(a, b))


@RULES.of("conv_general_dilated")
def _conv(equation, a, b):
    # Padding makes terms 0.
    low, high, exact = _factors(a, b)
    return _dot(equation, terms_of_conv(equation), min(low, 0), max(high, 0), exact)


def _factors(a: Value, b: Value) -> tuple[float, float, bool]:
    if not (a.integer and b.integer):
        return 0, 0, False
    whole = kind_of(a.dtype) != "float" and kind_of(b.dtype) != "float"
    exact = whole or all(max(-v.low, v.high) <= EXACT_FACTOR for v in (a, b))
    return *products(a, b), exact


def _dot(equation, terms: int, low: float, high: float, exact: bool) -> Value:
    return sum_of(result_dtype(equation), terms, low, high) if exact else top(result_dtype(equation))
