"""The training run: what happens in which order, and how a run continues."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.pipeline import batch_records, steps_per_epoch, train_batches
from spiking_mlp_jax.data.sources import Source, open_source
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import adapt as finetune
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train import dry_run, nonfinite
from spiking_mlp_jax.train.average import with_average
from spiking_mlp_jax.train.checkpoint import Checkpoints
from spiking_mlp_jax.train.config import Config, augmentation, model_config, to_dict, validate
from spiking_mlp_jax.train.eval_only import evaluate_only, evaluated, evaluation_batches
from spiking_mlp_jax.train.evaluate import Evaluation, evaluate
from spiking_mlp_jax.train.logging import Display, Metrics, to_json
from spiking_mlp_jax.train.optimizer import make_optimizer, make_schedule
from spiking_mlp_jax.train.profile import Profiler, annotate, check_window
from spiking_mlp_jax.train.qat import make_quantized
from spiking_mlp_jax.train.report import Report
from spiking_mlp_jax.train.runtime import StopVote, check_alike, end_together, union
from spiking_mlp_jax.train.sharding import make_mesh, placed, put_batch, put_together, replicated
from spiking_mlp_jax.train.state import TrainState, abstract_state, init_state, load_state
from spiking_mlp_jax.train.step import make_eval_step, step_from_config
from spiking_mlp_jax.train.versions import versions
from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache
from spiking_mlp_jax.utils.interrupt import StopRequest, out_of_reach
from spiking_mlp_jax.utils.memory import keep_freed_memory, return_freed_memory
from spiking_mlp_jax.utils.storage import as_path, storage_error, write_folder, write_text


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: steps taken in all.
        finished: False when it was interrupted and can be resumed.
        best_accuracy: best evaluation accuracy so far, None before the first evaluation with a finite loss.
        main: whether this is the process that writes for all.
    """

    step: int
    finished: bool
    best_accuracy: float | None
    main: bool = True


def train(config: Config, workdir: str | os.PathLike[str]) -> Result:
    """Trains, or continues training, until the last epoch or an interruption.

    The first SIGINT (Ctrl-C) or SIGTERM ends the run after the step it is in, with a checkpoint; an evaluation is
    abandoned, and made up for when the run goes on. The second one stops it at once. However often a run is
    interrupted and started again, it goes through the same states, bit for bit, on the same devices and versions.

    With several processes (see `spiking_mlp_jax.train.runtime.join`) all of them call this alike; the first writes
    what is not a checkpoint. A signal to any of them stops all at the same step; an error ends the process at once.

    Args:
        config: the experiment, see `spiking_mlp_jax.train.config.default_config`.
        workdir: folder of everything the run writes, on a disk or in an object store (gs://); made when missing.

    Returns:
        how it ended. A dry run only prints and has taken no step; with eval_only, best_accuracy is the one found.

    Raises:
        InputError: a configuration, data set or workdir that cannot be used.
        NonFiniteError: the loss or gradient of a step was not finite, and on_nonfinite is "stop".
        StorageError: the workdir is full, or cannot be written to any more.
    """
    if getattr(config, "host_memory", None) in ("auto", "keep"):
        # Before the devices are asked for: afterwards it is too late. It says nothing to accelerators.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    validate(config, jax.device_count())
    if config.dry_run:
        main = jax.process_index() == 0
        for line in dry_run.describe(config):
            if main:
                print(line, flush=True)
        return Result(0, True, None, main)
    use_compilation_cache(config.compilation_cache)
    try:
        if config.eval_only:
            with contextlib.ExitStack() as stack:
                stack.push(end_together)
                return _evaluate_only(config, as_path(workdir))
        with StopRequest() as stop:
            return _Run(config, as_path(workdir)).run(stop)
    except OSError as error:
        if (full := storage_error(error, workdir)) is None:
            raise
        raise full from error


