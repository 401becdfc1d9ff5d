"""Checkpoints in the workdir, with checksums: the only file that knows Orbax."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from spiking_mlp_jax.errors import InputError, StorageError
from spiking_mlp_jax.train.config import FREE_FIELDS, migrate_config
from spiking_mlp_jax.train.state import TrainState
from spiking_mlp_jax.utils.files import as_path, short_reason, unreachable
from spiking_mlp_jax.utils.paths import is_remote

# The size and a checksum of each file of a checkpoint.
MANIFEST = "manifest.json"
# Orbax adds to these after the rest is complete, and a restore does not need them.
UNLISTED = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")
RETAINED = ".retained"  # ends the name of a checkpoint that is being replaced
QUICK_BYTES = 1 << 16  # a quick check reads only files of at most this size


class Restored(NamedTuple):
    """A checkpoint's contents: the state, and the dicts passed to `save` as `data` and `progress`."""

    state: TrainState
    data: dict[str, Any]
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, written in the background; the newest and the best are retained.

    Each has a manifest with the checksums of its files, written before it gets its final name. The constructor moves
    damaged ones to the folder `damaged` beside `folder`, so that the newest is a good one, and removes what an
    interrupted save or deletion left.

    Args:
        folder: where they are, on a disk or in an object store; made if missing.
        config: the experiment as JSON types, saved along and compared when restoring.
        keep: how many of the newest are retained, besides the one with the best evaluation accuracy.

    Attributes:
        damaged: a message about each checkpoint that was moved.

    Raises:
        InputError: there are checkpoints, but all are damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], config: dict[str, Any], keep: int):
        self.folder = as_path(folder)
        self.config = config
        # One process checks; the others must not read the folder before.
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
        self._unfinished: set[epath.Path] = set()  # folders left by failed saves
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "run"))
        except ImportError as error:
            raise unreachable(self.folder, error) from error

    def save(
        self, state: TrainState, data: dict[str, Any], progress: dict[str, Any], accuracy: float | None = None
    ) -> None:
        """Starts writing a checkpoint, in place of one of the same step; returns as soon as the state may be donated.

        Args:
            state: the training state.
            data: state of the data iterator, JSON values.
            progress: what else the loop needs to resume, JSON values.
            accuracy: of the evaluation of this state, None if it was not evaluated.

        Raises:
            StorageError: this one or the one before could not be written.
        """
        self.wait()
        self._saving = step = int(state.step)
        # A copy: it is written in the background, while the loop changes its own.
        run = copy.deepcopy({"config": self.config, "data": data, "progress": progress})
        try:
            if step in self.steps():
                if jax.process_index() == 0 and not is_remote(self.folder):
                    _retain(self.folder / str(step))
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
        """Raises StorageError if a save in the background has failed; costs next to nothing and does not wait."""
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
        if jax.process_index() == 0:
            _drop_retained(self.folder)

    def restore(self, abstract: TrainState, step: int | None = None) -> Restored | None:
        """A checkpoint, or None.

        Args:
            abstract: shapes, dtypes and shardings of the state, as jax.ShapeDtypeStruct.
            step: of the checkpoint, None for the newest.

        Raises:
            InputError: the checkpoint belongs to another configuration (the message names the fields) or is damaged.
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
            raise InputError(
                f"checkpoint {where} cannot be read ({short_reason(error)}): delete that folder to resume from an "
                "earlier one"
            ) from error
        leaves = [flat[name] for name in _flat(abstract)]
        return Restored(jax.tree.unflatten(jax.tree.structure(abstract), leaves), data, progress)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits until everything that can be is written, and ends the threads."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # `wait` reports it
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
        resume = f"resume from step {left[0]}, whose checkpoint is complete" if left else "start again"
        return StorageError(
            f"the checkpoint of step {step} could not be written to {self.folder} ({short_reason(error)}): free disk "
            f"space, then rerun the same command to {resume}"
        )

    def _remove_unfinished(self) -> None:
        # Orbax reports the first file that failed while other threads still write theirs, into the same folder.
        for folder in self._unfinished if jax.process_index() == 0 else ():
            for pause in (0.05, 0.1, 0.2, 0.4, 0.8, 0.0):
                with contextlib.suppress(OSError):
                    folder.rmtree(missing_ok=True)
                if not folder.exists():
                    break
                time.sleep(pause)

    def _check_config(self, saved: dict[str, Any]) -> None:
        saved, config = migrate_config(saved), migrate_config(self.config)
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


def _retain(checkpoint: epath.Path) -> None:
    """Keeps a checkpoint that is about to be replaced, as links to the same files, until the new one is complete."""
    temporary = f"{checkpoint}{RETAINED}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, temporary, copy_function=os.link)
    except (OSError, shutil.Error):  # no links on this disk
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(checkpoint, temporary)
    os.replace(temporary, f"{checkpoint}{RETAINED}")


def _drop_retained(folder: epath.Path) -> None:
    """Removes what `_retain` kept of complete checkpoints, and puts it back where the new one is not complete."""
    for retained in [] if is_remote(folder) or not folder.exists() else folder.glob(f"*{RETAINED}*"):
        checkpoint = folder / retained.name.partition(".")[0]
        complete = checkpoint.exists() and find_damage(checkpoint, thorough=False) is None
        if complete or retained.name.endswith(".tmp"):
            retained.rmtree()
        else:
            checkpoint.rmtree(missing_ok=True)
            retained.rename(checkpoint)


def _set_damaged_aside(folder: epath.Path) -> list[str]:
    _drop_retained(folder)
    damage, good = {}, None
    for step in _steps(folder):
        # Older ones get a quick check: they serve only if the newest is damaged, and are read in full then.
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
            "workdir to start again"
        )
    messages = []
    for step, problem in damage.items():
        aside = folder.parent / "damaged" / str(step)
        while aside.exists():
            aside = aside.parent / f"{aside.name}_"
        aside.parent.mkdir(parents=True, exist_ok=True)
        (folder / str(step)).rename(aside)
        messages.append(f"the checkpoint of step {step} is damaged ({problem}) and was moved to {aside}")
    return messages


def _shown(config, name):
    return json.dumps(config[name]) if name in config else "missing"


def _flat(state: TrainState) -> dict[str, Any]:
    # Names instead of the tree itself: no part of the file format depends on Flax's or Optax's containers.
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def write_manifest(folder: epath.Path) -> None:
    """Adds manifest.json to a folder whose files are complete; they are read once."""
    files = {name: {"bytes": len_, "blake2b": digest} for name, len_, digest in _described(folder)}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")


def find_damage(folder: epath.Path, thorough: bool = True) -> str | None:
    """Compares a folder with its manifest.

    Args:
        folder: with or without a manifest.
        thorough: False reads the contents of small files only, and of the others compares the size.

    Returns:
        what is wrong, in words that name the file; None if nothing is, or if there is no manifest: older versions of
        this package wrote none.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        files: dict[str, Any] = json.loads(manifest.read_text())["files"]
        listed = [(name, int(entry["bytes"]), str(entry["blake2b"])) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size, digest in listed:
        file = folder / name
        try:
            found = file.stat().length
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if (thorough or size <= QUICK_BYTES) and _digest(file) != digest:
                return f"{name} has other contents than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def _described(folder: epath.Path) -> Iterator[tuple[str, int, str]]:
    for file in sorted(_files(folder), key=str):
        name = file.relative_to(folder).as_posix()
        if name not in UNLISTED:
            yield name, file.stat().length, _digest(file)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _digest(file: epath.Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
