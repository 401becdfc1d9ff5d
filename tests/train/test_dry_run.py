"""Dry runs: costs against the paper's table and against what JAX itself would execute."""

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.train.config import load_config, model_config, validate
from spiking_mlp_jax.train.dry_run import describe, macs_per_step, parameter_count
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import abstract_batch, abstract_with_sharding, make_mesh
from spiking_mlp_jax.train.state import abstract_state
from spiking_mlp_jax.train.step import make_train_step

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("variant", "millions", "giga_macs"),
    [
        ("mlp_t", "24.11", None),
        ("mlp_s", "34.507", "7.12"),
        ("mlp_spe_t", "25.229", "4.98"),
        ("mlp_spe_s", "37.976", "7.51"),
        ("mlp_spe_b", "65.607", "13.47"),
    ],
)
def test_the_papers_table(variant, millions, giga_macs):
    model = ModelConfig.variant(variant)
    _, state = abstract_state(model, make_optimizer(load_config(f"{CONFIGS}/imagenet.py"), 1))
    digits = len(millions.split(".")[1])
    assert f"{parameter_count(state) / 1e6:.{digits}f}" == millions
    if giga_macs:
        assert f"{macs_per_step(model) / 1e9:.2f}" == giga_macs


def executed_macs(jaxpr):
    """Multiply-accumulates of every matrix product and convolution of a jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            spec = eqn.params["dimension_numbers"].rhs_spec
            total += math.prod(out.shape) * math.prod(kernel) // kernel[spec[0]]
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += executed_macs(inner) * eqn.params.get("length", 1)
    return total


@pytest.mark.parametrize("encoding", ["spe", "plain"])
def test_counts_are_what_is_executed(encoding):
    model = ModelConfig(
        image_size=32, in_channels=2, num_classes=7, dim=12, depths=(1, 3, 2), encoding=encoding, time_steps=3
    )
    graphdef, variables = nnx.split(nnx.eval_shape(lambda: SpikingMLP(model, rngs=nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((1, 32, 32, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: nnx.merge(graphdef, v, copy=True)(x))(variables, images)
    # The stem runs once an image, whatever the number of steps, but counts in each.
    stem = 8 * 8 * 4 * 4 * 2 * 12
    assert executed_macs(jaxpr.jaxpr) == 3 * macs_per_step(model) - 2 * stem


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("fashion_mnist.py", {}),
        ("fashion_mnist.py:demo", {}),
        ("cifar10.py", {}),
        ("cifar10.py:224", {"GMAC per time step": "4.98 dense"}),
        ("imagenet.py:mlp_t", {"parameters": "24,11"}),
        ("imagenet.py:mlp_s", {"parameters": "34,507,", "GMAC per time step": "7.12 dense"}),
        ("imagenet.py:mlp_spe_t", {"parameters": "25,22", "GMAC per time step": "4.98 dense"}),
        ("imagenet.py:mlp_spe_s", {"parameters": "37,97", "GMAC per time step": "7.51 dense"}),
        ("imagenet.py:mlp_spe_b", {"parameters": "65,60", "GMAC per time step": "13.47 dense"}),
    ],
)
def test_reports_of_the_shipped_configs(name, lines):
    config = load_config(f"{CONFIGS}/{name}")
    validate(config, jax.device_count())
    # The last line, the temporaries, would compile the step.
    report = list(itertools.islice(describe(config), 11))
    assert report[-1].startswith("  batch ")
    for start, value in lines.items():
        assert any(line.startswith(f"{start:<22}{value}") for line in report), (start, report)


@pytest.mark.slow
def test_report_allocates_nothing():
    config = load_config(f"{CONFIGS}/fashion_mnist.py:demo")
    config.update({"dim": 6, "depths": (1, 1), "image_size": 16, "batch_size": 16})
    before = jax.live_arrays()  # held, so that other tests' arrays are not collected meanwhile
    text = "\n".join(describe(config))
    assert {id(x) for x in jax.live_arrays()} <= {id(x) for x in before}
    for word in ("parameters", "GMAC per time step", "norm statistics", "memory per device", "temporaries", "2 a step"):
        assert word in text
    # The quick compilation plans the same memory as that of training.
    optimizer = make_optimizer(config, steps_per_epoch=1)
    graphdef, state = abstract_state(model_config(config), optimizer)
    mesh = make_mesh()
    step = make_train_step(config, graphdef, optimizer, mesh)
    batch = abstract_batch(config.batch_size, config.image_size, config.in_channels, mesh)
    memory = step.lower(abstract_with_sharding(state, mesh), batch).compile().memory_analysis()
    assert f"{memory.temp_size_in_bytes / 1e3:.1f} kB, gradients included" in text
