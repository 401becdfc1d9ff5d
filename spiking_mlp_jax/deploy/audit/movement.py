"""Rules of what moves entries and converts them; what every rule returns is in `rules.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from spiking_mlp_jax.deploy.audit.rules import Rules, operand_shape, result_dtype, result_shape
from spiking_mlp_jax.deploy.audit.values import (
    CONSTANT_SIZE,
    EXACT_BITS,
    Power,
    Value,
    integers,
    join,
    kind_of,
    limits,
    of_array,
    reals,
    top,
)

RULES = Rules()

# Data movement: entries stay what they are.


@RULES.of("copy", "name", "stop_gradient", "pbroadcast", "pvary", "reshard", "sharding_constraint")
@RULES.of("layout_constraint")
def _same(equation, x):
    return x


@RULES.of("optimization_barrier", "device_put")
def _each_same(equation, *values):
    return list(values)


@RULES.of("rev", "tile", "dynamic_slice", "sort", "split", "unstack", "all_gather", "all_gather_invariant")
@RULES.of("all_to_all", "cummax", "cummin", "pmax", "pmin")
def _rearranged(equation, *values):
    if equation.primitive.name in ("sort", "pmax", "pmin", "all_to_all", "all_gather", "all_gather_invariant"):
        return [value.forget_constant() for value in values]
    return values[0].forget_constant()


def _moved(value: Value, function: Callable[[np.ndarray], np.ndarray]) -> Value:
    """Entries of a value elsewhere; looks at a constant's again, because some may be gone."""
    if value.constant is None:
        return value
    array = function(value.constant)
    # A broadcast constant has as many facts as before, and is a view.
    if array.size >= value.constant.size:
        return dataclasses.replace(value, constant=array if array.size <= CONSTANT_SIZE else None)
    return of_array(array) if array.size else value.forget_constant()


@RULES.of("broadcast_in_dim")
def _broadcast(equation, x, *sizes):
    dimensions, shape = equation.params["broadcast_dimensions"], result_shape(equation)

    def move(a):
        return np.broadcast_to(
            a.reshape([a.shape[dimensions.index(i)] if i in dimensions else 1 for i in range(len(shape))]), shape
        )

    return x.forget_constant() if sizes else _moved(x, move)


@RULES.of("reshape", "squeeze")
def _reshape(equation, x, *sizes):
    dimensions = equation.params.get("dimensions") if equation.primitive.name == "reshape" else None
    if sizes or dimensions is not None:
        return x.forget_constant()
    return _moved(x, lambda a: a.reshape(result_shape(equation)))


@RULES.of("transpose")
def _transpose(equation, x):
    return _moved(x, lambda a: a.transpose(equation.params["permutation"]))


@RULES.of("slice")
def _slice(equation, x):
    p = equation.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    window = tuple(map(slice, p["start_indices"], p["limit_indices"], strides))
    return _moved(x, lambda a: a[window])


@RULES.of("concatenate", "stack")
def _concatenate(equation, *values):
    joined = join(*values).forget_constant()
    if any(v.constant is None for v in values) or math.prod(result_shape(equation)) > CONSTANT_SIZE:
        return joined
    arrays = [v.constant for v in values]
    if equation.primitive.name == "stack":
        return dataclasses.replace(joined, constant=np.stack(arrays, equation.params["axis"]))
    return dataclasses.replace(joined, constant=np.concatenate(arrays, equation.params["dimension"]))


@RULES.of("pad", "dynamic_update_slice")
def _joined(equation, operand, other, *indices):
    return join(operand, other).forget_constant()


@RULES.of("scatter-min", "scatter-max")
def _scatter_max(equation, operand, indices, updates):
    return join(operand, updates).forget_constant()


