"""The study of a network's receptive fields, with its controls; finished parts are stored, so that it can resume.

For the trained network and an untrained one: input gradients, responses to white noise, responses to images. A Gabor is
then fitted to every field, to the same field with its pixels shuffled within each token's patch, and to the field of
the shifted spikes. `summary` turns the result into JSON and tables, `plots` into figures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from flax import nnx

from spiking_mlp_jax.analysis.fields.controls import main_colour, shuffled_pixels, untrained_network
from spiking_mlp_jax.analysis.fields.effective import effective_field
from spiking_mlp_jax.analysis.fields.gabor import SMALLEST, fit_gabor
from spiking_mlp_jax.analysis.fields.mixing import mixing_weights, separable_fields
from spiking_mlp_jax.analysis.fields.responses import (
    Units,
    choose_units,
    default_layers,
    natural_images,
    record_spikes,
    white_noise,
    window,
)
from spiking_mlp_jax.analysis.fields.spike_triggered import (
    Moments,
    average,
    covariance,
    linear_fields,
    significance,
    span,
)
from spiking_mlp_jax.data.sources import Source
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.utils.files import write_whole
from spiking_mlp_jax.utils.settings import usual_settings

Arrays = dict[str, np.ndarray]


def stored(file: Path, fingerprint: str, compute: Callable[[], Arrays]) -> Arrays:
    """Arrays from an NPZ file; computed and written if it is missing, corrupt or of another fingerprint.

    Raises:
        InputError: the file cannot be written; StorageError if the disk is full.
    """
    try:
        # np.load leaves a file that is no archive open.
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as found:
            if str(found["fingerprint"]) == fingerprint:
                return {key: found[key] for key in found.files if key != "fingerprint"}
    except (OSError, KeyError, ValueError, EOFError, BadZipFile):
        pass
    arrays = compute()
    stream = io.BytesIO()
    content: dict[str, Any] = {"fingerprint": np.array(fingerprint), **arrays}
    np.savez_compressed(stream, **content)
    write_whole(file, stream.getvalue())
    return arrays


def fingerprint(model: SpikingMLP, *others: Any) -> str:
    """A hash of a network's variables and of other JSON values or dataclasses."""
    digest = hashlib.sha256()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        digest.update(".".join(map(str, path)).encode())
        digest.update(np.asarray(variable[...]).tobytes())
    values = [
        dataclasses.asdict(other) if dataclasses.is_dataclass(other) and not isinstance(other, type) else other
        for other in others
    ]
    digest.update(json.dumps([dataclasses.asdict(model.config), *values], sort_keys=True).encode())
    return digest.hexdigest()


