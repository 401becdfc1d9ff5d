"""What one pass over the test images tells: classes after each step, firing rates at each step, the worst mistakes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int, UInt8

from spiking_mlp_jax.analysis.activity.measure import Rates, in_network_order
from spiking_mlp_jax.analysis.activity.rates import Counts, rates_of
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.pipeline import eval_batches
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.train.loss import class_scores

Progress = Callable[[str, float, float], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
    """An image that was taken for another class.

    Attributes:
        index: its place in the source.
        position: its place among all test images.
        image: as the network saw it.
        label, predicted: classes.
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
        images: how many.
        loss: mean cross-entropy of the time-mean logits, in nats.
        confusion: images by true class (row) and predicted class (column).
        right_after: images right if only the first 1, 2, ... T steps are counted.
        right_alone: images right if step 1, 2, ... T alone is counted.
        settled: images that have their final class after 1, 2, ... T steps.
        rates: how often neurons fire.
        mistakes: the most confident first.
    """

    images: int
    loss: float
    confusion: Int[np.ndarray, "K K"]
    right_after: Int[np.ndarray, " T"]
    right_alone: Int[np.ndarray, " T"]
    settled: Int[np.ndarray, " T"]
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
        mistakes: how many to keep.
        progress: called with what is done, how much of it and of how much.
        say: is told of images that cannot be decoded, which are left out.

    Raises:
        InputError: too many damaged images, or none that is whole; or scores that are no numbers.
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
        raise InputError("there is no test image that can be decoded: replace the damaged files")
    if not np.isfinite(loss):
        raise InputError(f"the network in {run.folder} gives scores that are no numbers: train it with a lower rate")
    rates = rates_of(in_network_order(counts, c), images)
    return Measured(images, loss / images, confusion, right_after, right_alone, settled, rates, worst)


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
        # The same mean as in training and evaluating, so that not even the last bit differs.
        scores = [class_scores(logits[: t + 1]) for t in range(steps)]
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
