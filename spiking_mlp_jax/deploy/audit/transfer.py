"""What is known of any equation's results, from what is known of its operands."""

from __future__ import annotations

from typing import Any

from spiking_mlp_jax.deploy.audit import arithmetic as rules_arithmetic
from spiking_mlp_jax.deploy.audit import movement as rules_movement
from spiking_mlp_jax.deploy.audit import reduction as rules_reduction
from spiking_mlp_jax.deploy.audit.values import Value, kind_of, top

TRANSFER = {**rules_movement.RULES, **rules_arithmetic.RULES, **rules_reduction.RULES}


def transfer(equation: Any, values: list[Value]) -> list[Value]:
    """What is known of an equation's results: that they may be anything, if there is no rule.

    Args:
        equation: of a jaxpr.
        values: of its operands, in their order.

    Returns:
        one value a result.
    """
    rule = TRANSFER.get(equation.primitive.name)
    if rule is None or any(kind_of(value.dtype) is None for value in values):
        return [top(dtype_of(variable)) for variable in equation.outvars]
    results = rule(equation, *values)
    return results if isinstance(results, list) else [results] * len(equation.outvars)


def dtype_of(variable: Any) -> Any:
    """A variable's dtype; None where it is no array (a token, a reference to memory)."""
    aval = variable.aval
    return None if hasattr(aval, "inner_aval") else getattr(aval, "dtype", None)
