import json

import numpy as np
import pytest

from notebooks.compare_plots import Ran, compare_runs, formats_figure, layer_rates, synaptic_operations
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.topology import dense_operations, fan_out, neuron_counts
from tests.support.random_model import make_workdir, random_model


def finished(folder, rate, accuracy, **overrides):
    model = random_model(**overrides)
    workdir = make_workdir(folder, model)
    rates = dict.fromkeys(neuron_counts(model.config), rate)
    (workdir / "evaluation.json").write_text(json.dumps({"accuracy": accuracy, "firing_rates": rates}))
    return workdir, model.config


def test_synaptic_operations_follow_from_the_rates(tmp_path):
    workdir, config = finished(tmp_path, 0.25, 0.5)
    assert synaptic_operations(workdir) == pytest.approx(0.25 * dense_operations(config))
    assert list(layer_rates(workdir)) == list(neuron_counts(config))
    rates = {"stage0.encode.spikes": 0.5}
    (workdir / "evaluation.json").write_text(json.dumps({"accuracy": 0.5, "firing_rates": rates}))
    expected = 2 * 0.5 * neuron_counts(config)["stage0.encode.spikes"] * fan_out(config)["stage0.encode.spikes"]
    assert synaptic_operations(workdir) == pytest.approx(expected)


def test_runs_are_compared(tmp_path):
    one, _ = finished(tmp_path / "one", 0.1, 0.5, time_steps=1)
    two, _ = finished(tmp_path / "two", 0.1, 0.625)
    left, right = compare_runs({"T = 1": one, "T = 2": two}).axes
    assert [line.get_label() for line in left.lines] == ["T = 1", "T = 2"]
    # The running mean of a straight line is the line, but for the ends.
    expected = 2 - np.arange(1, 21) / 20
    expected[[0, -1]] = 1.925, 1.025
    np.testing.assert_allclose(left.lines[0].get_ydata(), expected)
    points = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in right.lines[:2]]
    assert [y for _, y in points] == [50, 62.5]
    assert points[1][0] == pytest.approx(2 * points[0][0])
    assert [text.get_text() for text in right.texts] == ["T = 1", "T = 2"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(InputError, match="no runs"):
        compare_runs({})
    workdir, _ = finished(tmp_path, 0.1, 0.5)
    (workdir / "evaluation.json").unlink()
    with pytest.raises(InputError, match="finished run"):
        compare_runs({"a": workdir})


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def test_bars_show_size_accuracy_and_agreement(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file.bin"
    folder.mkdir()
    (folder / "a").write_bytes(bytes(3000))
    (folder / "b").write_bytes(bytes(1000))
    file.write_bytes(bytes(2500))
    first = np.eye(4, 3)
    other = first.copy()
    other[1] = [0, 0, 0.25]
    figure = formats_figure({"one": Ran(folder, first), "two": Ran(file, other)}, np.array([0, 1, 1, 0]))
    size, right, same, difference = figure.axes
    assert widths(size) == [4.0, 2.5]
    assert widths(right) == [75, 50]
    assert widths(same) == [100, 75]
    assert widths(difference) == [0, 1]
    assert [label.get_text() for label in size.get_yticklabels()] == ["one", "two"]


def test_formats_that_cannot_be_compared(tmp_path):
    with pytest.raises(InputError, match="no formats"):
        formats_figure({}, np.zeros(0, int))
    ran = {"one": Ran(tmp_path, np.zeros((2, 3))), "two": Ran(tmp_path, np.zeros((2, 4)))}
    with pytest.raises(InputError, match=r'"two" answered \(2, 4\) for 2 images, the first \(2, 3\)'):
        formats_figure(ran, np.zeros(2, int))
    with pytest.raises(InputError, match=r'"one" answered .* for 5 images'):
        formats_figure({"one": ran["one"]}, np.zeros(5, int))
