"""The integer network, made by `quantize`, stored in an artifact, run by every engine. Needs NumPy only.

All of it is defined by three operations on integers, which `reference.py` writes out:

    accumulate      acc = sum of the kernel's rows where there is a spike
    shift(x, s)     x * 2^s: x << s for s >= 0; for s < 0 (x + (1 << (-s - 1))) >> -s, which rounds halves up
    neuron          charge, compare, reset (`charge` below); its leak is an arithmetic right shift, which rounds down

A layer's result is shift(acc, shift) + bias. An integer x stands for x * 2^-fraction of its format.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.topology import Geometry, layers

Observe = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True)
class Format:
    """Number format of the potentials at a place in the network.

    Attributes:
        fraction: bits after the binary point.
        word: 16 or 32 bits; `ranges.check` proves that they suffice for any input.
        threshold: of its neurons, in units of 2^-fraction.
        reset: potential after a spike, likewise; 0 with a soft reset. It is also the potential at the start.
    """

    fraction: int
    word: int
    threshold: int
    reset: int

    @property
    def dtype(self) -> np.dtype:
        """int16 or int32."""
        return np.dtype(f"int{self.word}")


@dataclasses.dataclass(frozen=True)
class Description(Geometry):
    """An integer network without its arrays; all JSON values. Fields up to per_token are as in `ModelConfig`.

    Attributes:
        neuron: "lif" or "if".
        leak: k, where the membrane time constant is 2^k steps; 0 for "if".
        decay_input: as in `ModelConfig`.
        soft_reset: whether a spike subtracts the threshold instead of setting the potential to `reset`.
        bits: of a weight, 2 to 8.
        formats: of the potentials, by place: "stage0" (all sums that the stage's skip connection joins: encoding,
            fuse, channel), "stage0.block0.height", ".width", ".identity" ("plain"), ".hidden", ".project" (per_token:
            what is multiplied by a token's scale) and "head" (logits).
        data: preprocessing of images and class names: the "data" of the weights' config.json, or {}.
    """

    image_size: int
    in_channels: int
    num_classes: int
    patch_size: int
    dim: int
    depths: tuple[int, ...]
    expansion: int
    encoding: str
    time_steps: int
    per_token: bool
    neuron: str
    leak: int
    decay_input: bool
    soft_reset: bool
    bits: int
    formats: dict[str, Format]
    data: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerNet:
    """A network of integers. Calling it runs it through JAX; `reference.run` and `engine.Engine` give the same bits.

    Attributes:
        description: see there.
        arrays: by name, "LAYER.ENTRY". Linear layers are:

            stage0.encode                           fan_in: the patch's bytes (row, column, channel)
            stageI.encode                           "plain": fan_in (row, column, channel) of 2 x 2
            stageI.encode.cells, .edge1, .edge2     "spe": fan_in (row, column, channel) of 3 x 3
            stageI.blockJ.height, .width            fan_in and out: positions along the axis
            stageI.blockJ.fuse, .expand, .project
            head                                    fan_in: channels; its accumulation also runs over all tokens

            and has, with S = 1, or T where each time step has its own (TEBN):

            kernel int8 [S, fan_in, out]; shift int8 [S, out]; bias int32 [S, out]

            stageI.blockJ.identity ("plain") has low, high int32 [S, C]: the potential for no spike and for a spike.

            With per_token, over N = height * width tokens, row by row:

            expand     offset int32 [S, N]; threshold, reset int32 [N]; below, constant bool [N]
                       potential = (0 if constant else shift(acc, shift) + bias) + offset; the neuron fires at or below
                       the threshold where `below`, else at or above it
            project    exponents, signs int8 [N, k]; offset int32 [S, N]
                       z = shift(acc, shift) + bias; potential = sum of signs * shift(z, exponents), + offset;
                       signs are -1, 0 or 1
    """

    description: Description
    arrays: dict[str, np.ndarray]

    def __str__(self) -> str:
        """The network in one line."""
        c = self.description
        narrow = sum(f.word == 16 for f in c.formats.values())
        weights = sum(x.size for name, x in self.arrays.items() if name.endswith(".kernel"))
        return (
            f"{weights:,} weights of {c.bits} bits, {c.time_steps} time steps, 16-bit potentials in {narrow} of "
            f"{len(c.formats)} layers, 32-bit in the others"
        )

    def __call__(self, images, observe: Observe | None = None):
        """Logits of raw pixels as a JAX program.

        Args:
            images: uint8 [B, H, W, C].
            observe: when given, called while tracing with the name of each layer and the spikes that select rows of
                its kernel, int8 [B, T or 1, ..., fan_in]; for the stem once for each of its eight bit planes.

        Returns:
            int32 [T, B, K], in units of 2^-formats["head"].fraction. A class's score is their sum over T.
        """
        import jax.numpy as jnp

        from spiking_mlp_jax.deploy.forward import Integer

        images = jnp.asarray(images)
        check_pixels(self.description, images.shape, images.dtype)
        return Integer(self.arrays, self.description, observe).logits(images)


def check_images(description: Description, images) -> np.ndarray:
    """Raw pixels, uint8 [B, H, W, C], as an array.

    Raises:
        InputError: another shape or type than the network's.
    """
    images = as_array(images, "images")
    check_pixels(description, images.shape, images.dtype)
    return images


def as_array(images, name: str) -> np.ndarray:
    """Images as an array.

    Raises:
        InputError: they have different shapes, or are not numbers.
    """
    try:
        array = np.asarray(images)
    except ValueError as error:
        raise InputError(f"{name} must be one array, got different shapes: resize them first") from error
    if array.dtype.kind in "OSU":
        raise InputError(f"{name} must be an array of numbers, got {type(images).__name__}")
    return array


def is_whole(number) -> bool:
    """Whether a value is a Python or NumPy integer, and not a bool."""
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def check_pixels(c: Description, shape: tuple[int, ...], dtype) -> None:
    """`check_images` for a shape and dtype alone."""
    expected = (c.image_size, c.image_size, c.in_channels)
    if len(shape) != 4 or shape[1:] != expected or not shape[0]:
        raise InputError(f"images must be [batch, {', '.join(map(str, expected))}], got {shape}")
    if dtype != np.uint8:
        raise InputError(f"images must be raw pixels of dtype uint8, got {dtype}")


def array_shapes(c: Description) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """Every array that a description needs: its dtype and shape, with "S" for 1 or T and "k" for any count."""
    found: dict[str, tuple[str, tuple[int | str, ...]]] = {}
    for layer in layers(c):
        name, n = layer.name, layer.positions
        if layer.kind == "identity":
            found |= {f"{name}.{entry}": ("int32", ("S", layer.out)) for entry in ("low", "high")}
            continue
        found[f"{name}.kernel"] = ("int8", ("S", layer.fan_in, layer.out))
        found[f"{name}.shift"] = ("int8", ("S", layer.out))
        found[f"{name}.bias"] = ("int32", ("S", layer.out))
        if name.endswith(".project") and c.per_token:
            # In files, the arrays of both of a block's norms per token come last.
            expand = name.replace("project", "expand")
            found[f"{expand}.offset"] = ("int32", ("S", n))
            found |= {f"{expand}.{entry}": ("int32", (n,)) for entry in ("threshold", "reset")}
            found |= {f"{expand}.{entry}": ("bool", (n,)) for entry in ("below", "constant")}
            found |= {f"{name}.{entry}": ("int8", (n, "k")) for entry in ("exponents", "signs")}
            found[f"{name}.offset"] = ("int32", ("S", n))
    return found


def format_names(c: Description) -> list[str]:
    """The places that have a format, in the order of the network."""
    return list(dict.fromkeys(layer.place for layer in layers(c)))
