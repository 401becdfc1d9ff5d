"""The auditor: what it proves, that it proves nothing false, and that no multiplication gets past it."""

import functools
import gc

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import ShapeDtypeStruct as Spec
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from random_model import random_model
from random_programs import INPUTS, SHAPE, random_inputs, random_program
from tiny import tiny_model

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.infer import audit as auditor
from spiking_mlp_jax.infer import operations, transfer
from spiking_mlp_jax.infer.abstract_values import Power, Value, join, of_array, top
from spiking_mlp_jax.infer.audit import Report, Row, abstract, audit

F32, I32, U8, I8, BOOL = (Spec((4,), dtype) for dtype in ("float32", "int32", "uint8", "int8", "bool"))
THREE = np.float32(3)


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


def test_names_exist():
    existing = {o.name for o in gc.get_objects() if issubclass(type(o), jax.extend.core.Primitive)}
    tables = [v for v in vars(operations).values() if isinstance(v, frozenset)]
    assert len(tables) == 9
    names = set().union(*tables, transfer.TRANSFER, auditor.CALLS, auditor.NESTED, ["div", "rem", "scatter-mul"])
    assert len(names) > 150
    assert names - existing == set()
    # No primitive is in two tables.
    nested = [frozenset(auditor.CALLS), frozenset(auditor.NESTED)]
    assert sum(map(len, [*tables, *nested])) == len(set().union(*tables, *nested))


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