class _Run:
    """Everything one run is made of; `run` is the story, the other methods are its verbs."""

    def __init__(self, config: Config, workdir: epath.Path):
        self.config, self.workdir = config, workdir
        self.model = model_config(config)
        self.main = jax.process_index() == 0
        data_dir = config.data_dir or None
        self.source = open_source(config.dataset, "train", data_dir)
        self.eval_source = open_source(config.dataset, "test", data_dir)
        for source in (self.source, self.eval_source):
            _check_classes(source, self.model.num_classes, config.dataset)
        self.epoch_steps = steps_per_epoch(self.source, config.batch_size)
        total = config.epochs * self.epoch_steps
        self.last = min(total, config.max_steps) if config.max_steps else total
        check_window(config.profile_steps, self.last)
        self.mesh = make_mesh(fsdp=config.fsdp)
        self.optimizer = make_optimizer(config, self.epoch_steps)
        self.schedule = make_schedule(config, self.epoch_steps)
        self.graphdef, self.abstract = abstract_state(self.model, self.optimizer)
        if config.ema_decay:
            self.abstract = jax.eval_shape(with_average, self.abstract)
        self.quantized = make_quantized(config, self.model)
        self.train_step = step_from_config(config, self.graphdef, self.optimizer, self.mesh)
        skip = np.bool_(config.on_nonfinite == "skip")
        self.guard = nonfinite.Guard(*jax.device_put((np.True_, skip), replicated(self.mesh)))
        self.eval_step = make_eval_step(self.graphdef, config.mean, config.std, self.mesh)
        together = None if jax.process_count() == 1 else union
        self.damaged = Damaged(self.source, config.max_bad_images, self._say, together)
        self.damaged_eval = Damaged(self.eval_source, config.max_bad_images, self._say, together)
        self.batches: Any = train_batches(
            self.source,
            batch_size=config.batch_size,
            image_size=self.model.image_size,
            in_channels=self.model.in_channels,
            augment=augmentation(config),
            seed=config.seed,
            epochs=config.epochs,
            copies=config.repeats,
            damaged=self.damaged,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.workers,
        )
        self.best: float | None = None
        self.evaluation_due = False  # the last one was interrupted
        self.report = Report(config, self.epoch_steps, self.schedule)

    def run(self, signals: StopRequest) -> Result:
        _make_workdir(self.workdir)
        with contextlib.ExitStack() as stack:
            stop = StopVote(signals)
            folder = self.workdir / "checkpoints"
            self.checkpoints = Checkpoints(folder, to_dict(self.config), self.config.keep)
            stack.callback(self.checkpoints.close)
            _check_alike(self.config, [self.source, self.eval_source])
            check_alike({"list of checkpoints": self.checkpoints.steps()})
            state, step = self._start()
            if self.config.ema_decay and state.average is None:
                state = with_average(state)
            stack.push(end_together)
            self._write_descriptions()
            self.metrics = Metrics(self.workdir, step, not self.evaluation_due) if self.main else None
            if self.metrics is not None:
                stack.callback(self.metrics.close)
            self.display = Display(self.workdir / "log.txt" if self.main else None, step, self.last, show=self.main)
            stack.callback(self.display.close)
            self.report.show(self.display, self.metrics)
            self.display.say(self._greeting(state, step))
            for sentence in self.checkpoints.damaged:
                self.display.say(f"warning: {sentence}")
            self.profiler = Profiler(self.config.profile_steps, self.workdir / "profile", self.display.say)
            stack.callback(self.profiler.close)
            state, step = self._train(state, step, stop)
            self.checkpoints.wait()
            finished = step >= self.last and not self.evaluation_due
            best = "" if self.best is None else f"; best accuracy {100 * self.best:.2f} %"
            if step > self.last:
                ending = f"nothing to do: the run is at step {step} and was to stop after {self.last}"
            elif finished:
                ending = f"finished at step {step} of {self.last}"
            else:
                seconds = time.monotonic() - stop.since
                ending = f"interrupted: the same command continues at step {step} of {self.last}"
                ending += f" (saved {seconds:.1f} s after the signal)"
            self.display.say(ending + best)
            return Result(step, finished, self.best, self.main)

    def _start(self) -> tuple[TrainState, int]:
        # Where a run starts, in this order:
        # 1. at the newest checkpoint of its workdir, whose configuration has to be the same;
        # 2. at the weights that init_weights names, with a new optimiser and at step 0;
        # 3. at weights drawn from the seed.
        restored = self.checkpoints.restore(placed(self.abstract, self.mesh))
        if restored is None and self.config.init_weights:
            where, seed = self.config.init_weights, self.config.seed
            return load_state(self.model, self.optimizer, where, self.mesh, seed), 0
        if restored is None:
            return init_state(self.model, self.optimizer, self.config.seed, self.mesh), 0
        if restored.progress["epoch_steps"] != self.epoch_steps:
            raise InputError(
                f"the run in {self.workdir} had {restored.progress['epoch_steps']} steps an epoch, but this "
                f"data has {self.epoch_steps}: give the same data, or another workdir"
            )
        self.batches.set_state(restored.data)
        self.damaged.seen.update(restored.progress.get("damaged", ()))
        self.best = restored.progress["best"]
        # An older version may have summed fewer metrics and finished every evaluation.
        self.evaluation_due = restored.progress.get("evaluation_due", False)
        self.report.window |= restored.progress["window"]
        return restored.state, int(restored.state.step)

    def _train(self, state: TrainState, step: int, stop: StopVote) -> tuple[TrainState, int]:
        config = self.config
        pending = None
        self.skipped_in_a_row = 0
        first = step + 1
        batches = out_of_reach(self.batches, config.workers)
        if self.evaluation_due:
            self._evaluate_and_save(state, step, stop)
        while step < self.last and not stop.requested:
            self.checkpoints.check()
            self.profiler.between_steps(step, state)
            with annotate(step + 1):
                before, batch = self.batches.get_state(), self.report.data_wait.next(batches)
                state, metrics = self.train_step(state, put_batch(batch, self.mesh), self.guard)
            self.report.data_wait.dispatched(metrics)
            if config.on_nonfinite == "stop":
                self.guard = self.guard._replace(sound=metrics["sound"])
            step += 1
            stop.count()
            if step == first:
                return_freed_memory()  # the compiler's
                if config.host_memory == "keep" or (config.host_memory == "auto" and jax.default_backend() == "cpu"):
                    keep_freed_memory()
            # The metrics of a step are fetched while the next one runs.
            if pending is not None:
                self._note(state, *pending)
            pending = step, metrics, batch, before
            epoch_over = step % self.epoch_steps == 0 or step == self.last
            due = config.checkpoint_every and step % config.checkpoint_every == 0
            if not (epoch_over or due or stop.requested):
                continue
            self._note(state, *pending, timed=False)
            pending = None
            self.report.pause()
            if epoch_over:
                self._evaluate_and_save(state, step, stop)
            else:
                self._save(state)
        if pending is not None:
            # Interrupted between the check after a step and the one before the next.
            self._note(state, *pending)
            self._save(state)
        self.profiler.close(state)
        return state, step

    def _note(
        self, state: TrainState, step: int, metrics: dict[str, jax.Array], batch: Any, before: Any, timed: bool = True
    ) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        sound = values.pop("sound")
        if not sound:
            self._note_nonfinite(state, step, values, batch, before)
        self.skipped_in_a_row = 0 if sound else self.skipped_in_a_row + 1
        ends = step % self.config.log_every == 0 or step == self.last
        if ends:
            self.damaged.share()
        self.report.note(step, values, bool(sound), timed, ends)

    def _note_nonfinite(
        self, state: TrainState, step: int, values: dict[str, float], batch: Any, before: dict[str, Any]
    ) -> None:
        config = self.config
        records = batch_records(
            self.source, batch_size=config.batch_size, seed=config.seed, step=step, copies=config.repeats
        )
        nonfinite.record(self.workdir, step, values, records, batch)
        if config.on_nonfinite == "stop":
            # The state has stayed the one before that step, as the window has; only the data have gone on.
            self.checkpoints.wait()
            if step - 1 not in self.checkpoints.steps():
                self._save(state, data=before)
                self.checkpoints.wait()
            raise nonfinite.stopped(self.workdir, step, values, records)
        if self.skipped_in_a_row + 1 == nonfinite.MOST_IN_A_ROW:
            self.checkpoints.wait()
            raise nonfinite.hopeless(self.workdir, step, values)
        self.display.say(
            f"warning: step {step} was skipped: its loss is {values['loss']}, the norm of its gradient "
            f"{values['grad_norm']}; its images are listed in {self.workdir / nonfinite.RECORDS}"
        )

    def _evaluate_and_save(self, state: TrainState, step: int, stop: StopVote) -> None:
        started = time.monotonic()
        whole = put_together(state, self.mesh)
        result = self._evaluate(whole, stop)
        self.evaluation_due = result is None
        if result is None:
            self._save(state)
            return
        seconds = time.monotonic() - started
        self.display.say(
            f"step {step}: test accuracy {100 * result.accuracy:.2f} %, loss {result.loss:.4f} "
            f"on {result.images} images in {seconds:.0f} s"
        )
        if self.metrics is not None:
            values = {"loss": result.loss, "accuracy": result.accuracy, "firing_rates": result.firing_rates}
            self.metrics.write(step, step / self.epoch_steps, "eval", values)
        if step == self.last:
            for sentence in result.unhealthy_layers():
                self.display.say(f"warning: {sentence}")
        if self.main:
            write_text(self.workdir / "evaluation.json", to_json({"step": step, **result.to_dict()}) + "\n")
        # A diverged network is never the best, whatever share of the images its guesses hit.
        sound = bool(np.isfinite(result.loss))
        if not sound:
            self.display.say(f"warning: the test loss is {result.loss} at step {step}: these weights are not kept")
        elif self.best is None or result.accuracy > self.best:
            self.best = result.accuracy
            params, stats = evaluated(whole, self.quantized)
            if self.main:
                self._save_weights(params, stats, step, result)
        self._save(state, result.accuracy if sound else None)

    def _evaluate(self, state: TrainState, stop: StopVote) -> Evaluation | None:
        """None when a signal came meanwhile: evaluating may take longer than the time that is left."""
        batches = evaluation_batches(self.config, self.eval_source, self.damaged_eval)
        try:
            result = evaluate(self.eval_step, *evaluated(state, self.quantized), _until(stop, batches), self.mesh)
        except _Interrupted:
            return None
        self.damaged_eval.share()
        return result

    def _say(self, text: str) -> None:
        self.display.say(text)  # the display comes later than what uses it

    def _save(self, state: TrainState, accuracy: float | None = None, data: dict[str, Any] | None = None) -> None:
        progress = {"epoch_steps": self.epoch_steps, "best": self.best, "window": self.report.window}
        self.damaged.share()
        progress["damaged"] = sorted(self.damaged.seen)
        progress["evaluation_due"] = self.evaluation_due
        self.checkpoints.save(state, self.batches.get_state() if data is None else data, progress, accuracy)

    def _save_weights(self, params: Any, stats: Any, step: int, result: Evaluation) -> None:
        # On the host: this process alone cannot compute with arrays that lie on the devices of all.
        model = nnx.merge(self.graphdef, *jax.device_get((params, stats)), copy=True)
        data = {name: self.config[name] for name in ("dataset", "resize_mode", "eval_resize")}
        data |= {"mean": list(self.config.mean), "std": list(self.config.std)}
        data["class_names"] = list(self.source.class_names)
        summary = {"step": step, "accuracy": result.accuracy, "loss": result.loss, "images": result.images}
        meta = {"data": data, "result": summary}
        write_folder(self.workdir / "weights", lambda folder: weights.save(folder, model, meta))
        # A run in an object store that an earlier version began: there, `save` did not see its file.
        (self.workdir / "weights" / weights.OLD_TENSORS).unlink(missing_ok=True)

    def _greeting(self, state: TrainState, step: int) -> str:
        count = sum(x.size for x in jax.tree.leaves(state.params))
        start = f"resuming at step {step}" if step else "starting"
        if self.config.init_weights and not step:
            start += f" from {finetune.describe(self.config.init_weights, self.model)}"
        device = jax.devices()[0]
        return (
            f"{start}: {count:,} parameters, {len(self.source):,} training and {len(self.eval_source):,} "
            f"test images, {self.last} steps of {self.config.batch_size} images, "
            f"{jax.device_count()} {device.platform} device(s)"
        )

    def _write_descriptions(self) -> None:
        if self.main:
            write_text(self.workdir / "config.json", json.dumps(to_dict(self.config), indent=1) + "\n")
            write_text(self.workdir / "versions.json", json.dumps(versions(), indent=1) + "\n")


