import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import VARIANTS
from spiking_mlp_jax.models.topology import intermediate_names
from spiking_mlp_jax.nn.scan import block_selector
from tests.support.tiers import rest_slow
from tests.support.tiny import tiny_config, tiny_model

KINDS = [
    dict(),
    dict(encoding="plain"),
    dict(norm="layer"),
    dict(norm="tdbn", norm_features="channel", v_threshold=0.7),
    dict(norm="tebn", encoding="plain"),
    dict(neuron="plif", v_reset=None),
    dict(neuron="plif", tau_per_channel=True),
    dict(neuron="if", surrogate="atan"),
]
# Millions, counted on the official models (mlp_spe_b: from its dimensions).
PARAMETERS = {
    "mlp_t": "24.11",
    "mlp_s": "34.507",
    "mlp_spe_t": "25.229",
    "mlp_spe_s": "37.976",
    "mlp_spe_b": "65.607",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_of_the_paper(name):
    config = ModelConfig.variant(name)
    model = nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    digits = len(PARAMETERS[name].split(".")[1])
    assert f"{count / 1e6:.{digits}f}" == PARAMETERS[name]


def images(config, batch=3, seed=0):
    shape = (batch, config.image_size, config.image_size, config.in_channels)
    return jax.random.normal(jax.random.key(seed), shape) * 2


def loss_gradient_stats(model, x):
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss(params):
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(x)
        return jnp.square(logits).sum(), nnx.state(model, nnx.BatchStat)

    (value, stats), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, gradients, stats


@pytest.mark.parametrize("kind", rest_slow(KINDS, 2), ids=str)
def test_every_kind_computes_and_learns(kind):
    model = tiny_model(**kind)
    x = images(model.config)
    value, gradients, _ = loss_gradient_stats(model, x)
    assert bool(jnp.isfinite(value))
    for path, leaf in nnx.to_flat_state(gradients):
        assert bool(jnp.isfinite(leaf[...]).all()), path
    assert any(bool(jnp.any(leaf[...] != 0)) for _, leaf in nnx.to_flat_state(gradients))
    model.eval()
    assert model(x).shape == (2, 3, 3)


@pytest.mark.parametrize("kind", rest_slow(KINDS[:4]), ids=str)
def test_remat_changes_nothing(kind, x64):
    results = []
    for remat in (False, True):
        model = tiny_model(**kind, remat=remat)
        results.append(loss_gradient_stats(model, images(model.config).astype(jnp.float64)))
    for plain, remat in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(plain, remat, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_remat_in_bfloat16():
    results = []
    for remat in ("none", "block"):
        model = tiny_model(depths=(2, 2), remat=remat, dtype="bfloat16")
        results.append(loss_gradient_stats(model, images(model.config)))
    for plain, remat in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        scale = np.abs(np.asarray(plain, np.float64)).max()
        np.testing.assert_allclose(plain, remat, rtol=0, atol=0.02 * scale + 1e-6)


def test_each_block_gets_its_own_variables():
    stacked = {"a": jnp.arange(6.0).reshape(3, 2), "kernel": jnp.arange(12.0).reshape(3, 2, 2), "n": jnp.arange(3)}
    stacked["b"] = jnp.asarray([[1.0], [jnp.nan], [jnp.inf]])
    select, each = block_selector(stacked)
    for i in range(3):
        turn, expected = (jax.tree.map(operator.itemgetter(i), tree) for tree in (each, stacked))
        jax.tree.map(np.testing.assert_array_equal, select(turn), expected)


def test_remat_keeps_only_bools_of_each_block():
    depth, config = 5, tiny_config(depths=(5,), remat=True)
    graphdef, params, stats = nnx.split(SpikingMLP(config, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params, stats, copy=True)(images(config))).sum()

    scans = [eqn for eqn in nested_equations(jax.make_jaxpr(jax.grad(loss))(params)) if eqn.primitive.name == "scan"]
    assert len(scans) == 2  # forward and backward
    stored = [v.aval for v in scans[0].outvars if v.aval.shape[:1] == (depth,)]
    activations = [a for a in stored if a.size >= depth * 3 * 2 * 16 * 6]
    assert activations and all(a.dtype == jnp.bool_ for a in activations)


def nested_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from nested_equations(inner)


@pytest.mark.parametrize("kind", rest_slow(KINDS, 2), ids=str)
def test_intermediates_are_complete_and_spikes_are_binary(kind):
    model = tiny_model(**kind)
    model.eval()
    x = images(model.config)
    logits, seen = model(x, observe=lambda name, value: value)
    np.testing.assert_array_equal(logits, model(x))
    assert list(seen) == intermediate_names(model.config)
    for name, value in seen.items():
        stage = int(name[5])
        side = 4 // 2**stage
        assert value.shape[0] == 3 and value.shape[2:4] == (side, side), name
        if name.endswith(".spikes"):
            assert value.shape[1] == 2
            assert set(np.unique(value)) <= {0.0, 1.0}, name
        else:
            assert name.endswith(".potential")


def test_the_skip_is_the_stages_potential():
    """With the mixing silenced by zero gains, each block only sees h again, however deep it is."""
    model = tiny_model(depths=(3,))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "blocks" in path and path[-2] == "norm" and path[-1] in ("scale", "bias"):
            variable.set_value(jnp.zeros_like(variable[...]))
    model.eval()
    _, seen = model(images(model.config), observe=lambda name, value: value)
    h = np.broadcast_to(seen["stage0.encode.potential"], seen["stage0.encode.spikes"].shape)
    for block in range(3):
        for part in ("token", "channel"):
            np.testing.assert_array_equal(seen[f"stage0.block{block}.{part}.potential"], h)


def test_observing_can_reduce_and_drop():
    model = tiny_model()
    model.eval()
    _, seen = model(images(model.config), observe=lambda name, v: v.mean() if name.endswith(".spikes") else None)
    assert list(seen) == [name for name in intermediate_names(model.config) if name.endswith(".spikes")]
    assert all(value.shape == () for value in seen.values())


def test_bfloat16_computes_the_same_but_for_rounding():
    """Over the potential that no spike has reached yet; after a flipped spike the networks may differ."""
    seen = {}
    for dtype in ("float32", "bfloat16"):
        model = tiny_model(dtype=dtype)
        model.eval()
        logits, values = model(images(model.config), observe=lambda name, value: value)
        assert logits.dtype == jnp.float32
        spikes = [value for name, value in values.items() if name.endswith(".spikes")]
        assert all(value.dtype == jnp.dtype(dtype) for value in spikes)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        seen[dtype] = values
    a, b = (np.asarray(seen[dtype]["stage0.encode.potential"], np.float32) for dtype in seen)
    np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * np.abs(a).max())
    agree = np.mean(
        [
            np.mean(np.asarray(seen["float32"][n]) == np.asarray(seen["bfloat16"][n], np.float32))
            for n in seen["float32"]
            if n.endswith(".spikes")
        ]
    )
    assert agree > 0.95


def test_images_are_independent_and_evaluation_changes_nothing():
    model = tiny_model()
    x = images(model.config, batch=4)
    model(x)
    model.eval()
    before = jax.tree.leaves(nnx.state(model))
    together = model(x)
    np.testing.assert_allclose(together[:, 1:2], model(x[1:2]), rtol=1e-5, atol=1e-6)
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=12)
@given(
    patch=st.integers(1, 3),
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    tokens=st.integers(1, 2),
    channels=st.integers(1, 3),
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 3),
    batch=st.integers(1, 3),
)
def test_any_shape(patch, depths, tokens, channels, kind, steps, batch):
    size = patch * tokens * 2 ** (len(depths) - 1)
    config = tiny_config(
        **kind,
        image_size=size,
        patch_size=patch,
        depths=tuple(depths),
        in_channels=channels,
        dim=3,
        time_steps=steps,
    )
    model = jax.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    model.eval()
    shape = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    assert jax.eval_shape(lambda m, x: m(x), model, shape).shape == (steps, batch, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(dim=7), 'dim 7 is not divisible by the 3 nodes of encoding="spe": take 6 or 9'),
        (dict(image_size=18), "image_size 18 does not divide .* multiple of 8"),
        (dict(time_steps=0), "time_steps must be at least 1"),
        (dict(time_steps=2.0), "time_steps must be a whole number"),
        (dict(depths=()), "depths must list"),
        (dict(depths=(1, 0)), "depths must be at least 1"),
        (dict(encoding="spo"), 'encoding cannot be "spo": did you mean "spe"'),
        (dict(norm="bach"), 'did you mean "batch"'),
        (dict(tau=0.5), "tau must be at least 1"),
        (dict(tau=1.0, neuron="plif"), "tau must be above 1"),
        (dict(tau=float("nan")), "tau must be a finite number"),
        (dict(v_threshold=-1.0), "v_threshold must be above"),
        (dict(surrogate_alpha=0.0), "surrogate_alpha must be positive"),
        (dict(surrogate="sigmod"), 'did you mean "sigmoid"'),
        (dict(dtype="float16"), 'dtype cannot be "float16"'),
        (dict(remat="blok"), 'remat cannot be "blok": did you mean "block"'),
    ],
)
def test_impossible_configs_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        tiny_config(**overrides)


