"""What is known of an array without running the program: bounds, whether its entries are integers, a constant.

A `Value` describes a set of arrays. Everything here may forget but must not guess: where rounding, wrapping, NaN or a
device (subnormal numbers flushed to 0, products of rounded operands) leave a doubt, the answer is `top`, which
describes any array of the dtype.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

# Larger constants are reduced to their bounds.
CONSTANT_SIZE = 1 << 16

# Floats represent every integer up to 2**bits. Nothing is assumed of other floating dtypes.
EXACT_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


class Power(enum.IntEnum):
    """Whether all entries come from constants that are +-2**k. Ordered: a smaller member says less."""

    NO = 0
    OR_ZERO = 1
    YES = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A description of arrays.

    Attributes:
        dtype: None for what is not an array.
        low, high: bounds of all entries that are not NaN; Python integers where `integer`.
        integer: whether every entry is an integer, and so neither NaN nor infinite.
        nan: whether an entry may be NaN.
        power: whether the entries come from constant powers of two.
        constant: the only array that it can be: at most CONSTANT_SIZE entries, none of them subnormal.
    """

    dtype: Any
    low: float
    high: float
    integer: bool
    nan: bool
    power: Power = Power.NO
    constant: np.ndarray | None = None

    @property
    def binary(self) -> bool:
        """Whether every entry is 0 or 1."""
        return self.integer and self.low >= 0 and self.high <= 1

    def forget_constant(self) -> Value:
        """The same without the constant itself, whose entries may be repeated, dropped or in another order."""
        return self if self.constant is None else dataclasses.replace(self, constant=None)


def kind_of(dtype) -> str | None:
    """ "bool", "int" or "float"; None where nothing is ever known of a dtype (complex, keys, tokens, other floats)."""
    try:
        if jnp.issubdtype(dtype, jnp.bool_):
            return "bool"
        if jnp.issubdtype(dtype, jnp.integer):
            return "int"
    except TypeError:
        return None
    return "float" if getattr(dtype, "name", None) in EXACT_BITS else None


def limits(dtype) -> tuple[int, int]:
    """The smallest and largest number of a boolean or integer dtype."""
    if kind_of(dtype) == "bool":
        return 0, 1
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)


def top(dtype) -> Value:
    """Any array of a dtype."""
    if kind_of(dtype) in ("bool", "int"):
        low, high = limits(dtype)
        return Value(dtype, low, high, True, False)
    return Value(dtype, -math.inf, math.inf, False, True)


def integers(dtype, low: float, high: float, sums: tuple[float, float] | None = None) -> Value:
    """Exact integers between low and high, or top where the dtype wraps or rounds them.

    Args:
        dtype: of the result.
        low, high: bounds, Python integers.
        sums: bounds of partial sums, where they are wider. They matter for floats only: integers that wrap on the way
            are correct in the end.
    """
    kind = kind_of(dtype)
    if kind in ("bool", "int"):
        smallest, largest = limits(dtype)
        fits = smallest <= low and high <= largest
    else:
        fits = kind is not None and max(map(abs, (low, high, *(sums or ())))) <= 2 ** EXACT_BITS[dtype.name]
    power = Power.YES if low == high and abs(int(low)).bit_count() == 1 else Power.NO
    return Value(dtype, low, high, True, False, power) if fits else top(dtype)


def reals(dtype, low: float, high: float, nan: bool, power: Power = Power.NO) -> Value:
    """Floats between low and high that need not be integers."""
    if kind_of(dtype) != "float" or math.isnan(low) or math.isnan(high):
        return top(dtype)
    # Devices may flush subnormal numbers to 0.
    tiny = float(jnp.finfo(dtype).tiny)
    low = 0.0 if 0 < low < tiny else float(low)
    high = 0.0 if -tiny < high < 0 else float(high)
    return Value(dtype, low, high, False, nan, power)


def like(dtype, low: float, high: float, *parts: Value, power: Power = Power.NO) -> Value:
    """A result whose every entry is an entry of one of the parts, or the negative or absolute value of one."""
    if all(part.integer for part in parts):
        made = integers(dtype, int(low), int(high))
        return dataclasses.replace(made, power=power) if made.low == low and made.high == high else made
    return reals(dtype, low, high, any(part.nan for part in parts), power)


