"""Figures of activity from planted numbers: what they show, and that one step and many layers fit."""

import io

import numpy as np
import pytest
from PIL import Image

from spiking_mlp_jax.analysis.activity import measure as activity
from spiking_mlp_jax.analysis.activity import plots as activity_plots
from spiking_mlp_jax.analysis.activity.membrane import Membrane
from spiking_mlp_jax.analysis.activity.rates import dead_and_saturated, rates_of
from spiking_mlp_jax.analysis.activity.similarity import Similarity
from spiking_mlp_jax.analysis.activity.trains import Intervals

NAMES = ["stage0.encode.spikes", "stage0.block0.token.height.spikes", "stage0.block0.channel.spikes"]


def pixels(figure):
    """The figure as it is printed, [H, W, 4]."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=40)
    return np.asarray(Image.open(stream))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def rows(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def some_rates(steps=3, names=NAMES):
    """The first layer's channel 0 is dead and 1 saturated; the last layer is silent."""
    counts = {name: np.full((steps, 2, 2, 4), 30) for name in names}
    counts[names[0]][..., 0], counts[names[0]][..., 1] = 0, 100
    counts[names[0]][-1, ..., 2] = 90
    counts[names[-1]][:] = 0
    return rates_of(counts, 100)


def some_intervals(steps, names=NAMES):
    trains = dict(following=0.25, cv=0.1, cv_trains=3, lv=0.1, lv_pairs=3)
    counts, lengths = np.array([10, *range(steps, 0, -1)]), np.arange(steps - 1, 0, -1)
    return {name: Intervals(counts=counts, lengths=lengths, **trains) for name in names}


def some_membrane(steps=2):
    edges = np.linspace(-1, 2, 13)
    counts = np.zeros((steps, 12), int)
    counts[:, 2], counts[:, 9] = 60, 20
    counts[-1, 5] = 7
    return Membrane(edges, 1.0, 0.0, dict.fromkeys(NAMES, counts), {})


def some_information(steps=3):
    confusion = np.stack([np.eye(4, dtype=int) * (5 + t) + 1 for t in range(steps)])
    share = np.linspace(0.5, 0.75, steps)
    return activity.Information(400, share, 2 - share, share + 0.25, share - 0.1, confusion)


def test_rates_by_step():
    figure = activity_plots.rates_by_step(some_rates())
    axes, bar = figure.axes
    assert rows(axes) == ["stage0.encode", "stage0.block0.token.height", "stage0.block0.channel"]
    assert (axes.get_xlabel(), bar.get_ylabel()) == ("time step", "neurons that fire (%)")
    np.testing.assert_allclose(axes.images[0].get_array()[0], [40, 40, 55])
    assert texts(axes) == ["40.0", "40.0", "55.0", *["30.0"] * 3, *["0.0"] * 3]
    assert axes.get_title() == "firing rate by time step (%), 100 images"
    assert pixels(figure).std() > 0


def test_token_maps_share_a_scale():
    rates = some_rates()
    figure = activity_plots.token_maps(rates)
    maps = [axes.images[0] for axes in figure.axes[:3]]
    np.testing.assert_allclose(maps[0].get_array(), 100 * rates.token[NAMES[0]])
    assert {image.get_clim() for image in maps} == {(0, maps[0].get_array().max())}
    assert figure.axes[2].get_title() == "stage0.block0.channel\n2 x 2, mean 0.0 %"
    assert pixels(figure).std() > 0


def test_channels_mark_dead_and_saturated_ones():
    rates = some_rates()
    figure = activity_plots.channel_rates(rates, dead_and_saturated(rates))
    left, right = figure.axes
    marks = {line.get_label(): line.get_xydata().tolist() for line in left.lines if len(line.get_xydata())}
    assert marks["silent channel"] == [[0, 0], *[[0, 2]] * 4]
    assert marks["channel that always fires"] == [[100, 0]]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([25, 0, 100, 25, 0, 0])
    assert texts(right)[0] == "25.0 + 25.0"
    assert texts(right)[2] == "100"
    assert max(right.get_xticks()) == 100
    loose = activity_plots.channel_rates(rates, dead_and_saturated(rates, dead=0.3))
    assert "rate <= 0.3" in [line.get_label() for line in loose.axes[0].lines]
    assert pixels(figure).std() > 0


