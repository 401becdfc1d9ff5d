"""Devices, micro-batches and shared-out parameters: the same numbers, and only what has to cross devices does."""

import re
import types
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.nn.norm import BatchNorm, LayerNorm
from spiking_mlp_jax.train.checkpoint import Checkpoints
from spiking_mlp_jax.train.config import default_config
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import (
    abstract_with_sharding,
    batch_sharding,
    make_mesh,
    parameter_specs,
    replicate,
    shard_batch,
    shared_axis,
    state_shardings,
)
from spiking_mlp_jax.train.state import abstract_state
from spiking_mlp_jax.train.step import make_gradients, make_train_step
from tests.support.tiers import rest_slow
from tests.support.tiny import tiny_config

BATCH = 16
# Wide enough that some parameters are shared out and some are not.
WIDE = {"depths": (1, 1), "dim": 48}


def experiment(devices, fsdp=1, model=None, optimizer="sgd", **options):
    config = default_config()
    config.update(epochs=1, optimizer=optimizer, mean=(0.5,), std=(0.25,), **options)
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    model = model or tiny_config(**WIDE)
    rule = make_optimizer(config, 10)
    graphdef, abstract = abstract_state(model, rule)
    step = make_train_step(config, graphdef, rule, mesh)
    return types.SimpleNamespace(mesh=mesh, abstract=abstract, step=step, graphdef=graphdef)


def start(abstract):
    """A state in NumPy: that saves the compilation of a network's own."""
    rng = np.random.default_rng(3)
    draw = {
        "params": lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype),
        "stats": lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype),
    }
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    return zeros.replace(**{name: jax.tree.map(fill, getattr(abstract, name)) for name, fill in draw.items()})


def run(parts, batches):
    state = start(parts.abstract)
    state, losses = jax.device_put(state, state_shardings(state, parts.mesh), may_alias=False), []
    for batch in batches:
        state, metrics = parts.step(state, shard_batch(batch, parts.mesh))
        losses.append({name: float(value) for name, value in metrics.items()})
    return losses, jax.device_get(replicate(state, parts.mesh)), state


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(256, size=(count, 16, 16, 1), dtype=np.uint8)
    return {"image": pixels, "label": rng.integers(3, size=count, dtype=np.int32)}


def collectives(program):
    """Shapes of the arrays that each kind of collective of a compiled program moves, and their dtypes."""
    found = {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    for line in program.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            arrays = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match[1])
            found.setdefault(match[2], []).extend((kind, _shape(dims)) for kind, dims in arrays)
    return found


def _shape(text):
    return tuple(int(n) for n in text.split(",") if n)


