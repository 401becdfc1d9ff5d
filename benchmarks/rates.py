"""Random networks with a trained network's firing rates, on which the speed of an event-driven engine depends.

Running statistics come from a batch of images; then the bias of every norm before a neuron is adjusted until its layer
fires at the target rate. Weights stay random.
"""

from __future__ import annotations

import statistics

import jax
import numpy as np
from flax import nnx

from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.nn.norm import MOMENTUM, BatchNorm

# Mean rates of the layers of the trained Fashion-MNIST network, by kind (`spiking-mlp evaluate fashion_mnist`).
TRAINED_RATES = {
    "encode.spikes": 0.10,
    "token.height.spikes": 0.10,
    "token.width.spikes": 0.08,
    "token.spikes": 0.15,
    "channel.hidden.spikes": 0.065,
    "channel.spikes": 0.19,
}
ROUNDS, DAMPING = 40, 0.6


def synthetic_images(count: int, size: int, channels: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, channels] whose amplitude falls with spatial frequency, as natural images' does."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 1 / size
    noise = np.fft.rfft2(rng.normal(size=(count, channels, size, size)))
    images = np.fft.irfft2(noise / frequency, (size, size))
    images -= images.mean((2, 3), keepdims=True)
    images = 128 + 55 * images / images.std((2, 3), keepdims=True)
    return np.clip(images, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def set_rates(model: SpikingMLP, images: np.ndarray) -> dict[str, float]:
    """Set a network's running statistics from images and its firing rates to `TRAINED_RATES`.

    Args:
        model: with initial statistics; changed in place, and in evaluation mode afterwards.
        images: normalized, float32 [B, H, W, C].

    Returns:
        the resulting mean rate of every spiking layer.
    """
    graphdef, variables = nnx.split(model)

    @jax.jit
    def batch_statistics(variables, images):
        model = nnx.merge(graphdef, variables, copy=True)
        model.train()
        model(images)
        return nnx.split(model)[1]

    nnx.update(model, batch_statistics(variables, images))
    for norm in _norms(model):
        # Undo the weighting of one step of the running averages.
        norm.mean[...] = norm.mean[...] / MOMENTUM
        norm.var[...] = (norm.var[...] - (1 - MOMENTUM)) / MOMENTUM
    model.eval()
    graphdef, _ = nnx.split(model)

    @jax.jit
    def rates(variables, images):
        def mean(name, value):
            return value.mean() if name.endswith(".spikes") else None

        return nnx.merge(graphdef, variables, copy=True)(images, observe=mean)[1]

    normal, found = statistics.NormalDist(), {}
    for number in range(ROUNDS + 1):
        found = {name: float(rate) for name, rate in rates(nnx.split(model)[1], images).items()}
        if number == ROUNDS:
            break
        for layer, rate in found.items():
            kind = next((kind for kind in TRAINED_RATES if layer.endswith(kind)), None)
            if kind is None:
                continue  # inner nodes of an encoding
            wanted = normal.inv_cdf(TRAINED_RATES[kind])
            move = DAMPING * (wanted - normal.inv_cdf(min(max(rate, 1e-3), 0.999)))
            _move(model, layer, move)
    return found


def _norms(model):
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, BatchNorm)]


def _move(model, layer, by):
    """Add to the biases of the norms whose sum the layer's neurons receive."""
    stage, part, *rest = layer.removesuffix(".spikes").split(".")
    stage = model.stages[int(stage.removeprefix("stage"))]
    if part == "encode":
        norms = getattr(stage.encode, "cell_norms", None) or [stage.encode.norm]
        for norm in norms:
            norm.bias[...] = norm.bias[...] + by
        return
    block = int(part.removeprefix("block"))
    token, channel = stage.blocks.token, stage.blocks.channel
    norm = {
        "token.height": token.height.norm,
        "token.width": token.width.norm,
        "token": token.norm,
        "channel.hidden": channel.hidden_norm,
        "channel": channel.norm,
    }[".".join(rest)]
    norm.bias[...] = norm.bias[...].at[block].add(by)
