"""What the auditor says of the floating-point network."""

import jax
import jax.extend.core
import numpy as np
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Spec

from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.deploy.audit import abstract, audit
from tests.support.random_model import random_model

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


def test_a_real_network():
    config = ModelConfig(image_size=224, in_channels=3, num_classes=10, depths=(2, 8, 14, 2))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: np.full(leaf.shape, 0.3).astype(leaf.dtype), state))
    model.eval()
    report = audit(model, Spec((1, 224, 224, 3), "float32"))
    assert not report.ok and not report.total("unknown")
