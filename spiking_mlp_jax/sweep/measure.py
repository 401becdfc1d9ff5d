"""Measurements of a trained run, of its network after the last epoch.

The trainer saves the weights of the best epoch, chosen on the test set; over several runs that flatters those that
fluctuate. The last epoch's weights come from the checkpoint and are saved as `final/`, a weights folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import UInt8

from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.pipeline import network_batches
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.deploy import artifact
from spiking_mlp_jax.deploy.compile import compile
from spiking_mlp_jax.deploy.cost import cost
from spiking_mlp_jax.deploy.engine import Engine
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP, mean_logits
from spiking_mlp_jax.models.topology import neuron_counts
from spiking_mlp_jax.train.config import Config, model_config, resize_mode
from spiking_mlp_jax.train.evaluate import evaluated, saved_state
from spiking_mlp_jax.train.qat import make_quantized
from spiking_mlp_jax.train.sharding import make_mesh

FINAL, COMPILED = "final", "final.smlp"
COST_IMAGES = 1000
TIMED_IMAGES = 64
# A latency is the median over as many calls as fit into a second, within these bounds.
SECONDS, LEAST_CALLS, MOST_CALLS = 1.0, 20, 1000


def measure(config: Config, workdir: Path, test_time_steps: Sequence[int]) -> dict[str, Any]:
    """Measures everything but latency of a finished run. Writes `final/` and, if the network compiles, `final.smlp`.

    Args:
        config: of the run.
        workdir: of the run.
        test_time_steps: numbers of time steps to test the network with.

    Returns:
        JSON values. step; test_images; accuracy, of the last epoch; best_accuracy and best_step, of the best one;
        parameters; firing_rate, mean over all neurons and steps; synaptic_operations, dense_operations: per image, see
        `deploy.cost`, over the first `cost_images` test images; by_time_steps {steps: accuracy or None} and
        not_by_time_steps {steps: why}; integer_accuracy, None if the network cannot be compiled, and not_integer, why.

    Raises:
        InputError: the training is not finished, or its files or data are corrupt.
    """
    folder = save_final(config, workdir)
    model, _ = weights.load(folder)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    best = weights.read_config(workdir / "weights")[1]["result"]
    counts, rates = neuron_counts(model.config), evaluation["firing_rates"]
    images = (batch["image"][batch["mask"]] for batch in _test_batches(config))
    spent = cost(model, _first(images, COST_IMAGES))
    by_steps, without = accuracy_by_time_steps(model, _test_batches(config), test_time_steps)
    integer, no_integer = _integer_accuracy(config, workdir)
    return {
        "step": evaluation["step"],
        "test_images": evaluation["images"],
        "accuracy": evaluation["accuracy"],
        "best_accuracy": best["accuracy"],
        "best_step": best["step"],
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "firing_rate": sum(rates[name] * count for name, count in counts.items()) / sum(counts.values()),
        "synaptic_operations": spent.total.effective,
        "dense_operations": spent.total.Dense,
        "cost_images": spent.images,
        "by_time_steps": {str(steps): by_steps.get(steps) for steps in test_time_steps},
        "not_by_time_steps": {str(steps): why for steps, why in without.items()},
        "integer_accuracy": integer,
        "not_integer": no_integer,
    }


def save_final(config: Config, workdir: Path) -> Path:
    """Saves the weights that a run evaluated last, from its newest checkpoint, and returns their folder."""
    mesh = make_mesh(fsdp=config.fsdp)
    found = saved_state(config, epath.Path(workdir), mesh)
    evaluation = workdir / "evaluation.json"
    if found is None or not evaluation.is_file():
        raise InputError(f"{workdir} has no finished training; run the sweep again")
    state, _ = found
    found = json.loads(evaluation.read_text())
    if found["step"] != int(state.step):
        raise InputError(f"{workdir}: the checkpoint is of step {int(state.step)}, the evaluation of {found['step']}")
    shape = model_config(config)
    model = nnx.merge(_graphdef(shape), *jax.device_get(evaluated(state, make_quantized(config, shape))), copy=True)
    meta = {"data": weights.read_config(workdir / "weights")[1]["data"]}
    meta["result"] = {key: found[key] for key in ("step", "accuracy", "loss", "images")}
    weights.save(workdir / FINAL, model, meta)
    return workdir / FINAL


def with_time_steps(model: SpikingMLP, steps: int) -> SpikingMLP:
    """The same weights with another number of time steps, in evaluation mode.

    Running averages stay those of the trained steps. A network is causal: fewer steps equal the first of more.

    Args:
        model: any network.
        steps: from 1 on.

    Raises:
        InputError: more steps than were trained, with norm="tebn", which learns a scale for each step.
    """
    config = dataclasses.replace(model.config, time_steps=steps)
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    if config.norm == "tebn":
        if steps > model.config.time_steps:
            raise InputError(
                f'norm="tebn" has learned a scale for each of its {model.config.time_steps} time steps, and none for '
                "later ones"
            )
        flat = nnx.to_flat_state(params)
        params = nnx.from_flat_state(
            [(path, v.replace(v[...][..., :steps]) if path[-1] == "step_scale" else v) for path, v in flat]
        )
    other = nnx.merge(_graphdef(config), params, stats, copy=True)
    other.eval()
    other.pixels = model.pixels
    return other


def accuracy_by_time_steps(
    model: SpikingMLP, batches: Iterable[Mapping[str, np.ndarray]], steps: Sequence[int]
) -> tuple[dict[int, float], dict[int, str]]:
    """Accuracy of a network tested with other numbers of time steps than it was trained with.

    One pass with the largest number gives all: the score of a class is the mean of its logits so far.

    Args:
        model: with `pixels`, as `weights.load` gives it.
        batches: {"image" uint8 [B, H, W, C], "label" [B], "mask" bool [B]}.
        steps: numbers of time steps.

    Returns:
        {steps: accuracy in [0, 1]}, and {steps: why it is missing} for the others.
    """
    networks, without = {}, {}
    for count in sorted(steps):
        try:
            networks[count] = with_time_steps(model, count)
        except InputError as error:
            without[count] = str(error)
    if not networks:
        return {}, without
    longest = max(networks)
    run = _jitted(networks[longest], lambda logits: jnp.cumsum(logits, 0))
    correct, images = np.zeros(longest, np.int64), 0
    for batch in batches:
        classes = np.asarray(run(batch["image"])).argmax(-1)  # [T, B]
        correct += np.sum((classes == batch["label"]) & batch["mask"], 1)
        images += int(batch["mask"].sum())
    return {count: int(correct[count - 1]) / images for count in networks}, without


def measure_latency(config: Config, workdir: Path) -> dict[str, Any]:
    """Time per image of the float network and of the compiled one, on this machine under its present load.

    Args:
        config: of the run.
        workdir: of a run that `measure` has measured.

    Returns:
        JSON values, in milliseconds per image: float_ms and float_batch_ms, integer_ms and integer_batch_ms (None if
        the network is not compiled): the median over calls with one image and with `batch` images. cores: usable ones;
        load: mean number of running processes in the minute before; processor.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    model, _ = weights.load(workdir / FINAL)
    images = np.concatenate(list(_first((x["image"][x["mask"]] for x in _test_batches(config)), TIMED_IMAGES)))
    run = _jitted(model, mean_logits)
    found: dict[str, Any] = {"float_ms": _median_ms(lambda x: np.asarray(run(x)), images, 1)}
    found["float_batch_ms"] = _median_ms(lambda x: np.asarray(run(x)), images, len(images))
    found |= {"integer_ms": None, "integer_batch_ms": None}
    if (workdir / COMPILED).exists():
        engine = Engine(workdir / COMPILED)
        found["integer_ms"] = _median_ms(engine.predict, images, 1)
        found["integer_batch_ms"] = _median_ms(engine.predict, images, len(images))
    return {**found, "batch": len(images), "cores": _cores(), "load": load, "processor": _processor()}


