"""What the auditor proves of values, and that it proves nothing false."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import ShapeDtypeStruct as Spec
from jax import lax

from spiking_mlp_jax.deploy.audit import abstract, audit
from spiking_mlp_jax.deploy.audit.values import Power, Value, join, of_array, top
from tests.support.random_programs import INPUTS, SHAPE, random_inputs, random_program

F32, I32, U8, I8, BOOL = (Spec((4,), dtype) for dtype in ("float32", "int32", "uint8", "int8", "bool"))
THREE = np.float32(3)


X = Spec((2, 3), "float32")


def wrong(value: Value, array) -> str | None:
    """What is claimed of an array and does not hold."""
    a = np.asarray(array).astype(np.float64)
    nan = np.isnan(a)
    numbers = a[~nan]
    if nan.any() and not value.nan:
        return "NaN"
    if numbers.size and not (numbers.min() >= value.low and numbers.max() <= value.high):
        return "bounds"
    if value.integer and not (np.isfinite(a).all() and (a == np.rint(a)).all()):
        return "integer"
    if value.power and not (np.isfinite(a) & ((a == 0) | (np.abs(np.frexp(a)[0]) == 0.5))).all():
        return "powers of two"
    if value.power == Power.YES and not (a != 0).all():
        return "not 0"
    if value.constant is not None and not np.array_equal(value.constant.astype(np.float64), a, equal_nan=True):
        return "constant"
    return None


def kinds(fn, *args) -> dict[str, str]:
    """Kind by primitive, of a program in which each has one."""
    rows = audit(fn, *args).rows
    result = {row.primitive: row.kind for row in rows}
    assert len(result) == len({(row.primitive, row.kind) for row in rows}), rows
    return result


# What is proven: function, arguments, low, high; None where nothing but the dtype may be.
PROVEN = {
    "compare": (lambda x: x >= 1, [F32], (0, 1)),
    "bool to float": (lambda x: (x >= 1).astype("bfloat16"), [F32], (0, 1)),
    "bool to int": (lambda x: (x < 1).astype("int8"), [F32], (0, 1)),
    "bit": (lambda x: x & 1, [I32], (0, 1)),
    "bit from the top": (lambda x: x >> 7, [U8], (0, 1)),
    "bits of a plane": (lambda x: (x[:, None] >> jnp.arange(8, dtype="uint8")) & 1, [U8], (0, 1)),
    "bit of a byte, floating": (lambda x: ((x >> 3) & 1).astype("float32"), [U8], (0, 1)),
    "not a bit from the top": (lambda x: x >> 7, [I8], (-1, 0)),
    "unsigned range": (lambda x: x.astype("int32"), [U8], (0, 255)),
    "integers stay exact": (lambda x: x.astype("float32") + 1, [U8], (1, 256)),
    "sign of what is not negative": (lambda x: jnp.sign(x.astype("int32")), [U8], (0, 1)),
    "sign of anything": (jnp.sign, [I32], (-1, 1)),
    "clipped integers": (lambda x: jnp.minimum(jnp.maximum(x, 0), 1), [I32], (0, 1)),
    "clamp": (lambda x: lax.clamp(0, x, 1), [I32], (0, 1)),
    "floor of a clipped float": (lambda x: jnp.floor(jnp.where(x > 0, 0.25, 0.75)), [F32], (0, 0)),
    "select": (lambda x: jnp.where(x > 0, 1.0, 0.0), [F32], (0, 1)),
    "or, xor, and, not": (lambda x: ~((x > 0) | (x < -1) ^ (x == 2)) & (x != 7), [F32], (0, 1)),
    "product": (lambda x: (x > 0).astype("float32") * (x < 1).astype("float32"), [F32], (0, 1)),
    "maximum": (lambda x: jnp.maximum((x > 0).astype(int), (x < -1).astype(int)), [F32], (0, 1)),
    "one hot": (lambda x: jax.nn.one_hot(x, 5), [I32], (0, 1)),
    "identity matrix": (lambda x: jnp.eye(5) + 0 * x[0], [U8.update(dtype="bool")], (0, 1)),
    "max pool": (
        lambda x: lax.reduce_window((x > 0).astype("float32"), -np.inf, lax.max, (2,), (1,), "SAME"),
        [F32],
        (0, 1),
    ),
    "reductions": (lambda x: jnp.max(x > 0) & jnp.all(x > 0), [F32], (0, 1)),
    "count": (lambda x: jnp.sum(x > 0), [F32], (0, 4)),
    "running count": (lambda x: jnp.cumsum((x > 0).astype("int8")), [F32], (0, 4)),
    "population count": (lax.population_count, [U8], (0, 8)),
    "argmax": (jnp.argmax, [F32], (0, 3)),
    "iota": (lambda x: jnp.arange(9) + x.astype(int)[0], [BOOL], (0, 9)),
    "moved": (lambda x: jnp.roll((x > 0)[::-1].reshape(2, 2).T, 1).astype(int), [F32], (0, 1)),
    "compared with what it cannot be": (lambda x: (x < 0) | (x.astype(int) > 255), [U8], (0, 0)),
    "compared with what it must be": (lambda x: (x.astype(int) >= 0) & (x.astype(int) != 256), [U8], (1, 1)),
    "padded": (lambda x: jnp.pad((x > 0).astype(int), 2), [F32], (0, 1)),
    "joined": (lambda x: jnp.concatenate([(x > 0).astype(int), jnp.zeros(3, int), jnp.ones(2, int)]), [F32], (0, 1)),
    "looked up": (lambda x, i: jnp.take((x > 0).astype(int), i, mode="clip"), [F32, I32], (0, 1)),
    "looked up inside": (lambda i: jnp.take(jnp.arange(256) % 2, i.astype("int32")), [U8], (0, 1)),
    "sliced": (lambda x, i: lax.dynamic_slice((x > 0).astype(int), (i[0],), (2,)), [F32, I32], (0, 1)),
    "updated": (
        lambda x, i: lax.dynamic_update_slice((x > 0).astype(int), jnp.ones(2, int), (i[0],)),
        [F32, I32],
        (0, 1),
    ),
    "remainder": (lambda x: x % 2, [U8], (0, 1)),
    "quotient": (lambda x: lax.div(x, jnp.int32(2)), [I8.update(dtype="int32")], (-(2**30), 2**30 - 1)),
    "dot": (lambda x: (x > 0).astype("float32") @ jnp.asarray([1.0, 2, -4, 8]), [F32], (-16, 32)),
    "branches": (lambda x: lax.cond(x[0] > 1, lambda: x > 0, lambda: x < 0), [F32], (0, 1)),
    "barrier": (lambda x: lax.optimization_barrier(x > 0), [F32], (0, 1)),
}


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name):
    fn, args, bounds = PROVEN[name]
    (value,) = abstract(fn, *args)
    assert value.integer and not value.nan
    assert (value.low, value.high) == bounds
    assert value.binary == (bounds[0] >= 0 and bounds[1] <= 1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        arrays = [
            jnp.asarray(rng.integers(0, 256, a.shape).astype(a.dtype) - (a.dtype == jnp.float32) * 2) for a in args
        ]
        assert wrong(value, fn(*arrays)) is None


# What is not binary, though it looks so.
NOT_BINARY = {
    "float input": (lambda x: x, [F32]),
    "byte": (lambda x: x, [U8]),
    "clipped float": (lambda x: jnp.clip(x, 0, 1), [F32]),
    "sign of a float, which may be NaN": (lambda x: jnp.abs(jnp.sign(x)), [F32]),
    "max with NaN": (lambda x: jnp.minimum(jnp.maximum(jnp.round(x), 0), 1), [F32]),
    "sum wraps": (lambda x: x + x - 254, [U8]),
    "unsigned difference": (lambda x: (x > 0).astype("uint8") - (x < 0).astype("uint8"), [F32]),
    "sum of spikes": (lambda x: (x > 0).astype(int) + (x > 1).astype(int), [F32]),
    "difference of spikes": (lambda x: (x > 0).astype(int) - (x > 1).astype(int), [F32]),
    "and of negative numbers": (lambda x: x & -1, [I32]),
    "arithmetic shift": (lambda x: x >> 31, [I32]),
    "bits read as floats": (lambda x: lax.bitcast_convert_type((x > 0).astype("int32"), "float32"), [F32]),
    "filled gather": (lambda x, i: jnp.take((x > 0).astype("float32"), i, mode="fill"), [F32, I32]),
    "filled gather of ints": (lambda x, i: (x > 0).astype(int).at[i].get(mode="fill"), [F32, I32]),
    "select with a float": (lambda x: jnp.where(x > 0, x, 0), [F32]),
    "maximum of nothing": (lambda x: jnp.max((x > 0).astype("float32")[:0], initial=-np.inf), [F32]),
    "remainder of negative numbers": (lambda x: lax.rem(x, jnp.int32(2)), [I32]),
    "padded window": (
        lambda x: lax.reduce_window((x > 0).astype("float32"), -np.inf, lax.max, (2,), (1,), ((2, 0),)),
        [F32],
    ),
    "narrow sums": (lambda x: jnp.sum((x > 0).astype("int8")) * 64, [F32]),
    "scattered sum": (lambda x, i: jnp.zeros(4, int).at[i].add(1), [F32, I32]),
    "float too large to be exact": (lambda x: (x.astype("float32") + 2.0**24) - 2.0**24, [BOOL]),
    "float to int": (lambda x: x.astype("int32"), [F32]),
    "negated bool": (lambda x: -(x.astype("int32")), [BOOL]),
    "power zero of negative": (lambda x: lax.shift_right_arithmetic(x, x), [I8]),
}


@pytest.mark.parametrize("name", NOT_BINARY)
def test_not_binary(name):
    fn, args = NOT_BINARY[name]
    assert not abstract(fn, *args)[0].binary
    weights = jnp.asarray(3.7, "float32")
    assert not audit(lambda *args: fn(*args) * weights, *args).ok


def test_values_of_example_arguments_are_not_known():
    ones, fours = np.ones(4, "float32"), np.full(4, 4.0, "float32")
    assert kinds(lambda a, b: a * b, ones, fours) == {"mul": "multiplication"}
    assert kinds(lambda a: a * 4, fours) == {"mul": "shift"}
    assert kinds(lambda a, b: a * b, True, 2.5)["mul"] == "accumulate"
    assert kinds(lambda tree: tree["a"] * tree["b"], {"a": ones, "b": jnp.ones(4, bool)})["mul"] == "accumulate"


def test_what_is_known_of_constants():
    large = np.full((1 << 9, 1 << 9), -0.5, np.float32)
    for array, power, kept in (
        (np.float32([1, -2, 0.125]), Power.YES, True),
        (np.float32([1, 0, 4]), Power.OR_ZERO, True),
        (np.int8([-128, 64]), Power.YES, True),
        (np.uint8([128, 3]), Power.NO, True),
        (np.asarray([2**63], np.uint64), Power.YES, True),
        (np.asarray([-(2**63)], np.int64), Power.YES, True),
        (np.float32([np.inf]), Power.NO, True),
        (np.float32([2.0**-140]), Power.NO, False),
        (jnp.asarray([0.5, 2], "bfloat16"), Power.YES, True),
        (large, Power.YES, False),
        (np.zeros(0, np.float32), Power.NO, False),
    ):
        value = of_array(array)
        assert (value.power, value.constant is not None) == (power, kept), array
        if np.size(array):
            assert wrong(value, array) is None
    assert of_array(np.float32([np.nan, 1])).nan and not of_array(np.float32([np.nan, 1])).integer
    assert of_array(jax.random.key(0)).constant is None
    joined = join(of_array(np.float32(2)), of_array(np.float32(2)))
    assert joined.constant is not None and join(joined, of_array(np.float32(4))).constant is None
    assert join(joined, top(np.dtype("float32"))).nan


def carried(carry, body, length=5):
    return lambda x: lax.scan(lambda c, _: (body(c, x), c * jnp.float32(0.3)), carry(x), length=length)[1]


CARRIES = {
    "stays": (carried(lambda x: (x > 0).astype("float32"), lambda c, x: jnp.where(x > 1, 1.0, c)), "accumulate"),
    "leaves": (carried(lambda x: (x > 0).astype("float32"), lambda c, x: c + 1), "multiplication"),
    "leaves late": (
        lambda x: lax.scan(
            lambda c, _: ((c[1], c[2], c[3], x), c[0] * jnp.float32(0.3)),
            tuple((x > i).astype("float32") for i in range(4)),
            length=9,
        )[1],
        "multiplication",
    ),
    "swaps": (
        lambda x: lax.scan(
            lambda c, _: ((c[1], c[0]), c[0] * jnp.float32(0.3)),
            (jnp.zeros((2, 3)), (x > 0).astype("float32")),
            length=9,
        )[1],
        "accumulate",
    ),
    "is a constant": (carried(lambda x: jnp.full((2, 3), 2.0), lambda c, x: c), "shift"),
    "was a constant": (carried(lambda x: jnp.full((2, 3), 2.0), lambda c, x: c + c), "multiplication"),
    "nested": (
        carried(
            lambda x: (x > 0).astype("float32"),
            lambda c, x: lax.while_loop(lambda y: y[0, 0] > 2, lambda y: jnp.maximum(y, x > 0), c),
        ),
        "accumulate",
    ),
    "nested, leaves": (
        carried(
            lambda x: (x > 0).astype("float32"),
            lambda c, x: lax.while_loop(lambda y: y[0, 0] > 2, lambda y: y + (x > 0), c),
        ),
        "multiplication",
    ),
}


@pytest.mark.parametrize("name", CARRIES)
def test_carries(name):
    fn, kind = CARRIES[name]
    assert {row.kind for row in audit(fn, X).rows if row.primitive == "mul"} == {kind}


def test_carried_counters_end():
    (value,) = abstract(lambda x: lax.fori_loop(0, 1000, lambda i, c: c + 1, jnp.uint8(0)), X)
    assert (value.low, value.high) == (0, 255)
    (value,) = abstract(lambda x: lax.while_loop(lambda c: c < x[0, 0], lambda c: c + 1, jnp.float32(0)), X)
    assert not value.integer and value.nan
    (value,) = abstract(lambda x: lax.scan(lambda c, _: (c + 1, None), jnp.int32(7), length=0)[0], X)
    assert (value.low, value.high) == (7, 7)


PROGRAMS = [Spec(SHAPE, name) for name in INPUTS]


@given(st.integers(0, 2**32 - 1))
def test_claims_hold(seed):
    """Of every intermediate of random programs, on random inputs with extremes among them."""
    program = random_program(seed, 25)
    values = abstract(program, *PROGRAMS)
    audit(program, *PROGRAMS)
    compiled, rng = jax.jit(program), np.random.default_rng(seed)
    for _ in range(4):
        for i, (value, array) in enumerate(zip(values, compiled(*random_inputs(rng)), strict=True)):
            assert wrong(value, array) is None, (i, wrong(value, array), value, array)


def test_random_programs_are_worth_it():
    values = [value for seed in range(20) for value in abstract(random_program(seed, 25), *PROGRAMS)]
    assert sum(value.binary for value in values) > 50
    assert sum(value.integer and not value.binary for value in values) > 100
    assert sum(bool(value.power) for value in values) > 10