@pytest.mark.slow
def test_one_and_eight_devices_agree(x64):
    """Parameters shared out and in micro-batches; `test_sharding` compares without either."""
    batches = [images(BATCH, seed) for seed in range(2)]
    one = run(experiment(1, optimizer="adam", accumulate=2), batches)
    eight = run(experiment(8, 4, optimizer="adam", accumulate=2), batches)
    # Adam divides by the gradient's size, which for biases that a norm takes away is rounding alone: moments are
    # compared instead of parameters.
    chex.assert_trees_all_close(one[0], eight[0], rtol=1e-9)
    chex.assert_trees_all_close(one[1].stats, eight[1].stats, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(one[1].opt_state, eight[1].opt_state, rtol=1e-9, atol=1e-12)
    assert all(x.dtype == np.float64 for x in jax.tree.leaves(eight[1].params))
    check_memory(eight[2])


def check_memory(state):
    """Each device holds a quarter of what is shared out, of parameters and both moments, and the rest whole."""
    specs = [sharding.spec for sharding in jax.tree.leaves(state_shardings(state, state.step.sharding.mesh))]
    leaves = jax.tree.leaves(state)
    shared = 0
    for leaf, spec in zip(leaves, specs, strict=True):
        parts = 4 if "fsdp" in spec else 1
        assert all(shard.data.size * parts == leaf.size for shard in leaf.addressable_shards), leaf.shape
        shared += parts == 4
    assert shared == 3 * 3  # three kernels and two moments of each


@pytest.mark.slow
def test_per_device_norms_are_micro_batches_of_the_others(x64):
    """Eight devices with statistics of their own compute what one device does in eight micro-batches."""
    batch = images(BATCH)
    losses, eight, _ = run(experiment(8, norm_statistics="device"), [batch])
    # Micro-batch i of 8 has images i, i + 8, ...; device i has the images 2 i and 2 i + 1.
    order = np.arange(BATCH).reshape(8, 2).T.reshape(-1)
    one_losses, one, _ = run(experiment(1, accumulate=8), [{name: x[order] for name, x in batch.items()}])
    chex.assert_trees_all_close((losses, eight), (one_losses, one), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("together", [False, True])
def test_norm_over_devices_against_numpy(x64, together):
    """Values, running averages and gradient by the definition, and the gradient by differences."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(3, 2, (2, 16, 3, 5))
    x[::2] += 4  # devices differ
    norm = BatchNorm(5)
    norm.scale[...], norm.bias[...] = jnp.asarray(rng.normal(1, 0.5, 5)), jnp.asarray(rng.normal(0, 0.5, 5))
    scale, bias = np.asarray(norm.scale[...]), np.asarray(norm.bias[...])
    mesh = make_mesh()
    if together:
        norm.set_attributes(sync_axes=mesh.axis_names)
    graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

    def share(params, stats, x, weight):
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, mesh.axis_names, to="varying"), params)

        def weighted(params, x):
            norm = nnx.merge(graphdef, params, stats, copy=True)
            y = norm(x)
            return jnp.sum(y * weight), (y, nnx.state(norm, nnx.BatchStat))

        (_, (y, after)), grads = jax.value_and_grad(weighted, (0, 1), has_aux=True)(params, x)
        mean = jax.lax.pmean((after["mean"][...], after["var"][...]), mesh.axis_names)
        return y, grads[1], jax.lax.psum(grads[0]["scale"][...], mesh.axis_names), mean

    split, same = PartitionSpec("data"), PartitionSpec()
    over_devices = jax.shard_map(
        share, mesh=mesh, in_specs=(same, same, split, split), out_specs=(split, split, same, same)
    )
    y, dx, dscale, averages = jax.jit(over_devices)(params, stats, x, weight)

    def numpy_norm(x):
        groups = x.reshape(1 if together else 8, -1, 5)
        mean, var = groups.mean(1, keepdims=True), groups.var(1, keepdims=True)
        normed = (groups - mean) / np.sqrt(var + 1e-5)
        return (normed * scale + bias).reshape(x.shape), mean, groups.var(1, ddof=1), normed

    expected, mean, unbiased, normed = numpy_norm(x)
    np.testing.assert_allclose(y, expected, rtol=1e-9)
    np.testing.assert_allclose(averages[0], 0.1 * mean.mean((0, 1)), rtol=1e-9)
    np.testing.assert_allclose(averages[1], 0.9 + 0.1 * unbiased.mean(0), rtol=1e-9)
    np.testing.assert_allclose(dscale, (normed.reshape(x.shape) * weight).sum((0, 1)), rtol=1e-8)
    for place in [(0, 0, 0), (5, 2, 3), (15, 1, 4)]:
        step = np.zeros_like(x)
        step[place] = 1e-5
        slope = ((numpy_norm(x + step)[0] - numpy_norm(x - step)[0]) * weight).sum() / 2e-5
        np.testing.assert_allclose(dx[place], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 2), (1, 8), (8, 2)])
def test_accumulation_is_the_large_batch_without_batch_statistics(x64, devices, accumulate):
    norm = LayerNorm((6,), (-1,))
    graphdef, params = nnx.split(norm)
    x, y = np.random.default_rng(0).normal(size=(2, 32, 1, 6))

    def loss_of(params, stats, x, y):
        value = jnp.mean(jnp.square(nnx.merge(graphdef, params, copy=True)(x) - y))
        return value, ({"third": jnp.mean(x**3)}, stats)

    stats = {"steps": jnp.ones((), jnp.int32), "average": jnp.ones(3)}
    one = make_gradients(loss_of, make_mesh(jax.devices()[:1]))(params, stats, x, y)
    other = jax.jit(make_gradients(loss_of, make_mesh(jax.devices()[:devices]), accumulate))(params, stats, x, y)
    chex.assert_trees_all_close(one, other, rtol=1e-12, atol=1e-15)
    assert float(jnp.abs(one[3]["scale"][...]).min()) > 1e-6


@pytest.mark.slow
def test_accumulation_with_batch_norm(x64):
    """Exactly the mean over micro-batches, and exactly the large batch where their statistics are the same."""
    model = tiny_config(depths=(1, 1))
    whole, parts = experiment(1, model=model), experiment(1, model=model, accumulate=2)
    half = images(BATCH // 2)
    # Twice the same images, one copy for each micro-batch.
    doubled = {name: np.repeat(x, 2, 0) for name, x in half.items()}
    (losses, one, _), (other_losses, other, _) = run(whole, [doubled]), run(parts, [doubled])
    chex.assert_trees_all_close((losses, one.params), (other_losses, other.params), rtol=1e-9, atol=1e-12)
    # The averages keep the unbiased variance, of as many values as a micro-batch has: here 2 steps of 2 x 2 tokens.
    old = 0.9 * start(whole.abstract).stats["norm"]["var"][...]
    average = one.stats["norm"]["var"][...] - old, other.stats["norm"]["var"][...] - old
    count = BATCH * 2 * 2 * 2
    np.testing.assert_allclose(average[0] * (count - 1) / count, average[1] * (count / 2 - 1) / (count / 2), rtol=1e-9)

    # Otherwise: by hand, two passes from the same state.
    batch, first = images(BATCH), jax.tree.map(jnp.asarray, start(parts.abstract))

    def loss(params, image, label):
        network = nnx.merge(parts.graphdef, params, first.stats, copy=True)
        logits = network(normalize(image, (0.5,), (0.25,)))
        value = optax.softmax_cross_entropy_with_integer_labels(logits.mean(0), label).mean()
        return value, nnx.state(network, nnx.BatchStat)

    by_hand = jax.jit(jax.value_and_grad(loss, has_aux=True))
    passes = [by_hand(first.params, batch["image"][part::2], batch["label"][part::2]) for part in (0, 1)]
    grads = jax.tree.map(lambda a, b: (a + b) / 2, passes[0][1], passes[1][1])
    stats = jax.tree.map(lambda a, b: (a + b) / 2, passes[0][0][1], passes[1][0][1])
    losses, after, _ = run(parts, [batch])
    np.testing.assert_allclose(losses[0]["loss"], (passes[0][0][0] + passes[1][0][0]) / 2, rtol=1e-9)
    # After the first step the momentum is the gradient.
    chex.assert_trees_all_close((after.opt_state[0].trace, after.stats), (grads, stats), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("statistics", "fsdp", "accumulate", "fields"),
    rest_slow(
        [
            ("global", 1, 1, {}),
            ("device", 1, 2, {"dtype": "bfloat16"}),
            ("global", 4, 2, {"encoding": "plain", "remat": "block"}),
            ("device", 4, 1, {}),
        ]
    ),
)
def test_what_crosses_devices(statistics, fsdp, accumulate, fields):
    """Read off the compiled step: how many arrays are reduced, gathered and scattered, and that these are all."""
    model = tiny_config(**WIDE, **fields)
    parts = experiment(8, fsdp, model=model, norm_statistics=statistics, accumulate=accumulate)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(parts.mesh))
        for name, x in images(BATCH).items()
    }
    found = collectives(parts.step.lower(abstract_with_sharding(parts.abstract, parts.mesh), batch).compile().as_text())
    params = [x.shape for x in jax.tree.leaves(parts.abstract.params)]
    averages = [x.shape for x in jax.tree.leaves(parts.abstract.stats) if x.dtype == jnp.float32]
    norms = len(averages) // 2
    shared = [shape for shape in params if shared_axis(shape, parts.mesh) is not None]
    assert len(shared) == (0 if fsdp == 1 else 3 if model.encoding == "spe" else 4)
    # Two pairs of norms feed the same neurons with "spe": the gradients of their biases are the same sum, which the
    # compiler finds where it is not accumulated.
    twins = 2 if model.encoding == "spe" else 0
    # Once a step: the gradient, the running averages, loss and accuracy; with "fsdp" a sum of squares of each
    # shared-out gradient too, for its norm.
    once = len(params) - twins * (accumulate == 1) + len(averages) + 2 + len(shared)
    # A norm's mean, variance and, in the backward pass, two sums; the first two again where a block is recomputed.
    each = 4 * norms - twins
    if model.remat == "block":
        each += 2 * 6 * model.stages
    assert len(found["all-reduce"]) == once + (each if statistics == "global" else 0)
    assert {"all-reduce"} <= set(found) <= {"all-reduce", "all-gather", "reduce-scatter"}
    gathered = [shape for _, shape in found.get("all-gather", [])]
    assert Counter(gathered) == Counter(shared)
    assert len(found.get("reduce-scatter", [])) == len(shared)
    # Gradients are summed in float32, whatever the layers compute in.
    assert {kind for arrays in found.values() for kind, _ in arrays} <= {"f32"}


@pytest.mark.slow
def test_bfloat16_on_eight_devices():
    model = tiny_config(depths=(1, 1), dtype="bfloat16")
    batches = [images(BATCH)] * 2
    (one, *_), (eight, state, _) = (run(experiment(devices, model=model), batches) for devices in (1, 8))
    np.testing.assert_allclose([x["loss"] for x in eight], [x["loss"] for x in one], rtol=2e-2)
    assert eight[1]["loss"] < eight[0]["loss"]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))


def test_rules():
    mesh = make_mesh(fsdp=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    # The longest axis that divides; none of a small array, and none where none divides.
    assert shared_axis((14, 936, 312), mesh) == 1
    assert shared_axis((130, 2048), mesh) == 1 and shared_axis((2048, 130), mesh) == 0
    assert shared_axis((127, 1023), mesh) is None and shared_axis((4, 1024), mesh) is None
    assert shared_axis((1024, 1024), make_mesh()) is None
    specs = parameter_specs({"a": jnp.zeros((2, 8192)), "b": jnp.zeros(3)}, mesh)
    assert specs == {"a": PartitionSpec(None, "fsdp"), "b": PartitionSpec()}


@pytest.mark.slow
def test_checkpoints_move_between_meshes(tmp_path):
    """What four devices shared out is restored whole, and shared out over two."""
    four = experiment(8, 4)
    state = start(four.abstract)
    checkpoints = Checkpoints(tmp_path / "checkpoints", {}, 1)
    checkpoints.save(jax.device_put(state, state_shardings(state, four.mesh)), {}, {})
    for fsdp in (1, 2):
        mesh = make_mesh(fsdp=fsdp)
        restored = checkpoints.restore(abstract_with_sharding(four.abstract, mesh))
        assert restored is not None
        chex.assert_trees_all_equal(jax.device_get(restored.state), state)
        wanted = jax.tree.leaves(state_shardings(state, mesh))
        assert [x.sharding for x in jax.tree.leaves(restored.state)] == wanted
    checkpoints.close()
