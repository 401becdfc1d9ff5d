"""Checkpoints in the workdir: the only file that knows Orbax."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from spiking_mlp_jax.errors import InputError, StorageError
from spiking_mlp_jax.train.config import in_todays_words
from spiking_mlp_jax.train.manifest import find_damage, write_manifest
from spiking_mlp_jax.train.state import TrainState
from spiking_mlp_jax.utils.storage import as_path, is_remote, shortly, unreachable

# These fields change what is shown and kept, not what is computed: a run may be resumed with other values.
FREE_FIELDS = (
    "data_dir",
    "max_bad_images",
    "eval_batch_size",
    "log_every",
    "checkpoint_every",
    "keep",
    "max_steps",
    "on_nonfinite",
    "dry_run",
    "eval_only",
    "profile_steps",
    "compilation_cache",
    "host_memory",
    "fsdp",
)


class Restored(NamedTuple):
    """A checkpoint's contents: the state, and the dicts given to `save` as `data` and `progress`."""

    state: TrainState
    data: dict[str, Any]
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, written in the background; keeps the newest and the best.

    Each has a manifest with the checksums of its files, written before it gets its final name. Damaged ones are moved
    to the folder `damaged` beside `folder` when this is made, so that the newest is a good one; remains of an
    interrupted save or deletion are removed.

    Args:
        folder: where they are, on a disk or in an object store; made when missing.
        config: the experiment as JSON types, saved along and compared when restoring.
        keep: how many of the newest are kept, besides the one with the best evaluation accuracy.

    Attributes:
        damaged: a sentence about each checkpoint that was moved away.

    Raises:
        InputError: there are checkpoints, but all are damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], config: dict[str, Any], keep: int):
        self.folder = as_path(folder)
        self.config = config
        # One process looks; the others must not read the folder before.
        self.damaged = _set_damaged_aside(self.folder) if jax.process_index() == 0 else []
        multihost_utils.sync_global_devices("checkpoints are checked")
        policies = checkpoint_managers
        newest = policies.LatestN(keep)
        best = policies.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            best_fn=_accuracy,  # without it, Orbax forgets the metrics when the run is interrupted
            create=True,
            cleanup_tmp_directories=True,
            # Orbax calls this when all files are written, before the folder gets its final name.
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._saving: int | None = None  # the step being written
        self._unfinished: set[epath.Path] = set()  # what failed saves leave
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "run"))
        except ImportError as error:
            raise unreachable(self.folder, error) from error

    def save(
        self, state: TrainState, data: dict[str, Any], progress: dict[str, Any], accuracy: float | None = None
    ) -> None:
        """Starts writing a checkpoint, in place of an older one of the same step; returns as soon as the state may be
        overwritten.

        Args:
            state: the training state.
            data: state of the data iterator, JSON values.
            progress: what the loop itself remembers, JSON values.
            accuracy: of the evaluation of this state, None when it was not evaluated.

        Raises:
            StorageError: this one or the one before could not be written.
        """
        self.wait()
        self._saving = step = int(state.step)
        # A copy: it is written in the background, while the loop goes on changing its own.
        run = copy.deepcopy({"config": self.config, "data": data, "progress": progress})
        try:
            if step in self.steps():
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(_flat(state)), run=ocp.args.JsonSave(run)),
                metrics={"accuracy": -1.0 if accuracy is None else accuracy},
                force=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises StorageError if a save in the background has failed; costs next to nothing and waits for none."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            StorageError: it could not be.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from error
        self._saving = None

    def restore(self, abstract: TrainState, step: int | None = None) -> Restored | None:
        """A checkpoint, None when there is none.

        Args:
            abstract: shapes, dtypes and shardings of the state, as jax.ShapeDtypeStruct.
            step: of the checkpoint, None for the newest.

        Raises:
            InputError: the checkpoint belongs to another configuration (the sentence names the fields) or is
                damaged.
        """
        step = self._manager.latest_step() if step is None else step
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
        """Waits until everything is written that can be, and ends the threads."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # `wait` is there to tell
            self._manager.wait_until_finished()
        self._manager.close()
        self._remove_unfinished()

    def _write_manifest(self) -> None:
        # On a disk the folder still has its temporary name; in an object store it has no other.
        temporary = self.folder / f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}"
        write_manifest(temporary if temporary.exists() else self.folder / str(self._saving))

    def _failed(self, error: Exception) -> StorageError:
        step, self._saving = self._saving, None
        self._unfinished.add(self.folder / f"{step}{ocp.path.atomicity.TMP_DIR_SUFFIX}")
        self._remove_unfinished()
        left = [name for name in _steps(self.folder) if name != step]
        whole = f"that of step {left[0]} is whole" if left else "there is none before it"
        return StorageError(
            f"the checkpoint of step {step} could not be written to {self.folder} ({shortly(error)}), but {whole}: "
            "make room or mend it, then the same command continues there"
        )

    def _remove_unfinished(self) -> None:
        # Orbax tells of the first file that failed while other threads still write theirs, into the same folder.
        for folder in self._unfinished if jax.process_index() == 0 else ():
            for pause in (0.05, 0.1, 0.2, 0.4, 0.8, 0.0):
                with contextlib.suppress(OSError):
                    folder.rmtree(missing_ok=True)
                if not folder.exists():
                    break
                time.sleep(pause)

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


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]


def _steps(folder: epath.Path) -> list[int]:
    """Steps of the finished checkpoints, newest first."""
    if not folder.exists():
        return []
    # In an object store, a folder without this file is one whose upload has not ended.
    needed = "commit_success.txt" if is_remote(folder) else ""
    return sorted((int(e.name) for e in folder.iterdir() if e.name.isdigit() and (e / needed).exists()), reverse=True)


def _set_damaged_aside(folder: epath.Path) -> list[str]:
    damage, good = {}, None
    for step in _steps(folder):
        # A look at the older ones is short: they serve only when the newest is damaged, and are read in full then.
        problem = find_damage(folder / str(step), thorough=good is None)
        if problem is None:
            good = step if good is None else good
        elif good is not None and problem.endswith("missing"):
            (folder / str(step)).rmtree()  # a deletion that was interrupted
        else:
            damage[step] = problem
    if damage and good is None:
        listed = "; ".join(f"{step}: {problem}" for step, problem in damage.items())
        raise InputError(
            f"every checkpoint in {folder} is damaged ({listed}): restore that folder from a copy, or take another "
            "workdir to start anew"
        )
    sentences = []
    for step, problem in damage.items():
        aside = folder.parent / "damaged" / str(step)
        while aside.exists():
            aside = aside.parent / f"{aside.name}_"
        aside.parent.mkdir(parents=True, exist_ok=True)
        (folder / str(step)).rename(aside)
        sentences.append(f"the checkpoint of step {step} is damaged ({problem}) and was moved to {aside}")
    return sentences


def _shown(config, name):
    return json.dumps(config[name]) if name in config else "missing"


def _flat(state: TrainState) -> dict[str, Any]:
    # Names instead of the tree itself: no part of the file format depends on Flax's or Optax's containers.
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
