"""Figures of a single neuron: potential over time, firing rate by input, surrogate gradients.

The neurons are those of the network (`layers.Neuron`), with the constants of a `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spiking_mlp_jax.analysis.plots import BLUE, COLOURS, GREY, RED
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import neuron
from spiking_mlp_jax.nn.dynamics import step
from spiking_mlp_jax.nn.layers import equations
from spiking_mlp_jax.nn.surrogate import SURROGATES, SpikeFunction


@dataclasses.dataclass(frozen=True)
class Trace:
    """A neuron over T time steps.

    Attributes:
        charged: potential after charging and before the reset, which the threshold is compared with, [T].
        potential: potential after the step, [T].
        spikes: whether the neuron fires, [T].
        start: potential before the first step.
    """

    charged: Float[np.ndarray, "T"]
    potential: Float[np.ndarray, "T"]
    spikes: Bool[np.ndarray, "T"]
    start: float


def neuron_trace(current: Sequence[float] | Float[np.ndarray, "T"], config: ModelConfig) -> Trace:
    """Runs one neuron and returns its potential too, unlike `neuron.lif`.

    Args:
        current: its input at each step, in units of the potential.
        config: kind and constants of the neuron; other fields are ignored.

    Returns:
        its potential and spikes, float32, by `dynamics.step`.

    Raises:
        InputError: no steps, or a current that is not finite.
    """
    mode, k = equations(neuron(config, 1), jnp.float32)
    # Starts at the reset potential, like all neurons of the network.
    v, seen = k.v_reset, []
    for x in jnp.asarray(_current(current)):
        after, (fired, charged) = step(mode, k, v, x)
        seen.append((charged, after, fired))
        v = after
    charged, potential, fired = (np.asarray(jnp.stack(values)) for values in zip(*seen, strict=True))
    return Trace(charged, potential, fired, float(k.v_reset))


def firing_rate(currents: Sequence[float] | Float[np.ndarray, "N"], config: ModelConfig) -> Float[np.ndarray, "N"]:
    """Spikes per step of a neuron with constant input, over `config.time_steps` steps.

    With decay_input and v_reset=0 a LIF neuron reaches (1 - (1 - 1 / tau)^n) I after n steps: if that
    exceeds the threshold it fires every n-th step for the smallest such n, otherwise never.

    Args:
        currents: the inputs.
        config: kind and constants of the neuron, and the number of steps.

    Returns:
        the rate for each input, 0 to 1.

    Raises:
        InputError: no currents, or one that is not finite.
    """
    spikes = neuron(config, 1)(jnp.asarray(_current(currents))[:, None])
    return np.asarray(jnp.mean(spikes, 1))


def spike_count_gradient(
    current: Sequence[float] | Float[np.ndarray, "T"], config: ModelConfig
) -> Float[np.ndarray, "T"]:
    """Surrogate gradient of the number of spikes with respect to the input at each step.

    Args:
        current: the input at each step.
        config: kind, constants and surrogate of the neuron.

    Returns:
        the gradient, [T]; the true one is 0 almost everywhere.

    Raises:
        InputError: no steps, or a current that is not finite.
    """
    current = _current(current)
    neurons = neuron(dataclasses.replace(config, time_steps=len(current)), 1)
    return np.asarray(jax.grad(lambda x: jnp.sum(neurons(x[None])))(jnp.asarray(current)))


def trace_figure(current: Sequence[float] | Float[np.ndarray, "T"], neurons: Mapping[str, ModelConfig]) -> Figure:
    """Potentials of neurons with the same input, one below the other, and the input.

    Args:
        current: the input at each step.
        neurons: by label.

    Raises:
        InputError: no neurons; as `neuron_trace`.
    """
    if not neurons:
        raise InputError("there are no neurons to draw: give at least one")
    current = _current(current)
    figure = Figure(figsize=(8.5, 1.5 + 1.7 * len(neurons)), layout="constrained")
    panels = figure.subplots(
        len(neurons) + 1, 1, sharex=True, squeeze=False, height_ratios=[1.0] * len(neurons) + [0.5]
    )[:, 0]
    for axes, (name, config) in zip(panels, neurons.items(), strict=False):
        _draw_trace(axes, neuron_trace(current, config), config)
        axes.set_title(name, fontsize=10, loc="left")
    panels[0].legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.97), borderpad=0)
    steps = np.arange(1, len(current) + 1)
    panels[-1].bar(steps, current, width=0.9, color=GREY)
    panels[-1].axhline(0, color="black", linewidth=0.6)
    panels[-1].set(xlabel="time step", ylabel="input", xlim=(-0.3, len(current) + 0.6))
    panels[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    return figure


def rate_figure(currents: Sequence[float] | Float[np.ndarray, "N"], neurons: Mapping[str, ModelConfig]) -> Figure:
    """Firing rate against a constant input.

    Args:
        currents: the inputs, ascending.
        neurons: by label; each runs for its own `time_steps`.

    Raises:
        InputError: no neurons or currents, or one that is not finite.
    """
    if not neurons:
        raise InputError("there are no neurons to draw: give at least one")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, config) in enumerate(neurons.items()):
        axes.plot(currents, firing_rate(currents, config), color=COLOURS[i % len(COLOURS)], label=name)
    axes.set(xlabel="constant input (units of the potential)", ylabel="spikes per step", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def surrogate_figure(surrogates: Mapping[str, SpikeFunction] | None = None) -> Figure:
    """The spike function and the surrogates of its derivative.

    Args:
        surrogates: spike functions by label; None for all of `surrogate.SURROGATES` with their default sharpness.

    Raises:
        InputError: an empty mapping.
    """
    if surrogates is None:
        surrogates = {name: make() for name, make in SURROGATES.items()}  # pyright: ignore[reportCallIssue]
    if not surrogates:
        raise InputError("there are no surrogates to draw: give at least one")
    u = jnp.linspace(-1.5, 1.5, 1201)
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    left.plot([-1.5, 0], [0, 0], color="black")
    left.plot([0, 1.5], [1, 1], color="black")
    left.plot([0], [1], "o", color="black", markersize=5)
    left.plot([0], [0], "o", color="black", markersize=5, markerfacecolor="white")
    left.set_title("forward: a step", fontsize=10)
    left.set_ylabel("spike")
    for i, (name, spike) in enumerate(surrogates.items()):
        (slope,) = jax.vjp(spike, u)[1](jnp.ones_like(u))
        right.plot(u, slope, color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=name)
    right.set_title("backward: the surrogate of its derivative", fontsize=10)
    right.set_ylabel("ds/du")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xlabel("u = potential - threshold")
        axes.grid(alpha=0.3)
    return figure


def gradient_figure(current: Sequence[float] | Float[np.ndarray, "T"], neurons: Mapping[str, ModelConfig]) -> Figure:
    """`spike_count_gradient` of neurons with the same input, side by side.

    Args:
        current: the input at each step.
        neurons: by label.

    Raises:
        InputError: no neurons, no steps, or a current that is not finite.
    """
    if not neurons:
        raise InputError("there are no neurons to draw: give at least one")
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(neurons)
    for i, (name, config) in enumerate(neurons.items()):
        gradient = spike_count_gradient(current, config)
        at = np.arange(1, len(gradient) + 1) + (i - (len(neurons) - 1) / 2) * width
        axes.bar(at, gradient, width, color=COLOURS[i % len(COLOURS)], label=name)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="time step of the input", ylabel="d(number of spikes) / d(input)", xlim=(0.4, len(current) + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_trace(axes: Axes, trace: Trace, config: ModelConfig):
    steps = np.arange(1, len(trace.spikes) + 1)
    # Each step moves to the charged potential, from which a reset drops at once.
    time = np.concatenate([[0], np.repeat(steps, 2)])
    path = np.concatenate([[trace.start], np.stack([trace.charged, trace.potential], 1).ravel()])
    axes.axhline(config.v_threshold, color=RED, linestyle="--", linewidth=1, label="threshold")
    if trace.start:
        axes.axhline(trace.start, color=GREY, linestyle=":", linewidth=1)
    axes.plot(time, path, color=BLUE, linewidth=1.4, label="potential")
    fired = trace.spikes
    axes.plot(steps[fired], trace.charged[fired], "o", color="black", markersize=5, label="spike")
    axes.set_ylabel("potential")
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)


def _current(values) -> Float[np.ndarray, "N"]:
    found = np.asarray(values, np.float32)
    if found.ndim != 1 or not len(found):
        raise InputError(f"a neuron's input must be one number per step, [T], but its shape is {found.shape}")
    if not np.isfinite(found).all():
        raise InputError("a neuron's input has NaN or inf")
    return found