@RULES.of("gather")
def _gather(equation, operand, indices):
    p, operand = equation.params, operand.forget_constant()
    # A promise to be inside is made true by XLA, which clips.
    if getattr(p["mode"], "name", "") in ("CLIP", "PROMISE_IN_BOUNDS"):
        return operand
    shape, mapped = operand_shape(equation), p["dimension_numbers"].start_index_map
    if indices.low >= 0 and all(indices.high <= shape[axis] - p["slice_sizes"][axis] for axis in mapped):
        return operand
    if p["fill_value"] is None:
        return top(result_dtype(equation))
    return join(operand, of_array(np.asarray(p["fill_value"]).astype(operand.dtype))).forget_constant()


@RULES.of("select_n")
def _select(equation, which, *cases):
    last = len(cases) - 1
    first, end = min(max(int(which.low), 0), last), max(min(int(which.high), last), 0) + 1
    return join(*cases[first:end])


@RULES.of("ppermute")
def _ppermute(equation, *values):
    # A device that no other sends to gets zeros.
    return [join(value, of_array(np.zeros((), value.dtype))).forget_constant() for value in values]


@RULES.of("iota")
def _iota(equation):
    dtype, shape, dimension = result_dtype(equation), result_shape(equation), equation.params["dimension"]
    value = integers(dtype, 0, max(shape[dimension] - 1, 0))
    if value.high != max(shape[dimension] - 1, 0) or math.prod(shape) > CONSTANT_SIZE or not math.prod(shape):
        return value
    column = np.arange(shape[dimension]).astype(dtype).reshape([-1] + [1] * (len(shape) - dimension - 1))
    return of_array(np.broadcast_to(column, shape))


@RULES.of("platform_index", "axis_index")
def _index(equation, *values):
    return integers(result_dtype(equation), 0, limits(result_dtype(equation))[1])


# Conversion.


@RULES.of("convert_element_type")
def _convert(equation, x):
    new, old = result_dtype(equation), x.dtype
    if new == old:
        return x
    to, kept = kind_of(new), x.power
    if to is None:
        return top(new)
    if to == "bool":
        return integers(new, int(x.integer and (x.low > 0 or x.high < 0)), int(x.low != 0 or x.high != 0 or x.nan))
    if x.integer:
        value = integers(new, x.low, x.high)
        exact = (value.low, value.high) == (x.low, x.high)
        if exact or to == "int":
            constant = None if x.constant is None or not exact else x.constant.astype(new)
            return dataclasses.replace(value, power=kept if exact else Power.NO, constant=constant)
        # Exact powers of two, if not among the integers without a gap.
        low, high = _rounded(x.low, x.high, new)
        fits = max(-x.low, x.high) <= float(jnp.finfo(new).max)
        return reals(new, low, high, False, kept if fits else Power.NO)
    if to == "int":
        smallest, largest = limits(new)
        if x.nan or not (smallest <= x.low and x.high <= largest):
            return top(new)
        return integers(new, math.trunc(x.low), math.trunc(x.high))
    wider = EXACT_BITS[new.name] > EXACT_BITS[old.name] and jnp.finfo(new).maxexp >= jnp.finfo(old).maxexp
    if wider:
        constant = None if x.constant is None else x.constant.astype(new)
        return dataclasses.replace(reals(new, x.low, x.high, x.nan, kept), constant=constant)
    if x.constant is not None:
        with np.errstate(all="ignore"):
            narrow = x.constant.astype(new)
        # Only where nothing is rounded: compilers may leave out the rounding.
        if np.array_equal(narrow.astype(old), x.constant):
            return of_array(narrow)
    return reals(new, *_rounded(x.low, x.high, new), x.nan)


def _rounded(low: float, high: float, dtype) -> tuple[float, float]:
    """Bounds of numbers rounded to the dtype, or not: compilers may keep more digits than they are asked for."""
    with np.errstate(all="ignore"):
        down, up = (float(np.asarray(float(bound)).astype(dtype)) for bound in (low, high))
    return min(down, float(low)), max(up, float(high))


@RULES.of("reduce_precision")
def _reduce_precision(equation, x):
    bits, exponent = equation.params["mantissa_bits"] + 1, equation.params["exponent_bits"]
    exact = x.integer and exponent >= 5 and max(-x.low, x.high) <= min(2**bits, 2**15)
    return x.forget_constant() if exact else top(x.dtype)
