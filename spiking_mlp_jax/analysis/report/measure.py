"""What is measured on the test images: accuracy and firing rates by time step, mistakes, fields, operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from spiking_mlp_jax.analysis.activity.rates import Counts, Rates, rates_of
from spiking_mlp_jax.analysis.activity.stream import in_network_order
from spiking_mlp_jax.analysis.fields.effective import EffectiveField, effective_field
from spiking_mlp_jax.analysis.fields.responses import choose_units, default_layers
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.data.damaged import Damaged, next_decodable
from spiking_mlp_jax.data.pipeline import eval_batches
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.deploy.cost import Cost, cost
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import mean_logits

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
        images: their number.
        loss: mean cross-entropy of the time-mean logits, in nats.
        confusion: images by true class (row) and predicted class (column).
        accuracy_after: accuracy if only the first 1, 2, ... T steps are counted.
        accuracy_alone: accuracy if step 1, 2, ... T alone is counted.
        settled: share of images that have their final class after 1, 2, ... T steps.
        rates: firing rates.
        mistakes: the most confident first.
    """

    images: int
    loss: float
    confusion: Int[np.ndarray, "K K"]
    accuracy_after: Float[np.ndarray, " T"]
    accuracy_alone: Float[np.ndarray, " T"]
    settled: Float[np.ndarray, " T"]
    rates: Rates
    mistakes: list[Mistake]

    @property
    def accuracy(self) -> float:
        """Share of images whose class was predicted, in [0, 1]."""
        return int(np.trace(self.confusion)) / self.images


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
    source, c = run.source, run.config
    assert source is not None
    size, channels, resize_mode, eval_resize = run.fitting
    batches = eval_batches(
        source,
        batch_size=batch_size,
        image_size=size,
        in_channels=channels,
        resize_mode=resize_mode,
        eval_resize=eval_resize,
        damaged=Damaged(source, weights.max_bad_images(run.folder), say),
    )
    step = _make_step(run)
    confusion = np.zeros((c.num_classes, c.num_classes), np.int64)
    right_after, right_alone, settled = np.zeros((3, c.time_steps), np.int64)
    counts: dict[str, Any] = {}
    loss = 0.0
    worst: list[Mistake] = []
    progress("test images", 0, len(source))
    for at, batch in enumerate(batches):
        found = jax.device_get(step(batch["image"], batch["label"], batch["mask"]))
        whole, label, predicted = batch["mask"], batch["label"], found["predicted"]
        np.add.at(confusion, (label[whole], predicted[-1][whole]), 1)
        right_after += (predicted == label)[:, whole].sum(1)
        right_alone += (found["alone"] == label)[:, whole].sum(1)
        settled += (predicted == predicted[-1])[:, whole].sum(1)
        loss += float(found["losses"][whole].astype(np.float64).sum())
        for name, count in found["counts"].items():
            counts[name] = counts.get(name, 0) + count.astype(np.int64)
        worst += [
            Mistake(
                at * batch_size + i,
                run.position(at * batch_size + i),
                batch["image"][i],
                int(label[i]),
                int(predicted[-1, i]),
                float(found["best"][i]),
                float(found["own"][i]),
            )
            for i in np.flatnonzero(whole & (predicted[-1] != label)).tolist()
        ]
        worst = sorted(worst, key=lambda mistake: (-mistake.probability, mistake.index))[:mistakes]
        progress("test images", min((at + 1) * batch_size, len(source)), len(source))
    images = int(confusion.sum())
    if not images:
        raise InputError("no test image can be decoded: replace the corrupt files")
    if not np.isfinite(loss):
        raise InputError(f"the network in {run.folder} produces NaN or inf logits: retrain with a lower learning rate")
    rates = rates_of(in_network_order(counts, c), images)
    after, alone, settled = right_after / images, right_alone / images, settled / images
    return Measured(images, loss / images, confusion, after, alone, settled, rates, worst)


def _make_step(run: Run):
    graphdef, variables = nnx.split(run.model)
    steps, data = run.config.time_steps, run.data

    @jax.jit
    def step(variables, images, labels, mask):
        inputs = normalize(images, data["mean"], data["std"])
        fired = Counts()
        logits, counts = nnx.merge(graphdef, variables, copy=True)(
            inputs, observe=lambda name, value: fired.observe(name, value, mask)
        )
        # The same mean as in training and evaluation, bit for bit.
        scores = [mean_logits(logits[: t + 1]) for t in range(steps)]
        log_probability = jax.nn.log_softmax(scores[-1])
        own = jnp.take_along_axis(log_probability, labels[:, None], -1)[:, 0]
        return {
            "predicted": jnp.stack([jnp.argmax(score, -1) for score in scores]),
            "alone": jnp.argmax(logits, -1),
            "best": jnp.exp(jnp.max(log_probability, -1)),
            "own": jnp.exp(own),
            "losses": -own,
            "counts": counts,
        }

    return lambda images, labels, mask: step(variables, images, labels, mask)


def fitted_image(run: Run, index: int) -> tuple[UInt8[np.ndarray, "H W C"], int]:
    """A test image at the network's size, and its label; the next one where it cannot be decoded."""
    assert run.source is not None
    record = next_decodable(run.source, index)
    return fit_image(record["image"], *run.fitting), int(record["label"])


def _spaced_images(run: Run, count: int, batch_size: int) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Batches of evenly spaced test images."""
    assert run.source is not None
    size = len(run.source)
    positions = np.linspace(0, size - 1, count).round().astype(int).tolist()
    for at in range(0, count, batch_size):
        yield np.stack([fitted_image(run, i)[0] for i in positions[at : at + batch_size]])


def effective_fields(run: Run, progress: Progress) -> list[EffectiveField]:
    """Mean gradients of the middle token's units of each stage.

    Args:
        run: with a source.
        progress: called with what is done, how much of it and of how much.
    """
    c = run.config
    images, channels = (16, 8) if c.image_size <= LARGE else (8, 2)
    batches = [normalize(x, run.data["mean"], run.data["std"]) for x in _spaced_images(run, images, FIELD_BATCH)]
    layers, found = default_layers(c), []
    for done, layer in enumerate(layers):
        progress("effective fields", done, len(layers))
        found.append(effective_field(run.model, choose_units(c, layer, channels=channels), batches))
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

    return cost(run.model, batches())
