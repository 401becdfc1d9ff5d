"""Recomputes the training step that stopped a run, and reports where it stops being finite.

    python -m spiking_mlp_jax.train.replay WORKDIR

It needs only the workdir, not the data set, and changes nothing in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.train.config import default_config, model_config
from spiking_mlp_jax.train.evaluate import saved_state
from spiking_mlp_jax.train.loss import make_loss
from spiking_mlp_jax.train.mix import make_mix
from spiking_mlp_jax.train.nonfinite import RECORDS, batch_file
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.qat import make_quantized
from spiking_mlp_jax.train.sharding import make_mesh, shard_batch
from spiking_mlp_jax.train.state import abstract_state
from spiking_mlp_jax.train.step import make_train_step
from spiking_mlp_jax.utils.files import as_path, read_lines


@dataclasses.dataclass(frozen=True)
class Replay:
    """Result of a step.

    Attributes:
        step: the step.
        loss: its loss, penalty included.
        grad_norm: global norm of its gradient.
        variables: names of the parameters and running averages that are not finite before it.
        layers: names of the intermediates, as `SpikingMLP` passes them to `observe`, with values that are not finite.
        gradients: names of the parameters whose gradient is not finite.
        images: the records, as `batch_records` gives them, of the images whose logits are not finite.
    """

    step: int
    loss: float
    grad_norm: float
    variables: list[str]
    layers: list[str]
    gradients: list[str]
    images: list[dict[str, Any]]

    def lines(self) -> list[str]:
        """The same as text."""
        text = [f"step {self.step}: loss {self.loss}, norm of the gradient {self.grad_norm}"]
        for what, names in (
            ("variables that are not finite before the step", self.variables),
            ("layers with values that are not finite", self.layers),
            ("parameters with a gradient that is not finite", self.gradients),
            ("images with logits that are not finite", [str(e.get("path", e["index"])) for e in self.images]),
        ):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            text.append(f"{what}: {f'{len(names)} ({shown})' if names else 'none'}")
        return text


def replay(workdir: str | os.PathLike[str]) -> Replay:
    """Recomputes the last step at which `on_nonfinite` stopped a run, from the saved state and images.

    Args:
        workdir: of a run in a single process.

    Raises:
        InputError: the run was not stopped by a step, or the checkpoint or images of the step are gone.
    """
    workdir = as_path(workdir)
    found = read_lines(workdir / RECORDS)
    if not found:
        raise InputError(f"no step of {workdir} had a loss that is not finite: there is no {RECORDS} to replay")
    entry = json.loads(found[-1])
    step, file = entry["step"], batch_file(workdir, entry["step"], 0)
    config: Any = default_config()
    config.update(json.loads((workdir / "config.json").read_text()))
    model, optimizer, mesh = model_config(config), make_optimizer(config, 1), _mesh(config)
    restored = saved_state(config, workdir, mesh, step - 1) if file.exists() else None
    if restored is None:
        raise InputError(
            f"step {step} of {workdir} cannot be replayed: checkpoints/{step - 1} or {file} is gone, because the run "
            "was resumed"
        )
    state, graphdef = restored[0], abstract_state(model, optimizer)[0]
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        batch = {name: arrays[name] for name in arrays.files}
    if len(batch["label"]) != len(entry["records"]):
        raise InputError(f"step {step} of {workdir} had several processes: replay needs a run of a single one")

    quantized, mix = make_quantized(config, model), make_mix(config)
    loss = make_loss(config)

    def forward(params):
        params = params if quantized is None else quantized(params, state.stats)
        network = nnx.merge(graphdef, params, state.stats, copy=True)
        network.train()
        images, labels = normalize(jnp.asarray(batch["image"]), config.mean, config.std), jnp.asarray(batch["label"])
        if mix is not None:
            images, labels = mix(state.step, images, labels)
        logits, layers = network(images, observe=lambda name, value: jnp.isfinite(value).all())
        return loss(logits, labels), (logits, layers)

    grads, (logits, layers) = jax.jit(jax.grad(forward, has_aux=True))(state.params)
    bad: Any = ~np.isfinite(np.asarray(logits, np.float32)).all((0, 2))
    variables = _not_finite(state.params) + _not_finite(state.stats)
    # The step itself comes last: it donates the state.
    train_step = make_train_step(config, graphdef, optimizer, mesh)
    _, metrics = train_step(state, shard_batch(batch, mesh))
    return Replay(
        step,
        float(metrics["loss"]),
        float(metrics["grad_norm"]),
        variables,
        [name for name, finite in layers.items() if not np.all(finite)],
        _not_finite(grads),
        [record for record, is_bad in zip(entry["records"], bad, strict=True) if is_bad],
    )


def _mesh(config):
    # As many devices as the run has on the same machine: with norm_statistics="device" they are part of the step.
    devices = jax.devices()
    return make_mesh(devices if config.batch_size % (len(devices) * config.accumulate) == 0 else devices[:1])


def _not_finite(tree):
    leaves = jax.tree.leaves_with_path(tree)
    names = ((jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves)
    return [name for name, leaf in names if not np.isfinite(np.asarray(leaf, np.float64)).all()]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m spiking_mlp_jax.train.replay WORKDIR")
    try:
        print("\n".join(replay(sys.argv[1]).lines()))
    except InputError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(error.exit_code)