def _graphdef(config):
    return nnx.split(nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0))), nnx.Param, nnx.BatchStat)[0]


def _jitted(model: SpikingMLP, of_logits: Callable[[Any], Any]) -> Callable[[np.ndarray], jax.Array]:
    """A compiled function of uint8 images."""
    graphdef, variables = nnx.split(model)
    pixels: Any = model.pixels

    @jax.jit
    def run(variables, images):
        logits = nnx.merge(graphdef, variables, copy=True)(normalize(images, pixels.mean, pixels.std))
        return of_logits(logits)

    return lambda images: run(variables, images)


def _integer_accuracy(config: Config, workdir: Path) -> tuple[float | None, str | None]:
    """Compiles and saves the network; its accuracy on the test images, or why it cannot be compiled."""
    (workdir / COMPILED).unlink(missing_ok=True)
    try:
        net = compile(workdir / FINAL, config.weight_bits or 8, data_dir=config.data_dir)
    except InputError as error:
        return None, str(error)
    artifact.save(net, workdir / COMPILED)
    engine = Engine(net)
    correct = images = 0
    for batch in _test_batches(config):
        mask = batch["mask"]
        correct += int(np.sum(engine.predict(batch["image"][mask]).argmax(1) == batch["label"][mask]))
        images += int(mask.sum())
    return correct / images, None


def _test_batches(config: Config) -> Iterable[dict[str, np.ndarray]]:
    source = open_source(config.dataset, "test", config.data_dir or None)
    damaged = Damaged(source, config.max_bad_images, print)
    resizing = {"resize_mode": resize_mode(config), "eval_resize": config.eval_resize}
    return network_batches(source, config, resizing, config.eval_batch_size, damaged)


def _first(batches: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The first `count` images, in batches."""
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def _median_ms(run: Callable[[UInt8[np.ndarray, "B H W C"]], Any], images: np.ndarray, size: int) -> float:
    """Milliseconds per image: the median over calls with `size` images each, which cycle through all images."""
    parts = [images[i : i + size] for i in range(0, len(images) - size + 1, size)]
    for part in parts[:3]:
        run(part)  # compiles and warms the caches
    seconds: list[float] = []
    # An event-driven network is slower on some images than on others: time all of them.
    least = max(LEAST_CALLS, len(parts))
    while len(seconds) < least or (sum(seconds) < SECONDS and len(seconds) < MOST_CALLS):
        started = time.perf_counter()
        run(parts[len(seconds) % len(parts)])
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds) / size


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
