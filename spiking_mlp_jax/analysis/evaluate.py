"""Accuracy of a trained or compiled network on a dataset; of compiled ones without JAX."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mlp_jax.data.sources import Source, check_same, differences, identity, spread
from spiking_mlp_jax.data.transforms import fitted
from spiking_mlp_jax.deploy.artifact import is_compiled
from spiking_mlp_jax.deploy.engine import Engine
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.predict import config_of, open_network, pixels_of, predict_logits, test_images
from spiking_mlp_jax.errors import InputError

if TYPE_CHECKING:
    from spiking_mlp_jax.data.trained import Trained
    from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
    from spiking_mlp_jax.train.evaluate import Evaluation


@dataclasses.dataclass(frozen=True)
class CompiledEvaluation:
    """Accuracy and speed of a compiled network on a set of images.

    Attributes:
        images: how many there are.
        accuracy: fraction classified correctly.
        steps: time steps run per image, on average.
        images_per_second: throughput of the engine, without reading images.
        threads: that the engine ran on.
        agreement: fraction classified as the trained network does; None without one.
    """

    images: int
    accuracy: float
    steps: float
    images_per_second: float
    threads: int
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, as JSON values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def evaluate(
    network: SpikingMLP | Trained | Engine | IntegerNet | str | os.PathLike[str],
    dataset: str | Source | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 256,
    steps: int | None = None,
    margin: float | None = None,
    against: SpikingMLP | str | os.PathLike[str] | None = None,
    allow_other_data: bool = False,
    shown: Callable[[Iterable, int], Iterable] | None = None,
) -> Evaluation | CompiledEvaluation:
    """Evaluate a network on the test split of a dataset.

    Args:
        network: a trained or compiled network, or the name or path of one, see `deploy.predict.open_network`.
        dataset: see `data.sources.open_source`, or an open source; None for the dataset the network was trained on.
        data_dir: folder of the dataset; None where the package or the network's training run knows it.
        limit: use only this many images, evenly spaced.
        batch_size: images per batch.
        steps: compiled networks: time steps to run, 1 to T; None for T.
        margin: compiled networks: stop an image early, see `deploy.predict.classify`.
        against: compiled networks: the trained network to measure the agreement with.
        allow_other_data: evaluate on classes with other names than the network's, label by label.
        shown: function of the batches and their number that shows progress and returns the batches.

    Returns:
        accuracy, loss, confusion matrix and firing rates of a trained network; accuracy and speed of a compiled one.

    Raises:
        InputError: there is no such network or dataset, they do not fit, classes have other names, an argument is out
            of range, or too many images are corrupt.
    """
    if isinstance(network, Engine | IntegerNet) or (isinstance(network, str | os.PathLike) and is_compiled(network)):
        return _compiled(network, dataset, data_dir, limit, batch_size, steps, margin, against, allow_other_data, shown)
    for name, value in (("steps", steps), ("margin", margin), ("against", against)):
        if value is not None:
            raise InputError(f"{name} needs a compiled network (.smlp)")
    from spiking_mlp_jax.data.trained import Trained, open_trained
    from spiking_mlp_jax.train.evaluate import evaluate_source

    trained = network if isinstance(network, Trained) else open_trained(network)
    if dataset is None or isinstance(dataset, str):
        dataset = trained.source("test", dataset, data_dir)
        check_labels(trained.data, dataset, trained.name, allow_other_data)
    source, bad = spread(dataset, limit), trained.max_bad_images
    return evaluate_source(trained.model, source, trained.data, batch_size=batch_size, max_bad_images=bad, shown=shown)


def check_labels(data: Mapping[str, Any], source: Source, name: str, allowed: bool) -> list[str]:
    """Refuses data whose classes have other names than a network's, so that labels would be wrong.

    Args:
        data: "data" of the network.
        source: the test images.
        name: of the network, for the message.
        allowed: whether other classes are allowed.

    Returns:
        how the data differ from those of the training run, in words.

    Raises:
        InputError: class names differ and `allowed` is False.
    """
    check_same({"class_names": data.get("class_names")}, {"class_names": list(source.class_names)}, name, allowed)
    return differences(data, identity({"test": source}))


def _compiled(
    network, dataset, data_dir, limit, batch_size, steps, margin, against, allow_other_data, shown
) -> CompiledEvaluation:
    engine: Any = open_network(network)
    c, pixels = engine.description, pixels_of(engine)
    if dataset is None or isinstance(dataset, str):
        dataset = test_images(engine, dataset, data_dir, against)
        check_labels(c.data, dataset, "the compiled network", allow_other_data)
    source = spread(dataset, limit)
    other = None if against is None else open_network(against)
    if other is not None:
        sizes = [(x.image_size, x.in_channels, x.num_classes) for x in (c, config_of(other))]
        if sizes[0] != sizes[1]:
            raise InputError(f"{against} takes other images or has other classes than the compiled network")
    starts: Iterable[int] = range(0, len(source), batch_size)
    correct = agreed = taken = 0
    seconds = 0.0
    for start in starts if shown is None else shown(starts, len(starts)):
        records = [source[i] for i in range(start, min(start + batch_size, len(source)))]
        images = fitted((record["image"] for record in records), c, pixels)
        if not start:
            engine.predict(images[:1])  # compiles
        begun = time.perf_counter()
        logits, ran = predict_logits(engine, images, steps, margin)
        seconds += time.perf_counter() - begun
        classes = logits.argmax(1)
        correct += int(np.sum(classes == [record["label"] for record in records]))
        taken += int(ran.sum())
        if other is not None:
            agreed += int(np.sum(classes == predict_logits(other, images)[0].argmax(1)))
    count = len(source)
    agreement = None if other is None else agreed / count
    return CompiledEvaluation(count, correct / count, taken / count, count / seconds, engine.threads, agreement)
