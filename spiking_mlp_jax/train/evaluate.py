"""Evaluation: accuracy, confusion matrix and firing rates, of a model, of a run in progress, or of a saved state."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.pipeline import eval_batches, network_batches
from spiking_mlp_jax.data.sources import Source, check_same, identity
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import adapt as finetune
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.train.checkpoint import Checkpoints
from spiking_mlp_jax.train.config import Config, model_config, resize_mode, to_dict
from spiking_mlp_jax.train.logging import Display, to_json
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.qat import make_quantized
from spiking_mlp_jax.train.runtime import check_alike, union
from spiking_mlp_jax.train.sharding import abstract_with_sharding, make_mesh, replicate, replicated, shard_batch
from spiking_mlp_jax.train.state import TrainState, abstract_state, load_state
from spiking_mlp_jax.train.step import make_eval_step
from spiking_mlp_jax.utils.files import write_whole
from spiking_mlp_jax.utils.interrupt import out_of_reach
from spiking_mlp_jax.utils.watchdog import Watchdog

SILENT, SATURATED = 0.001, 0.95


def silent_and_saturated(rates: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """The layers that carry next to no information.

    Args:
        rates: mean firing rate of each layer, spikes per neuron and time step, 0 to 1.

    Returns:
        silent: names of the layers below 0.001 (0.1 %).

        saturated: names of the layers above 0.95 (95 %). Both in the order given.

    Examples:
        >>> silent_and_saturated({"a": 0.0, "b": 0.2, "c": 0.99})
        (['a'], ['c'])
    """
    silent = [name for name, rate in rates.items() if rate < SILENT]
    saturated = [name for name, rate in rates.items() if rate > SATURATED]
    return silent, saturated


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result over a whole set of images.

    Attributes:
        images: how many.
        loss: mean cross-entropy of the time-mean logits, in nats.
        confusion: int64 [K, K], images by label (row) and predicted class (column).
        firing_rates: mean over images, time and neurons, for each layer of spikes.
    """

    images: int
    loss: float
    confusion: np.ndarray
    firing_rates: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Share of images whose class was predicted, in [0, 1]."""
        return int(np.trace(self.confusion)) / self.images

    @property
    def class_accuracy(self) -> list[float | None]:
        """The same for the images of each class [K]; None for a class without images."""
        totals = self.confusion.sum(1).tolist()
        hits = np.diagonal(self.confusion).tolist()
        return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]

    def unhealthy_layers(self) -> list[str]:
        """A message for each layer that is silent (< 0.1 %) or saturated (> 95 %)."""
        rates = self.firing_rates
        silent, saturated = silent_and_saturated(rates)
        found = [f"{name} is silent: it fires at {100 * rates[name]:.3f} %" for name in silent]
        return found + [f"{name} is saturated: it fires at {100 * rates[name]:.1f} %" for name in saturated]

    def summary(self, seconds: float) -> str:
        """Accuracy, loss and duration in words."""
        score = f"test accuracy {100 * self.accuracy:.2f} %, loss {self.loss:.4f}"
        return f"{score} on {self.images} images in {seconds:.0f} s"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "images": self.images,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "class_accuracy": self.class_accuracy,
            "confusion": self.confusion.tolist(),
            "firing_rates": self.firing_rates,
        }


def evaluate(
    eval_step: Callable[..., dict[str, Any]],
    params: Any,
    stats: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> Evaluation:
    """Evaluates a network on every image of some batches.

    Args:
        eval_step: from `make_eval_step`.
        params: parameters, on the mesh.
        stats: running averages, on the mesh.
        batches: {"image", "label", "mask"}, this process's share; masked images do not count.
        mesh: the devices.

    Raises:
        InputError: there are no images.
    """
    # Sums are fetched one batch late, so that the devices never wait for the host.
    total = pending = None
    for batch in batches:
        sums = eval_step(params, stats, shard_batch(batch, mesh))
        if pending is not None:
            total = added(total, pending)
        pending = sums
    if pending is None:
        raise InputError("there are no images to evaluate: give a split that has some")
    total = added(total, pending)
    images = int(total["confusion"].sum())
    rates = {name: float(value) / images for name, value in total["rates"].items()}
    return Evaluation(images, float(total["loss"]) / images, total["confusion"], rates)


def evaluate_model(
    model: SpikingMLP, batches: Iterable[dict[str, np.ndarray]], mean: Sequence[float], std: Sequence[float]
) -> Evaluation:
    """Evaluates a model on one device.

    Args:
        model: the network; it is not changed.
        batches: as for `evaluate`.
        mean, std: of the pixels in [0, 1], per channel.
    """
    mesh = make_mesh(jax.devices()[:1])
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = jax.device_put((params, stats), replicated(mesh))
    return evaluate(make_eval_step(graphdef, mean, std, mesh), params, stats, batches, mesh)


def evaluate_source(
    model: SpikingMLP,
    source: Source,
    data: Mapping[str, Any],
    *,
    batch_size: int,
    max_bad_images: float = 0.0,
    shown: Callable[[Iterable[dict[str, np.ndarray]], int], Iterable[dict[str, np.ndarray]]] | None = None,
) -> Evaluation:
    """Evaluates a model on all images of a source, on one device.

    Args:
        model: the network; it is not changed.
        source: the images. Those that cannot be decoded are skipped and reported on stderr.
        data: "data" of a weights folder's meta, which says how images become inputs.
        batch_size: images at a time.
        max_bad_images: the share of images that may be skipped, 0 to 1.
        shown: function of the batches and their number to the same batches, which shows progress.

    Raises:
        InputError: there are no images, or too many that cannot be decoded.
    """
    damaged = Damaged(source, max_bad_images, lambda text: print(text, file=sys.stderr))
    batches = network_batches(source, model.config, data, batch_size, damaged)
    if shown is not None:
        batches = shown(batches, -(-len(source) // batch_size))
    return evaluate_model(model, batches, data["mean"], data["std"])


def evaluated(state: TrainState, quantized: Callable[[Any, Any], Any] | None) -> tuple[Any, Any]:
    """Params and stats that are evaluated and saved: averages if there are any, rounded if trained so."""
    params, stats = (state.params, state.stats) if state.average is None else state.average
    return (params if quantized is None else quantized(params, stats)), stats


def evaluation_batches(config: Config, source: Source, damaged: Damaged) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of the test images, prepared as the experiment says; see `eval_batches`."""
    batches = eval_batches(
        source,
        batch_size=config.eval_batch_size,
        image_size=config.image_size,
        in_channels=config.in_channels,
        resize_mode=resize_mode(config),
        eval_resize=config.eval_resize,
        damaged=damaged,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.workers,
    )
    return out_of_reach(batches, config.workers)


