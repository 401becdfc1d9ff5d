"""What is measured on the test images: accuracy and firing rates by time step, mistakes, fields, operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from spiking_mlp_jax.analysis.activity import stream
from spiking_mlp_jax.analysis.activity.measure import Information, answers, information_of
from spiking_mlp_jax.analysis.activity.rates import Counts, Rates, rates_of
from spiking_mlp_jax.analysis.fields.effective import EffectiveField, effective_field
from spiking_mlp_jax.analysis.fields.responses import choose_units, default_layers
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.data.damaged import Damaged, next_decodable
from spiking_mlp_jax.data.pipeline import network_batches
from spiking_mlp_jax.data.sources import spaced
from spiking_mlp_jax.data.trained import Trained
from spiking_mlp_jax.deploy.cost import Cost, cost
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import mean_logits
from spiking_mlp_jax.train.evaluate import added

Progress = Callable[[str, float, float], None]
COST_IMAGES = 200
LARGE = 64  # pixels a side above which gradients are averaged over fewer images and units
FIELD_BATCH = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
    """A misclassified image.

    Attributes:
        index: its place in the source.
        position: its place among all test images.
        image: as the network saw it.
        label, predicted: its class, and the network's.
        probability, of_label: softmax of the time-mean logits at these classes.
    """

    index: int
    position: int
    image: UInt8[np.ndarray, "H W C"]
    label: int
    predicted: int
    probability: float
    of_label: float


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Results over the test images.

    Attributes:
        information: accuracy and confusion matrix after each step.
        rates: firing rates.
        mistakes: the most confident first.
    """

    information: Information
    rates: Rates
    mistakes: list[Mistake]


def measure(run: Run, batch_size: int, mistakes: int, progress: Progress, say: Callable[[str], None]) -> Measured:
    """Runs a network over all test images once.

    Args:
        run: with a source.
        batch_size: images at a time.
        mistakes: number of mistakes to return.
        progress: called with what is done, how much of it and of how much.
        say: called with a line for each image that is skipped because it cannot be decoded.

    Raises:
        InputError: too many corrupt images, or all of them; NaN or inf logits.
    """
    source, trained = run.source, run.trained
    assert source is not None
    c, damaged = trained.model.config, Damaged(source, trained.max_bad_images, say)
    step = _make_step(trained)
    total: Any = None
    worst: list[Mistake] = []
    progress("test images", 0, len(source))
    for at, batch in enumerate(network_batches(source, c, trained.data, batch_size, damaged)):
        sums, predicted, best, own = jax.device_get(step(batch["image"], batch["label"], batch["mask"]))
        total = added(total, sums)
        worst += [
            Mistake(
                at * batch_size + i,
                run.position(at * batch_size + i),
                batch["image"][i],
                int(batch["label"][i]),
                int(predicted[i]),
                float(best[i]),
                float(own[i]),
            )
            for i in np.flatnonzero(batch["mask"] & (predicted != batch["label"])).tolist()
        ]
        worst = sorted(worst, key=lambda mistake: (-mistake.probability, mistake.index))[:mistakes]
        progress("test images", min((at + 1) * batch_size, len(source)), len(source))
    answered, counts = total
    images = int(answered["confusion"][-1].sum())
    if not images:
        raise InputError("no test image can be decoded: replace the corrupt files")
    if not np.isfinite(answered["loss"][-1]):
        raise InputError(f"{trained.name} produces NaN or inf logits: retrain with a lower learning rate")
    rates = rates_of(stream.in_network_order(counts, c), images)
    return Measured(information_of(answered, images), rates, worst)


def _make_step(trained: Trained):
    """A function of a batch to its sums, and of each image the predicted class and the probabilities of a `Mistake`."""
    graphdef, variables = nnx.split(trained.model)
    pixels = trained.pixels

    @jax.jit
    def step(variables, images, labels, mask):
        fired = Counts()
        logits, counts = nnx.merge(graphdef, variables, copy=True)(
            normalize(images, pixels.mean, pixels.std), observe=lambda name, value: fired.observe(name, value, mask)
        )
        probability = jax.nn.softmax(mean_logits(logits))
        own = jnp.take_along_axis(probability, labels[:, None], -1)[:, 0]
        return (answers(logits, labels, mask), counts), probability.argmax(-1), probability.max(-1), own

    return lambda images, labels, mask: step(variables, images, labels, mask)


def fitted_image(run: Run, index: int) -> tuple[UInt8[np.ndarray, "H W C"], int]:
    """A test image at the network's size, and its label; the next one where it cannot be decoded."""
    assert run.source is not None
    record = next_decodable(run.source, index)
    return run.trained.inputs([record["image"]])[0], int(record["label"])


def _spaced_images(run: Run, count: int, batch_size: int) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Batches of evenly spaced test images."""
    assert run.source is not None
    positions = spaced(len(run.source), count)
    for at in range(0, len(positions), batch_size):
        yield np.stack([fitted_image(run, i)[0] for i in positions[at : at + batch_size]])


def effective_fields(run: Run, progress: Progress) -> list[EffectiveField]:
    """Mean gradients of the middle token's units of each stage.

    Args:
        run: with a source.
        progress: called with what is done, how much of it and of how much.
    """
    c, pixels = run.trained.model.config, run.trained.pixels
    images, channels = (16, 8) if c.image_size <= LARGE else (8, 2)
    batches = [normalize(x, pixels.mean, pixels.std) for x in _spaced_images(run, images, FIELD_BATCH)]
    layers, found = default_layers(c), []
    for done, layer in enumerate(layers):
        progress("effective fields", done, len(layers))
        found.append(effective_field(run.trained.model, choose_units(c, layer, channels=channels), batches))
    progress("effective fields", len(layers), len(layers))
    return found


def operations(run: Run, batch_size: int, progress: Progress) -> Cost:
    """Operations and energy over 200 evenly spaced test images; arguments as for `measure`."""
    assert run.source is not None
    count, done = min(COST_IMAGES, len(run.source)), 0

    def batches():
        nonlocal done
        for images in _spaced_images(run, count, batch_size):
            progress("counting operations", done, count)
            done += len(images)
            yield images
        progress("counting operations", count, count)

    return cost(run.trained.model, batches())
