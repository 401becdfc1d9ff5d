"""Steps whose loss or gradient is NaN or infinite: they change nothing, and can be reproduced."""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spiking_mlp_jax.errors import NonFiniteError
from spiking_mlp_jax.train.logging import to_json
from spiking_mlp_jax.train.state import TrainState
from spiking_mlp_jax.utils.files import Lines, as_path, write_whole

RECORDS = "nonfinite.jsonl"
# Steps skipped in a row after which a run gives up.
MOST_IN_A_ROW = 50


class Guard(NamedTuple):
    """Makes a training step change nothing when its loss or gradient is not finite.

    Attributes:
        sound: bool scalar; False undoes the step whatever it computes.
        skip: bool scalar; whether a step that is undone counts.
    """

    sound: Any
    skip: Any


def keep_if_sound(
    state: TrainState, new: TrainState, metrics: dict[str, jax.Array], guard: Guard
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Undoes a training step whose loss or norm of the gradient is not finite.

    The host learns of a bad step one step late. To stop at it, the metric "sound" of each step is the `guard.sound` of
    the next: after a bad one all later ones are undone as well, and the state stays the one before the bad step.
    Stopping and skipping are one program, so that the choice does not change rounding.

    Args:
        state: before the step.
        new: after it.
        metrics: its "loss" and "grad_norm", scalars.
        guard: see there.

    Returns:
        one of the two states, and the metrics with "sound".
    """
    sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]) & guard.sound
    kept = jax.tree.map(lambda after, before: jnp.where(sound, after, before), new, state)
    kept = kept.replace(step=jnp.where(sound | guard.skip, new.step, state.step))
    return kept, {**metrics, "sound": sound}


def batch_file(workdir: str | os.PathLike[str], step: int, process: int) -> Any:
    """Where `record` writes a process's share of a batch."""
    return as_path(workdir) / "nonfinite" / f"step_{step}_process_{process}.npz"


def record(
    workdir: str | os.PathLike[str],
    step: int,
    values: dict[str, float],
    records: list[dict[str, Any]],
    batch: dict[str, np.ndarray],
) -> None:
    """Records a bad step: a line in WORKDIR/nonfinite.jsonl, and its images.

    Args:
        workdir: the run's folder.
        step: the step.
        values: its metrics.
        records: from `batch_records`.
        batch: {"image", "label"}, this process's share of the step's input.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **batch)
    write_whole(batch_file(workdir, step, jax.process_index()), buffer.getvalue())
    if jax.process_index() == 0:
        # As text, because JSON has no NaN.
        named = {name: value if np.isfinite(value) else str(value) for name, value in values.items()}
        Lines(as_path(workdir) / RECORDS).add(to_json({"step": step, **named, "records": records}))


def stopped(
    workdir: str | os.PathLike[str], step: int, values: dict[str, float], records: list[dict]
) -> NonFiniteError:
    """The error that ends a run at a bad step; arguments as for `record`."""
    again = f'"python -m spiking_mlp_jax.train.replay {workdir}" recomputes it and reports where it goes wrong, '
    again = again if jax.process_count() == 1 else ""  # it needs the images of a single process
    shown = ", ".join(str(entry.get("path", entry["index"])) for entry in records[:3])
    return NonFiniteError(
        f"the loss is {values['loss']} and the norm of its gradient {values['grad_norm']} at step {step}, whose "
        f"{len(records)} images ({shown}, ...) are listed in {as_path(workdir) / RECORDS}; the state before that step "
        f"is saved: {again}"
        "--config.on_nonfinite=skip continues without it; a lower learning_rate or a clip_norm may prevent it"
    )


def hopeless(workdir: str | os.PathLike[str], step: int, values: dict[str, float]) -> NonFiniteError:
    """The error that ends a run after `MOST_IN_A_ROW` skipped steps; arguments as for `record`."""
    return NonFiniteError(
        f"{MOST_IN_A_ROW} steps in a row up to step {step} were skipped, the last with loss {values['loss']} and norm "
        f"of its gradient {values['grad_norm']}, see {as_path(workdir) / RECORDS}: the weights have "
        "diverged; start from an earlier checkpoint, or again with a lower learning_rate or a clip_norm"
    )