def write_evaluation(workdir: epath.Path, step: int, result: Evaluation, origin: str) -> None:
    """Writes WORKDIR/evaluation.json, in the process that writes for all; `origin` says which weights these are."""
    if jax.process_index() == 0:
        write_whole(workdir / "evaluation.json", to_json({"step": step, "weights": origin, **result.to_dict()}) + "\n")


def trained_weights(config: Config, step: int) -> str:
    """Which weights of a run are evaluated after a step, in words."""
    kind = f"averaged weights (ema_decay={config.ema_decay})" if config.ema_decay else "weights"
    rounded = f", rounded to {config.weight_bits} bits" if config.weight_bits else ""
    return f"{kind} after step {step}{rounded}"


def evaluate_only(
    config: Config, workdir: epath.Path, source: Source, display: Display, watch: Watchdog
) -> tuple[int, Evaluation]:
    """Evaluates the newest checkpoint of a workdir or, where there is none, the weights that init_weights names.

    Needs no training images. Writes WORKDIR/evaluation.json and a line of log.txt, and leaves the rest of the workdir
    unchanged.

    Args:
        config: the experiment, which a checkpoint has to fit as for resuming.
        workdir: of a run, or an empty folder for the result.
        source: the test images.
        display: shows the progress, and gets workdir/log.txt.
        watch: learns of each batch.

    Returns:
        the step of the checkpoint, 0 for given weights, and the result.

    Raises:
        InputError: there is nothing to evaluate, or it does not fit.
    """
    mesh, model = make_mesh(fsdp=config.fsdp), model_config(config)
    # Only the learning rate depends on the number of steps an epoch.
    optimizer = make_optimizer(config, steps_per_epoch=1)
    watch.enter("restoring", 0)
    found = saved_state(config, workdir, mesh)
    data = identity({"test": source})
    if found is not None:
        state, saved = found
        origin = trained_weights(config, int(state.step))
        other_data = check_same(saved, data, f"the run in {workdir}", config.allow_other_data)
    elif config.init_weights:
        named = {"class_names": _check_head(config)}
        other_data = check_same(named, data, f"the network in {config.init_weights}", config.allow_other_data)
        state = load_state(model, optimizer, config.init_weights, mesh)
        origin = finetune.describe(config.init_weights, model)
    else:
        raise InputError(
            f"there is nothing to evaluate: {workdir} holds no checkpoint, and init_weights names no weights"
        )
    step = int(state.step)
    eval_step = make_eval_step(abstract_state(model, optimizer)[0], config.mean, config.std, mesh)
    main = jax.process_index() == 0
    together = union if jax.process_count() > 1 else None
    damaged = Damaged(source, config.max_bad_images, display.say, together)
    started = time.monotonic()
    display.start(0, -(-len(source) // config.eval_batch_size), workdir / "log.txt" if main else None)
    if other_data:
        display.say(f"warning: {other_data}")
    batches = _shown(evaluation_batches(config, source, damaged), display, config.eval_batch_size, watch)
    result = evaluate(eval_step, *evaluated(state, make_quantized(config, model)), batches, mesh)
    damaged.share()
    write_evaluation(workdir, step, result, origin)
    display.say(f"{origin}: {result.summary(time.monotonic() - started)}")
    for message in result.unhealthy_layers():
        display.say(f"warning: {message}")
    return step, result


def saved_state(
    config: Config, workdir: epath.Path, mesh: Mesh, step: int | None = None
) -> tuple[TrainState, dict[str, Any]] | None:
    """The state in a run's checkpoint of a step, the newest for None, and the identity of its data; or None.

    The state is gathered on every device.

    Raises:
        InputError: the checkpoints are damaged, or of another configuration.
    """
    folder = workdir / "checkpoints"
    check_alike({"list of checkpoints": sorted(x.name for x in folder.iterdir()) if folder.is_dir() else None})
    if not folder.is_dir():
        return None
    optimizer = make_optimizer(config, steps_per_epoch=1)
    _, abstract = abstract_state(model_config(config), optimizer, average=bool(config.ema_decay))
    checkpoints = Checkpoints(folder, to_dict(config), config.keep)
    try:
        there = step is None or step in checkpoints.steps()
        restored = checkpoints.restore(abstract_with_sharding(abstract, mesh), step) if there else None
    finally:
        checkpoints.close()
    return None if restored is None else (replicate(restored.state, mesh), restored.progress.get("dataset", {}))


def _check_head(config):
    """The class names of the weights, [] if unknown."""
    saved, meta = weights.read_config(weights.find(config.init_weights))
    if saved.num_classes != config.num_classes:
        raise InputError(
            f"the weights that init_weights names know {saved.num_classes} classes, but num_classes is "
            f"{config.num_classes}: a new head has to be trained before it is evaluated"
        )
    return meta.get("data", {}).get("class_names", [])


def _shown(batches, display, size, watch) -> Iterator[dict[str, np.ndarray]]:
    started = time.monotonic()
    watch.enter("evaluating", 0)
    for done, batch in enumerate(batches):
        watch.enter("evaluating", 0, done)
        yield batch
        speed = (done + 1) * size / (time.monotonic() - started)
        display.step(done + 1, "evaluating", f"{speed:.0f} images/s")


def added(total: Any, sums: Any) -> Any:
    """Trees of arrays, added on the host in 64 bits: counts stay exact however many images there are.

    Args:
        total: the sum so far, None at first.
        sums: of a batch.
    """
    wide = jax.tree.map(lambda x: x.astype(f"{x.dtype.kind}8"), jax.device_get(sums))
    return wide if total is None else jax.tree.map(np.add, total, wide)
