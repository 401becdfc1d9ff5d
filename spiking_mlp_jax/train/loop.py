"""The training run, top to bottom: what happens in which order, and how a run resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from ml_collections import config_dict

from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.pipeline import batch_records, steps_per_epoch, train_batches
from spiking_mlp_jax.data.sources import (
    ARRAYS,
    Source,
    array_sources,
    check_same,
    differences,
    identity,
    open_source,
)
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import adapt as finetune
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train import dry_run, nonfinite
from spiking_mlp_jax.train.checkpoint import Checkpoints
from spiking_mlp_jax.train.config import (
    Config,
    augmentation,
    mismatches,
    model_config,
    parse_window,
    resize_mode,
    to_dict,
    validate,
)
from spiking_mlp_jax.train.evaluate import (
    Evaluation,
    evaluate,
    evaluate_only,
    evaluated,
    evaluation_batches,
    trained_weights,
    write_evaluation,
)
from spiking_mlp_jax.train.logging import Display, Metrics, Profiler, Report
from spiking_mlp_jax.train.optimizer import make_optimizer, make_schedule
from spiking_mlp_jax.train.qat import make_quantized
from spiking_mlp_jax.train.runtime import (
    AHEAD,
    StopVote,
    check_alike,
    check_settings,
    end_together,
    union,
    versions,
    watchdog,
)
from spiking_mlp_jax.train.sharding import abstract_with_sharding, make_mesh, replicate, replicated, shard_batch
from spiking_mlp_jax.train.state import abstract_state, init_state, load_state, with_average
from spiking_mlp_jax.train.step import make_eval_step, make_train_step
from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache
from spiking_mlp_jax.utils.files import as_path, system_error, write_folder, write_whole
from spiking_mlp_jax.utils.interrupt import StopRequest, out_of_reach
from spiking_mlp_jax.utils.lock import locked
from spiking_mlp_jax.utils.memory import keep_freed_memory, return_freed_memory
from spiking_mlp_jax.utils.paths import real_path, user_path
from spiking_mlp_jax.utils.watchdog import Watchdog, parse_deadlines


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: steps taken in all.
        finished: False if it was interrupted and can be resumed.
        best_accuracy: best evaluation accuracy so far, None before the first evaluation with a finite loss.
        main: whether this is the process that writes for all.
    """

    step: int
    finished: bool
    best_accuracy: float | None
    main: bool = True


