"""Integer networks with random geometry, neurons and numbers, whose words `ranges` has proven to be enough."""

import dataclasses

import numpy as np

from spiking_mlp_jax.deploy import ranges
from spiking_mlp_jax.deploy.network import Description, Format, IntegerNet, array_shapes, format_names


def random_integer_net(seed: int, **fields) -> IntegerNet:
    """A network drawn from the seed; `fields` fixes some of the description's, and `step_kernels` TEBN's T kernels."""
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    encoding = fields.get("encoding", pick("spe", "plain"))
    depths = fields.get("depths", pick((1,), (2,), (1, 1), (1, 2), (1, 1, 1)))
    patch = fields.get("patch_size", pick(1, 2, 3, 4))
    neuron = fields.get("neuron", pick("lif", "lif", "if"))
    chosen = dict(
        image_size=patch * 2 ** (len(depths) - 1) * pick(1, 2, 3),
        in_channels=pick(1, 3),
        num_classes=pick(1, 3, 10),
        patch_size=patch,
        dim=3 * pick(1, 2, 5, 11) if encoding == "spe" else pick(1, 4, 7, 16, 33),
        depths=depths,
        expansion=pick(1, 2, 3),
        encoding=encoding,
        time_steps=pick(1, 2, 4, 6),
        per_token=pick(True, False),
        neuron=neuron,
        leak=0 if neuron == "if" else pick(1, 1, 1, 2, 0),
        decay_input=pick(True, True, False),
        soft_reset=pick(False, False, True),
        bits=pick(8, 4, 2),
        formats={},
        data={},
    )
    step_kernels = fields.pop("step_kernels", bool(rng.integers(4) == 0))
    c = Description(**{**chosen, **fields})
    formats = {}
    for place in format_names(c):
        fraction = int(rng.integers(4, 9))
        reset = 0 if c.soft_reset else pick(0, 0, int(rng.integers(-20, 8)))
        formats[place] = Format(fraction, 32, 1 << fraction, reset)
    c = dataclasses.replace(c, formats=formats)
    sizes = {"S": c.time_steps if step_kernels else 1, "k": int(rng.integers(1, 4))}
    arrays = {}
    for name, (dtype, shape) in array_shapes(c).items():
        shape = tuple(sizes.get(n, n) for n in shape)
        arrays[name] = _values(rng, c, name.split(".")[-1], shape).astype(dtype)
    for place, (low, high) in ranges.extremes(c, arrays).items():
        word = ranges.bits(low, high)
        assert word <= 32, (place, low, high)
        formats[place] = dataclasses.replace(formats[place], word=16 if word <= 16 and place != "head" else 32)
    net = IntegerNet(dataclasses.replace(c, formats=formats), arrays)
    ranges.check(net)
    return net


def _values(rng, c, entry, shape):
    limit = (1 << (c.bits - 1)) - 1
    if entry == "kernel":
        # A part of the outputs gets no weights at all.
        return rng.integers(-limit, limit + 1, shape) * (rng.random(shape[-1]) < 0.9)
    if entry == "shift":
        return rng.integers(-3, 4, shape)
    if entry == "exponents":
        return rng.integers(-4, 3, shape)
    if entry == "signs":
        return rng.integers(-1, 2, shape)
    if entry in ("below", "constant"):
        return rng.random(shape) < 0.3
    if entry == "threshold":
        return rng.integers(-300, 600, shape)
    return rng.integers(-150, 250, shape)


def random_images(net: IntegerNet, count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, H, W, C]."""
    c = net.description
    return np.random.default_rng(seed).integers(
        0, 256, (count, c.image_size, c.image_size, c.in_channels), dtype=np.uint8
    )
