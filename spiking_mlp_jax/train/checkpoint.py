"""Checkpoints in the workdir: the only file that knows Orbax."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.train.config import in_todays_words
from spiking_mlp_jax.train.state import TrainState

# These fields change what is shown and kept, not what is computed: a run may be resumed with other values.
FREE_FIELDS = (
    "data_dir",
    "eval_batch_size",
    "log_every",
    "checkpoint_every",
    "keep",
    "max_steps",
    "dry_run",
    "eval_only",
    "profile_steps",
    "compilation_cache",
    "host_memory",
)


class Restored(NamedTuple):
    """A checkpoint's contents: the state, and the dicts given to `save` as `data` and `progress`."""

    state: TrainState
    data: dict[str, Any]
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, written in the background; keeps the newest and the best.

    Args:
        folder: where they are; made when missing.
        config: the experiment as JSON types, saved along and compared when restoring.
        keep: how many of the newest are kept, besides the one with the best evaluation accuracy.
    """

    def __init__(self, folder: str | os.PathLike[str], config: dict[str, Any], keep: int):
        self.folder = Path(folder).absolute()
        self.config = config
        policies = checkpoint_managers
        newest = policies.LatestN(keep)
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["accuracy"], n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best]), create=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "run"))

    def save(
        self, state: TrainState, data: dict[str, Any], progress: dict[str, Any], accuracy: float | None = None
    ) -> None:
        """Starts writing a checkpoint; returns as soon as the state may be overwritten.

        Args:
            state: the training state.
            data: state of the data iterator, JSON values.
            progress: what the loop itself remembers, JSON values.
            accuracy: of the evaluation of this state, None when it was not evaluated.
        """
        run = {"config": self.config, "data": data, "progress": progress}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(state=ocp.args.StandardSave(_flat(state)), run=ocp.args.JsonSave(run)),
            metrics=None if accuracy is None else {"accuracy": accuracy},
            force=True,
        )

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint, None when there is none.

        Args:
            abstract: shapes, dtypes and shardings of the state, as jax.ShapeDtypeStruct.

        Raises:
            InputError: the checkpoint belongs to another configuration (the sentence names the fields) or is
                damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        where = self.folder / str(step)
        try:
            run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
            self._check_config(run["config"])
            args = ocp.args.Composite(state=ocp.args.StandardRestore(_flat(abstract)))
            flat = self._manager.restore(step, args=args)["state"]
            data, progress = run["data"], run["progress"]
        except InputError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"checkpoint {where} cannot be read ({reason}): delete that folder to resume from an earlier one"
            ) from error
        leaves = [flat[name] for name in _flat(abstract)]
        return Restored(jax.tree.unflatten(jax.tree.structure(abstract), leaves), data, progress)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check_config(self, saved: dict[str, Any]) -> None:
        saved, config = in_todays_words(saved), in_todays_words(self.config)
        names = sorted({*config, *saved} - {*FREE_FIELDS})
        different = [
            f"{name} ({_shown(saved, name)} there, {_shown(config, name)} now)"
            for name in names
            if config.get(name) != saved.get(name)
        ]
        if different:
            raise InputError(
                f"{self.folder.parent} holds a run of another configuration, which differs in "
                f"{', '.join(different)}: take another workdir, or the same values"
            )


def _shown(config, name):
    return json.dumps(config[name]) if name in config else "missing"


def _flat(state: TrainState) -> dict[str, Any]:
    # Names instead of the tree itself: no part of the file format depends on Flax's or Optax's containers.
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
