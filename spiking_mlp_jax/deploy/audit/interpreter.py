"""Counts the operations of a function, and proves where none of them is a multiplication.

The function's jaxpr is read and never run. Multiply-like operations are judged by what abstract interpretation proves
of their operands (`values.py`, `rules.py`): a product with spikes, 0 or 1, only adds; one with constant powers of two
only shifts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import Literal

from spiking_mlp_jax.deploy.audit.rules import Kind, classify, dtype_of, transfer
from spiking_mlp_jax.deploy.audit.values import Value, join, of_array, same, top, widen
from spiking_mlp_jax.errors import InputError

# Primitives that only call a jaxpr with their operands, and the parameter that holds it.
CALLS = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "shard_map": "jaxpr",
}
# Their names in other versions of JAX.
OTHER_NAMES = {"checkpoint": "remat2", "pjit": "jit"}

# The values of a loop are joined for this many iterations, then widened for as many, then given up.
PATIENCE = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """Equal operations in one place.

    Attributes:
        primitive: JAX's name of the operation.
        kind: "accumulate", "shift", "add_or_compare", "multiplication" or "unknown".
        count: scalar operations: M N K for a product of matrices, multiplied by the length of a `scan`. Every branch of
            a `cond` counts, and one iteration of a `while` loop.
        where: its `jax.named_scope`s, joined by dots, or file and line where there are none.
    """

    primitive: str
    kind: Kind
    count: int
    where: str


@dataclasses.dataclass(frozen=True)
class Report:
    """All operations of a function except data movement, in program order."""

    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether nothing is multiplied and everything is known."""
        return not any(row.kind in ("multiplication", "unknown") for row in self.rows)

    def total(self, kind: Kind) -> int:
        """The number of scalar operations of a kind."""
        return sum(row.count for row in self.rows if row.kind == kind)

    def table(self) -> str:
        """The rows as text, grouped by place, and the verdict in the last line."""
        lines = [("where", "primitive", "kind", "count")]
        for where in dict.fromkeys(row.where for row in self.rows):
            here = [row for row in self.rows if row.where == where]
            lines += [
                (where if i == 0 else "", row.primitive, row.kind, f"{row.count:,}") for i, row in enumerate(here)
            ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in lines
        ]
        return "\n".join([*texts, self.verdict()])

    def verdict(self) -> str:
        """One line: whether the function multiplies, and where."""
        if self.ok:
            return "ok: no multiplication, no unknown operation."
        parts = []
        names: dict[Kind, str] = {"multiplication": "multiplications", "unknown": "unknown operations"}
        for kind, plural in names.items():
            places = dict.fromkeys(row.where for row in self.rows if row.kind == kind)
            if places:
                parts.append(f"{self.total(kind):,} {plural} in {', '.join(places)}")
        return f"not ok: {'; '.join(parts)}."

    def __str__(self) -> str:
        return self.table()


def audit(fn: Callable[..., Any], *example_args: Any) -> Report:
    """Classify every operation of a function.

    Args:
        fn: traceable by JAX. Arrays that it closes over are constants with known values.
        example_args: arrays, `jax.ShapeDtypeStruct`s or trees of them. Only their shapes and dtypes matter: a bool is
            0 or 1, a uint8 is 0 to 255, a float is anything.

    Returns:
        the report. A product (`mul`, `dot_general`, a convolution) is "accumulate" where every entry of an operand is 0
        or 1 for any input, "shift" where an operand is a constant of entries 0 or +-2**k, and a "multiplication"
        otherwise. So is a division, but a "shift" where the divisor is a constant +-2**k and the dividend is floating
        or never negative. Primitives that `rules.py` does not list are "unknown": kernels, callbacks, foreign calls,
        random bits, and any that neither networks nor tests use.

    Raises:
        InputError: fn is not callable, or cannot be traced for these arguments.

    Examples:
        >>> spikes, x, w = (jax.ShapeDtypeStruct(*of) for of in (((4,), bool), ((4,), "float32"), ((4, 2), "float32")))
        >>> audit(lambda s, w: s.astype(w.dtype) @ w, spikes, w).total("accumulate")
        8
        >>> audit(lambda x, w: x @ w, x, w).total("multiplication")
        8
    """
    if not callable(fn):
        raise InputError(f"audit takes a function and its arguments, got {type(fn).__name__}")
    try:
        # A lambda, because a module is callable but not a function.
        closed = jax.make_jaxpr(lambda *args: fn(*args))(*example_args)
    except InputError:
        raise
    except Exception as error:
        # The function is the user's, and so is whatever it raises.
        reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
        raise InputError(
            f"{_name(fn)} cannot be traced for arguments of these shapes and dtypes: {type(error).__name__}: {reason}; "
            "change the arguments, or what depends on their values in Python"
        ) from error
    walk = _Walk()
    walk.closed(closed, [top(dtype_of(variable)) for variable in closed.jaxpr.invars], _Place(frame=_name(fn)))
    return Report([Row(*key[:2], count, key[2]) for key, count in walk.counts.items()])


