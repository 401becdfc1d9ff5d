import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notebooks import neuron_plots
from spiking_mlp_jax import ModelConfig
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.nn import neuron, surrogate

CURRENT = np.array([1.5, 1.5, 0.3, 2.5, -0.5, 0.9, 0.9, 0.9], np.float32)
LIF, SOFT, IF = ModelConfig(), ModelConfig(v_reset=None), ModelConfig(neuron="if")
OTHERS = [
    ModelConfig(tau=3.0, v_reset=-0.5),
    ModelConfig(decay_input=False, v_threshold=0.7),
    ModelConfig(neuron="plif", tau=4.0),
]


@pytest.mark.parametrize("config", [LIF, SOFT, IF, *OTHERS])
def test_a_trace_is_the_neuron_of_the_equations(config):
    # `nn/dynamics.py`, written out for one neuron in Python's numbers.
    reset = config.v_reset or 0.0
    v, charged, potential, spikes = reset, [], [], []
    for x in CURRENT.tolist():
        if config.neuron == "if":
            h = v + x
        elif config.decay_input:
            h = v + (x - (v - reset)) / config.tau
        else:
            h = v - (v - reset) / config.tau + x
        fired = h >= config.v_threshold
        v = h if not fired else h - config.v_threshold if config.v_reset is None else reset
        charged, potential, spikes = [*charged, h], [*potential, v], [*spikes, fired]
    trace = neuron_plots.neuron_trace(CURRENT, config)
    np.testing.assert_array_equal(trace.spikes, spikes)
    np.testing.assert_allclose(trace.charged, charged, rtol=1e-6)
    np.testing.assert_allclose(trace.potential, potential, rtol=1e-5, atol=1e-6)
    assert trace.start == pytest.approx(reset)


def test_a_trace_fires_as_the_network_does():
    spikes, last = neuron.lif(jnp.asarray(CURRENT), tau=2.0)
    trace = neuron_plots.neuron_trace(CURRENT, LIF)
    np.testing.assert_array_equal(trace.spikes, np.asarray(spikes))
    assert trace.potential[-1] == pytest.approx(float(last))


@settings(max_examples=8)
@given(st.floats(1.02, 6.0), st.sampled_from([1.5, 2.0, 4.0]))
def test_rate_of_a_constant_input_is_known_in_closed_form(current, tau):
    config = ModelConfig(tau=tau, time_steps=40)
    # (1 - (1 - 1 / tau)^n) I >= 1 for the smallest n; away from equality, which rounding decides.
    needed = np.log(1 - 1 / current) / np.log(1 - 1 / tau)
    if abs(needed - round(needed)) > 1e-3:
        expected = (40 // np.ceil(needed)) / 40
        assert neuron_plots.firing_rate([current], config)[0] == pytest.approx(expected)
    assert neuron_plots.firing_rate([0.99], config)[0] == 0


def test_gradient_of_the_number_of_spikes_is_the_chain_rule():
    config = ModelConfig(surrogate="triangle", surrogate_alpha=1.0)
    trace = neuron_plots.neuron_trace(CURRENT, config)
    slope = np.maximum(0, 1 - np.abs(trace.charged - 1))
    # d h[t] / d x[s] = 1/2 * (1/2)^(t - s) as long as no spike in between reset the potential.
    expected = np.zeros(len(CURRENT))
    for s in range(len(CURRENT)):
        reach = 0.5
        for t in range(s, len(CURRENT)):
            expected[s] += slope[t] * reach
            reach *= 0.0 if trace.spikes[t] else 0.5
    np.testing.assert_allclose(neuron_plots.spike_count_gradient(CURRENT, config), expected, rtol=1e-5)


def test_figures_show_what_was_computed():
    figure = neuron_plots.trace_figure(CURRENT, {"a": LIF, "b": IF})
    top, second, bottom = figure.axes
    assert [axes.get_title(loc="left") for axes in (top, second)] == ["a", "b"]
    assert bottom.get_xlabel() == "time step"
    assert [bar.get_height() for bar in bottom.patches] == pytest.approx(CURRENT.tolist())
    for axes, config in ((top, LIF), (second, IF)):
        spikes = {line.get_label(): line for line in axes.lines}["spike"]
        np.testing.assert_array_equal(
            spikes.get_xdata(), 1 + np.flatnonzero(neuron_plots.neuron_trace(CURRENT, config).spikes)
        )
    (axes,) = neuron_plots.rate_figure([0.5, 5.0], {"tau 2": LIF}).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0, 1])
    (axes,) = neuron_plots.gradient_figure(CURRENT, {"a": LIF, "b": dataclasses.replace(LIF, surrogate="atan")}).axes
    assert len(axes.patches) == 2 * len(CURRENT)


def test_surrogates_are_drawn_as_their_own_derivatives():
    _, right = neuron_plots.surrogate_figure().axes
    names = [line.get_label() for line in right.lines if not str(line.get_label()).startswith("_")]
    assert names == list(surrogate.SURROGATES)
    (line,) = (line for line in right.lines if line.get_label() == "atan")
    u = np.asarray(line.get_xdata())
    np.testing.assert_allclose(line.get_ydata(), 1 / (1 + (np.pi * u) ** 2), rtol=1e-4)
    one = neuron_plots.surrogate_figure({"steep": surrogate.sigmoid(8.0)})
    assert max(one.axes[1].lines[0].get_ydata()) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("bad", [[], [[1.0]], [1.0, np.nan], 3.0])
def test_bad_currents_are_refused(bad):
    with pytest.raises(InputError, match="input"):
        neuron_plots.neuron_trace(bad, LIF)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: neuron_plots.trace_figure(CURRENT, {}),
        lambda: neuron_plots.rate_figure(CURRENT, {}),
        lambda: neuron_plots.gradient_figure(CURRENT, {}),
        lambda: neuron_plots.surrogate_figure({}),
    ],
)
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(InputError, match="to draw"):
        draw()
