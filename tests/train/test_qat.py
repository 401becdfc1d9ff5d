"""Training with rounded weights: the same grid as `deploy.quantize`, straight-through gradients, through the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.deploy.quantize import quantize
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train.config import validate
from spiking_mlp_jax.train.loop import fit
from spiking_mlp_jax.train.qat import quantize_weights
from tests.support.random_model import random_model, variables
from tests.train.test_loop import make_config, shared  # noqa: F401  (a fixture)

CASES = [("spe", "channel", "batch"), ("plain", "token", "tdbn"), ("spe", "token", "batch")]


def rounded_model(encoding, features, norm, bits):
    model = random_model(seed=1, encoding=encoding, norm_features=features, norm=norm, v_threshold=0.8)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return model, nnx.merge(graphdef, quantize_weights(params, stats, model.config, bits), stats)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_quantising_the_rounded_network_loses_nothing(case, bits, x64):
    """The folded kernels of a network trained so are integers times a power of two: the integer network's own."""
    model, rounded = rounded_model(*case, bits)
    folded = fold(rounded)
    net = quantize(folded, np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), dtype=np.uint8), bits)
    places = {"height", "width", "fuse", "cells", "edge1", "edge2", "expand", "project", "head", "encode"}
    found = 0
    for name, entries in folded.arrays.items():
        if name.split(".")[-1] not in places or "kernel" not in entries:
            continue
        kernel = np.asarray(entries["kernel"], np.float64)
        if name == "stage0.encode":
            kernel = kernel / 255
        if name == "head":
            kernel = kernel * model.config.stage_side(model.config.stages - 1) ** 2
        shift = np.log2(np.abs(kernel).max(1) / np.abs(net.arrays[f"{name}.kernel"]).max(1))
        if name not in ("stage0.encode",):
            np.testing.assert_allclose(shift, np.rint(shift), atol=1e-9, err_msg=name)
        lost = kernel - net.arrays[f"{name}.kernel"] * 2.0 ** shift[:, None]
        np.testing.assert_allclose(lost, 0, atol=1e-9 * np.abs(kernel).max(), err_msg=name)
        found += 1
    assert found > 8


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_only_kernels_change_and_by_half_a_unit_in_the_mean(case):
    model, rounded = rounded_model(*case, 8)
    before, after = variables(model), variables(rounded)
    changed = {name for name in before if not np.array_equal(before[name][...], after[name][...])}
    assert changed and all(name.endswith("kernel") for name in changed)
    for name in changed - {"head.kernel"}:  # whose inputs have factors of their own
        a, b = (np.asarray(v[name][...]) for v in (before, after))
        # A unit is below 2 / 127 of the output's largest weight; single outliers may be clipped by more.
        assert np.sqrt(np.square(a - b).mean()) <= np.abs(a).max() / 127


@pytest.mark.slow
def test_gradient_passes_through():
    model = random_model(seed=1)
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def total(params):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(quantize_weights(params, stats, model.config, 4)))

    rounded = quantize_weights(params, stats, model.config, 4)
    jax.tree.map(
        lambda g, x: np.testing.assert_allclose(g, jnp.cos(x), rtol=1e-5, atol=1e-6), jax.grad(total)(params), rounded
    )


@pytest.mark.slow
def test_the_loop_trains_evaluates_and_saves_rounded_weights(shared, tmp_path):  # noqa: F811
    assert fit(make_config(shared, weight_bits=3, epochs=1), tmp_path).finished
    model, _ = weights.load(tmp_path / "weights")
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    again = nnx.merge(graphdef, quantize_weights(params, stats, model.config, 3), stats)
    for name, value in variables(model).items():
        np.testing.assert_allclose(variables(again)[name][...], value[...], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("fields", "words"),
    [(dict(weight_bits=1), "2 to 8"), (dict(weight_bits=9), "at most 8"), (dict(weight_bits=8, norm="layer"), "layer")],
)
def test_impossible_bits(shared, fields, words):  # noqa: F811
    with pytest.raises(InputError, match=words):
        validate(make_config(shared, **fields), 1)


@pytest.mark.slow
def test_an_outlier_is_clipped_where_that_loses_less(x64):
    """Two bits are -1, 0 and 1 units: with the unit that holds 1.01, two, the others would all be lost."""
    model = random_model(seed=1, norm="batch", norm_features="channel")
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params = jax.tree.map(lambda x: jnp.where(jnp.arange(x.size) == 0, 1.01, 0.9).reshape(x.shape), params)
    stats = jax.tree.map(jnp.ones_like, stats)
    rounded = dict(nnx.to_flat_state(quantize_weights(params, stats, model.config, 2)))
    kernel = next(v[...] for k, v in rounded.items() if k[-2:] == ("conv", "kernel"))
    assert jnp.all(kernel > 0) and jnp.ptp(kernel[..., 1:]) < 1e-9
