"""Compile time, step time and peak temporaries of one training step, with and without remat.

    python benchmarks/step.py                       # MLP-SPE-T at 224 px, B=4, T=4, both ways
    python benchmarks/step.py --variant mlp_spe_s --batch 8 --time-steps 2 --runs 5

The step is forward, backward and SGD with momentum on random images, jitted with donated state. Temporaries are what
the compiler reserves beside arguments and results (`memory_analysis`); times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from spiking_mlp_jax import ModelConfig, SpikingMLP


def make_step(config: ModelConfig):
    """A jitted training step `(params, stats, opt_state, images, labels) -> the same and the loss`, and its state."""
    graphdef, params, stats = nnx.split(SpikingMLP(config, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(params, stats, opt_state, images, labels):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            model.train()
            scores = jnp.mean(model(images), 0)
            value = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
            return value, nnx.state(model, nnx.BatchStat)

        (value, new_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), new_stats, opt_state, value

    return jax.jit(step, donate_argnums=(0, 1, 2)), (params, stats, optimizer.init(params))


def measure(config: ModelConfig, batch: int, runs: int) -> tuple[float, float, float]:
    """Seconds to trace and compile, median seconds a step, GB of temporaries."""
    step, state = make_step(config)
    key = jax.random.key(0)
    images = jax.random.normal(key, (batch, config.image_size, config.image_size, config.in_channels))
    labels = jax.random.randint(key, (batch,), 0, config.num_classes)
    start = time.perf_counter()
    compiled = step.lower(*state, images, labels).compile()
    compile_seconds = time.perf_counter() - start
    temporaries = getattr(compiled.memory_analysis(), "temp_size_in_bytes", float("nan")) / 1e9
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        *state, _ = jax.block_until_ready(compiled(*state, images, labels))
        seconds.append(time.perf_counter() - start)
    return compile_seconds, statistics.median(seconds[1:]), temporaries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="mlp_spe_t", help="network of the paper")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--time-steps", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--runs", type=int, default=3, help="timed steps, after one that is not counted")
    args = parser.parse_args()
    # A cached program would make the compile time meaningless.
    jax.config.update("jax_enable_compilation_cache", False)
    table = Table(
        title=f"{args.variant}, {args.image_size} px, B={args.batch}, T={args.time_steps}, "
        f"{jax.devices()[0].device_kind}"
    )
    for column in ("remat", "compile, s", "step, s", "temporaries, GB"):
        table.add_column(column, justify="right")
    for remat in (False, True):
        config = ModelConfig.variant(
            args.variant,
            image_size=args.image_size,
            time_steps=args.time_steps,
            remat=remat,
            dtype=args.dtype,
        )
        compile_seconds, step_seconds, temporaries = measure(config, args.batch, args.runs)
        table.add_row(str(remat), f"{compile_seconds:.1f}", f"{step_seconds:.2f}", f"{temporaries:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