X = Spec((2, 3), "float32")
# Multiply-like operations: function, argument, primitive, kind, count.
CLASSIFIED = {
    "mul": (lambda x: x * x.T.reshape(2, 3), X, "mul", "multiplication", 6),
    "mul by a number": (lambda x: x * 3, X, "mul", "multiplication", 6),
    "mul by a spike": (lambda x: x * (x > 0), X, "mul", "accumulate", 6),
    "mul by a power of two": (lambda x: x * -0.25, X, "mul", "shift", 6),
    "mul by powers of two": (lambda x: x * np.float32([1, -2, 8]), X, "mul", "shift", 6),
    "mul by many powers": (lambda x: x[0, 0] * np.full((300, 300), 2.0, "float32"), X, "mul", "shift", 90_000),
    "mul by powers and 3": (lambda x: x * np.float32([1, 3, 8]), X, "mul", "multiplication", 6),
    "mul by computed powers": (lambda x: x * (jnp.ones(3) + 1), X, "mul", "shift", 6),
    "mul by a sliced constant": (lambda x: x * jnp.asarray([3.0, 4, 4, 4])[1:], X, "mul", "shift", 6),
    "mul by a sign": (lambda x: x * jnp.sign(x), X, "mul", "multiplication", 6),
    "div by a power of two": (lambda x: x / 4, X, "div", "shift", 6),
    "div by 3": (lambda x: x / 3, X, "div", "multiplication", 6),
    "div by 0": (lambda x: x / 0, X, "div", "multiplication", 6),
    "div of a constant": (lambda x: 1 / x, X, "div", "multiplication", 6),
    "div of a spike": (lambda x: (x > 0) / x, X, "div", "multiplication", 6),
    "integer div": (lambda x: lax.div(x, jnp.uint8(4)), U8, "div", "shift", 4),
    "integer div of negatives": (lambda x: lax.div(x, jnp.int8(4)), I8, "div", "multiplication", 4),
    "integer rem": (lambda x: lax.rem(x, jnp.uint8(4)), U8, "rem", "shift", 4),
    "float rem": (lambda x: lax.rem(x, jnp.float32(4)), F32, "rem", "multiplication", 4),
    "integer mul by its negation": (lambda x: x * -x, I32, "mul", "multiplication", 4),
    "square": (jnp.square, X, "square", "multiplication", 6),
    "square of a spike": (lambda x: jnp.square((x > 0).astype(float)), X, "square", "accumulate", 6),
    "cube": (lambda x: lax.integer_pow(x, 3), X, "integer_pow", "multiplication", 6),
    "fifth power": (lambda x: lax.integer_pow(x, 5), X, "integer_pow", "multiplication", 12),
    "inverse of a spike": (lambda x: lax.integer_pow((x > 0).astype(float), -1), X, "integer_pow", "multiplication", 6),
    "pow": (lambda x: 2.0**x, X, "pow", "multiplication", 6),
    "dot": (lambda x: x @ x.T, X, "dot_general", "multiplication", 12),
    "dot with spikes": (lambda x: (x > 0).astype(float) @ jnp.full((3, 5), 0.3), X, "dot_general", "accumulate", 30),
    "dot of a constant with spikes": (lambda x: jnp.full((5, 2), 0.3) @ (x > 0), X, "dot_general", "accumulate", 30),
    "dot with powers of two": (lambda x: x @ np.full((3, 5), 0.5, "float32"), X, "dot_general", "shift", 30),
    "batched dot": (lambda x: jnp.einsum("bi,bi->b", x, x), X, "dot_general", "multiplication", 6),
    "convolution": (
        lambda x: lax.conv_general_dilated(x.reshape(1, 1, 6), jnp.full((4, 1, 3), 0.3), (1,), "VALID"),
        *(X, "conv_general_dilated", "multiplication", 4 * 4 * 3),
    ),
    "convolution of spikes in groups": (
        lambda x: lax.conv_general_dilated(
            (x > 0).astype("float32").reshape(1, 2, 3), jnp.full((4, 1, 3), 0.3), (1,), "SAME", feature_group_count=2
        ),
        *(X, "conv_general_dilated", "accumulate", 4 * 3 * 3),
    ),
    "product": (jnp.prod, X, "reduce_prod", "multiplication", 6),
    "running product": (lambda x: lax.cumprod(x, 1), X, "cumprod", "multiplication", 6),
    "scattered product": (lambda x: x.at[jnp.array([0, 0])].multiply(x), X, "scatter-mul", "multiplication", 6),
    "reduction with a product": (
        lambda x: lax.reduce(x, 1.0, lambda a, b: a * b + 1, (0,)),
        X,
        "mul",
        "multiplication",
        6,
    ),
    "window with a product": (
        lambda x: lax.reduce_window(x, 1.0, lambda a, b: a * b, (1, 2), (1, 1), "VALID"),
        *(X, "mul", "multiplication", 8),
    ),
    "product at an index": (lambda x: x.at[0].apply(lambda entry: entry * 3), X, "mul", "multiplication", 3),
    "exp": (jnp.exp, X, "exp", "multiplication", 6),
    "rsqrt": (lax.rsqrt, X, "rsqrt", "multiplication", 6),
    "logistic of a spike": (lambda x: jax.nn.sigmoid((x > 0).astype(float)), X, "logistic", "multiplication", 6),
    "cumlogsumexp": (lax.cumlogsumexp, X, "cumlogsumexp", "multiplication", 6),
    "fft": (jnp.fft.fft, X, "fft", "multiplication", 6),
    "cholesky": (lambda x: lax.linalg.cholesky(x[:, :2], symmetrize_input=False), X, "cholesky", "multiplication", 4),
    "complex product": (lambda x: (x > 0).astype("complex64") * lax.complex(x, x), X, "mul", "multiplication", 6),
}


@pytest.mark.parametrize("name", CLASSIFIED)
def test_classified(name):
    fn, arg, primitive, kind, count = CLASSIFIED[name]
    report = audit(fn, arg)
    rows = [row for row in report.rows if row.primitive == primitive]
    assert [(row.kind, row.count) for row in rows] == [(kind, count)]
    assert report.ok == (kind != "multiplication")


