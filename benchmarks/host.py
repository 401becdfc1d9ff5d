"""What the host adds to a training step: a run whose network takes no time, against the bare loop over its batches.

    python -m benchmarks.host                 # 8 images of 8 x 8 x 1 and 64 of 32 x 32 x 3, on one core

Both get their batches from the same pipeline, copy them to the device and call the same compiled step, which only
counts. They alternate; a round's figure is the mean time from step to step after the first 100, the table's the median
of the rounds.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CORE = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})  # before JAX starts its threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.report import head, line, make_parser  # noqa: E402
from spiking_mlp_jax.cli.options import positive  # noqa: E402
from spiking_mlp_jax.data.pipeline import train_batches  # noqa: E402
from spiking_mlp_jax.data.sources import array_sources  # noqa: E402
from spiking_mlp_jax.train import loop  # noqa: E402
from spiking_mlp_jax.train.config import augmentation, default_config  # noqa: E402
from spiking_mlp_jax.train.sharding import make_mesh, replicated, shard_batch  # noqa: E402

WARM_UP = 100  # steps
CASES = ((8, 8, 1), (64, 32, 3))  # images a batch, their side, channels


class Steps:
    """A training step that takes no time, and when it was called."""

    def __init__(self):
        self.calls: list[float] = []
        self._step = jax.jit(self._count, donate_argnums=0)

    @staticmethod
    def _count(state, batch, guard):
        zero = jnp.zeros(()) + 0 * batch["label"][0]
        outputs = {"loss": zero, "accuracy": zero, "grad_norm": zero, "sound": jnp.bool_(True)}
        return dataclasses.replace(state, step=state.step + 1), outputs

    def __call__(self, state, batch, guard):
        self.calls.append(time.perf_counter())
        return self._step(state, batch, guard)

    def milliseconds(self) -> float:
        """Mean time from step to step."""
        calls = self.calls[WARM_UP:]
        return 1000 * (calls[-1] - calls[0]) / (len(calls) - 1)


def main() -> int:
    parser = make_parser(__doc__, "host")
    parser.add_argument("--turns", type=positive, default=7, help="rounds (7)")
    parser.add_argument("--steps", type=positive, default=500, help=f"steps a round, besides {WARM_UP} (500)")
    args = parser.parse_args()
    steps = WARM_UP + args.steps
    print(f"{args.turns} rounds of {args.steps} steps on core {CORE} of {os.cpu_count()}\n")
    print(head(["batch", "trainer, ms a step", "bare loop, ms a step", "the trainer adds, ms"]))
    for batch, side, channels in CASES:
        found = [measure(batch, side, channels, steps) for _ in range(args.turns + 1)][1:]
        added = statistics.median(ours - bare for ours, bare in found)
        ours, bare = (statistics.median(column) for column in zip(*found, strict=True))
        name = f"{batch} images of {side} x {side} x {channels}"
        print(line([name, f"{ours:.2f}", f"{bare:.2f}", f"{added:.2f}"]), flush=True)
    return 0


def measure(batch: int, side: int, channels: int, steps: int) -> tuple[float, float]:
    """Milliseconds a step of the trainer and of the bare loop."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch * steps, side, side, channels), np.uint8)
    labels = np.arange(len(images), dtype=np.int32) % 10
    config: Any = default_config()
    config.update(
        image_size=side, in_channels=channels, num_classes=10, patch_size=4, dim=4, depths=(1,), time_steps=1,
        mean=(0.5,) * channels, std=(0.25,) * channels, flip=True, batch_size=batch, eval_batch_size=batch, epochs=1,
        compilation_cache="off",
    )  # fmt: skip
    trainer, bare = Steps(), Steps()
    loop.make_train_step = lambda *_: trainer
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        shown, sys.stdout = sys.stdout, nowhere
        try:
            loop.fit(config, Path(folder), train_data=(images, labels), test_data=(images[:batch], labels[:batch]))
        finally:
            sys.stdout = shown
    source = array_sources((images, labels), None, 10)["train"]
    mesh = make_mesh()
    state, guard = jax.device_put((Counter(jnp.int32(0)), jnp.bool_(True)), replicated(mesh))
    batches = train_batches(
        source, batch_size=batch, image_size=side, in_channels=channels, augment=augmentation(config), seed=0, epochs=1
    )
    for item in batches:
        state, _ = bare(state, shard_batch(item, mesh), guard)
    jax.block_until_ready(state)
    return trainer.milliseconds(), bare.milliseconds()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Counter:
    """The bare loop's state."""

    step: jax.Array


if __name__ == "__main__":
    sys.exit(main())