def test_unknown_variants_and_fields_are_refused():
    with pytest.raises(InputError, match='did you mean "mlp_spe_t"'):
        ModelConfig.variant("mlp-spe-t")
    with pytest.raises(InputError, match='did you mean "time_steps"'):
        ModelConfig.variant("mlp_t", timesteps=2)
    assert ModelConfig.variant("mlp_spe_s", time_steps=6).time_steps == 6
    assert type(tiny_config(dim=np.int64(6)).dim) is int


def test_wrong_images_are_refused():
    model = tiny_model()
    with pytest.raises(InputError, match=r"images must be \[batch, 16, 16, 1\]"):
        model(jnp.zeros((2, 1, 16, 16)))
    with pytest.raises(InputError, match=r"images must be .* got \(0, 16, 16, 1\)"):
        model(jnp.zeros((0, 16, 16, 1)))
    with pytest.raises(InputError, match="normalized floating"):
        model(jnp.zeros((2, 16, 16, 1), jnp.uint8))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("folded", [False, True])
def test_pixels_that_are_not_finite_give_no_answer(folded, wrong):
    model = tiny_model()
    model.eval()
    network = fold(model) if folded else model
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 1)).astype(np.float32)
    expected = np.asarray(network(images))
    images[1, 3, 4, 0] = wrong
    logits = np.asarray(network(images))
    np.testing.assert_array_equal(logits[:, [0, 2]], expected[:, [0, 2]])
    assert np.isnan(logits[:, 1]).all()