def test_what_adds_compares_and_moves():
    def fn(x, i):
        y = jnp.where(x > 0, x, -x) + jnp.maximum(x, 1)
        z = jnp.sort(jnp.abs(y)).T.reshape(-1)[::-1]
        return jnp.concatenate([z, z[:2]])[i], jnp.sum(y), jnp.argmax(z), i << 2, lax.floor(x)

    report = audit(fn, X, Spec((5,), "int32"))
    assert report.ok
    assert {row.kind for row in report.rows} == {"add_or_compare", "shift"}
    counts = {row.primitive: row.count for row in report.rows}
    assert counts["reduce_sum"] == counts["sort"] == counts["floor"] == 6 and counts["shift_left"] == 5
    moved = ["reshape", "transpose", "rev", "concatenate", "gather", "broadcast_in_dim", "convert_element_type"]
    assert not set(moved) & counts.keys()


def evil(x):
    return x * x


def good(x):
    return x + x


def with_custom_vjp(f, x):
    inner = jax.custom_vjp(f)
    inner.defvjp(lambda x: (f(x), x), lambda kept, g: (g,))
    return inner(x)


def with_custom_jvp(f, x):
    inner = jax.custom_jvp(f)
    inner.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return inner(x)


def with_shard_map(f, x):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("d",))
    return jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d"))(x)


def with_custom_vmap(f, x):
    inner = jax.custom_batching.custom_vmap(f)
    inner.def_vmap(lambda size, batched, x: (f(x), batched[0]))
    return inner(x)


def with_while(f, x):
    return lax.while_loop(lambda c: c[0, 0] > 0, f, x)


def with_while_condition(f, x):
    return lax.while_loop(lambda c: f(c)[0, 0] > 0, lambda c: c - 1, x)


