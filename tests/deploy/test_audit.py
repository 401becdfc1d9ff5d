"""The auditor: what it says of every operation, and that no multiplication gets past it."""

import functools
import gc

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct as Spec
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from spiking_mlp_jax.deploy.audit import Report, Row, audit, interpreter, rules
from spiking_mlp_jax.errors import InputError
from tests.support.tiny import tiny_model

F32, I32, U8, I8, BOOL = (Spec((4,), dtype) for dtype in ("float32", "int32", "uint8", "int8", "bool"))
THREE = np.float32(3)


def kinds(fn, *args) -> dict[str, str]:
    """Kind by primitive, of a program in which each has one."""
    rows = audit(fn, *args).rows
    result = {row.primitive: row.kind for row in rows}
    assert len(result) == len({(row.primitive, row.kind) for row in rows}), rows
    return result


def test_names_exist():
    existing = {o.name for o in gc.get_objects() if issubclass(type(o), jax.extend.core.Primitive)}
    names = [*rules.KINDS, *interpreter.CALLS, *interpreter.NESTED]
    assert len(names) == len(set(names)) > 100
    assert set(names) - existing == set()
    assert rules.RULES.keys() <= rules.KINDS.keys()
    kinds = {"add_or_compare", "movement", "multiplication", "product", "quotient", "self_product", "shift"}
    assert set(rules.KINDS.values()) == kinds


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
    "complex abs": (lambda x: jnp.abs(lax.complex(x, x)), X, "abs", "multiplication", 6),
    "complex sign": (lambda x: lax.sign(lax.complex(x, x)), X, "sign", "multiplication", 6),
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
    assert row.count == 3 * 24 and "one iteration of a while loop" in row.where


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
    assert rows["tanh"].where.endswith(" (one iteration of a while loop)")
    assert "while" not in rows["cos"].where


def test_first_power_is_nothing():
    assert audit(lambda x: lax.integer_pow(x, 1), X).ok and audit(lambda x: lax.integer_pow(x, 1), X).rows == []


def test_a_function_without_frames_is_named():
    assert [row.where for row in audit(jnp.abs, X).rows] == ["abs"]


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
    assert clean.ok and clean.table().splitlines()[-1] == "ok: no multiplication, no unknown operation."
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
        (3, (), "^audit takes a function and its arguments, got int$"),
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
