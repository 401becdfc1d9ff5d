"""This package's side of a comparison."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.interop import official
from spiking_mlp_jax.utils.memory import return_freed_memory

Arrays = dict[str, np.ndarray]
# A function, so that the weights are not held twice while memory is measured.
Read = Callable[[], Arrays]

NOT_TRAINED = ("running_mean", "running_var", "num_batches_tracked")


def initial_state(config: ModelConfig, seed: int) -> Arrays:
    """Random weights in float32 under their official names."""
    return official.state_dict(initial_model(config, seed))


def outputs(config: ModelConfig, read: Read, images: np.ndarray, labels: np.ndarray) -> Arrays:
    """The values that both sides must agree on, in float64.

    Args:
        config: the network.
        read: returns its weights under the official names.
        images: float64 [B, H, W, C].
        labels: int [B].

    Returns:
        "training" logits [T, B, K], "loss", "gradient.<official name>" of every parameter, and the "evaluation"
        logits with the running averages after that training step.
    """
    with jax.enable_x64(True):
        graphdef, params, stats = _split(config, read, np.float64)

        @jax.jit
        def compute(params, stats, images, labels):
            (value, (logits, after)), gradients = jax.value_and_grad(_loss(graphdef), has_aux=True)(
                params, stats, images, labels
            )
            model = nnx.merge(graphdef, params, after, copy=True)
            model.eval()
            return logits, value, gradients, after, model(images)

        logits, value, gradients, after, evaluation = compute(params, stats, jnp.asarray(images), jnp.asarray(labels))
        # Gradients have the layout of the weights, and so the same names.
        named = official.state_dict(nnx.merge(graphdef, gradients, after))
        gradients = {f"gradient.{name}": value for name, value in named.items() if not name.endswith(NOT_TRAINED)}
        return {
            "training": np.asarray(logits),
            "loss": np.asarray(value),
            "evaluation": np.asarray(evaluation),
            **gradients,
        }


def make_step(config: ModelConfig, read: Read | None = None):
    """A training step, SGD with momentum 0.9 on the cross-entropy of the time-mean logits.

    Args:
        config: the network.
        read: returns its weights; None: random ones.

    Returns:
        a jitted function (params, stats, opt_state, images, labels) -> (params, stats, opt_state, loss) that donates
        the first three, and these three.
    """
    graphdef, params, stats = _split(config, read, np.float32)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(params, stats, opt_state, images, labels):
        (value, (_, after)), gradients = jax.value_and_grad(_loss(graphdef), has_aux=True)(
            params, stats, images, labels
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), after, opt_state, value

    return jax.jit(step, donate_argnums=(0, 1, 2)), (params, stats, optimizer.init(params))


def make_logits(config: ModelConfig, read: Read | None = None):
    """Evaluation; arguments as in `make_step`.

    Returns:
        a jitted function (params, stats, images) -> logits [T, B, K], and the first two.
    """
    graphdef, params, stats = _split(config, read, np.float32)

    def logits(params, stats, images):
        model = nnx.merge(graphdef, params, stats, copy=True)
        model.eval()
        return model(images)

    return jax.jit(logits), (params, stats)


def training(config: ModelConfig, read: Read, images: np.ndarray, labels: np.ndarray):
    """A function that runs one training step to completion, and facts about its compilation."""
    step, carried = make_step(config, read)
    batch = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    compiled, facts = _compile(step, *carried, *batch)

    def run():
        nonlocal carried
        *carried, _ = jax.block_until_ready(compiled(*carried, *batch))

    return run, facts


def inference(config: ModelConfig, read: Read, images: np.ndarray, labels: np.ndarray):
    """A function that computes logits in evaluation mode, and facts about its compilation."""
    logits, variables = make_logits(config, read)
    pixels = jnp.asarray(images, jnp.float32)
    compiled, facts = _compile(logits, *variables, pixels)
    return lambda: jax.block_until_ready(compiled(*variables, pixels)), facts


def device_facts() -> dict[str, Any]:
    """Device and versions; `device_peak_bytes` where the device counts its memory."""
    device = jax.devices()[0]
    facts: dict[str, Any] = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    statistics = device.memory_stats() or {}
    if "peak_bytes_in_use" in statistics and device.platform != "cpu":
        facts["device_peak_bytes"] = statistics["peak_bytes_in_use"]
    return facts


def _split(config, read, dtype):
    model = initial_model(config, 0)
    if read is not None:
        cast = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in read().items()}
        official.load_state_dict(model, cast)
    return nnx.split(model, nnx.Param, nnx.BatchStat)


def initial_model(config: ModelConfig, seed: int) -> SpikingMLP:
    """A network with random weights."""
    # Jitted: eager construction compiles hundreds of tiny programs.
    return nnx.merge(*jax.jit(lambda key: nnx.split(SpikingMLP(config, rngs=nnx.Rngs(key))))(jax.random.key(seed)))


def _loss(graphdef) -> Callable[..., Any]:
    def loss(params, stats, images, labels):
        model = nnx.merge(graphdef, params, stats, copy=True)
        model.train()
        logits = model(images)
        value = optax.softmax_cross_entropy_with_integer_labels(jnp.mean(logits, 0), labels).mean()
        return value, (logits, nnx.state(model, nnx.BatchStat))

    return loss


def _compile(function, *arguments):
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return_freed_memory()  # as the trainer does
    memory = compiled.memory_analysis()
    return compiled, {"compile_s": seconds, "temporary_bytes": getattr(memory, "temp_size_in_bytes", None)}