NESTINGS = {
    "jit": lambda f, x: jax.jit(f)(x),
    "scan": lambda f, x: lax.scan(lambda c, _: (f(c), None), x, length=3)[0],
    "scan over inputs": lambda f, x: lax.scan(lambda c, row: (c, f(row)), 0, x)[1],
    "map": lambda f, x: lax.map(f, x),
    "fori_loop": lambda f, x: lax.fori_loop(0, 5, lambda i, c: f(c), x),
    "while": with_while,
    "condition of while": with_while_condition,
    "cond": lambda f, x: lax.cond(x[0, 0] > 0, f, lambda x: x, x),
    "switch": lambda f, x: lax.switch(x[0, 0].astype(int), [lambda x: x, lambda x: -x, f], x),
    "branch that is never taken": lambda f, x: lax.cond(False & (x[0, 0] > 0), f, lambda x: x, x),
    "custom_vjp": with_custom_vjp,
    "custom_jvp": with_custom_jvp,
    "remat": lambda f, x: jax.checkpoint(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "custom_vmap": with_custom_vmap,
    "shard_map": with_shard_map,
    "platform": lambda f, x: lax.platform_dependent(x, tpu=f, default=lambda x: x),
    "reduce": lambda f, x: lax.reduce(x, 0.0, lambda a, b: f(a) + b, (0,)),
    "reduce_window": lambda f, x: lax.reduce_window(x, 0.0, lambda a, b: f(a) + b, (2, 2), (1, 1), "VALID"),
    "associative_scan": lambda f, x: lax.associative_scan(lambda a, b: f(a) + b, x),
    "scatter": lambda f, x: x.at[0].apply(f),
    "closed over": lambda f, x: jax.jit(lambda: f(x))(),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_nested(name):
    planted, harmless = (audit(functools.partial(NESTINGS[name], f), X) for f in (evil, good))
    assert harmless.ok, harmless
    assert {row.primitive for row in planted.rows if row.kind == "multiplication"} == {"mul"}
    assert not planted.ok and not planted.total("unknown")


@pytest.mark.parametrize("f", [evil, good])
def test_nested_in_everything(f):
    order = ["shard_map", "vmap", "remat", "custom_jvp", "custom_vjp", "while", "cond", "scan", "jit"]
    nested = f
    for name in reversed(order):
        nested = functools.partial(with_flat if name == "while" else NESTINGS[name], nested)
    report = audit(nested, Spec((4, 2, 3), "float32"))
    found = [(row.primitive, row.kind) for row in report.rows if row.kind == "multiplication"]
    assert found == ([("mul", "multiplication")] if f is evil else [])
    # Two devices, three turns, and all entries.
    primitive = "mul" if f is evil else "add"
    row = next(row for row in report.rows if row.primitive == primitive)
    assert row.count == 3 * 24 and "one turn of a while loop" in row.where


def with_flat(f, x):
    return lax.while_loop(lambda c: c.ravel()[0] > 0, f, x)


def test_combiners():
    x = Spec((8,), "float32")
    assert not audit(lambda x: lax.associative_scan(jnp.multiply, x), x).ok
    assert audit(lambda x: lax.associative_scan(jnp.add, x), x).ok
    assert audit(lambda x: lax.reduce(x > 0, True, lambda a, b: a & b, (0,)), x).ok
    assert audit(lambda x: jnp.prod((x > 0).astype(int)), x).ok
    # A product of spikes that also adds does not stay a product of spikes.
    counting = audit(lambda x: lax.reduce((x > 0).astype(int), 0, lambda a, b: a * b + a, (0,)), x)
    assert not counting.ok
    # The second update multiplies what the first has made.
    assert not audit(lambda x: jnp.ones(4).at[jnp.zeros(8, int)].multiply(x), x).ok
    assert audit(lambda x: jnp.ones(4).at[jnp.zeros(8, int)].multiply((x > 0).astype("float32")), x).ok


def test_unknown_is_never_passed():
    import jax.experimental.pallas as pl
    from jax.experimental import io_callback

    def double(ref, out):
        out[...] = ref[...] + ref[...]

    def kernel(x):
        return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

    def referred(x):
        ref = jax.new_ref(jnp.zeros(3))
        ref[...] = x[0]
        return ref[...]

    programs = {
        "pallas_call": kernel,
        "pure_callback": lambda x: jax.pure_callback(lambda x: x, x, x),
        "io_callback": lambda x: io_callback(lambda x: x, x, x),
        "debug_callback": lambda x: (jax.debug.callback(lambda x: None, x), x)[1],
        "ffi_call": lambda x: jax.ffi.ffi_call("f", x)(x),
        "random_bits": lambda x: jax.random.bits(jax.random.key(0), x.shape),
        "custom_linear_solve": lambda x: lax.custom_linear_solve(lambda v: v, x, lambda _, b: b),
        "get": referred,
    }
    for primitive, fn in programs.items():
        for nested in (fn, jax.jit(fn), lambda x, fn=fn: lax.cond(x[0, 0] > 0, fn, fn, x)):
            report = audit(nested, X)
            assert not report.ok, primitive
            row = next(row for row in report.rows if row.primitive == primitive)
            assert row.kind == "unknown" and row.count >= 1
    # Nor is anything known of what comes out of it.
    spikes = audit(lambda x: jax.pure_callback(lambda x: x, x > 0, x > 0).astype("int8") * jnp.int8(3), X)
    assert [row.kind for row in spikes.rows if row.primitive == "mul"] == ["accumulate"]
    assert not spikes.ok
    ints = audit(lambda x: jax.pure_callback(lambda x: x, jnp.zeros(2, "int8"), x) * jnp.int8(3), X)
    assert ints.total("multiplication") == 2


def test_references_that_are_closed_over_are_no_constants():
    ref = jax.new_ref(jnp.asarray(2.0))
    report = audit(lambda x: x * ref[...], X)
    assert [row.kind for row in report.rows if row.primitive == "mul"] == ["multiplication"]


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


def test_where():
    def fn(x):
        with jax.named_scope("outer"):

            def turn(c, _):
                with jax.named_scope("inner"):
                    return jax.jit(evil)(c), None

            with jax.named_scope("middle"):
                x = lax.scan(turn, x, length=4)[0]
            x = jax.vmap(lambda row: jax.named_scope("row")(jnp.sin)(row))(x)
        return jnp.cos(x)

    rows = {row.primitive: row for row in audit(fn, X).rows}
    assert rows["mul"] == Row("mul", "multiplication", 24, "outer.middle.inner")
    assert rows["sin"].where == "outer.row"
    file, line = rows["cos"].where.split(":")
    assert file == "test_audit.py" and int(line) == fn.__code__.co_firstlineno + 10
    # What a library does inside is where the user calls it.
    assert {row.where.split(":")[0] for row in audit(lambda x: jnp.where(x > 0, x, jnp.var(x)), X).rows} == {file}


def test_counts_of_loops_and_branches():
    def fn(x):
        x = lax.scan(lambda c, _: (lax.scan(lambda d, _: (jnp.sin(d), None), c, length=3)[0], None), x, length=5)[0]
        x = lax.switch(x[0, 0].astype(int), [jnp.cos, jnp.cos, lambda x: x], x)
        return lax.while_loop(lambda c: c[0, 0] > 0, jnp.tanh, x)

    rows = {row.primitive: row for row in audit(fn, X).rows}
    assert (rows["sin"].count, rows["cos"].count, rows["tanh"].count) == (90, 12, 6)
    assert rows["tanh"].where.endswith(" (one turn of a while loop)")
    assert "while" not in rows["cos"].where


def test_table():
    def fn(x):
        with jax.named_scope("a"):
            y = x * x
        with jax.named_scope("long name"):
            y = y + jnp.tile(y, (1, 1))
        with jax.named_scope("a"):
            return (y - 1).reshape(3, 2) @ jnp.full((2, 1000), 0.3)

    assert str(audit(fn, X)) == "\n".join(
        [
            "where      primitive    kind            count",
            "a          mul          multiplication      6",
            "           sub          add_or_compare      6",
            "           dot_general  multiplication  6,000",
            "long name  add          add_or_compare      6",
            "not ok: 6,006 multiplications in a.",
        ]
    )
    clean = audit(lambda x: x + 1, X)
    assert clean.ok and clean.table().splitlines()[-1] == "ok: no multiplication, and no operation that is not known."
    assert audit(lambda x: x, X).ok and audit(lambda x: x, X).rows == []
    both = Report([Row("f", "unknown", 2, "p"), Row("mul", "multiplication", 3, "q"), Row("mul", "shift", 3, "r")])
    assert both.verdict() == "not ok: 3 multiplications in q; 2 unknown operations in p."


@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        (lambda x: x if x[0, 0] > 0 else -x, (X,), "TracerBoolConversionError"),
        (lambda x: np.asarray(x), (X,), "TracerArrayConversionError"),
        (lambda x: x @ x, (X,), "<lambda> cannot be traced for arguments of these shapes and dtypes"),
        (lambda x: x, (X, X), "cannot be traced"),
        (lambda x: x, ("text",), "cannot be traced"),
        (lambda x: [][0], (X,), "IndexError: list index out of range"),
    ],
)
def test_what_cannot_be_traced(fn, args, message):
    with pytest.raises(InputError, match=message) as caught:
        audit(fn, *args)
    assert "\n" not in str(caught.value)


