"""The integer network: NumPy reference against JAX, proven ranges against what happens, and hand-made cases."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mlp_jax.deploy import ranges, reference
from spiking_mlp_jax.deploy.network import array_shapes, format_names
from spiking_mlp_jax.errors import InputError
from tests.support.random_integer import random_images, random_integer_net
from tests.support.tiers import rest_slow


@pytest.mark.parametrize("seed", rest_slow(range(6)))
def test_jax_gives_the_reference_bits(seed):
    # The first seeds cover both encodings, both neurons, token and channel constants, kernels of each step.
    fields = [dict(encoding="spe"), dict(encoding="plain"), dict(step_kernels=True), dict(neuron="if")][seed % 4]
    net = random_integer_net(seed, per_token=seed % 3 != 0, depths=(1, 1), **fields)
    images = random_images(net, 2)
    np.testing.assert_array_equal(net(images), reference.run(net, images))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31))
def test_no_value_leaves_its_word(seed):
    """The reference raises where a value does not fit; black, white and random images."""
    net = random_integer_net(seed)
    images = random_images(net, 4, seed)
    images[0], images[1] = 0, 255
    logits = reference.run(net, images)
    low, high = ranges.check(net)["head"]
    assert low <= logits.min() and logits.max() <= high


def test_bounds_are_reached():
    """One output whose weights are all positive spikes everywhere and so reaches its upper bound."""
    net = random_integer_net(0, depths=(1,), encoding="spe", dim=3, per_token=False, time_steps=1, neuron="if")
    arrays = dict(net.arrays)
    for name in arrays:
        entry = name.rsplit(".", 1)[1]
        arrays[name] = np.full_like(arrays[name], {"kernel": 1, "shift": 0, "bias": 1000}[entry])
    formats = {
        place: dataclasses.replace(f, word=32, threshold=1, reset=0) for place, f in net.description.formats.items()
    }
    net = dataclasses.replace(net, arrays=arrays, description=dataclasses.replace(net.description, formats=formats))
    images = random_images(net, 1)
    assert ranges.check(net)["head"][1] == reference.run(net, images).max()


def test_fewer_steps_are_the_first_steps():
    for seed in range(6):
        net = random_integer_net(seed, time_steps=4, step_kernels=seed % 2 == 0)
        images = random_images(net, 2)
        whole = reference.run(net, images)
        for steps in (1, 2, 3):
            np.testing.assert_array_equal(reference.run(net, images, steps), whole[:steps])


def test_a_word_too_small_is_refused():
    net = random_integer_net(3)
    arrays = {**net.arrays, "stage0.encode.bias": np.full_like(net.arrays["stage0.encode.bias"], 2**31 - 1)}
    with pytest.raises(InputError, match=f"potentials at stage0.*{net.description.formats['stage0'].word} bits"):
        ranges.check(dataclasses.replace(net, arrays=arrays))


def test_shift_rounds_halves_up():
    x = np.arange(-9, 10)
    for by in range(-4, 4):
        np.testing.assert_array_equal(reference.shift(x, by), np.floor(x * 2.0**by + (0.5 if by < 0 else 0)))


@pytest.mark.parametrize("leak", [0, 1, 3])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_charge_is_the_neuron_times_its_time_constant(leak, decay_input, soft):
    net = random_integer_net(1, neuron="lif", leak=leak, decay_input=decay_input, soft_reset=soft)
    v, x, reset, tau = 37, -12, 0 if soft else 5, 2**leak
    h = v + (x - (v - reset)) / tau if decay_input else v - (v - reset) / tau + x
    assert reference.charge(net.description, v, x, reset) == h * tau


def test_wrong_images():
    net = random_integer_net(0)
    good = random_images(net, 1)
    for images in (good.astype(np.float32), good[0], good[:0], good[..., :0]):
        for run in (net, lambda x: reference.run(net, x)):
            with pytest.raises(InputError, match="images must be"):
                run(images)


def test_every_array_has_its_place():
    for seed in range(8):
        net = random_integer_net(seed)
        assert set(array_shapes(net.description)) == set(net.arrays)
        assert set(format_names(net.description)) == set(net.description.formats)