def abstract(fn: Callable[..., Any], *example_args: Any) -> list[Value]:
    """What the audit knows of a function's results, flattened. Arguments as in `audit`."""
    closed = jax.make_jaxpr(fn)(*example_args)
    return _Walk().closed(closed, [top(dtype_of(variable)) for variable in closed.jaxpr.invars], _Place())


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a jaxpr is called from.

    Attributes:
        scopes: names of the scopes around it.
        frame: file and line of the call.
        note: what to add to every place in it.
        times: how often it runs; None while a loop's values are being sought and nothing counts.
    """

    scopes: tuple[str, ...] = ()
    frame: str = "?"
    note: str = ""
    times: int | None = 1

    def of(self, equation) -> _Place:
        """The place of an equation."""
        stack = getattr(equation.source_info.name_stack, "stack", ())
        # The stack also holds transformations (vmap, jvp).
        scopes = tuple(part.name for part in stack if type(part).__name__ == "Scope")
        found = None if self.scopes or scopes else _frame(equation.source_info)
        return dataclasses.replace(self, scopes=self.scopes + scopes, frame=found or self.frame)

    def repeated(self, times: int) -> _Place:
        """The same for what runs this many times in it."""
        return self if self.times is None else dataclasses.replace(self, times=self.times * times)

    def silent(self) -> _Place:
        """The same, with nothing counted."""
        return dataclasses.replace(self, times=None)

    def __str__(self) -> str:
        return (".".join(self.scopes) or self.frame) + self.note


def _name(fn) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _frame(source_info) -> str | None:
    summary = source_info_util.summarize(source_info)
    match = re.match(r"(?:.*[/\\])?([^/\\]+?:\d+)", summary)
    # The lambda in `audit` is not the user's.
    return match[1] if match and not summary.startswith(f"{__file__}:") else None


class _Walk:
    """An interpreter of jaxprs with abstract values, which counts their operations."""

    def __init__(self):
        self.counts: dict[tuple[str, Kind, str], int] = {}
        self.constants: dict[int, tuple[Any, Value]] = {}

    def closed(self, closed: Any, values: Sequence[Value], place: _Place, consts: Sequence[Any] = ()) -> list[Value]:
        """What is known of the results of a jaxpr with its constants, or with `consts`."""
        constants = [self.constant(array) for array in (*getattr(closed, "consts", ()), *consts)]
        return self.run(getattr(closed, "jaxpr", closed), constants, values, place)

    def constant(self, array: Any) -> Value:
        """`of_array`, once for each array."""
        if id(array) not in self.constants:
            # Mutable references have no known value. The array is stored so that no other gets its id.
            value = top(None) if hasattr(jax.typeof(array), "inner_aval") else of_array(array)
            self.constants[id(array)] = array, value
        return self.constants[id(array)][1]

    def run(self, jaxpr: Any, constants: Sequence[Value], values: Sequence[Value], place: _Place) -> list[Value]:
        known: dict[Any, Value] = {}

        def read(atom) -> Value:
            return of_array(atom.val, dtype_of(atom)) if isinstance(atom, Literal) else known[atom]

        def write(variable, value: Value) -> None:
            # An iteration of a scan, or a device, sees a part of an array.
            if value.constant is not None and value.constant.shape != getattr(variable.aval, "shape", None):
                value = value.forget_constant()
            known[variable] = value

        for variable, value in zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *values], strict=True):
            write(variable, value)
        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self.equation(equation, operands, place)
            for variable, value in zip(equation.outvars, results, strict=True):
                write(variable, value)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, operands: list[Value], place: _Place) -> list[Value]:
        """What is known of an equation's results."""
        primitive, p = equation.primitive.name, equation.params
        name = OTHER_NAMES.get(primitive, primitive)
        if name in CALLS or name in NESTED:
            place = place.of(equation)
        if name == "shard_map":
            place = place.repeated(_devices(p))
        if name in CALLS and CALLS[name] in p:
            return self.closed(p[CALLS[name]], operands, place)
        if name in NESTED:
            return NESTED[name](self, equation, operands, place)
        found = None if place.times is None else classify(equation, operands)
        if found is not None:
            self.add(primitive, *found, place.of(equation))
        return transfer(equation, operands)

    def add(self, primitive: str, kind: Kind, count: int, place: _Place) -> None:
        assert place.times is not None
        key = primitive, kind, str(place)
        self.counts[key] = self.counts.get(key, 0) + count * place.times

    def fixpoint(self, body: Callable[[list[Value]], Sequence[Value]], values: Sequence[Value]) -> list[Value]:
        """What holds before every iteration of a loop, given what holds before the first."""
        values = list(values)
        # In the end each iteration gives up at least one of the values.
        for i in range(2 * PATIENCE + len(values) + 1):
            after = [join(a, b) for a, b in zip(values, body(values), strict=True)]
            changed = [not same(a, b) for a, b in zip(values, after, strict=True)]
            if not any(changed):
                return values
            if i >= 2 * PATIENCE:
                after = [top(b.dtype) if moved else b for moved, b in zip(changed, after, strict=True)]
            elif i >= PATIENCE:
                after = [widen(a, b) for a, b in zip(values, after, strict=True)]
            values = after
        raise AssertionError("a rule's result is outside its dtype's bounds")

    def scan(self, equation: Any, operands: list[Value], place: _Place) -> list[Value]:
        p = equation.params
        constants = operands[: p["num_consts"]]
        carry = operands[p["num_consts"] :][: p["num_carry"]]
        inputs = [value.forget_constant() for value in operands[p["num_consts"] + p["num_carry"] :]]

        def body(carry, place):
            return self.closed(p["jaxpr"], [*constants, *carry, *inputs], place)

        before = self.fixpoint(lambda carry: body(carry, place.silent())[: len(carry)], carry)
        results = body(before, place.repeated(p["length"]))
        if p["length"] == 0:
            results[: len(carry)] = carry
        return [*results[: len(carry)], *(value.forget_constant() for value in results[len(carry) :])]

    def while_loop(self, equation: Any, operands: list[Value], place: _Place) -> list[Value]:
        p = equation.params
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        place = dataclasses.replace(place, note=f"{place.note} (one iteration of a while loop)")

        def body(carry, place):
            return self.closed(p["body_jaxpr"], [*operands[first:second], *carry], place)

        before = self.fixpoint(lambda carry: body(carry, place.silent()), operands[second:])
        self.closed(p["cond_jaxpr"], [*operands[:first], *before], place)
        body(before, place)
        return before

    def cond(self, equation: Any, operands: list[Value], place: _Place) -> list[Value]:
        results = [self.closed(branch, operands[1:], place) for branch in equation.params["branches"]]
        return [join(*values) for values in zip(*results, strict=True)]

    def reduce(self, equation: Any, operands: list[Value], place: _Place) -> list[Value]:
        """A reduction by a function of two entries, each an operand's or an earlier result."""
        p = equation.params
        half = len(operands) // 2
        shape = equation.invars[0].aval.shape
        count = math.prod(shape)
        if equation.primitive.name == "reduce_window":
            count = math.prod(equation.outvars[0].aval.shape) * math.prod(p["window_dimensions"])
        entries = [join(a, b).forget_constant() for a, b in zip(operands[:half], operands[half:], strict=True)]
        return self.combine(p["jaxpr"], p.get("consts", ()), entries, place.repeated(count))

    def scatter(self, equation: Any, operands: list[Value], place: _Place) -> list[Value]:
        """Replace entries by a function of them and the updates, or by the updates."""
        p = equation.params
        operand, _, updates = operands
        entry = join(operand, updates).forget_constant()
        if p.get("update_jaxpr") is None:
            return [entry]
        count = math.prod(equation.invars[2].aval.shape)
        (result,) = self.combine(p["update_jaxpr"], p.get("update_consts", ()), [entry], place.repeated(count))
        return [result]

    def combine(self, jaxpr: Any, consts: Sequence[Any], entries: Sequence[Value], place: _Place) -> list[Value]:
        def body(entries, place):
            return self.closed(jaxpr, [*entries, *entries], place, consts)

        settled = self.fixpoint(lambda entries: body(entries, place.silent()), entries)
        body(settled, place)
        return settled


# Primitives whose jaxprs need their own handling.
NESTED: dict[str, Callable[[_Walk, Any, list[Value], _Place], list[Value]]] = {
    "cond": _Walk.cond,
    "reduce": _Walk.reduce,
    "reduce_window": _Walk.reduce,
    "scan": _Walk.scan,
    "scatter": _Walk.scatter,
    "while": _Walk.while_loop,
}


def _devices(params) -> int:
    """The number of devices that run the body of a `shard_map`."""
    shape = dict(params["mesh"].shape)
    axes = params.get("newly_manual_axes", params.get("manual_axes", shape))
    return math.prod(shape[axis] for axis in axes)