class _Interrupted(Exception):
    """A signal came while evaluating."""


def _until(stop: StopVote, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if stop.requested:
            raise _Interrupted
        yield batch
        stop.count()


def _evaluate_only(config: Config, workdir: epath.Path) -> Result:
    source = open_source(config.dataset, "test", config.data_dir or None)
    _check_classes(source, config.num_classes, config.dataset)
    _check_alike(config, [source])
    _make_workdir(workdir)
    step, result = evaluate_only(config, workdir, source)
    return Result(step, True, result.accuracy if np.isfinite(result.loss) else None, jax.process_index() == 0)


def _make_workdir(workdir: epath.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'workdir "{workdir}" cannot be made ({error.strerror}): name another folder') from error


def _check_alike(config: Config, sources: list[Source]) -> None:
    paths = "data_dir", "compilation_cache"  # may be another place on each machine
    fields = {name: value for name, value in to_dict(config).items() if name not in paths}
    sizes = [[len(source), list(source.class_names)] for source in sources]
    check_alike({"configuration": fields, "number of images or list of classes": sizes})


def _check_classes(source: Source, num_classes: int, dataset: str) -> None:
    if len(source.class_names) != num_classes:
        raise InputError(
            f'num_classes is {num_classes}, but "{dataset}" has {len(source.class_names)} classes: make them equal'
        )
