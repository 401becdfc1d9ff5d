import numpy as np
import pytest

from notebooks import agreement as ag
from notebooks import network_plots
from spiking_mlp_jax.analysis import samples
from spiking_mlp_jax.analysis.activity.stream import spikes_of_first
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.deploy.quantize import quantize
from spiking_mlp_jax.deploy.reads import observe
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import Pixels, normalize
from tests.support.random_model import make_data, meta_for, random_model

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 16, 16, 1), np.uint8)


@pytest.fixture(scope="module")
def model():
    model = random_model(depths=(2, 1))
    model.pixels = Pixels((0.4,), (0.3,))
    return model


@pytest.mark.parametrize("overrides", [{}, {"encoding": "plain", "norm_features": "channel"}])
def test_folding_keeps_every_spike(model, overrides):
    if overrides:
        model = random_model(depths=(2, 1), **overrides)
    trained, folded = ag.layer_spikes(model, IMAGES), ag.layer_spikes(fold(model), IMAGES)
    assert list(trained) == list(folded)
    found = ag.agreement(trained, folded)
    # Rounding decides where a potential is at the threshold.
    assert min(x.equal for x in found.values()) > 0.999
    assert all(x.chance < x.equal for x in found.values() if 0.01 < x.chance < 0.99)
    # The sums are those that the operation counts are made of.
    counts = observe(model, [IMAGES])[2]
    assert {name: x.sum() for name, x in trained.items()} == {name: counts[name] for name in trained}


def test_integers_fire_nearly_the_same_spikes(model):
    folded = fold(model)
    net = quantize(folded, IMAGES, 8)
    integers = ag.layer_spikes(net, IMAGES)
    counts = observe(net, [IMAGES])[2]
    assert {name: x.sum() for name, x in integers.items()} == {name: counts[name] for name in integers}
    found = ag.agreement(ag.layer_spikes(folded, IMAGES), integers)
    assert 0.9 < found["stage0.encode.spikes"].equal <= 1


def test_agreement_counts_equal_spikes_and_chance():
    a = {"x": np.array([1, 1, 0, 0], bool).reshape(1, 2, 2)}
    b = {"x": np.array([1, 0, 0, 0], bool).reshape(1, 2, 2)}
    assert ag.agreement(a, b) == {"x": ag.Agreement(0.75, 0.5 * 0.25 + 0.5 * 0.75)}
    axes = ag.agreement_figure(ag.agreement(a, b)).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [75, 50]
    assert [text.get_text() for text in axes.texts] == ["75.00"]


@pytest.mark.parametrize("other", [{}, {"x": np.zeros((1, 2, 3), bool)}, {"y": np.zeros((1, 2, 2), bool)}])
def test_spikes_of_other_networks_are_refused(other):
    with pytest.raises(InputError, match="same layers"):
        ag.agreement({"x": np.zeros((1, 2, 2), bool)}, other)


def test_bad_input_is_refused(model):
    with pytest.raises(InputError, match="uint8"):
        ag.layer_spikes(model, IMAGES.astype(np.float32))
    with pytest.raises(InputError, match="no layers"):
        ag.agreement_figure({})
    with pytest.raises(InputError, match="stage must be between 0 and 1, got 2"):
        network_plots.row_folding(model, normalize(IMAGES, (0.4,), (0.3,)), stage=2)
    with pytest.raises(InputError, match="tebn"):
        network_plots.row_folding(random_model(norm="tebn"), np.zeros((1, 16, 16, 1), np.float32))
    with pytest.raises(InputError, match="no encoding"):
        network_plots.pixels_to_scores(IMAGES[0], {}, np.zeros((2, 3)), "abc")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_folded_row_mixing_gives_the_same_potentials(model, stage):
    found = network_plots.row_folding(model, normalize(IMAGES, (0.4,), (0.3,)), stage)
    mixing = model.stages[stage].blocks.token.height
    kernel, mean, var, scale, bias, own = (
        np.asarray(x[...][0])
        for x in (
            mixing.kernel, mixing.norm.mean, mixing.norm.var, mixing.norm.scale, mixing.norm.bias, mixing.bias,
        )
    )  # fmt: skip
    factor = scale / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(found.factor, factor, rtol=1e-4)
    np.testing.assert_allclose(found.offset, (own - mean) * factor + bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.folded, factor[:, None] * kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.after, found.before, rtol=1e-4, atol=1e-4)
    assert found.before.std() > 0
    lines, before, after, same = network_plots.folding_figure(found).axes[:4]
    assert len([line for line in lines.lines if line.get_color() != "black"]) == len(factor)
    np.testing.assert_array_equal(before.images[0].get_array(), kernel)
    np.testing.assert_array_equal(after.images[0].get_array(), found.folded)
    assert same.get_title().startswith("largest difference")


def test_pixels_to_scores_shows_shares_and_running_scores(model):
    logits, spikes = spikes_of_first(model, normalize(IMAGES, (0.4,), (0.3,)))
    figure = network_plots.pixels_to_scores(IMAGES[0], spikes, logits[:, 0], ["a", "b", "c"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "pixels" and "step 2" in titles
    maps = [axes for axes in figure.axes if axes.images and axes.get_title() != "pixels"][:2]
    for t, axes in enumerate(maps):
        expected = 100 * spikes["stage0.encode.spikes"][t].mean(-1)
        np.testing.assert_allclose(axes.images[0].get_array(), expected)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel().startswith("stage")]
    assert labels == [
        "stage0\nencode\n4 x 4 x 6",
        "stage0\nblock1\n4 x 4 x 6",
        "stage1\nencode\n2 x 2 x 12",
        "stage1\nblock0\n2 x 2 x 12",
    ]
    last = next(axes for axes in figure.axes if axes.get_xlabel() == "score after 2 (%)")
    mean = logits[:, 0].mean(0)
    scores = np.sort(np.exp(mean) / np.exp(mean).sum())[::-1]
    assert [bar.get_width() for bar in last.patches] == pytest.approx((100 * scores).tolist(), rel=1e-4)


def test_samples_are_what_the_network_gets(tmp_path):
    model = random_model()
    data = {**meta_for(model)["data"], "mean": [0.25], "std": [0.5]}
    folder = make_data(tmp_path, per_class=4)
    found = samples.take(model.config, data, 3, data_dir=str(folder))
    assert found.raw.shape == (3, 16, 16, 1) and found.raw.dtype == np.uint8
    assert found.labels.tolist() == [0, 1, 2] and found.class_names == ["bird", "cat", "dog"]
    np.testing.assert_allclose(found.normalised, (found.raw / 255 - 0.25) / 0.5, rtol=1e-5, atol=1e-6)
    assert len(samples.take(model.config, data, 99, data_dir=str(folder)).labels) == 12
    with pytest.raises(InputError, match="count must be at least 1, got 0"):
        samples.take(model.config, data, 0, data_dir=str(folder))