NETWORKS = ("trained", "untrained")
KINDS = ("noise", "images", "gradient")  # spike-triggered average, the same with a ridge, mean gradient
CONTROLS = ("field", "pixels", "spikes")  # the field itself, its pixels shuffled within patches, shifted spikes
FIT_COLUMNS = ("row", "column", "orientation", "frequency", "phase", "sigma_x", "sigma_y", "amplitude", "explained")
GRADIENT_BATCH = 32
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        layers: of spikes; () for the output of each stage.
        channels: number of channels of each layer, evenly spaced.
        noise: number of white-noise images; 0 for ten times `images`.
        images: number of natural images; a fifth is held out to choose the ridges.
        gradients: number of natural images to average gradients over.
        covariances: number of channels of each layer with a spike-triggered covariance.
        shifts: number of shifted copies of the spikes, the control.
        least: minimum number of spikes; units with fewer are skipped.
        contrast: standard deviation of the noise in normalised pixels.
        kind: of noise, "gaussian" or "binary".
        seed: of all random numbers.
        batch_size: images at a time; 0 for 256, and fewer above 32 px.
    """

    layers: tuple[str, ...] = ()
    channels: int = 24
    noise: int = 0
    images: int = 2_000
    gradients: int = 64
    covariances: int = 4
    shifts: int = 9
    least: int = 100
    contrast: float = 1.0
    kind: str = "gaussian"
    seed: int = 0
    batch_size: int = 0

    def of(self, config: ModelConfig) -> Settings:
        """The settings with the numbers that 0 stands for."""
        batch_size = self.batch_size or max(8, min(256, 256 * 32**2 // config.image_size**2))
        return dataclasses.replace(self, noise=self.noise or 10 * self.images, batch_size=batch_size)


def _chosen_units(config: ModelConfig, source: Source, settings: Settings) -> list[Units]:
    layers = settings.layers or default_layers(config)
    groups = [choose_units(config, layer, channels=settings.channels) for layer in layers]
    for group in groups:
        if not group.layer.endswith(".spikes"):
            raise InputError(f"{group.layer} is not a layer of spikes: use one whose name ends in .spikes")
    if min(settings.images, len(source)) < 10:
        raise InputError(f"the study needs at least 10 images, got {min(settings.images, len(source))}")
    return groups


@usual_settings()
def estimate(model: SpikingMLP, source: Source, settings: Settings) -> float:
    """Seconds that `study` will take, from a batch of each measurement and a few fits on this machine.

    Args:
        model: the trained network.
        source: as for `study`.
        settings: as for `study`.

    Raises:
        InputError: no such layer, or too few images.
    """
    config, settings = model.config, settings.of(model.config)
    groups = _chosen_units(config, source, settings)
    noise = next(white_noise(config, settings.batch_size, seed=settings.seed, batch_size=settings.batch_size))
    times: list[float] = []

    def timed(batch):
        for _ in range(2):  # the first compiles
            times.append(time.perf_counter())
            yield batch
        times.append(time.perf_counter())

    for _ in record_spikes(model, groups, timed(noise)):
        pass
    small = noise[: min(GRADIENT_BATCH, settings.gradients)]
    effective_field(model, _potentials(groups[0]), timed(small))
    per_image = (times[2] - times[1]) / len(noise)
    per_gradient = (times[5] - times[4]) / len(small)
    started = time.perf_counter()
    for image in noise[:2]:
        _fit(main_colour(image)[0])
    per_fit = (time.perf_counter() - started) / len(noise[:2])
    units = sum(len(group.channels) for group in groups)
    gradients = settings.gradients * len(groups) * per_gradient
    fits = (8 + 3) * units * per_fit  # with the controls of the trained network, see `_gabors`
    return len(NETWORKS) * ((settings.noise + settings.images) * per_image + gradients) + fits


def _potentials(group: Units) -> Units:
    # Gradients of potentials, not of spikes: one surrogate less between the unit and the pixels.
    return dataclasses.replace(group, layer=group.layer.removesuffix(".spikes") + ".potential")


@usual_settings()
def study(
    model: SpikingMLP,
    data: dict[str, Any],
    source: Source,
    settings: Settings,
    folder: Path,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Arrays]:
    """Measures everything that is not stored yet.

    Args:
        model: the trained network.
        data: the weights' "data".
        source: natural images, such as the test split.
        settings: what to measure.
        folder: of the NPZ files of finished parts, from which an interrupted study resumes; parts of other weights or
            settings are measured again.
        progress: called with a description, the number done and the total.

    Returns:
        parts: "mixing", "trained/noise", "untrained/gradient", ..., each a dict of arrays whose names end in the layer.

    Raises:
        InputError: no such layer, too few images, or the folder cannot be written.
    """
    config, settings = model.config, settings.of(model.config)
    groups = _chosen_units(config, source, settings)

    def images(count, offset=0, batch_size=settings.batch_size):
        return natural_images(source, config, data, count, seed=settings.seed + offset, batch_size=batch_size)

    # A few images identify the data: another data set may have as many.
    some = [batch.tolist() for batch in images(16, 2, 16)]
    key = fingerprint(model, data, settings, [group.layer for group in groups], len(source), some)

    def kept(name, compute):
        return stored(folder / f"{name}.npz", key, compute)

    fresh: list[SpikingMLP] = []

    def network(name):
        if name == "trained":
            return model
        if not fresh:  # built when first needed; a resumed study may not need it
            shown = images(min(4 * settings.batch_size, len(source)), 1)
            fresh.append(untrained_network(config, shown, seed=settings.seed))
        return fresh[0]

    parts = {"mixing": kept("mixing", lambda: _mixing(model, network("untrained"), settings, progress))}
    for name in NETWORKS:
        measures = {
            "gradient": lambda n: _gradients(network(n), groups, images, settings, f"{n}: gradients", progress),
            "noise": lambda n: _noise(network(n), groups, settings, f"{n}: white noise", progress),
            "images": lambda n: _images(network(n), groups, images, settings, f"{n}: images", progress),
        }
        for measure, compute in measures.items():
            parts[f"{name}/{measure}"] = kept(f"{name}.{measure}", lambda n=name, f=compute: f(n))
    for name in NETWORKS:
        for measure in KINDS:
            fields = parts[f"{name}/{measure}"]
            what = f"{name}: Gabors, {measure}"
            parts[f"{name}/{measure}/gabors"] = kept(
                f"{name}.{measure}.gabors",
                lambda f=fields, w=what, c=name == "trained": _gabors(f, groups, settings.seed, c, w, progress),
            )
    return parts


def _gradients(model, groups, images, settings, what, progress) -> Arrays:
    found: Arrays = {}
    for i, group in enumerate(groups):

        def batches(i=i):
            done = i * settings.gradients
            for batch in images(settings.gradients, batch_size=min(GRADIENT_BATCH, settings.batch_size)):
                progress(what, done, len(groups) * settings.gradients)
                yield batch
                done += len(batch)

        result = effective_field(model, _potentials(group), batches())
        found[f"field {group.layer}"] = result.signed
        found[f"map {group.layer}"] = result.map()
        found[f"maps {group.layer}"] = result.energy.sum(-1)
    progress(what, len(groups) * settings.gradients, len(groups) * settings.gradients)
    return found


def _noise(model, groups, settings, what, progress) -> Arrays:
    shape = (model.config.image_size, model.config.image_size, model.config.in_channels)
    sums = [Moments(int(np.prod(shape)), len(group.channels), shifts=settings.shifts) for group in groups]
    windows = _Windows(groups, model.config, settings)
    noise = white_noise(
        model.config, settings.noise, seed=settings.seed, batch_size=settings.batch_size, std=settings.contrast,
        kind=settings.kind,
    )  # fmt: skip
    for images, counts in record_spikes(model, groups, noise):
        for moments, answers in zip(sums, counts, strict=True):
            moments.add(images, answers)
        windows.add(images, counts)
        progress(what, sums[0].stimuli, settings.noise)
    found: Arrays = {}
    for group, moments in zip(groups, sums, strict=True):
        units = range(len(group.channels))
        enough = moments.c.min(0) >= settings.least
        fields, control = (np.full((len(units), *shape), np.nan) for _ in range(2))
        signal, p = (np.full(len(units), np.nan) for _ in range(2))
        for unit in np.flatnonzero(enough).tolist():
            fields[unit] = average(moments, unit).reshape(shape)
            control[unit] = average(moments, unit, shift=1).reshape(shape)
            above = significance(moments, unit)
            signal[unit], p[unit] = above.signal, above.p
        found |= {
            f"spikes {group.layer}": moments.c[0],
            f"field {group.layer}": fields,
            f"control {group.layer}": control,
            f"signal {group.layer}": signal,
            f"p {group.layer}": p,
        }
    return found | windows.found(keep=1.0)


def _images(model, groups, images, settings, what, progress) -> Arrays:
    shape = (model.config.image_size, model.config.image_size, model.config.in_channels)
    units = sum(len(group.channels) for group in groups)
    pixels = int(np.prod(shape))
    windows = _Windows(groups, model.config, settings)

    def batches():
        done = 0
        for seen, counts in record_spikes(model, groups, images(settings.images)):
            windows.add(seen, counts)
            done += len(seen)
            progress(what, done, settings.images)
            yield np.asarray(seen).reshape(len(seen), pixels), np.concatenate(counts, 1)

    pairs, size, basis = batches(), pixels, None
    if settings.images < pixels:
        # Their span has fewer dimensions than the pixels: at 64 x 64 x 3 a covariance of pixels would take 1.2 GB.
        shown, answered = zip(*pairs, strict=True)
        gram = np.block([[one.astype(np.float64) @ other.T for other in shown] for one in shown])
        basis = span(gram)
        size, ends = basis.shape[1], np.cumsum([len(one) for one in shown])[:-1]
        pairs = zip(np.split(gram @ basis, ends), answered, strict=True)
    # All layers at once, so that the images' covariance is summed and decomposed once.
    fit, held = (Moments(size, units, shifts=settings.shifts, prior=True) for _ in range(2))
    for seen, answers in pairs:
        cut = len(seen) - max(1, len(seen) // 5)
        if cut:
            fit.add(seen[:cut], answers[:cut])
        held.add(seen[cut:], answers[cut:])
    if min(fit.stimuli, held.stimuli) < 2:
        raise InputError(
            f"{fit.stimuli} images to fit and {held.stimuli} held out are too few: use more images, or batches of 10"
        )
    result = linear_fields(fit, held, pixels=pixels)
    fields = result.fields[:2]
    if basis is not None:
        parts = zip(np.split(fields @ basis.T, ends, -1), shown, strict=True)
        fields = np.sum([w @ one for w, one in parts], 0)
    found: Arrays = {"stimuli": np.array(fit.stimuli + held.stimuli)}
    start = 0
    for group in groups:
        own = slice(start, start + len(group.channels))
        start = own.stop
        spikes = fit.c[0, own] + held.c[0, own]
        bad = spikes < settings.least
        found |= {
            f"spikes {group.layer}": spikes,
            f"field {group.layer}": _blank(fields[0, own].reshape(-1, *shape), bad),
            f"control {group.layer}": _blank(fields[1, own].reshape(-1, *shape), bad),
            f"signal {group.layer}": _blank(result.explained[0, own], bad),
            f"p {group.layer}": _blank(result.p()[own], bad),
            f"ridge {group.layer}": result.strengths[0, own],
        }
    return found | windows.found(keep=0.95)


class _Windows:
    """Spike-triggered covariances of a few units, in a greyscale window around their token."""

    def __init__(self, groups: Sequence[Units], config, settings: Settings):
        self.settings = settings
        self.groups = groups
        self.sides = [min(config.image_size, max(8, min(16, 3 * group.patch))) for group in groups]
        self.columns = [
            np.unique(
                np.linspace(0, len(g.channels) - 1, min(settings.covariances, len(g.channels))).round().astype(int)
            )
            for g in groups
        ]
        self.sums = [
            Moments(side**2, len(columns), shifts=settings.shifts, prior=True, triggered=True)
            for side, columns in zip(self.sides, self.columns, strict=True)
        ]

    def add(self, images, counts) -> None:
        for group, side, columns, moments, answers in zip(
            self.groups, self.sides, self.columns, self.sums, counts, strict=True
        ):
            moments.add(window(images, group.centre, side), answers[:, columns])

    def found(self, keep: float) -> Arrays:
        found: Arrays = {}
        for group, side, columns, moments in zip(self.groups, self.sides, self.columns, self.sums, strict=True):
            rows = []
            for unit, channel in enumerate(columns):
                if moments.c[:, unit].min() < max(self.settings.least, 2):
                    continue
                result = covariance(moments, unit, keep=keep)
                ends = result.axes[[0, -1]].reshape(2, side, side)
                # One value less if the average was strong enough to be projected out.
                values = np.full(side**2, np.nan)
                values[: len(result.values)] = result.values
                rows.append((channel, result.excitatory, result.suppressive, values, result.low, result.high, ends))
            if rows:
                names = ("channel", "excitatory", "suppressive", "eigenvalues", "low", "high", "axes")
                for name, values in zip(names, zip(*rows, strict=True), strict=True):
                    found[f"{name} {group.layer}"] = np.array(values)
        return found


def _mixing(model, untrained, settings, progress) -> Arrays:
    found: Arrays = {}
    rng = np.random.default_rng(settings.seed)
    blocks = [
        (name, mixing) for name, n in zip(NETWORKS, (model, untrained), strict=True) for mixing in mixing_weights(n)
    ]
    for i, (name, mixing) in enumerate(blocks):
        progress("Gabors, mixing weights", i, len(blocks))
        found[f"{name} height {mixing.block}"] = mixing.height
        found[f"{name} width {mixing.block}"] = mixing.width
        side = len(mixing.height)
        if side < SMALLEST:
            continue
        products = separable_fields(mixing.height, mixing.width)
        places = np.linspace(0, side - 1, 4).round().astype(int)
        chosen = [products[row, column] for row in places for column in places]
        found[f"{name} gabors field {mixing.block}"] = np.array([_fit(product) for product in chosen])
        shuffled = [shuffled_pixels(product, rng) for product in chosen]
        found[f"{name} gabors pixels {mixing.block}"] = np.array([_fit(product) for product in shuffled])
    if model.config.patch_size >= SMALLEST:
        for name, net in zip(NETWORKS, (model, untrained), strict=True):
            # [side, side, colours, channels]
            kernels = np.moveaxis(np.asarray(net.stages[0].encode.conv.kernel[...], np.float64), -1, 0)
            grey = [main_colour(kernel)[0] for kernel in kernels]
            found[f"{name} gabors field stem"] = np.array([_fit(kernel) for kernel in grey])
            found[f"{name} gabors pixels stem"] = np.array([_fit(shuffled_pixels(kernel, rng)) for kernel in grey])
    progress("Gabors, mixing weights", len(blocks), len(blocks))
    return found


def _gabors(fields: Arrays, groups, seed, controls, what, progress) -> Arrays:
    rng = np.random.default_rng(seed)
    found: Arrays = {}
    jobs = []
    for group in groups:
        layer = group.layer
        whole = fields[f"field {layer}"]
        grey = [_grey(field) for field in whole]
        found[f"colour {layer}"] = np.array([share for _, share in grey])
        jobs += [(f"field {layer}", [g for g, _ in grey])]
        if not controls:
            continue
        jobs += [
            (f"pixels {layer}", [g if np.isnan(g).any() else shuffled_pixels(g, rng, group.patch) for g, _ in grey])
        ]
        if f"control {layer}" in fields:
            jobs += [(f"spikes {layer}", [_grey(field)[0] for field in fields[f"control {layer}"]])]
    total, done = sum(len(maps) for _, maps in jobs), 0
    for name, maps in jobs:
        fits = []
        for field in maps:
            progress(what, done, total)
            fits.append(_fit(field))
            done += 1
        found[name] = np.array(fits)
    progress(what, total, total)
    return found


def _grey(field):
    return (np.full(field.shape[:2], np.nan), np.nan) if np.isnan(field).any() else main_colour(field)


def _fit(field) -> np.ndarray:
    # NaN for units with too few spikes, small fields, and units that no pixel reaches.
    if min(field.shape) < SMALLEST or np.isnan(field).any() or np.ptp(field) <= 1e-12 * np.abs(field).max():
        return np.full(len(FIT_COLUMNS), np.nan)
    gabor = fit_gabor(field, starts=2)
    return np.array([getattr(gabor, name) for name in FIT_COLUMNS])


def _blank(values, bad):
    values = np.array(values, np.float64)
    values[bad] = np.nan
    return values