def fit(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    train_data: tuple[Any, Any] | None = None,
    test_data: tuple[Any, Any] | None = None,
) -> Result:
    """Trains a network, or resumes training, until the last epoch or an interruption.

    The first SIGINT (Ctrl-C) or SIGTERM ends the run after the current step, with a checkpoint; an evaluation is
    abandoned, and repeated when the run resumes. The second one stops it at once. However often a run is interrupted
    and resumed, it goes through the same states, bit for bit, on the same devices and versions.

    With several processes (see `spiking_mlp_jax.train.runtime.join`) all of them call this alike; the first writes
    everything but checkpoints. A signal to any of them stops all at the same step; an error ends the process at once.

    Args:
        config: the experiment, see `spiking_mlp_jax.train.config.default_config`.
        workdir: folder of everything the run writes, on a disk or in an object store (gs://); made if missing.
        train_data: (images, labels) in place of `config.dataset`: uint8 [N, H, W] or [N, H, W, C] with 1, 3 or 4
            channels, and integers [N] below `config.num_classes`. Needs `test_data`, too; a run is resumed with the
            same arrays.
        test_data: likewise; with eval_only it is enough.

    Returns:
        how it ended. A dry run only prints, and has taken no step; with eval_only, best_accuracy is the accuracy found.

    Raises:
        InputError: a configuration, data set or workdir that cannot be used, or another process trains in the workdir.
        NonFiniteError: the loss or gradient of a step was not finite, and on_nonfinite is "stop".
        StorageError: the disk of the workdir is full, or the workdir cannot be written to.
    """
    if isinstance(config, str):
        raise InputError(f'config must be a ConfigDict, got "{config}": pass load_config("{config}")')
    if getattr(config, "host_memory", None) in ("auto", "keep") and "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        # Must precede the first use of devices. It concerns CPUs alone.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    validate(config, jax.device_count())
    given = array_sources(train_data, test_data, config.num_classes)
    if given:
        for split in ("test",) if config.eval_only else ("train", "test"):
            if split not in given:
                raise InputError(f"{split}_data is missing: pass train_data and test_data")
        config = _with(config, dataset=ARRAYS, data_dir=None)
    elif config.data_dir or config.dataset.startswith("npz:"):
        # The workdir's configuration serves from any working folder.
        config = _with(config, data_dir=os.path.abspath(user_path(config.data_dir or ".")))
    main = jax.process_index() == 0
    if config.dry_run:
        for line in dry_run.describe(config):
            if main:
                print(line, flush=True)
        return Result(0, True, None, main)
    use_compilation_cache(config.compilation_cache)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_system_errors(workdir))
        root = as_path(real_path(workdir))
        watch = watchdog(parse_deadlines(config.deadlines))
        stack.callback(watch.close)
        display = Display(show=main, doing=lambda: watch.doing)
        stack.callback(display.close)
        display.say(f"opening {config.data_dir or config.dataset}")
        if config.eval_only:
            stack.push(end_together)
            test_source = _open_source(config, "test", given)
            _check_alike(config, identity({"test": test_source}))
            _make_workdir(root)
            stack.enter_context(locked(root) if main else contextlib.nullcontext())
            step, result = evaluate_only(config, root, test_source, display, watch)
            return Result(step, True, result.accuracy if np.isfinite(result.loss) else None, main)

        # Devices, data and everything that is compiled.
        signals = stack.enter_context(StopRequest())
        source, test_source = _open_source(config, "train", given), _open_source(config, "test", given)
        data = identity({"train": source, "test": test_source})
        epoch_steps = steps_per_epoch(source, config.batch_size)
        total = config.epochs * epoch_steps
        last = min(total, config.max_steps or total)
        window = parse_window(config.profile_steps, last)
        mesh, model = make_mesh(fsdp=config.fsdp), model_config(config)
        optimizer = make_optimizer(config, epoch_steps)
        graphdef, abstract = abstract_state(model, optimizer, average=bool(config.ema_decay))
        train_step = make_train_step(config, graphdef, optimizer, mesh)
        eval_step = make_eval_step(graphdef, config.mean, config.std, mesh)
        quantized = make_quantized(config, model)
        _make_workdir(root)

        # What people see, and what reports to it.
        together = union if jax.process_count() > 1 else None
        damaged = Damaged(source, config.max_bad_images, display.say, together)
        test_damaged = Damaged(test_source, config.max_bad_images, display.say, together)
        batches: Any = train_batches(
            source,
            batch_size=config.batch_size,
            image_size=model.image_size,
            in_channels=model.in_channels,
            augment=augmentation(config),
            seed=config.seed,
            epochs=config.epochs,
            copies=config.repeats,
            damaged=damaged,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.workers,
        )

        # Start at the newest checkpoint, else at the weights that init_weights names, else at weights from the seed.
        with contextlib.ExitStack() as alone:
            alone.push(end_together)  # the others do not know that the workdir is taken
            stack.enter_context(locked(root) if main else contextlib.nullcontext())
        watch.enter("restoring", 0)
        stop = StopVote(signals)
        checkpoints = Checkpoints(root / "checkpoints", to_dict(config), config.keep)
        stack.callback(checkpoints.close)
        _check_alike(config, data)
        check_alike({"list of checkpoints": checkpoints.steps()})
        if checkpoints.steps():
            check_settings(root / "versions.json")
        restored = checkpoints.restore(abstract_with_sharding(abstract, mesh))
        # What a checkpoint holds besides the state and the position in the data; older versions saved less.
        progress: dict[str, Any] = {"epoch_steps": epoch_steps, "best": None, "evaluation_due": False, "dataset": data}
        other_data = None
        totals = Report.empty_window(config)
        if restored is not None:
            saved = restored.progress.get("dataset", {})
            other_data = check_same(saved, data, f"the run in {root}", config.allow_other_data)
            if restored.progress["epoch_steps"] != epoch_steps and not config.allow_other_data:
                raise InputError(
                    f"the run in {root} had {restored.progress['epoch_steps']} steps an epoch, but this data has "
                    f"{epoch_steps}: use the same data or another workdir, or set allow_other_data=True"
                )
            state = restored.state
            batches.set_state({"batch": int(state.step)})
            if other_data is None:
                damaged.seen.update(restored.progress.get("damaged", ()))
            totals |= restored.progress["window"]
            progress |= restored.progress | {"epoch_steps": epoch_steps, "dataset": data}
        elif config.init_weights:
            state = load_state(model, optimizer, config.init_weights, mesh, config.seed)
            named = weights.read_config(weights.find(config.init_weights))[1].get("data", {}).get("class_names", [])
            if len(named) == config.num_classes and (found := differences({"class_names": named}, data)):
                other_data = f"the head of init_weights is for other classes: {'; '.join(found)}"
        else:
            state = init_state(model, optimizer, config.seed, mesh)
        if config.ema_decay and state.average is None:
            state = with_average(state)
        progress["window"] = totals
        step = first = int(state.step)
        watch.enter("starting", step)
        stack.push(end_together)

        if main:
            write_whole(root / "config.json", json.dumps(to_dict(config), indent=1) + "\n")
            write_whole(root / "versions.json", json.dumps(versions(), indent=1) + "\n")
        metrics = Metrics(root, step, not progress["evaluation_due"]) if main else None
        if metrics is not None:
            stack.callback(metrics.close)
        report = Report(config, epoch_steps, make_schedule(config, epoch_steps), display, metrics, totals)
        profiler = Profiler(window, root / "profile", display.say)
        stack.callback(profiler.close)
        display.start(step, last, root / "log.txt" if main else None)
        count = sum(x.size for x in jax.tree.leaves(state.params))
        origin = f"resuming at step {step}" if step else "starting"
        if config.init_weights and not step:
            origin += f" from {finetune.describe(config.init_weights, model)}"
        display.say(
            f"{origin}: {count:,} parameters, {len(source):,} training and {len(test_source):,} test images, "
            f"{last} steps of {config.batch_size} images, {jax.device_count()} {jax.devices()[0].platform} device(s)"
        )
        for message in mismatches(config):
            display.say(f"warning: {message}")
        for message in [*checkpoints.damaged, *([other_data] if other_data else [])]:
            display.say(f"warning: {message}")

        def save(accuracy: float | None = None) -> None:
            watch.enter("saving", step)
            damaged.share()
            progress["damaged"] = sorted(damaged.seen)
            checkpoints.save(state, {"batch": int(state.step)}, progress, accuracy)

        def log_step(step: int, outputs: dict[str, jax.Array], batch: Any, timed: bool = True) -> bool:
            """Fetches a step's metrics, reports them, and says whether they are finite."""
            values = {name: float(value) for name, value in jax.device_get(outputs).items()}
            sound = bool(values.pop("sound"))
            if not sound:
                records = batch_records(
                    source, batch_size=config.batch_size, seed=config.seed, step=step, copies=config.repeats
                )
                nonfinite.record(root, step, values, records, batch)
                if config.on_nonfinite == "stop":
                    # The state is still that before the step, and so are the totals; only the data have moved on.
                    checkpoints.wait()
                    if step - 1 not in checkpoints.steps():
                        save()
                        checkpoints.wait()
                    raise nonfinite.stopped(root, step, values, records)
                if skipped + 1 == nonfinite.MOST_IN_A_ROW:
                    checkpoints.wait()
                    raise nonfinite.hopeless(root, step, values)
                display.say(
                    f"warning: step {step} was skipped: its loss is {values['loss']}, the norm of its gradient "
                    f"{values['grad_norm']}; its images are listed in {root / nonfinite.RECORDS}"
                )
            window_ends = step % config.log_every == 0 or step == last
            if window_ends:
                damaged.share()
            report.step(step, values, sound, timed, window_ends)
            return sound

        # The loop. A step's metrics are fetched AHEAD steps later, so that the devices never wait for the host: always,
        # because what follows from them (a line, a warning, the end) has to come at the same time in all processes.
        guard = nonfinite.Guard(*jax.device_put((np.True_, np.bool_(config.on_nonfinite == "skip")), replicated(mesh)))
        iterator = out_of_reach(batches, config.workers)
        pending: deque[tuple[int, dict[str, jax.Array], Any]] = deque()
        skipped, evaluation_due = 0, progress["evaluation_due"]
        while True:
            # Pause after an epoch, for a checkpoint and for a signal, as soon as all metrics are known.
            checkpoint_due = config.checkpoint_every and step % config.checkpoint_every == 0
            pausing = evaluation_due or checkpoint_due or stop.requested
            stepped = bool(pending)
            if pausing and stepped:
                while pending:
                    skipped = 0 if log_step(*pending.popleft(), timed=False) else skipped + 1
                report.pause()
            if evaluation_due:
                started = time.monotonic()
                gathered = replicate(state, mesh)
                params, stats = evaluated(gathered, quantized)
                test_batches = evaluation_batches(config, test_source, test_damaged)
                try:
                    result = evaluate(eval_step, params, stats, _followed(test_batches, stop, watch, step), mesh)
                except _Interrupted:
                    progress["evaluation_due"] = True
                    save()
                    break
                test_damaged.share()
                progress["evaluation_due"] = False
                display.say(f"step {step}: {result.summary(time.monotonic() - started)}")
                if metrics is not None:
                    values = {"loss": result.loss, "accuracy": result.accuracy, "firing_rates": result.firing_rates}
                    metrics.write(step, step / epoch_steps, "eval", values)
                if step == last:
                    for message in result.unhealthy_layers():
                        display.say(f"warning: {message}")
                write_evaluation(root, step, result, trained_weights(config, step))
                # A diverged network is never the best, however many images it gets right by chance.
                sound = bool(np.isfinite(result.loss))
                if not sound:
                    display.say(f"warning: the test loss is {result.loss} at step {step}: these weights are not saved")
                elif progress["best"] is None or result.accuracy > progress["best"]:
                    progress["best"] = result.accuracy
                    if main:
                        # On the host: this process alone cannot compute with arrays on the devices of all.
                        network = nnx.merge(graphdef, *jax.device_get((params, stats)), copy=True)
                        _save_weights(root, config, network, data, step, result)
                save(result.accuracy if sound else None)
            elif pausing and stepped:
                save()
            if step >= last or (stop.requested and not pending):
                break

            checkpoints.check()
            profiler.between_steps(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                watch.enter("reading", step + 1)
                batch = report.data_wait.next(iterator)
                watch.enter("compiling" if step == first else "stepping", step + 1)
                state, outputs = train_step(state, shard_batch(batch, mesh), guard)
            report.data_wait.dispatched(outputs)
            if config.on_nonfinite == "stop":
                guard = guard._replace(sound=outputs["sound"])
            jax.tree.map(lambda x: x.copy_to_host_async(), outputs)
            step += 1
            watch.enter("stepping", step)
            stop.count()
            if step == first + 1:
                return_freed_memory()  # the compiler's
                if config.host_memory == "keep" or (config.host_memory == "auto" and jax.default_backend() == "cpu"):
                    keep_freed_memory()
            if len(pending) == AHEAD:
                skipped = 0 if log_step(*pending.popleft()) else skipped + 1
            pending.append((step, outputs, batch))
            evaluation_due = step % epoch_steps == 0 or step == last

        profiler.close(state)
        watch.enter("saving", step)
        checkpoints.wait()
        finished = step >= last and not progress["evaluation_due"]
        if step > last:
            ending = f"already at step {step} (max_steps={last})"
        elif finished:
            ending = f"finished at step {step} of {last}"
        else:
            ending = f"interrupted: rerun the same command to resume at step {step} of {last}"
            ending += f" (saved {time.monotonic() - stop.since:.1f} s after the signal)"
        best = progress["best"]
        display.say(ending + ("" if best is None else f"; best accuracy {100 * best:.2f} %"))
        return Result(step, finished, best, main)


train = fit  # the name until 0.1


class _Interrupted(Exception):
    """A signal came while evaluating, which may take longer than the time that is left."""


def _followed(batches: Iterable[Any], stop: StopVote, watch: Watchdog, step: int) -> Iterator[Any]:
    """The batches of an evaluation, until a signal comes."""
    watch.enter("evaluating", step)
    for done, batch in enumerate(batches):
        watch.enter("evaluating", step, done)
        if stop.requested:
            raise _Interrupted
        yield batch
        stop.count()


def _save_weights(workdir: epath.Path, config: Config, model, dataset, step: int, result: Evaluation) -> None:
    data = {"dataset": config.dataset, "resize_mode": resize_mode(config), "eval_resize": config.eval_resize}
    data |= {"mean": list(config.mean), "std": list(config.std), **dataset}
    summary = {"step": step, "accuracy": result.accuracy, "loss": result.loss, "images": result.images}
    meta = {"data": data, "result": summary}
    write_folder(workdir / "weights", lambda folder: weights.save(folder, model, meta))
    # A run in an object store that an earlier version began: there, `save` did not see its file.
    (workdir / "weights" / weights.OLD_TENSORS).unlink(missing_ok=True)


def _with(config: Config, **fields: Any) -> Any:
    return config_dict.ConfigDict(config.to_dict() | fields)


def _open_source(config: Config, split: str, given: Mapping[str, Source]) -> Source:
    source = given.get(split) or open_source(config.dataset, split, config.data_dir or None)
    if len(source.class_names) != config.num_classes:
        raise InputError(
            f'num_classes is {config.num_classes}, but "{config.dataset}" has {len(source.class_names)} classes: make '
            "them equal"
        )
    return source


def _make_workdir(workdir: epath.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'workdir "{workdir}" cannot be made ({error.strerror}): name another folder') from error


def _check_alike(config: Config, data: dict[str, Any]) -> None:
    paths = "data_dir", "compilation_cache"  # may differ between machines
    fields = {name: value for name, value in to_dict(config).items() if name not in paths}
    sizes = [data["class_names"], *(data[split]["images"] for split in ("train", "test") if split in data)]
    check_alike({"configuration": fields, "number of images or list of classes": sizes, "list of images": data})


@contextlib.contextmanager
def _system_errors(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's errors into messages: the disk is full, read-only, gone."""
    try:
        yield
    except OSError as error:
        if not error.errno:
            raise
        raise system_error(error, workdir) from error
