"""Methods to adapt a trained network to another image size: accuracy and firing rates, before and after training.

    python -m benchmarks.resample --size 48
    python -m benchmarks.resample --size 48 --steps 60

The shipped Fashion-MNIST network, trained at 32 px, gets the same test images resized to `--size`. Columns: test
accuracy with the resampled running averages; mean difference of the layers' firing rates from those at 32 px, in
points; test accuracy after some training batches have updated the running averages only or, with `--steps`, after that
many training steps. Results are in docs/finetuning.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from benchmarks.report import make_parser
from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.data.sources import Source, open_source
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.adapt import adapt, resize_matrix
from spiking_mlp_jax.train.config import default_config
from spiking_mlp_jax.train.evaluate import evaluate
from spiking_mlp_jax.train.sharding import make_mesh, replicated
from spiking_mlp_jax.train.state import TrainState
from spiking_mlp_jax.train.step import make_eval_step, make_train_step

BATCH = 100
RECALIBRATION = 40  # batches; the old running averages then count 0.9 ** 40 = 1.5 %


def images_of(source: Source, count: int, size: int) -> list[dict[str, np.ndarray]]:
    """The first images of a source, padded to 32 px as in training, resized, in batches."""
    records = [source[i] for i in range(count)]
    pixels = np.stack([np.pad(record["image"], ((2, 2), (2, 2), (0, 0))) for record in records]).astype(np.float32)
    pixels = np.asarray(jax.image.resize(jnp.asarray(pixels), (count, size, size, 1), "linear"))
    pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    labels = np.array([record["label"] for record in records], np.int32)
    return [
        {"image": pixels[i : i + BATCH], "label": labels[i : i + BATCH], "mask": np.ones(BATCH, bool)}
        for i in range(0, count, BATCH)
    ]


def mixed(scale: float, wanted: Callable[..., bool], state: Any) -> Any:
    """A state whose variables are scaled where `wanted(path)`."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(p, v.replace(v[...] * scale) if wanted(p) else v) for p, v in flat])


def is_mixing(path, *names) -> bool:
    """Whether a path is that of a row or column mixing's variable with one of these names."""
    return ("height" in path or "width" in path) and path[-1] in names


def methods(network: SpikingMLP, model: ModelConfig) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Functions that return params and stats, by name."""
    ratio = model.image_size / network.config.image_size

    def fresh():
        _, params, stats = nnx.split(SpikingMLP(model, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
        return params, stats

    def by(method):
        params, stats = adapt(network, model, 0, functools.partial(resize_matrix, method=method))
        # Cubic interpolation overshoots, and a variance must not be negative.
        flat = [(p, v.replace(jnp.maximum(v[...], 1e-4)) if p[-1] == "var" else v) for p, v in nnx.to_flat_state(stats)]
        return params, nnx.from_flat_state(flat)

    def scaled(factor, mean):
        params, stats = adapt(network, model, 0)
        params = mixed(factor, lambda path: is_mixing(path, "kernel"), params)
        return params, mixed(factor, lambda path: is_mixing(path, "mean"), stats) if mean else stats

    def reinitialized():
        # Only variables whose shape depends on the grid.
        trained = [dict(nnx.to_flat_state(state)) for state in nnx.split(network, nnx.Param, nnx.BatchStat)[1:]]
        parts: list[Any] = []
        for drawn, old in zip(fresh(), trained, strict=True):
            pairs = [(p, old[p] if old[p].shape == v.shape else v) for p, v in nnx.to_flat_state(drawn)]
            parts.append(nnx.from_flat_state(pairs))
        return parts[0], parts[1]

    return {
        "linear, rows keep their sums": lambda: adapt(network, model, 0),
        "cubic, rows keep their sums": lambda: by("cubic"),
        "nearest, rows keep their sums": lambda: by("nearest"),
        "linear, sums grow with the side (like an image)": lambda: scaled(ratio, False),
        "linear, sums grow with the side's root": lambda: scaled(ratio**0.5, True),
        "mixing and token norms reinitialized": reinitialized,
        "everything reinitialized": fresh,
    }


class Bench:
    """Data, steps and evaluation shared by all methods."""

    def __init__(self, network: SpikingMLP, model: ModelConfig, mesh: Mesh, test, train):
        self.mesh, self.test, self.train = mesh, test, train
        pixels = network.pixels
        assert pixels is not None
        self.graphdef = nnx.split(
            nnx.eval_shape(lambda: SpikingMLP(model, rngs=nnx.Rngs(0))), nnx.Param, nnx.BatchStat
        )[0]
        self.eval_step = make_eval_step(self.graphdef, pixels.mean, pixels.std, mesh)
        config: Any = default_config()
        config.update(mean=tuple(pixels.mean), std=tuple(pixels.std))
        self.still, self.moving = (optax.sgd(rate, 0.9 if rate else None) for rate in (0.0, 0.02))
        self.still_step, self.train_step = (
            make_train_step(config, self.graphdef, optimizer, mesh) for optimizer in (self.still, self.moving)
        )

    def evaluate(self, params, stats):
        params, stats = jax.device_put((params, stats), replicated(self.mesh))
        return evaluate(self.eval_step, params, stats, self.test, self.mesh)

    def steps(self, params, stats, count: int, rate: bool):
        """Params and stats after some training steps; with `rate` False only stats change."""
        optimizer, step = (self.moving, self.train_step) if rate else (self.still, self.still_step)
        state = TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))
        state = jax.device_put(state, replicated(self.mesh), may_alias=False)
        for i in range(count):
            batch = {name: self.train[i % len(self.train)][name] for name in ("image", "label")}
            state, _ = step(state, batch)
        return state.params, state.stats


def main() -> None:
    parser = make_parser(__doc__, "resample")
    parser.add_argument("--size", type=int, default=48, help="side of the images in pixels, a multiple of 8")
    parser.add_argument("--images", type=int, default=2000, help="test images, a multiple of 100")
    parser.add_argument("--steps", type=int, default=0, help="training steps of 100 images")
    parser.add_argument("--only", nargs="*", default=[""], help="prefixes of the methods to compare")
    chosen = parser.parse_args()
    network, _ = weights.load(weights.find("fashion_mnist"))
    mesh = make_mesh(jax.devices()[:1])
    test, train = (open_source("fashion_mnist", split) for split in ("test", "train"))
    at_home = Bench(network, network.config, mesh, images_of(test, chosen.images, network.config.image_size), [])
    params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)[1:]
    home = at_home.evaluate(params, stats)
    print(f"as trained, {network.config.image_size} px: {100 * home.accuracy:.2f} % of {home.images} test images")

    model = dataclasses.replace(network.config, image_size=chosen.size)
    count = (chosen.steps or RECALIBRATION) * BATCH
    bench = Bench(
        network, model, mesh, images_of(test, chosen.images, chosen.size), images_of(train, count, chosen.size)
    )
    last = f"{chosen.steps} steps" if chosen.steps else "averages updated"
    print(f"{f'at {chosen.size} px':48}{'at once':>10}{'rates off':>11}{last:>18}", flush=True)
    for name, method in methods(network, model).items():
        if not name.startswith(tuple(chosen.only)):
            continue
        params, stats = method()
        first = bench.evaluate(params, stats)
        off = 100 * np.mean([abs(rate - home.firing_rates[layer]) for layer, rate in first.firing_rates.items()])
        params, stats = bench.steps(params, stats, chosen.steps or RECALIBRATION, bool(chosen.steps))
        later = bench.evaluate(params, stats)
        print(
            f"{name:48}{100 * first.accuracy:8.1f} %{off:11.1f}{100 * later.accuracy:16.1f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
