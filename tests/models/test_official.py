"""Parity with the official code, through its own numbers: values, gradients and running statistics in float64."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.official import state as official
from spiking_mlp_jax.models.topology import intermediate_names
from tests.support.tiny import tiny_config, tiny_model

GOLDEN = Path(__file__).parents[1] / "oracles" / "golden"
FILES = ["spe_small", "conv_small", "spe_layernorm", "spe_tdbn", "spe_tebn"]
TOLERANCE = 1e-8


def close(actual, expected, name=""):
    """Relative to the largest entry; what is zero but for rounding, as a bias before a norm, is held to 1e-14."""
    atol = TOLERANCE * float(np.abs(expected).max()) + 1e-14
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


def golden_model(file, **overrides):
    golden = np.load(GOLDEN / f"{file}.npz", allow_pickle=False)
    c = json.loads(str(golden["config"]))
    config = ModelConfig(
        image_size=c["image_size"],
        in_channels=c["in_channels"],
        num_classes=c["num_classes"],
        patch_size=c["patch_size"],
        dim=c["dim"],
        depths=tuple(c["depths"]),
        expansion=c["alpha"],
        encoding="plain" if c["model"] == "conv" else "spe",
        norm=c.get("norm", "batch"),
        time_steps=c["T"],
        **overrides,
    )
    model = SpikingMLP(config, rngs=nnx.Rngs(0))
    official.load_state_dict(model, entries(golden, "state/"))
    return golden, model, jnp.asarray(golden["image_nchw"].transpose(0, 2, 3, 1))


def entries(golden, prefix):
    return {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}


def lif_names(config: ModelConfig) -> dict[str, str]:
    """Official names of the LIF modules to the names of their spikes in `SpikingMLP.__call__` (observe)."""
    names, n = {}, 0
    for i, depth in enumerate(config.depths):
        if i and config.encoding == "spe":
            for node in (0, 1):
                names[f"to_patch_embedding.{i}.lif.{node}"] = f"stage{i}.encode.node{node + 1}.spikes"
        names[f"to_patch_embedding_lif.{i}"] = f"stage{i}.encode.spikes"
        for j in range(depth):
            block = f"stage{i}.block{j}"
            if config.encoding == "plain":
                names[f"token_mix.{n}.activation"] = f"{block}.token.identity.spikes"
            names[f"token_mix.{n}.proj_h.3"] = f"{block}.token.height.spikes"
            names[f"token_mix.{n}.proj_w.3"] = f"{block}.token.width.spikes"
            names[f"token_mix_lif.{n}"] = f"{block}.token.spikes"
            names[f"channel_mix.{n}.1.net.2"] = f"{block}.channel.hidden.spikes"
            names[f"channel_mix_lif.{n}"] = f"{block}.channel.spikes"
            n += 1
    return names


@pytest.mark.parametrize("file", FILES)
def test_evaluation(file, x64):
    golden, model, images = golden_model(file)
    model.eval()
    logits, rates = jax.jit(lambda x: model(x, observe=lambda name, v: v.mean() if name.endswith(".spikes") else None))(
        images
    )
    close(logits, golden["eval_logits"])
    expected = entries(golden, "firing_rate/")
    names = lif_names(model.config)
    assert set(names) == set(expected) and set(names.values()) == set(rates)
    for name, ours in names.items():
        close(rates[ours], expected[name], name)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("file", FILES)
def test_training(file, remat, x64):
    golden, model, images = golden_model(file, remat=remat)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    labels = jnp.asarray(golden["label"])

    def loss(params):
        model = nnx.merge(graphdef, params, stats, copy=True)
        model.train()
        logits = model(images)
        scores = jax.nn.log_softmax(logits.mean(0))
        return -scores[jnp.arange(len(labels)), labels].mean(), (logits, nnx.state(model, nnx.BatchStat))

    (value, (logits, stats)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(logits, golden["train_logits"])
    close(value, golden["train_loss"])
    ours = official.state_dict(nnx.merge(graphdef, gradients, stats))
    for prefix in ("grad/", "after/"):
        expected = entries(golden, prefix)
        assert expected
        for name, array in expected.items():
            close(ours[name], array, prefix + name)


@pytest.mark.parametrize("file", FILES)
def test_golden_states_round_trip(file, x64):
    golden, model, _ = golden_model(file)
    state, expected = official.state_dict(model), entries(golden, "state/")
    assert set(state) == set(expected)
    for name, array in expected.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array, err_msg=name)


KINDS = st.fixed_dictionaries(
    dict(
        encoding=st.sampled_from(["spe", "plain"]),
        norm=st.sampled_from(["batch", "layer", "tdbn", "tebn"]),
        neuron=st.sampled_from(["lif", "plif"]),
        depths=st.sampled_from([(1,), (2, 1), (1, 2)]),
    )
)


@settings(max_examples=15)
@given(kind=KINDS, channel=st.booleans(), seed=st.integers(0, 99))
def test_every_kind_is_a_bijection(kind, channel, seed):
    config = tiny_config(**kind, norm_features="channel" if channel else "token")
    model = SpikingMLP(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    state = {
        name: rng.integers(0, 99, a.shape) if a.dtype.kind == "i" else rng.normal(size=a.shape).astype(np.float32)
        for name, a in official.state_dict(model).items()
    }
    state = {name: np.abs(a) if name.endswith("running_var") else a for name, a in state.items()}
    official.load_state_dict(model, state)
    again = official.state_dict(model)
    assert set(again) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    # Every number of the model came from the state: none of the initial ones is left.
    variables = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    assert variables == sum(a.size for a in state.values())
    assert set(lif_names(config).values()) == {n for n in intermediate_names(config) if n.endswith(".spikes")}


def test_names_that_distributed_training_adds():
    model, other = tiny_model(), tiny_model(seed=1)
    state = official.state_dict(model)
    norms = {name.rsplit(".", 1)[0] for name in state if name.endswith("running_mean")}
    wrapped = {}
    for name, array in state.items():
        module, leaf = name.rsplit(".", 1)
        wrapped[f"module.{module}.0.{leaf}" if module in norms else f"module.{name}"] = array
    official.load_state_dict(other, wrapped)
    again = official.state_dict(other)
    for name, array in state.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    with pytest.raises(InputError, match="twice"):
        official.load_state_dict(other, {**state, **wrapped})


@given(st.data())
def test_damaged_states_are_refused_by_name_and_change_nothing(data):
    model = tiny_model()
    state = official.state_dict(model)
    name = data.draw(st.sampled_from(sorted(state)))
    # A counter may be missing.
    damages = ["extra", "shape", "kind"] + ["missing"] * (not name.endswith("num_batches_tracked"))
    damage = data.draw(st.sampled_from(damages))
    if damage == "missing":
        del state[name]
    elif damage == "extra":
        name += "x"
        state[name] = np.zeros(3, np.float32)
    elif damage == "shape":
        state[name] = np.zeros((*state[name].shape, 2), state[name].dtype)
    else:
        state[name] = np.full(state[name].shape, 1j)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    with pytest.raises(InputError) as error:
        official.load_state_dict(model, state)
    assert f'"{name}"' in str(error.value)
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [[[1.0], [2.0, 3.0]], np.full((), 3_000_000_000), np.full((), -1)])
def test_values_that_do_not_fit_are_refused(value):
    model = tiny_model()
    state = {f"module.{name}": array for name, array in official.state_dict(model).items()}
    name = "module.batch_norm.num_batches_tracked"
    with pytest.raises(InputError, match=f'"{name}"'):
        official.load_state_dict(model, {**state, name: value})
    with pytest.raises(InputError, match=r'"module\.optimizer"') as error:
        official.load_state_dict(model, {**state, "module.optimizer": np.zeros(3)})
    assert len(str(error.value)) < 1500
