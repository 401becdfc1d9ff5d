"""Evaluation: what of a state is evaluated and on which images, and a run that does nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.pipeline import eval_batches
from spiking_mlp_jax.data.sources import Source
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import adapt as finetune
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train.average import with_average
from spiking_mlp_jax.train.checkpoint import Checkpoints
from spiking_mlp_jax.train.config import Config, model_config, to_dict
from spiking_mlp_jax.train.evaluate import Evaluation, evaluate
from spiking_mlp_jax.train.logging import Display, to_json
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.qat import make_quantized
from spiking_mlp_jax.train.runtime import check_alike, union
from spiking_mlp_jax.train.sharding import make_mesh, placed, put_together
from spiking_mlp_jax.train.state import TrainState, abstract_state, load_state
from spiking_mlp_jax.train.step import make_eval_step
from spiking_mlp_jax.utils.interrupt import out_of_reach
from spiking_mlp_jax.utils.storage import write_text


def evaluate_only(config: Config, workdir: epath.Path, source: Source) -> tuple[int, Evaluation]:
    """Evaluates the newest checkpoint of a workdir or, where there is none, the weights that init_weights names.

    Needs no training images. Writes WORKDIR/evaluation.json and a line of log.txt, and leaves the rest of the workdir
    as it is.

    Args:
        config: the experiment, which a checkpoint has to fit as for resuming.
        workdir: of a run, or an empty folder for the result.
        source: the test images.

    Returns:
        the step of the checkpoint, 0 for given weights, and the result.

    Raises:
        InputError: there is nothing to evaluate, or it does not fit.
    """
    mesh = make_mesh(fsdp=config.fsdp)
    state, origin = _given(config, workdir, mesh)
    step = int(state.step)
    graphdef, _ = abstract_state(model_config(config), make_optimizer(config, steps_per_epoch=1))
    eval_step = make_eval_step(graphdef, config.mean, config.std, mesh)
    main = jax.process_index() == 0
    batches = -(-len(source) // config.eval_batch_size)
    display = Display(workdir / "log.txt" if main else None, 0, batches, show=main)
    together = None if jax.process_count() == 1 else union
    damaged = Damaged(source, config.max_bad_images, display.say, together)
    try:
        started = time.monotonic()
        watched = _watched(evaluation_batches(config, source, damaged), display, config.eval_batch_size)
        result = evaluate(eval_step, *evaluated(state, make_quantized(config, model_config(config))), watched, mesh)
        damaged.share()
        if main:
            write_text(workdir / "evaluation.json", to_json({"step": step, **result.to_dict()}) + "\n")
        display.say(
            f"{origin}: test accuracy {100 * result.accuracy:.2f} %, loss {result.loss:.4f} on {result.images} images "
            f"in {time.monotonic() - started:.0f} s"
        )
        for sentence in result.unhealthy_layers():
            display.say(f"warning: {sentence}")
    finally:
        display.close()
    return step, result


def newest_state(config: Config, workdir: epath.Path, mesh: Mesh) -> TrainState | None:
    """The state in the newest checkpoint of a run, each array whole on every device; None where there is none.

    Raises:
        InputError: the checkpoints are damaged, or of another configuration.
    """
    folder = workdir / "checkpoints"
    check_alike({"list of checkpoints": sorted(x.name for x in folder.iterdir()) if folder.is_dir() else None})
    if not folder.is_dir():
        return None
    # The number of steps an epoch shapes no state.
    _, abstract = abstract_state(model_config(config), make_optimizer(config, steps_per_epoch=1))
    if config.ema_decay:
        abstract = jax.eval_shape(with_average, abstract)
    checkpoints = Checkpoints(folder, to_dict(config), config.keep)
    try:
        restored = checkpoints.restore(placed(abstract, mesh))
    finally:
        checkpoints.close()
    return None if restored is None else put_together(restored.state, mesh)


def evaluated(state: TrainState, quantized: Callable[[Any, Any], Any] | None) -> tuple[Any, Any]:
    """Params and stats that are evaluated and kept: their averages if there are such, rounded if trained so."""
    params, stats = (state.params, state.stats) if state.average is None else state.average
    return (params if quantized is None else quantized(params, stats)), stats


def evaluation_batches(config: Config, source: Source, damaged: Damaged) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of the test images, prepared as the experiment says; see `eval_batches`."""
    batches = eval_batches(
        source,
        batch_size=config.eval_batch_size,
        image_size=config.image_size,
        in_channels=config.in_channels,
        resize_mode=config.resize_mode,
        eval_resize=config.eval_resize,
        damaged=damaged,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.workers,
    )
    return out_of_reach(batches, config.workers)


def _given(config, workdir, mesh) -> tuple[TrainState, str]:
    model = model_config(config)
    state = newest_state(config, workdir, mesh)
    if state is not None:
        return state, f"checkpoint of step {int(state.step)}"
    if not config.init_weights:
        raise InputError(
            f"there is nothing to evaluate: {workdir} holds no checkpoint, and init_weights names no weights"
        )
    saved, _ = weights.read_config(weights.find(config.init_weights))
    if saved.num_classes != model.num_classes:
        raise InputError(
            f"the weights that init_weights names know {saved.num_classes} classes, but num_classes is "
            f"{model.num_classes}: a new head has to be trained before it is evaluated"
        )
    # The number of steps an epoch shapes no state.
    optimizer = make_optimizer(config, steps_per_epoch=1)
    return load_state(model, optimizer, config.init_weights, mesh), finetune.describe(config.init_weights, model)


def _watched(batches, display, size) -> Iterator[dict[str, np.ndarray]]:
    started = time.monotonic()
    for done, batch in enumerate(batches):
        yield batch
        speed = (done + 1) * size / (time.monotonic() - started)
        display.step(done + 1, "evaluating", f"{speed:.0f} images/s")