def test_input_errors_of_the_function_stay_what_they_are():
    with pytest.raises(InputError, match=r"^images must be \[batch, 16, 16, 1\]"):
        audit(tiny_model(), X)


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


IMAGES = Spec((2, 16, 16, 1), "float32")
MAPS = ("token.height", "token.width", "token.fuse", "channel.hidden", "channel.project")
NETWORKS = [
    dict(),
    dict(encoding="plain"),
    dict(norm_features="channel"),
    dict(encoding="plain", norm_features="channel", v_reset=None),
    dict(norm="tdbn", v_threshold=0.7),
    dict(norm="tebn"),
    dict(norm="layer"),
    dict(norm="layer", encoding="plain", neuron="if"),
    dict(neuron="if"),
    dict(neuron="plif"),
    dict(tau=3.0),
    dict(decay_input=False, v_reset=-0.25),
    dict(time_steps=9, neuron_backend="xla"),
    dict(remat="block"),
    dict(dtype="bfloat16"),
]


@pytest.mark.parametrize("overrides", NETWORKS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_float_network(overrides):
    model = random_model(**overrides)
    report = audit(model, IMAGES)
    assert not report.ok and not report.total("unknown")
    where: dict[tuple[str, str], set[str]] = {}
    for row in report.rows:
        where.setdefault((row.where, row.primitive), set()).add(row.kind)
    multiplied = {row.where for row in report.rows if row.kind == "multiplication"}

    # Spikes' maps only add, all of them.
    for stage in ("stage0", "stage1"):
        for name in MAPS:
            assert where[f"{stage}.block*.{name}", "dot_general"] == {"accumulate"}
    plain = overrides.get("encoding") == "plain"
    maps = {"stage1.encode"} if plain else {"stage1.encode", "stage1.encode.node2", "stage1.encode.node3"}
    primitive = "dot_general" if plain else "conv_general_dilated"
    assert {place for place, name in where if name == primitive and place.startswith("stage1.e")} == maps
    assert all(where[place, primitive] == {"accumulate"} for place in maps)
    # The stem and the head multiply, and so does every norm.
    assert where["stage0.encode", "dot_general"] == where["head", "dot_general"] == {"multiplication"}
    norms = {
        f"{stage}.block*.{name}.norm" for stage in ("stage0", "stage1") for name in (*MAPS[:2], "token", "channel")
    }
    norms |= {f"stage{i}.block*.channel.hidden.norm" for i in (0, 1)} | {"stage0.encode.norm", "head.norm"}
    norms |= {"stage1.encode.norm"} if plain else {f"stage1.encode.node{i}.norm" for i in (1, 2, 3)}
    norms |= {f"stage{i}.block*.token.identity.norm" for i in (0, 1)} if plain else set()
    assert norms <= multiplied

    # Neurons: nothing else multiplies, and the leak of tau = 2 shifts.
    neurons = multiplied - norms - {"stage0.encode", "head"}
    divisions = {
        kind for (place, name), found in where.items() if place.endswith(".neuron") and name == "div" for kind in found
    }
    if overrides.get("neuron") == "plif" or overrides.get("tau") == 3.0:
        assert neurons and all(place.endswith(".neuron") for place in neurons)
        assert divisions == {"multiplication"}
    else:
        assert neurons == set()
        assert divisions == (set() if overrides.get("neuron") == "if" else {"shift"})


def test_every_spike_is_proven_binary():
    model = random_model(encoding="plain")
    names: list[str] = []

    def spikes(images):
        seen = model(images, observe=lambda name, x: x)[1]
        names[:] = seen
        return list(seen.values())

    values = abstract(spikes, IMAGES)
    assert len(values) == len(names) > 30
    for name, value in zip(names, values, strict=True):
        assert value.binary == name.endswith(".spikes"), name


def test_counts_of_the_network():
    report = audit(random_model(), IMAGES)
    counts = {(row.where, row.primitive): row.count for row in report.rows}
    # 2 images, 2 steps, 2 blocks of 4 tokens and 12 channels in the second stage.
    assert counts["stage1.block*.channel.hidden", "dot_general"] == 2 * 2 * 2 * 4 * 12 * 24
    assert counts["stage1.block*.token.height", "dot_general"] == 2 * 2 * 2 * 12 * 2 * 2 * 2
    # The stem is computed once an image.
    assert counts["stage0.encode", "dot_general"] == 2 * 16 * 16 * 6
    assert counts["stage1.encode", "conv_general_dilated"] == 2 * 2 * 4 * 12 * 9 * 6


def test_kernels_for_other_platforms_are_unknown():
    report = audit(random_model(time_steps=9), IMAGES)
    assert report.total("unknown")
    assert all(row.where.endswith(".neuron") for row in report.rows if row.kind == "unknown")


def test_a_real_network_takes_seconds():
    import time

    from flax import nnx

    from spiking_mlp_jax import ModelConfig

    config = ModelConfig(image_size=224, in_channels=3, num_classes=10, depths=(2, 8, 14, 2))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: np.full(leaf.shape, 0.3).astype(leaf.dtype), state))
    model.eval()
    start = time.perf_counter()
    report = audit(model, Spec((1, 224, 224, 3), "float32"))
    assert not report.ok and not report.total("unknown")
    assert time.perf_counter() - start < 30
