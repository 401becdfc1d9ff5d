"""What the rules of abstract interpretation are written with: a table by primitive, and looks at an equation.

A rule is a function of an equation and of what is known of its operands, and returns what is known of its results: a
list, or one value for all of them. No operand's dtype is one that nothing is known of. Rules follow XLA: integers
wrap, indices out of bounds are moved inside or filled, shifts by more than the width leave 0 or the sign, division
of integers goes towards 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from spiking_mlp_jax.deploy.audit.values import Value, integers

Rule = Callable[..., Value | list[Value]]


class Rules(dict[str, Rule]):
    """Rules by the primitive's name."""

    def of(self, *names: str) -> Callable[[Rule], Rule]:
        """Decorates the rule of the named primitives."""

        def register(rule: Rule) -> Rule:
            self.update(dict.fromkeys(names, rule))
            return rule

        return register


def result_dtype(equation: Any) -> Any:
    """Of an equation with one result."""
    return equation.outvars[0].aval.dtype


def result_shape(equation: Any) -> tuple[int, ...]:
    """Of an equation with one result."""
    return equation.outvars[0].aval.shape


def operand_shape(equation: Any, index: int = 0) -> tuple[int, ...]:
    """Of one of its operands."""
    return equation.invars[index].aval.shape


def bits(*values: Value) -> int:
    """The fewest bits n with all entries, integers, in -2**n ... 2**n - 1."""
    return max(max(int(v.high), ~int(v.low) if v.low < 0 else 0).bit_length() for v in values)


def products(a: Value, b: Value) -> tuple[float, float]:
    """Bounds of products of integers."""
    corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(corners), max(corners)


def sum_of(dtype: Any, n: int, low: float, high: float, least: int | None = None) -> Value:
    """Sums of `least` (n if None) to n integers between low and high, in any order."""
    sums = n * min(low, 0), n * max(high, 0)
    if least is None:
        return integers(dtype, n * low, n * high, sums)
    return integers(dtype, min(least * low, n * low), max(least * high, n * high), sums)


def terms_of_conv(equation: Any) -> int:
    """How many products one result of a convolution sums."""
    outputs = equation.params["dimension_numbers"].rhs_spec[0]
    return math.prod(n for axis, n in enumerate(operand_shape(equation, 1)) if axis != outputs)
