"""Which primitives move data, add or compare, shift or multiply, and how many scalar operations each takes.

What is in no table is unknown: the audit says so, and never passes it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from spiking_mlp_jax.deploy.audit.rules import terms_of_conv
from spiking_mlp_jax.deploy.audit.values import Power, Value, kind_of

Kind = Literal["accumulate", "shift", "add_or_compare", "multiplication", "unknown"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVEMENT = _names(
    """
    all_gather all_gather_invariant all_to_all axis_index bitcast_convert_type broadcast_in_dim complex concatenate
    convert_element_type copy device_put dynamic_slice dynamic_update_slice gather imag iota layout_constraint name
    optimization_barrier pad pbroadcast platform_index ppermute pvary real reduce_precision reshape reshard rev
    sharding_constraint slice split squeeze stack stop_gradient tile transpose unstack
    """
)

# One operation for each entry of the result.
ADD_OR_COMPARE = _names(
    """
    abs add add_any and ceil clamp clz conj cummax cummin cumsum eq eq_to floor ge gt is_finite le le_to lt lt_to max
    min ne neg not or pmax pmin population_count psum psum_invariant round select_n sign sub xor
    """
)

# One for each entry of the operands.
REDUCTIONS = _names("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_sum reduce_xor sort top_k")

WINDOW_REDUCTIONS = _names("reduce_window_max reduce_window_min reduce_window_sum")

# One for each update.
SCATTERS = _names("scatter-add scatter-max scatter-min scatter-sub")

SHIFTS = _names("shift_left shift_right_arithmetic shift_right_logical")

# Products of two operands: no multiplications where one is binary, or a constant of powers of two.
PRODUCTS = _names("mul dot_general conv_general_dilated")

# Products of entries of one operand: of 0 and 1 they are what a gate or nothing at all computes.
SELF_PRODUCTS = _names("square integer_pow reduce_prod cumprod")

# Always multiplications, as far as one knows how they are computed.
MULTIPLICATIONS = _names(
    """
    acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cholesky cholesky_update cos cosh cumlogsumexp
    digamma eig eigh erf erf_inv erfc exp exp2 expm1 fft geqp3 geqrf hessenberg householder_product igamma
    igamma_grad_a igammac lgamma log log1p logistic lu ormqr polygamma pow qr ragged_dot_general random_gamma
    regularized_incomplete_beta rsqrt scaled_matmul schur sin sinh sqrt svd symmetric_product tan tanh
    triangular_solve tridiagonal tridiagonal_solve zeta
    """
)


def classify(equation: Any, values: list[Value]) -> tuple[Kind, int] | None:
    """What kind of operation an equation is, and how many.

    Args:
        equation: of a jaxpr, without a jaxpr in it that would have to be read.
        values: what is known of its operands.

    Returns:
        (kind, number of scalar operations), or None for data movement.
    """
    name = equation.primitive.name
    if name in MOVEMENT:
        return None
    shapes: list[tuple[int, ...]] = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
    # A callback may have no results, but is an operation.
    count = (
        sum(math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars) if equation.outvars else 1
    )
    if name in ("abs", "sign") and equation.invars[0].aval.dtype.kind == "c":
        return "multiplication", count  # squares and a root
    if name in ADD_OR_COMPARE:
        return "add_or_compare", count
    if name in REDUCTIONS:
        return "add_or_compare", sum(map(math.prod, shapes))
    if name in WINDOW_REDUCTIONS:
        return "add_or_compare", count * math.prod(equation.params["window_dimensions"])
    if name in SCATTERS:
        return "add_or_compare", math.prod(shapes[2])
    if name in SHIFTS:
        return "shift", count
    if name in PRODUCTS:
        if name == "dot_general":
            count *= math.prod(shapes[0][axis] for axis in equation.params["dimension_numbers"][0][0])
        elif name == "conv_general_dilated":
            count *= terms_of_conv(equation)
        return _product(*values), count
    if name == "scatter-mul":
        # The operand may be multiplied by many updates, after the first of which it is no longer what it was.
        return "accumulate" if values[2].binary else "multiplication", math.prod(shapes[2])
    if name in SELF_PRODUCTS:
        gate = values[0].binary and equation.params.get("y", 2) > 0
        if name.startswith("reduce"):
            count = math.prod(shapes[0])
        elif name == "integer_pow":
            if equation.params["y"] == 1:
                return None
            # By squaring.
            count *= max(abs(equation.params["y"]).bit_length() - 1, 1)
        return "accumulate" if gate else "multiplication", count
    if name in ("div", "rem"):
        return _quotient(name, *values), count
    return "multiplication" if name in MULTIPLICATIONS else "unknown", count


def _product(a: Value, b: Value) -> Kind:
    if a.binary or b.binary:
        return "accumulate"
    return "shift" if a.power or b.power else "multiplication"


def _quotient(name: str, a: Value, b: Value) -> Kind:
    if b.power != Power.YES:
        return "multiplication"
    if kind_of(a.dtype) == "float":
        # Only the exponent changes. A remainder takes more than that.
        return "shift" if name == "div" else "multiplication"
    # Shifts round down and division towards 0, which for negative numbers is not the same.
    return "shift" if a.low >= 0 else "multiplication"
