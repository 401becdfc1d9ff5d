"""Random programs on small arrays, made of primitives for which the audit has rules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SHAPE = (3, 4)
INTS = ("uint8", "int8", "int32", "uint32", "int16")
FLOATS = ("float32", "bfloat16", "float16")
INPUTS = ("bool", "uint8", "int8", "int32", "uint32", "float32", "bfloat16")


def is_int(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def fill(x):
    """x broadcast to SHAPE."""
    return jnp.broadcast_to(x, SHAPE)


UNARY: list[tuple[Callable, Callable]] = [
    (lambda x: x.dtype != bool, lax.neg),
    (lambda x: x.dtype != bool and x.dtype.kind != "u", lax.abs),
    (lambda x: x.dtype != bool, lax.sign),
    (lambda x: not is_float(x), lax.bitwise_not),
    (is_int, lax.population_count),
    (is_float, lax.floor),
    (is_float, lax.ceil),
    (is_float, lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)),
    (is_float, lax.exp),
    (is_float, lambda x: jnp.clip(x, 0, 1)),
    (is_float, lambda x: jnp.clip(x, -2.5, 1.25)),
    (is_int, lambda x: lax.min(lax.max(x, jnp.zeros_like(x)), jnp.ones_like(x))),
    (is_int, lambda x: lax.bitwise_and(x, jnp.ones_like(x))),
    (is_int, lambda x: lax.shift_right_logical(x, jnp.full_like(x, jnp.iinfo(x.dtype).bits - 1))),
    (is_int, lambda x: lax.shift_right_arithmetic(x, jnp.full_like(x, 3))),
    (is_int, lambda x: lax.shift_left(x, jnp.full_like(x, 1))),
    (is_int, lambda x: lax.shift_left(jnp.ones_like(x), x)),
    (is_int, lambda x: lax.div(x, jnp.full_like(x, 3))),
    (is_int, lambda x: lax.rem(x, jnp.full_like(x, 4))),
    (lambda x: x.dtype != bool, lambda x: x * jnp.full_like(x, 2)),
    (is_float, lambda x: x / jnp.full_like(x, 4)),
    (lambda x: True, lambda x: x.T.reshape(SHAPE)),
    (lambda x: True, lambda x: lax.rev(x, (1,))),
    (lambda x: True, lambda x: jnp.concatenate(jnp.split(x, 2, 1)[::-1], 1)),
    (lambda x: x.dtype != bool, lambda x: x + lax.broadcasted_iota(x.dtype, SHAPE, 1)),
    (lambda x: True, lambda x: jnp.tile(x[:, 1:3], (1, 2))),
    (lambda x: True, lambda x: fill(lax.slice(x, (0, 1), (3, 4), (2, 3))[:1, :1])),
    (lambda x: x.dtype != bool, lambda x: lax.cumsum(x, 1)),
    (lambda x: x.dtype != bool, lambda x: fill(lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None))),
    (lambda x: x.dtype != bool, lambda x: fill(lax.reduce_max(x, (0, 1)))),
    (lambda x: x.dtype != bool, lambda x: fill(lax.reduce_min(x, (0,)))),
    (lambda x: not is_float(x), lambda x: fill(lax.reduce_and(x, (0,)))),
    (lambda x: not is_float(x), lambda x: fill(lax.reduce_or(x, (0,)))),
    (lambda x: True, lambda x: fill(jnp.argmax(x, 0))),
    (lambda x: True, lambda x: fill(jnp.argmin(x, 1)[:, None])),
    (lambda x: x.dtype != bool, lambda x: lax.sort(x, dimension=1)),
    (
        lambda x: is_int(x),
        lambda x: lax.reduce_window(x, np.asarray(jnp.iinfo(x.dtype).min, x.dtype), lax.max, (2, 2), (1, 1), "SAME"),
    ),
    (
        lambda x: is_float(x),
        lambda x: lax.reduce_window(x, np.asarray(-np.inf, x.dtype), lax.max, (1, 2), (1, 1), ((0, 0), (0, 1))),
    ),
    (lambda x: x.dtype == jnp.int32, lambda x: lax.reduce_window(x, np.int32(1), lax.mul, (2, 2), (1, 1), "SAME")),
    (lambda x: x.dtype != bool, lambda x: fill(lax.reduce(x, jnp.ones((), x.dtype), lambda a, b: a * b + a, (0,)))),
    (lambda x: x.dtype != bool, lambda x: lax.associative_scan(jnp.multiply, x, axis=1)),
    (lambda x: x.dtype != bool, lambda x: x.at[1].apply(lambda entry: entry * entry)),
    (
        lambda x: True,
        lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, lax.rev(c[1], (0,))), (0, x))[1],
    ),
    (
        lambda x: x.dtype != bool,
        lambda x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + c[1]), (0, x))[1],
    ),
    *[
        (lambda x: True, lambda x, dtype=dtype: lax.convert_element_type(x, dtype))
        for dtype in ("bool", *INTS, *FLOATS)
    ],
]


def dot(a, b):
    products = lax.dot_general(a, b, (((1,), (1,)), ((), ())))
    return lax.pad(products, a.ravel()[0], ((0, 0, 0), (0, 1, 0)))


def convolve(a, b):
    y = lax.conv_general_dilated(a.reshape(1, 1, 12), b.reshape(1, 1, 12)[..., :3], (1,), "SAME")
    return y.reshape(SHAPE)


def scan(a, b, body):
    carry, ys = lax.scan(body, a[0], b)
    return jnp.concatenate([ys[1:], carry[None]])


def numbers(a, b):
    return a.dtype == b.dtype and a.dtype != bool


def equal(a, b):
    return a.dtype == b.dtype


def bits(a, b):
    return a.dtype == b.dtype and not is_float(a)


def index(a, b):
    return is_int(b)


def whole(a, b):
    return a.dtype == b.dtype and is_int(a)


def signed(a, b):
    return numbers(a, b) and (is_float(a) or jnp.iinfo(a.dtype).min < 0)


def take(mode):
    return lambda a, b: a.ravel().at[b].get(mode=mode)


def positive(b):
    # Constant folding in XLA may crash on a division by 0, or of the least integer by -1.
    return lax.max(b, jnp.ones_like(b))


def negative(b):
    return lax.min(b, jnp.full_like(b, -2))


BINARY: list[tuple[Callable, Callable]] = [
    *[(numbers, f) for f in (lax.add, lax.sub, lax.mul, lax.add, lax.sub, dot, convolve)],
    *[(numbers, lambda a, b, f=f: f(a, positive(b))) for f in (lax.div, lax.rem)],
    *[(signed, lambda a, b, f=f: f(a, negative(b))) for f in (lax.div, lax.rem)],
    *[(equal, f) for f in (lax.max, lax.min, lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge)],
    *[(bits, f) for f in (lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor)],
    *[(whole, f) for f in (lax.shift_left, lax.shift_right_logical, lax.shift_right_arithmetic)],
    *[(index, take(mode)) for mode in ("fill", "clip", "promise_in_bounds")],
    (index, lambda a, b: fill(lax.dynamic_slice(a, (b[0, 0], b[0, 1]), (1, 4)))),
    (index, lambda a, b: jnp.take(jnp.tile(a.ravel(), 22), b.astype("uint8"), mode="fill")),
    (index, lambda a, b: a[b[:, 0]]),
    (index, lambda a, b: jnp.take(a.ravel(), b, mode="wrap")),
    (numbers, lambda a, b: lax.dynamic_update_slice(a, b[:2, :2], (1, b[0, 0].astype("int32")))),
    (numbers, lambda a, b: a.at[b[:, 0].astype("int32")].set(b)),
    (equal, lambda a, b: jnp.concatenate([a[:1], b[1:]])),
    (equal, lambda a, b: jnp.stack([a[0], b[1], a[2]])),
    (equal, lambda a, b: lax.cond(jnp.any(a == b), lambda: a, lambda: b)),
    (equal, lambda a, b: scan(a, b, lambda c, x: (x, c))),
    (equal, lambda a, b: scan(a, b, lambda c, x: (lax.max(c, x), lax.min(c, x)))),
    (numbers, lambda a, b: scan(a, b, lambda c, x: (c + x, c))),
    (numbers, lambda a, b: scan(a, b, lambda c, x: (c * x, c - x))),
    (bits, lambda a, b: scan(a, b, lambda c, x: (c ^ x, c | x))),
    (bits, lambda a, b: lax.fori_loop(0, 3, lambda i, c: c & b, a)),
]

TERNARY: list[tuple[Callable, Callable]] = [
    (lambda a, b, c: a.dtype == bool and equal(b, c), lax.select),
    (lambda a, b, c: a.dtype == jnp.int32 and equal(b, c), lambda a, b, c: lax.select_n(a, b, c, b)),
    (lambda a, b, c: numbers(a, b) and numbers(b, c), lax.clamp),
    (lambda a, b, c: a.dtype == bool and equal(b, c), lambda a, b, c: jnp.where(a, b, c)),
]
OPERATIONS = [(1, *op) for op in UNARY] + [(2, *op) for op in BINARY] * 2 + [(3, *op) for op in TERNARY] * 3


def constants(rng) -> list[np.ndarray]:
    """Constants that programs close over: powers of two, 0 and 1, arbitrary numbers."""
    powers = (2 ** rng.integers(0, 6, SHAPE)) * rng.choice([-1, 1], SHAPE)
    return [
        powers.astype(np.float32),
        (powers * rng.integers(0, 2, SHAPE)).astype(np.int32),
        np.full(SHAPE, 0.5, np.float32),
        rng.integers(0, 2, SHAPE).astype(np.uint8),
        rng.integers(-3, 200, SHAPE).astype(np.int32),
        rng.normal(size=SHAPE).astype(np.float32),
        np.asarray([[1e-40, np.inf, 3, 4]] * 3, np.float32),
        np.asarray([[np.nan, 0, 1, 0]] * 3, np.float32),
    ]


def random_program(seed: int, length: int) -> Callable:
    """A function from one array for each of INPUTS to the list of its `length` intermediates.

    The same seed gives the same program, which is drawn while it is traced.
    """

    def program(*inputs):
        rng = np.random.default_rng(seed)
        known = [*inputs, *map(jnp.asarray, constants(rng))]
        made: list[jax.Array] = []
        while len(made) < length:
            arity, fits, operation = OPERATIONS[rng.integers(len(OPERATIONS))]
            # Recent results are preferred, so that programs are deep.
            pool = known + made[-8:] * 2
            operands = [pool[i] for i in rng.integers(len(pool), size=arity)]
            if arity > 1 and rng.random() < 0.7:
                same = [x for x in pool if x.dtype == operands[-1].dtype]
                operands[-2] = same[rng.integers(len(same))]
            if fits(*operands):
                made.append(operation(*operands))
        return made

    return program


def random_inputs(rng) -> list[np.ndarray]:
    """Arrays for INPUTS that include the extremes of their dtypes."""
    arrays = []
    for name in INPUTS:
        if name == "bool":
            arrays.append(rng.integers(0, 2, SHAPE).astype(bool))
        elif name.startswith(("float", "bfloat")):
            special = np.asarray([0, -0.0, 1, np.inf, -np.inf, np.nan, 1e-40, 3e38, 0.5, -1.5, 255, 2**24 + 1])
            values = np.where(rng.random(SHAPE) < 0.6, rng.choice(special, SHAPE), rng.normal(0, 3, SHAPE))
            arrays.append(values.astype(jnp.dtype(name)))
        else:
            info = np.iinfo(name)
            special = np.asarray([0, 1, 2, 7, info.max, info.min, info.max - 1, info.bits, info.bits - 1])
            values = np.where(rng.random(SHAPE) < 0.6, rng.choice(special, SHAPE), rng.integers(0, 12, SHAPE))
            arrays.append(values.astype(name))
    return arrays