def test_spike_trains():
    intervals = some_intervals(4)
    figure = activity_plots.spike_trains(intervals)
    left, right = figure.axes
    widths = np.reshape([bar.get_width() for bar in left.patches], (4, 3))
    np.testing.assert_allclose(widths[:, 0], [20, 15, 10, 5])
    np.testing.assert_allclose([bar.get_width() for bar in right.patches][::3], 100 * np.array([3, 2, 1]) / 6)
    shown = [text.get_text() for text in left.get_legend().get_texts()]
    assert shown == ["1", "2", "3", "4", "at least one, if spikes were independent"]
    # 20 spikes of 20 trains at 4 steps: a rate of 1/4.
    (independent,) = left.lines[0].get_xdata()
    assert independent == pytest.approx(100 * (1 - 0.75**4))
    assert pixels(figure).std() > 0


def test_accuracy_per_step():
    information = some_information()
    figure = activity_plots.accuracy_per_step(information)
    accuracy, loss, bits = figure.axes
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [50, 62.5, 75])
    assert texts(accuracy) == ["50.0", "62.5", "75.0"]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), information.loss)
    np.testing.assert_allclose(bits.lines[0].get_ydata(), information.mutual_information)
    assert accuracy.get_title() == "accuracy, 400 images"
    assert [axes.get_ylabel() for axes in figure.axes] == ["images (%)", "cross-entropy (nats)", "bits"]
    np.testing.assert_array_equal(loss.get_xticks(), [1, 2, 3])
    assert pixels(figure).std() > 0


def test_membrane_histograms():
    membrane = some_membrane()
    figure = activity_plots.membrane_histograms(membrane)
    axes = figure.axes[0]
    assert axes.get_title() == f"stage0.encode\n{100 * (20 / 80 + 20 / 87) / 2:.1f} % fire"
    assert axes.lines[0].get_xdata() == [1.0, 1.0]
    values, edges, _ = axes.patches[1].get_data()
    np.testing.assert_allclose(edges, membrane.edges)
    np.testing.assert_allclose(np.nan_to_num(values), membrane.counts[NAMES[0]][0] / 80 / 0.25)
    assert pixels(figure).std() > 0


def test_similarity_matrices():
    rsa, cka = np.array([[1, 0.25], [0.25, 1]]), np.array([[1, np.nan], [np.nan, 1]])
    figure = activity_plots.similarity_matrices({"stage0.encode.spikes": Similarity(rsa, cka, 0.0)})
    axes = figure.axes[0]
    assert texts(axes) == ["1", "x", ".25", "1"]
    assert rows(axes) == ["1", "2"]
    assert pixels(figure).std() > 0


@pytest.mark.parametrize("steps, layers", [(1, 3), (20, 60)])
def test_one_step_and_many_layers(steps, layers):
    names = [f"stage0.block{i}.channel.spikes" for i in range(layers)]
    rates = some_rates(steps, names)
    figures = [
        activity_plots.rates_by_step(rates),
        activity_plots.spike_trains(some_intervals(steps, names)),
        activity_plots.accuracy_per_step(some_information(steps)),
        activity_plots.membrane_histograms(some_membrane(steps)),
    ]
    for figure in figures:
        assert pixels(figure).std() > 0
    assert len(rows(figures[0].axes[0])) == layers
    maps = activity_plots.token_maps(rates)
    assert len(maps.axes) == min(layers, 24) + 1
    assert len(activity_plots.step_colours(steps)) == len(set(activity_plots.step_colours(steps))) == steps
