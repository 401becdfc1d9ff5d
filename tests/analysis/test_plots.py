import io
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax.analysis import plots
from spiking_mlp_jax.errors import InputError
from tests.support.random_model import CLASSES, make_workdir, random_model

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (9, 9, 1), dtype=np.uint8)
RATES = {"stage0.encode.spikes": 0.2, "stage0.block0.token.spikes": 0.0004, "stage0.block0.channel.spikes": 0.97}
FILES = ["learning_curves", "confusion_matrix", "firing_rates", "spikes", "predictions"]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labels(figure):
    """(x, y) labels of the axes that have a frame."""
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]


def pixels(figure):
    """The figure as it is printed, [H, W, 4]."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=50)
    return np.asarray(Image.open(stream))


def test_learning_curves():
    records = [{"step": s, "split": "train", "loss": 2.0, "accuracy": 0.5, "x": 1} for s in range(1, 101)]
    records += [{"step": 50, "split": "eval", "loss": 9.0, "accuracy": 0.1}]
    records += [{"step": s, "split": "eval", "loss": 1 / s, "accuracy": s / 200} for s in (50, 100)]
    records += [{"step": 101, "split": "train", "loss": float("nan")}, {"note": "no step"}, {"step": 1}]
    figure = plots.learning_curves(records)
    assert labels(figure) == [("training step", "loss"), ("training step", "accuracy (%)")]
    loss, accuracy = figure.axes
    raw, smooth, test = loss.lines
    np.testing.assert_array_equal(raw.get_xdata(), range(1, 101))
    np.testing.assert_allclose(smooth.get_ydata(), 2.0)
    # Of two entries for step 50 the later one counts.
    np.testing.assert_allclose(test.get_ydata(), [0.02, 0.01])
    np.testing.assert_allclose(accuracy.lines[2].get_ydata(), [25, 50])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()][1] == "test, best 50 %"
    assert pixels(figure).std() > 0


def test_learning_curves_leave_out_null():
    records = [{"step": step, "split": "train", "loss": loss, "accuracy": 0.5} for step, loss in ((1, 2.0), (2, None))]
    losses = plots.learning_curves(records).axes[0].lines[0]
    np.testing.assert_array_equal(losses.get_xdata(), [1])


def test_learning_curves_of_little():
    with pytest.raises(InputError, match="no metrics"):
        plots.learning_curves([])
    plots.learning_curves([{"step": 1, "split": "eval", "loss": float("nan"), "accuracy": 0.1}])
    plots.learning_curves([{"step": 1, "split": "train", "loss": 3.0, "accuracy": 0.1}])


@settings(max_examples=5)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200))
def test_running_mean_stays_within_the_values(values):
    records = [{"step": i, "split": "train", "loss": value, "accuracy": 0} for i, value in enumerate(values)]
    raw, smooth = plots.learning_curves(records).axes[0].lines
    assert min(values) - 1e-6 <= smooth.get_ydata().min() <= smooth.get_ydata().max() <= max(values) + 1e-6
    near = max(1, len(values) // 30) + 1
    assert smooth.get_ydata()[0] == pytest.approx(np.mean(values[:near]), abs=1e-6)
    assert smooth.get_ydata()[-1] == pytest.approx(np.mean(values[-near:]), abs=1e-6)
    np.testing.assert_allclose(raw.get_ydata(), values)


def test_confusion_matrix():
    confusion = np.array([[99, 1, 0], [0, 1000, 2], [0, 0, 0]])
    figure = plots.confusion_matrix(confusion, ["a", "b", "a class with a very long name"])
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert bar.get_ylabel() == "share of the true class (%)"
    assert texts(axes) == ["99", "1", "100", "<1"]
    assert axes.get_title() == "99.73 % of 1,102 images correct"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "a class with a …"]
    np.testing.assert_allclose(axes.images[0].get_array()[0], [99, 1, 0])


def test_confusion_matrix_of_many_classes_names_some():
    figure = plots.confusion_matrix(np.eye(90, dtype=int), [str(i) for i in range(90)])
    assert texts(figure.axes[0]) == []
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [str(i) for i in range(0, 90, 3)]


def test_firing_rates_mark_silent_and_saturated_layers():
    figure = plots.firing_rates(RATES)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "mean firing rate (% of neurons that spike in a time step)"
    assert axes.get_ylabel() == "layer, input to output"
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["stage0.encode", "stage0.block0.token", "stage0.block0.channel"]
    assert texts(axes) == ["20.0", "0.04 silent", "97.0 saturated"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([20, 0.04, 97])
    # Input on top.
    assert axes.yaxis_inverted()


def test_raster_has_a_dash_for_each_spike():
    spikes = {
        "stage0.encode.spikes": RNG.random((4, 2, 2, 5)) < 0.3,
        "stage0.block0.token.spikes": np.zeros((4, 2, 2, 5), bool),
        "stage0.block0.channel.spikes": np.ones((4, 1, 1, 1), bool),
    }
    figure = plots.spike_raster(PICTURE, spikes, "true: cat")
    image, raster, rates = figure.axes
    assert image.get_title() == "true: cat"
    assert (image.get_xlabel(), image.get_ylabel()) == ("x (pixels)", "y (pixels)")
    assert (raster.get_xlabel(), raster.get_ylabel()) == ("time step", "layer, input to output")
    assert rates.get_xlabel() == "firing rate (% of all\nneurons and steps)"
    drawn = [len(collection.get_segments()) for collection in raster.collections]
    assert drawn == [spikes[name].sum() for name in spikes]
    assert [bar.get_width() for bar in rates.patches] == pytest.approx([100 * x.mean() for x in spikes.values()])
    steps = raster.get_xticks()
    np.testing.assert_array_equal(steps, [1, 2, 3, 4])
    assert pixels(figure).std() > 0


def test_raster_of_a_deep_network_shows_some_layers_and_neurons():
    spikes = {f"layer{i}": np.ones((12, 8, 8, 3), bool) for i in range(50)}
    _, raster, _ = plots.spike_raster(np.repeat(PICTURE, 3, 2), spikes).axes
    assert len(raster.collections) == 24
    assert {len(collection.get_segments()) for collection in raster.collections} == {12 * 40}
    shown = [t.get_text() for t in raster.get_yticklabels()]
    assert (shown[0], shown[-1]) == ("layer0", "layer49")
    assert "24 of 50 layers" in raster.get_title()


def test_predictions():
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.3, 0.3, 0.4], [1, 0, 0], [0, 1, 0]])
    figure = plots.predictions([PICTURE] * 5, [1, 2, 2, 0, 0], scores, CLASSES)
    pictures, bars = figure.axes[::2], figure.axes[1::2]
    titles = [axes.get_title() for axes in pictures]
    assert titles == [
        "cat\n(correct)",
        "bird\n(wrong, true: dog)",
        "dog\n(correct)",
        "bird\n(correct)",
        "cat\n(wrong, true: bird)",
    ]
    assert {axes.get_xlabel() for axes in bars} == {"score (%)"}
    assert [t.get_text() for t in bars[1].get_yticklabels()] == ["bird", "dog", "cat"]
    assert [bar.get_width() for bar in bars[1].patches] == pytest.approx([50, 30, 20])


def test_class_names_are_never_math():
    names = ["price_$_low_$", "$\\frac{", "a\nb", "\\$"]
    figure = plots.confusion_matrix(np.eye(4, dtype=int), names)
    assert pixels(figure).any()
    scores = np.full((2, 4), 0.25)
    assert pixels(plots.predictions([PICTURE] * 2, [0, 1], scores, names)).any()
    assert plots.plain("price_$_low_$") == r"price_\$_low_\$"
    assert plots.plain("a\n b" + "c" * 9, 5) == "a bc…"


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = plots.write(plots.firing_rates(RATES), tmp_path / "new" / "rates.png")
    first = path.read_bytes()
    assert plots.write(plots.firing_rates({"a": 0.5}), path) == path
    assert path.read_bytes() != first
    assert os.listdir(path.parent) == ["rates.png"]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_plot_workdir(tmp_path, capsys):
    workdir = make_workdir(tmp_path, random_model(depths=(1,)))
    files = plots.plot_workdir(workdir)
    assert [file.name for file in files] == [f"{name}.png" for name in FILES]
    assert sorted(os.listdir(workdir / "plots")) == sorted(file.name for file in files)
    for file in files:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert np.asarray(picture.convert("L")).std() > 0

    # An evaluation of these very weights (step 20) is used, one of other weights is not.
    before = (workdir / "plots" / "confusion_matrix.png").read_bytes()
    confusion = np.full((3, 3), 7).tolist()
    for step, same in ((10, True), (20, False)):
        stored = {"step": step, "confusion": confusion, "firing_rates": {"stage0.encode.spikes": 0.5}}
        (workdir / "evaluation.json").write_text(json.dumps(stored))
        plots.plot_workdir(workdir)
        assert ((workdir / "plots" / "confusion_matrix.png").read_bytes() == before) == same


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "weights" / "config.json").unlink(), r"config\.json"),
        (lambda d: (d / "config.json").unlink(), r"there is no .*config\.json"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (lambda d: (d / "metrics.jsonl").unlink(), "no metrics"),
        (lambda d: (d / "evaluation.json").write_text("{"), r"evaluation\.json"),
        (lambda d: (d / "config.json").write_text('{"data_dir": "/nowhere"}'), "/nowhere"),
    ],
)
def test_damaged_workdir_is_refused(tmp_path, damage, message):
    workdir = make_workdir(tmp_path, random_model(depths=(1,)))
    stored = {"step": 20, "confusion": np.eye(3).tolist(), "firing_rates": {"stage0.encode.spikes": 0.5}}
    (workdir / "evaluation.json").write_text(json.dumps(stored))
    damage(workdir)
    with pytest.raises(InputError, match=message):
        plots.plot_workdir(workdir)
