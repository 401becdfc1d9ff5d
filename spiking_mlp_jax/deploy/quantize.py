"""Post-training quantization: a folded network in integers.

What is exact, rounded or approximated, with its error, for weights of `bits` bits:

    weights            rounded to q * 2^-s, s per output channel: at most half of 2^-s, except outliers that are clipped
                       where that lowers the mean squared error over the calibration images
    biases, thresholds rounded to the format's unit u = 2^-fraction: u / 2
    sums of weights    exact; brought to u by a shift that rounds only where s > fraction: u / 2
    leak               a right shift, rounding down: less than u a step (after the comparison, which is exact)
    scale per token    k signed powers of two: at most `scale_error` of it, and u / 2 for each of the k shifts
    pixels             exact: eight bit planes; the normalization is in the stem's weights and bias

Rounding weights also moves a layer's mean output; the bias corrects it for the mean inputs of the calibration images.

References: Nagel et al., "A white paper on neural network quantization", arXiv 2106.08295 (power-of-two ranges, bias
correction); Frantar et al., "GPTQ", arXiv 2210.17323 (rounding that later weights compensate).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiking_mlp_jax.deploy import ranges
from spiking_mlp_jax.deploy.fold import FoldedNet
from spiking_mlp_jax.deploy.network import Description, Format, IntegerNet, as_array, format_names, is_whole
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.topology import layers
from spiking_mlp_jax.utils.settings import usual_settings

BATCH = 32
LARGEST_PIXEL = 1e6
# Bits after the binary point: tried first in 16 bits, least in 16 bits, tried first in 32 bits.
MOST_16, LEAST_16, MOST_32 = 12, 8, 16


@usual_settings()
def quantize(
    folded: FoldedNet,
    calibration_images: np.ndarray,
    bits: int = 8,
    *,
    scale_error: float = 2.0**-8,
    data: dict[str, Any] | None = None,
) -> IntegerNet:
    """Post-training quantization of a folded network.

    Args:
        folded: from `fold`; its mean and std must be those that its inputs are normalized with.
        calibration_images: typical images [N, H, W, C], raw (uint8) or normalized (floating).
        bits: of each weight, 2 to 8.
        scale_error: largest relative error of a token's scale (`norm_features="token"`), which sets its number of
            powers of two.
        data: preprocessing and class names, as in a weights folder's config.json; by default those of the network.

    Returns:
        the network, proven not to overflow for any image.

    Raises:
        InputError: neurons that need multiplications (a time constant that is not a power of two, "plif"), images of
            another shape or not finite, bits out of range, or weights too large for 32 bits.

    Examples:
        >>> from flax import nnx
        >>> from spiking_mlp_jax import ModelConfig, SpikingMLP
        >>> from spiking_mlp_jax.deploy import fold, reference
        >>> config = ModelConfig(image_size=8, in_channels=1, num_classes=3, patch_size=4, dim=3, depths=(1,))
        >>> images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
        >>> net = quantize(fold.fold(SpikingMLP(config, rngs=nnx.Rngs(0))), images, bits=4)
        >>> net.arrays["head.kernel"].dtype, int(abs(net.arrays["head.kernel"]).max())
        (dtype('int8'), 7)
        >>> reference.run(net, images).shape
        (4, 4, 3)
    """
    if not isinstance(folded, FoldedNet):
        raise InputError(f"quantize takes a folded network, fold(model), got a {type(folded).__name__}")
    c = folded.config
    if not is_whole(bits) or not 2 <= bits <= 8:
        raise InputError(f"bits must be a whole number from 2 to 8, got {bits!r}")
    bits = int(bits)
    if not 0 < scale_error < 1:
        raise InputError(f"scale_error must be between 0 and 1, got {scale_error}")
    leak = _leak(c)
    statistics = _statistics(folded, calibration_images)
    arrays = {name: {key: np.asarray(x) for key, x in entries.items()} for name, entries in folded.arrays.items()}
    for name, entries in arrays.items():
        for key, x in entries.items():
            if not np.all(np.isfinite(x)):
                raise InputError(f"{key} of {name} has NaN or inf; retrain the network")
    _fold_pixels(arrays["stage0.encode"], folded)
    rounded = {name: round_weights(x["kernel"], statistics[name], bits) for name, x in arrays.items() if "kernel" in x}
    for name, (kernel, shift) in rounded.items():
        lost = arrays[name]["kernel"] - kernel * 2.0 ** -shift[:, None]
        arrays[name]["bias"] = arrays[name]["bias"] + np.einsum("sio,si->so", lost, statistics[name].mean)
    common = {name: getattr(c, name) for name in Description.__dataclass_fields__ if hasattr(c, name)}
    soft_reset = c.v_reset is None
    if data is None:
        data = folded.pixels.to_data(c.num_classes) if folded.pixels else {}
    description = Description(**common, leak=leak, soft_reset=soft_reset, bits=bits, formats={}, data=data)
    return _fit(description, arrays, rounded, c, scale_error)


@dataclasses.dataclass
class _Inputs:
    """What a layer saw on the calibration images: mean [S, fan_in] and second moments [fan_in, fan_in]."""

    mean: np.ndarray
    moments: np.ndarray


def _leak(c) -> int:
    if c.neuron == "if":
        return 0
    if c.neuron == "plif":
        raise InputError(
            'neuron="plif" learns its time constants, which multiply unless they are powers of two: train with '
            'neuron="lif" and tau=2'
        )
    leak = round(math.log2(c.tau))
    if 2.0**leak != c.tau:
        raise InputError(f"a leak with tau={c.tau} multiplies; only powers of two are shifts: train with tau=2")
    return leak


def _statistics(folded: FoldedNet, images) -> dict[str, _Inputs]:
    images, c = as_array(images, "calibration images"), folded.config
    if images.ndim != 4 or images.shape[1:] != (c.image_size, c.image_size, c.in_channels) or not len(images):
        raise InputError(
            f"calibration images must be [count, {c.image_size}, {c.image_size}, {c.in_channels}], got {images.shape}"
        )
    raw = images.dtype == np.uint8
    if not raw and not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"calibration images must be raw uint8 or normalized floating pixels, not {images.dtype}")
    if not raw and not np.all(np.abs(images) <= LARGEST_PIXEL):
        raise InputError(
            f"calibration images hold NaN, infinity or pixels beyond {LARGEST_PIXEL:g}: give normalized pixels, or raw "
            "uint8 ones"
        )

    @jax.jit
    def sums(folded, images):
        seen: dict[str, tuple[Any, Any]] = {}

        def observe(name, x):
            steps = folded.arrays[name]["kernel"].shape[0]
            wide = x.astype(float)
            kept = tuple(range(1, x.ndim - 1)) if steps == 1 else tuple(range(2, x.ndim - 1))
            mean = jnp.sum(jnp.mean(wide, kept), 0)
            flat = wide.reshape(-1, x.shape[-1])
            share = x.shape[0] / flat.shape[0]
            seen[name] = mean.reshape(-1, x.shape[-1]), share * flat.T @ flat

        folded(images, observe)
        return seen

    total: dict[str, Any] = {}
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        inputs = normalize(batch, folded.mean, folded.std) if raw else batch
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), sums(folded, jnp.asarray(inputs)))
        total = jax.tree.map(np.add, total, found) if total else found
    statistics = {}
    for name, (mean, moments) in total.items():
        steps = folded.arrays[name]["kernel"].shape[0]
        mean = np.broadcast_to(mean / len(images), (steps, mean.shape[-1]))
        statistics[name] = _Inputs(mean, moments / len(images))
    return statistics


def _fold_pixels(entries, folded: FoldedNet) -> None:
    """Fold the normalization (p / 255 - mean) / std into the stem, which then takes raw bytes p."""
    kernel = entries["kernel"].astype(np.float64)
    inputs = kernel.shape[1] // len(folded.std)
    std, mean = np.tile(folded.std, inputs), np.tile(folded.mean, inputs)
    entries["bias"] = entries["bias"] - np.einsum("sio,i->so", kernel, mean / std)
    entries["kernel"] = kernel / (255 * std)[:, None]


def round_weights(kernel: np.ndarray, inputs: _Inputs, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Integer weights [S, fan_in, out] and the shift [S, out] with kernel ~ weights * 2^-shift.

    Each output's shift is the finest that holds its largest weight, or one finer, which clips, where that has the
    smaller error. Inputs are rounded in order; later weights compensate the error of earlier ones, as far as their
    inputs spike together (GPTQ).
    """
    most = (1 << (bits - 1)) - 1
    fan_in = kernel.shape[1]
    # The bias corrects the mean.
    centred = _positive(inputs.moments - np.outer(inputs.mean.mean(0), inputs.mean.mean(0)))
    # Silent inputs get a small weight: other images may use them.
    centred += np.eye(fan_in) * max(0.01 * np.trace(centred) / fan_in, 1e-6 * np.trace(inputs.moments) / fan_in, 1e-11)
    # Rows of the upper factor of the inverse: how a weight's error is shared among the later ones.
    spread = np.linalg.cholesky(np.linalg.inv(centred)).T
    found = []
    for each in kernel.astype(np.float64):
        # For outputs near zero any scale will do; 1e-5 is for weights already on a grid, up to rounding.
        exponent = np.floor(np.log2(most / np.maximum(np.abs(each).max(0), 2.0**-24)) + 1e-5)
        options = []
        for shift in (exponent, exponent + 1):
            q = _round_in_turn(each * 2.0**shift, spread, most)
            lost = each - q * 2.0**-shift
            options.append((np.sum(lost * (centred @ lost), 0), q, shift))
        better = options[1][0] < options[0][0]
        found.append(tuple(np.where(better, b, a) for a, b in zip(options[0][1:], options[1][1:], strict=True)))
    kernels, shifts = zip(*found, strict=True)
    return np.stack(kernels), np.stack(shifts).astype(np.int64)


