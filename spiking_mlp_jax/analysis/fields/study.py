"""The study of a network's receptive fields, with its controls; finished parts are stored, so that it can resume.

For the trained network and an untrained one: input gradients, responses to white noise, responses to images. A Gabor is
then fitted to every field, to the same field with its pixels shuffled within each token's patch, and to the field of
the shifted spikes. `summary` turns the result into JSON and tables, `plots` into figures.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from flax import nnx

from spiking_mlp_jax.analysis.fields.controls import main_colour, shuffled_pixels, untrained_network
from spiking_mlp_jax.analysis.fields.effective import effective_field
from spiking_mlp_jax.analysis.fields.gabor import SMALLEST, fit_gabor
from spiking_mlp_jax.analysis.fields.mixing import mixing_weights
from spiking_mlp_jax.analysis.fields.responses import (
    Units,
    choose_units,
    default_layers,
    evaluation_copy,
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
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.utils.files import write_whole
from spiking_mlp_jax.utils.settings import usual_settings

Arrays = dict[str, np.ndarray]


def _load(file: Path, fingerprint: str) -> Arrays | None:
    """Arrays from an NPZ file; None if it is missing, corrupt or of another fingerprint."""
    try:
        # np.load leaves a file that is no archive open.
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as found:
            if str(found["fingerprint"]) == fingerprint:
                return {key: found[key] for key in found.files if key != "fingerprint"}
    except (OSError, KeyError, ValueError, EOFError, BadZipFile):
        pass
    return None


def _write(file: Path, fingerprint: str, arrays: Arrays, save: Callable[..., None]) -> None:
    stream = io.BytesIO()
    save(stream, fingerprint=np.array(fingerprint), **arrays)
    write_whole(file, stream.getvalue())


class Unfinished:
    """The state of a part that is being measured, written now and then so that it resumes.

    Args:
        file: where it is stored; None for nowhere.
        fingerprint: of the study.

    Attributes:
        done: number of images or fits in the state.
        state: arrays, {} at first.
    """

    def __init__(self, file: Path | None = None, fingerprint: str = ""):
        self.file, self._fingerprint = file, fingerprint
        self.state: Arrays = (_load(file, fingerprint) if file else None) or {}
        self.done = int(self.state.pop("done", 0))
        self._due: float | None = None

    def save(self, done: int, state: Callable[[], Arrays]) -> None:
        """Writes the state if the last time is long enough ago.

        Raises:
            InputError: it cannot be written; StorageError if the disk is full.
        """
        began = time.monotonic()
        self._due = began + SAVE_SECONDS if self._due is None else self._due
        if self.file is not None and began >= self._due:
            _write(self.file, self._fingerprint, {"done": np.array(done), **state()}, np.savez)
            now = time.monotonic()
            self._due = now + max(SAVE_SECONDS, 10 * (now - began))  # large states take a tenth of the time


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
SAVE_SECONDS = 1.0  # between two states of an unfinished part
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


@usual_settings()
def study(
    model: SpikingMLP,
    data: dict[str, Any],
    source: Source,
    settings: Settings,
    folder: Path,
    progress: Progress = lambda what, done, total: None,
    announce: Callable[[float], None] = lambda seconds: None,
) -> dict[str, Arrays]:
    """Measures everything that is not stored yet.

    Args:
        model: the trained network.
        data: the weights' "data".
        source: natural images, such as the test split.
        settings: what to measure.
        folder: of the NPZ files of finished parts and of the one in progress, from which an interrupted study resumes;
            those of other weights or settings are measured again.
        progress: called with a description, the number done and the total.
        announce: called with an estimate of the seconds left, before anything missing is measured.

    Returns:
        parts: "untrained", the variables of that network; "mixing", "trained/noise", "untrained/gradient", ..., each a
            dict of arrays whose names end in the layer.

    Raises:
        InputError: no such layer, too few images, or the folder cannot be written.
    """
    config, settings = model.config, settings.of(model.config)
    layers = settings.layers or tuple(default_layers(config))
    groups = [choose_units(config, layer, channels=settings.channels) for layer in layers]
    for group in groups:
        if not group.layer.endswith(".spikes"):
            raise InputError(f"{group.layer} is not a layer of spikes: use one whose name ends in .spikes")
    count = min(settings.images, len(source))
    if count < 10:
        raise InputError(f"the study needs at least 10 images, got {count}")

    def images(count, offset=0, batch_size=settings.batch_size):
        return natural_images(source, config, data, count, seed=settings.seed + offset, batch_size=batch_size)

    # A few images identify the data: another data set may have as many.
    began = time.monotonic()
    some = [batch.normalised.tolist() for batch in images(16, 2, 16)]
    reading = (time.monotonic() - began) / min(16, len(source))
    key = fingerprint(model, data, settings, layers, len(source), some)

    def untrained():
        shown = images(min(4 * settings.batch_size, len(source)), 1)
        network = untrained_network(config, (batch.normalised for batch in shown), seed=settings.seed)
        return {".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(network))}

    @functools.cache
    def network(name):
        if name == "trained":
            return model
        made = evaluation_copy(model)
        for path, variable in nnx.to_flat_state(nnx.state(made)):
            variable[...] = parts["untrained"][".".join(map(str, path))]
        return made

    parts: dict[str, Arrays] = {}

    def measure(part: str, kept: Unfinished) -> Arrays:
        if part == "untrained":
            return untrained()
        if part == "mixing":
            return _mixing(model, network("untrained"), settings, kept, progress)
        name, kind, *fitted = part.split("/")
        if fitted:
            what = f"{name}: Gabors, {kind}"
            return _gabors(parts[f"{name}/{kind}"], groups, settings.seed, name == "trained", kept, what, progress)
        if kind == "noise":
            return _noise(network(name), groups, settings, kept, f"{name}: white noise", progress)
        if kind == "images":
            return _images(network(name), groups, images, data, settings, kept, f"{name}: images", progress)
        return _gradients(network(name), groups, images, settings, kept, f"{name}: gradients", progress)

    measured = ("gradient", "noise", "images")
    names = [*(f"trained/{kind}" for kind in measured), "untrained", *(f"untrained/{kind}" for kind in measured)]
    names += ["mixing", *(f"{name}/{kind}/gabors" for name in NETWORKS for kind in KINDS)]
    files = {part: folder / f"{part.replace('/', '.')}.npz" for part in names}
    missing: dict[str, Unfinished] = {}
    for part, file in files.items():
        found = _load(file, key)
        if found is None:
            missing[part] = Unfinished(file.with_suffix(".unfinished.npz"), key)
        else:
            parts[part] = found
    if missing:
        write_whole(folder / "writable", "")  # said before anything is measured
        (folder / "writable").unlink()
        announce(_estimate(model, groups, settings, count, reading, missing))
    for part, kept in missing.items():
        parts[part] = measure(part, kept)
        _write(files[part], key, parts[part], np.savez_compressed)
        if kept.file is not None:
            kept.file.unlink(missing_ok=True)
    return {part: parts[part] for part in files}


def _estimate(model, groups, settings, count, reading, missing) -> float:
    """Seconds that the missing parts take, from those of one batch and one Gabor fit; `reading` is of an image."""
    config, units = model.config, sum(len(group.channels) for group in groups)
    rng = np.random.default_rng(0)

    @functools.cache
    def fit(side):
        return _seconds(lambda: _fit(rng.normal(size=(side, side))))

    batch = dataclasses.replace(settings, noise=settings.batch_size)
    forward = compiling = decomposition = 0.0
    if any("gabors" not in part for part in missing):
        show = lambda: _noise(model, groups, batch, Unfinished(), "", lambda *_: None)  # noqa: E731
        first, again = _seconds(show), _seconds(show)
        forward, compiling = again / batch.noise, max(first - again, 0)
        matrix = rng.normal(size=(512, 512))
        decomposed = min(count, config.image_size**2 * config.in_channels)
        decomposition = _seconds(lambda: np.linalg.eigh(matrix + matrix.T)) * (decomposed / 512) ** 3
    total = 0.0
    for part, kept in missing.items():
        if part == "mixing":
            sides = [len(mixing.height) for mixing in mixing_weights(model)]
            total += sum(4 * _spread(settings) ** 2 * fit(side) for side in sides if side >= SMALLEST)
        elif part == "untrained":
            total += compiling + 4 * settings.batch_size * (forward + reading)
        elif part.endswith("gabors"):
            controls = 1 if part.startswith("untrained") else 2 if "gradient" in part else 3
            total += (controls * units - kept.done) * fit(config.image_size)
        elif part.endswith("noise"):
            total += (settings.noise - kept.done) * forward
        elif part.endswith("images"):
            total += count * reading + (count - kept.done) * forward + 2 * decomposition
        else:
            # A pass forward for each layer, and one back for each unit, which takes about as long.
            passes = len(groups) + units
            total += compiling * len(groups) + (settings.gradients - kept.done) * (reading + passes * forward)
    return total


def _seconds(run: Callable[[], Any]) -> float:
    began = time.monotonic()
    run()
    return time.monotonic() - began


def _gradients(model, groups, images, settings, kept, what, progress) -> Arrays:
    sums, done, total = dict(kept.state), kept.done, len(groups) * settings.gradients
    size = min(GRADIENT_BATCH, settings.batch_size)
    for batch in islice(images(settings.gradients, batch_size=size), done // size, None):
        for i, group in enumerate(groups):
            progress(what, done * len(groups) + i * len(batch.raw), total)
            # Gradients of potentials, not of spikes: one surrogate less between the unit and the pixels.
            units = dataclasses.replace(group, layer=group.layer.removesuffix(".spikes") + ".potential")
            result = effective_field(model, units, [batch.normalised])
            for name, mean in (("field", result.signed), ("energy", result.energy)):
                sums[f"{name} {group.layer}"] = sums.get(f"{name} {group.layer}", 0) + mean * result.images
        done += len(batch.raw)
        kept.save(done, lambda: sums)
    progress(what, total, total)
    found: Arrays = {}
    for group in groups:
        energy = sums[f"energy {group.layer}"] / done
        found[f"field {group.layer}"] = sums[f"field {group.layer}"] / done
        found[f"map {group.layer}"] = energy.mean(0).sum(-1)
        found[f"maps {group.layer}"] = energy.sum(-1)
    return found


def _noise(model, groups, settings, kept, what, progress) -> Arrays:
    shape = (model.config.image_size, model.config.image_size, model.config.in_channels)
    sums = [Moments(int(np.prod(shape)), len(group.channels), shifts=settings.shifts) for group in groups]
    windows = _Windows(groups, model.config, settings)
    moments = [*sums, *windows.sums]
    for i, each in enumerate(moments):
        each.restore({key: kept.state[f"{i} {key}"] for key in each.state() if kept.state})
    noise = white_noise(
        model.config, settings.noise, seed=settings.seed, batch_size=settings.batch_size, std=settings.contrast,
        kind=settings.kind,
    )  # fmt: skip
    for images, counts in record_spikes(model, groups, islice(noise, kept.done // settings.batch_size, None)):
        for each, answers in zip(sums, counts, strict=True):
            each.add(images, answers)
        windows.add(images, counts)
        progress(what, sums[0].stimuli, settings.noise)
        kept.save(
            sums[0].stimuli,
            lambda: {f"{i} {key}": value for i, each in enumerate(moments) for key, value in each.state().items()},
        )
    found: Arrays = {}
    for group, each in zip(groups, sums, strict=True):
        units = range(len(group.channels))
        enough = each.c.min(0) >= settings.least
        fields, control = (np.full((len(units), *shape), np.nan) for _ in range(2))
        signal, p = (np.full(len(units), np.nan) for _ in range(2))
        for unit in np.flatnonzero(enough).tolist():
            fields[unit] = average(each, unit).reshape(shape)
            control[unit] = average(each, unit, shift=1).reshape(shape)
            above = significance(each, unit)
            signal[unit], p[unit] = above.signal, above.p
        found |= {
            f"spikes {group.layer}": each.c[0],
            f"field {group.layer}": fields,
            f"control {group.layer}": control,
            f"signal {group.layer}": signal,
            f"p {group.layer}": p,
        }
    return found | windows.found(keep=1.0)


def _images(model, groups, images, data, settings, kept, what, progress) -> Arrays:
    shape = (model.config.image_size, model.config.image_size, model.config.in_channels)
    units, pixels = sum(len(group.channels) for group in groups), int(np.prod(shape))
    batches, answered = [], [kept.state["counts"]] if kept.done else []

    def unseen():
        for batch in images(settings.images):
            batches.append(batch.raw)
            if sum(map(len, batches)) > kept.done:
                yield batch.normalised

    done = kept.done
    for seen, counts in record_spikes(model, groups, unseen()):
        answered.append(np.concatenate(counts, 1))
        done += len(seen)
        progress(what, done, settings.images)
        kept.save(done, lambda: {"counts": np.concatenate(answered)})
    raw, counts = np.concatenate(batches), np.concatenate(answered)

    def shown(part):
        return normalize(raw[part], data["mean"], data["std"])

    def slices(size):
        return [slice(start, start + size) for start in range(0, len(raw), size)]

    def coordinates(part):
        return shown(part).reshape(-1, pixels)

    basis, size = None, pixels
    blocks = slices(max(1, 2**23 // pixels))
    if len(raw) < pixels:
        # Their span has fewer dimensions than the pixels: at 64 x 64 x 3 a covariance of pixels would take 1.2 GB.
        gram = np.empty((len(raw), len(raw)))
        for i, one in enumerate(blocks):
            progress(f"{what}, linear fields", i, len(blocks))
            rows = shown(one).reshape(-1, pixels).astype(np.float64)
            for other in blocks[: i + 1]:
                gram[one, other] = rows @ shown(other).reshape(-1, pixels).T
                gram[other, one] = gram[one, other].T
        basis = span(gram)
        spanned = gram @ basis
        size, coordinates = basis.shape[1], lambda part: spanned[part]
    # All layers at once, so that the images' covariance is summed and decomposed once.
    fit, held = (Moments(size, units, shifts=settings.shifts, prior=True) for _ in range(2))
    windows = _Windows(groups, model.config, settings)
    ends = np.cumsum([len(group.channels) for group in groups])[:-1]
    for part in slices(max(settings.batch_size, 10)):
        windows.add(shown(part), np.split(counts[part], ends, 1))
        stimuli, answers = coordinates(part), counts[part]
        cut = len(answers) - max(1, len(answers) // 5)
        if cut:
            fit.add(stimuli[:cut], answers[:cut])
        held.add(stimuli[cut:], answers[cut:])
    result = linear_fields(fit, held, pixels=pixels)
    fields = result.fields[:2]
    if basis is not None:
        weights = fields @ basis.T
        fields = np.sum([weights[..., part] @ shown(part).reshape(-1, pixels) for part in blocks], 0)
    progress(f"{what}, linear fields", len(blocks), len(blocks))
    found: Arrays = {"stimuli": np.array(len(raw))}
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


def _spread(settings: Settings) -> int:
    """Tokens along a side whose outer products of mixing weights are fitted: 4 x 4, or about as many as channels."""
    return min(4, math.ceil(math.sqrt(settings.channels)))


def _mixing(model, untrained, settings, kept, progress) -> Arrays:
    found: Arrays = {}
    jobs: dict[str, list[np.ndarray]] = {}
    rng = np.random.default_rng(settings.seed)
    networks = dict(zip(NETWORKS, (model, untrained), strict=True))
    for name, mixing in [(name, mixing) for name, network in networks.items() for mixing in mixing_weights(network)]:
        found[f"{name} height {mixing.block}"] = mixing.height
        found[f"{name} width {mixing.block}"] = mixing.width
        side = len(mixing.height)
        if side >= SMALLEST:
            places = np.linspace(0, side - 1, _spread(settings)).round().astype(int)
            products = [np.outer(mixing.height[row], mixing.width[column]) for row in places for column in places]
            jobs[f"{name} gabors field {mixing.block}"] = products
            jobs[f"{name} gabors pixels {mixing.block}"] = [shuffled_pixels(product, rng) for product in products]
    if model.config.patch_size >= SMALLEST:
        for name, network in networks.items():
            # [side, side, colours, channels]
            kernels = np.moveaxis(np.asarray(network.stages[0].encode.conv.kernel[...], np.float64), -1, 0)
            chosen = np.linspace(0, len(kernels) - 1, min(settings.channels, len(kernels))).round().astype(int)
            grey = [main_colour(kernel)[0] for kernel in kernels[chosen]]
            jobs[f"{name} gabors field stem"] = grey
            jobs[f"{name} gabors pixels stem"] = [shuffled_pixels(kernel, rng) for kernel in grey]
    return found | _fits(jobs, kept, "Gabors, mixing weights", progress)


def _gabors(fields: Arrays, groups, seed, controls, kept, what, progress) -> Arrays:
    rng = np.random.default_rng(seed)
    found: Arrays = {}
    jobs: dict[str, list[np.ndarray]] = {}
    for group in groups:
        layer = group.layer
        grey = [_grey(field) for field in fields[f"field {layer}"]]
        found[f"colour {layer}"] = np.array([share for _, share in grey])
        jobs[f"field {layer}"] = [g for g, _ in grey]
        if not controls:
            continue
        jobs[f"pixels {layer}"] = [g if np.isnan(g).any() else shuffled_pixels(g, rng, group.patch) for g, _ in grey]
        if f"control {layer}" in fields:
            jobs[f"spikes {layer}"] = [_grey(field)[0] for field in fields[f"control {layer}"]]
    return found | _fits(jobs, kept, what, progress)


def _fits(jobs: dict[str, list[np.ndarray]], kept: Unfinished, what, progress) -> Arrays:
    fields = [field for each in jobs.values() for field in each]
    rows = list(kept.state.get("fits", []))
    for field in fields[len(rows) :]:
        progress(what, len(rows), len(fields))
        rows.append(_fit(field))
        kept.save(len(rows), lambda: {"fits": np.array(rows)})
    progress(what, len(fields), len(fields))
    remaining = iter(rows)
    return {name: np.array([next(remaining) for _ in each]) for name, each in jobs.items()}


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
