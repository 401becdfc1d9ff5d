import json

import numpy as np
import pytest

from spiking_mlp_jax.analysis.compare_plots import compare_runs, layer_rates, synaptic_operations
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
    np.testing.assert_allclose(left.lines[0].get_ydata(), 2 - np.arange(1, 21) / 20)
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