def _positive(centred: np.ndarray) -> np.ndarray:
    """The nearest positive semidefinite covariance: for nearly constant inputs, float32 sums may not be one."""
    centred = (centred + centred.T) / 2
    try:
        np.linalg.cholesky(centred + np.eye(len(centred)) * max(0.005 * np.trace(centred) / len(centred), 0))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(centred)
        centred = vectors * np.maximum(values, 0) @ vectors.T
    return centred


def _round_in_turn(weights, spread, most, block=64):
    """Round rows of weights [fan_in, out] in order; later rows are updated once per block."""
    rest, rounded = weights.copy(), np.zeros_like(weights)
    for start in range(0, len(weights), block):
        end = min(start + block, len(weights))
        errors = np.zeros((end - start, weights.shape[1]))
        for i in range(start, end):
            rounded[i] = np.clip(np.rint(rest[i]), -most, most)
            errors[i - start] = (rest[i] - rounded[i]) / spread[i, i]
            rest[i:end] -= np.outer(spread[i, i:end], errors[i - start])
        rest[end:] -= spread[start:end, end:].T @ errors
    return rounded


def signed_digits(scale: np.ndarray, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Each scale as a sum of signed powers of two, as few as the relative error allows.

    Returns:
        exponents, signs, int64 [N, k]: scale ~ sum of signs * 2^exponents; signs are 0 where fewer terms suffice.

    Examples:
        0.75 is 1 - 1/4, and 2 needs one term.

        >>> exponents, signs = signed_digits(np.array([0.75, 2.0]), 2.0**-8)
        >>> exponents.tolist(), signs.tolist()
        ([[0, -2], [1, 0]], [[1, -1], [1, 0]])
    """
    rest, exponents, signs = scale.astype(np.float64).copy(), [], []
    while True:
        open_ = np.abs(rest) > error * np.abs(scale)
        if not open_.any():
            break
        # The power of two nearest to the rest: boundaries lie at 3/4 of the next one.
        with np.errstate(divide="ignore"):
            exponent = np.where(open_, np.floor(np.log2(np.abs(rest) * 4 / 3)), 0)
        sign = np.where(open_, np.sign(rest), 0)
        rest = rest - sign * 2.0**exponent
        exponents.append(exponent)
        signs.append(sign)
    if not exponents:
        exponents, signs = [np.zeros_like(rest)], [np.zeros_like(rest)]
    return np.stack(exponents, -1).astype(np.int64), np.stack(signs, -1).astype(np.int64)


def _fit(description: Description, arrays, rounded, config, scale_error) -> IntegerNet:
    """Choose the formats: 16 bits where the range analysis proves that they suffice, else 32."""
    places = format_names(description)
    words = {place: 32 if place == "head" else 16 for place in places}
    fractions = {place: MOST_32 if words[place] == 32 else MOST_16 for place in places}
    while True:
        net = _at(description, arrays, rounded, config, scale_error, words, fractions)
        found = ranges.extremes(net.description, net.arrays)
        excess = {place: ranges.bits(*found[place]) - words[place] for place in places}
        over = [place for place in places if excess[place] > 0]
        if not over:
            return _stored(net)
        for place in over:
            fractions[place] -= excess[place]
            if words[place] == 16 and fractions[place] < LEAST_16:
                words[place], fractions[place] = 32, MOST_32
            elif fractions[place] < 0:
                raise InputError(
                    f"potentials at {place} can be 2^{-fractions[place]} times too large for 32 bits: the network's "
                    "weights are too large, or a norm's variance is nearly zero"
                )


def _stored(net: IntegerNet) -> IntegerNet:
    """The network in the types of a file."""

    def in_word(value, word):
        # Where no neuron compares with it, a format's threshold is not part of the range analysis.
        return int(np.clip(value, -(1 << (word - 1)), (1 << (word - 1)) - 1))

    formats = {
        place: Format(f.fraction, f.word, in_word(f.threshold, f.word), in_word(f.reset, f.word))
        for place, f in net.description.formats.items()
    }
    arrays = {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in net.arrays.items()}
    return IntegerNet(dataclasses.replace(net.description, formats=formats), arrays)


def _at(description, arrays, rounded, config, scale_error, words, fractions) -> IntegerNet:
    """The network with given words and fractions, which may overflow."""
    unit = {place: 2.0**fraction for place, fraction in fractions.items()}
    integers: dict[str, np.ndarray] = {}

    def scaled(value, place):
        # In 64 bits, so that the range analysis finds what exceeds 32.
        return np.clip(np.rint(np.asarray(value, np.float64) * unit[place]), -(2.0**40), 2.0**40).astype(np.int64)

    for layer in layers(config):
        name, place, entries = layer.name, layer.place, arrays[layer.name]
        if layer.kind == "identity":
            integers |= {f"{name}.{key}": scaled(entries[key], place) for key in ("low", "high")}
            continue
        kernel, shift = rounded[name]
        integers[f"{name}.kernel"] = kernel.astype(np.int8)
        # A sum whose bits are all shifted out is zero in either case.
        integers[f"{name}.shift"] = np.clip(fractions[place] - shift, -(words[place] - 2), 30).astype(np.int8)
        integers[f"{name}.bias"] = scaled(entries["bias"], place)
        if "threshold" in entries:
            integers |= _hidden(name, place, entries, integers, config, fractions[place], scaled)
        if "scale" in entries:
            stage = layer.stage
            exponents, signs = signed_digits(entries["scale"], scale_error)
            exponents = exponents + fractions[stage] - fractions[place]
            integers[f"{name}.exponents"] = np.clip(exponents, -(words[place] - 2), 30).astype(np.int8)
            integers[f"{name}.signs"] = signs.astype(np.int8)
            integers[f"{name}.offset"] = scaled(entries["offset"], stage)
    threshold, reset = config.v_threshold, config.v_reset or 0.0
    formats = {
        place: Format(fractions[place], words[place], int(scaled(threshold, place)), int(scaled(reset, place)))
        for place in fractions
    }
    return IntegerNet(dataclasses.replace(description, formats=formats), integers)


def _hidden(name, place, entries, integers, config, fraction, scaled):
    """Thresholds per token; a token whose weights cannot move its neurons by half a unit becomes constant."""
    kernel, shift = integers[f"{name}.kernel"].astype(np.float64), integers[f"{name}.shift"].astype(np.float64)
    reach = (np.abs(kernel).sum(1) * 2.0 ** (shift - fraction)).max() + np.abs(entries["bias"]).max()
    scale = np.where(entries["constant"], 0, config.v_threshold / entries["threshold"])
    constant = entries["constant"] | (np.abs(scale) * reach < 2.0 ** -(fraction + 1))
    plain = constant & ~entries["constant"]
    values = {
        "offset": np.where(plain, entries["offset"] * scale, entries["offset"]),
        "threshold": np.where(plain, config.v_threshold, entries["threshold"]),
        "reset": np.where(plain, config.v_reset or 0.0, entries["reset"]),
    }
    found = {f"{name}.{key}": scaled(value, place) for key, value in values.items()}
    return found | {f"{name}.below": entries["below"] & ~constant, f"{name}.constant": constant}