def of_array(array: Any, dtype: Any = None) -> Value:
    """What is known of a constant: everything, or of large ones bounds, integers and powers.

    Args:
        array: of NumPy or JAX, or a number.
        dtype: JAX's dtype for it; its own if None.
    """
    dtype = np.asarray(array).dtype if dtype is None and not hasattr(array, "dtype") else dtype or array.dtype
    kind = kind_of(dtype)
    if kind is None:
        return top(dtype)
    try:
        a = np.asarray(array, dtype)
    except (RuntimeError, TypeError):  # on another process's devices; a tracer
        return top(dtype)
    if not a.size:
        return top(dtype)
    kept = a if a.size <= CONSTANT_SIZE else None
    if kind in ("bool", "int"):
        # NumPy itself has no integers of 2 and 4 bits.
        a = a if a.dtype.kind in "iu" else a.astype(np.int64)
        low, high = int(a.min()), int(a.max())
        power = _power(a, lambda x: (x & (x - (x != 0))) == 0 if x.dtype.kind == "u" else _magnitude_is_power(x))
        return Value(dtype, low, high, True, False, power, kept)
    wide = a if a.dtype.itemsize >= 4 else a.astype(np.float32)
    nan = bool(np.isnan(wide).any())
    if nan and np.isnan(wide).all():
        return top(dtype)
    low, high = float(np.nanmin(wide)), float(np.nanmax(wide))
    tiny = float(jnp.finfo(dtype).tiny)
    if _all(lambda x: (x == 0) | (np.abs(x) >= tiny) | np.isnan(x), wide):
        whole = not nan and _all(lambda x: np.isfinite(x) & (x == np.rint(x)), wide)
        power = _power(wide, lambda x: np.isfinite(x) & ((x == 0) | (np.abs(np.frexp(x)[0]) == 0.5)))
        if whole and max(-low, high) <= 2 ** EXACT_BITS[dtype.name]:
            return Value(dtype, int(low), int(high), True, False, power, kept)
        return Value(dtype, low, high, False, nan, power, kept)
    return reals(dtype, min(low, 0.0), max(high, 0.0), nan)


def _magnitude_is_power(x: np.ndarray) -> np.ndarray:
    # The most negative number is its own magnitude, and a power of two.
    magnitude = np.abs(x).view(x.dtype.str.replace("i", "u"))
    return (magnitude & (magnitude - (magnitude != 0))) == 0


def _power(a: np.ndarray, test: Callable[[np.ndarray], np.ndarray]) -> Power:
    if not _all(test, a):
        return Power.NO
    return Power.YES if (a != 0).all() else Power.OR_ZERO


def _all(test: Callable[[np.ndarray], np.ndarray], a: np.ndarray) -> bool:
    # Most weights fail at their first entry.
    return bool(test(a.reshape(-1)[:64]).all()) and bool(test(a).all())


def same(a: Value, b: Value) -> bool:
    """Whether two values of one dtype say the same."""
    facts = [(v.low, v.high, v.integer, v.nan, v.power) for v in (a, b)]
    return facts[0] == facts[1] and _same_constant(a.constant, b.constant)


def join(a: Value, *others: Value) -> Value:
    """What holds for each of several values of one dtype, and so for arrays made of their entries."""
    for b in others:
        constant = a.constant if _same_constant(a.constant, b.constant) else None
        a = Value(
            a.dtype,
            min(a.low, b.low),
            max(a.high, b.high),
            a.integer and b.integer,
            a.nan or b.nan,
            min(a.power, b.power),
            constant,
        )
    return a


def widen(old: Value, new: Value) -> Value:
    """`join`, but a bound that moves goes to the dtype's, so that a loop's values settle after a few iterations."""
    joined = join(old, new)
    if joined.low >= old.low and joined.high <= old.high:
        return joined
    whole = top(joined.dtype)
    if whole.integer:
        low = joined.low if joined.low >= old.low else whole.low
        return dataclasses.replace(joined, low=low, high=joined.high if joined.high <= old.high else whole.high)
    return whole


def _same_constant(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is b:
        return True
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)
