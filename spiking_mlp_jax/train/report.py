"""What a run tells of its steps: on the progress bar, in log.txt and in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spiking_mlp_jax.train.config import Config
from spiking_mlp_jax.train.data_wait import DataWait
from spiking_mlp_jax.train.logging import Display, Metrics, Speedometer

STARVED = 0.1  # share of the time waited for images of which a run warns


class Report:
    """Sums the steps' metrics, and tells their means every `log_every` steps.

    Args:
        config: the experiment.
        epoch_steps: steps an epoch.
        schedule: function of the number of steps taken to the learning rate.

    Attributes:
        window: sums since the last line; they are saved, so that a resumed run writes the same lines.
        data_wait: to be asked for batches, and told of steps.
    """

    def __init__(self, config: Config, epoch_steps: int, schedule: Callable[[int], Any]):
        self._config, self._epoch_steps, self._schedule = config, epoch_steps, schedule
        self.window: dict[str, float] = {"steps": 0, "loss": 0.0, "accuracy": 0.0, "grad_norm": 0.0}
        if config.activity_weight:
            self.window["activity"] = 0.0
        if config.on_nonfinite == "skip":
            self.window["skipped"] = 0
        self.data_wait = DataWait()
        self._speedometer = Speedometer(config.batch_size)
        self._told_of_waiting = False

    def show(self, display: Display, metrics: Metrics | None) -> None:
        """Says where lines go: to a display and, in the process that writes for all, to a file."""
        self._display, self._metrics = display, metrics

    def pause(self) -> None:
        """Evaluating and saving, which come now, count as no training time."""
        self.data_wait.pause()
        self._speedometer.restart()

    def note(self, step: int, values: dict[str, float], sound: bool, timed: bool, ends: bool) -> None:
        """Counts a step.

        Args:
            step: its number.
            values: its metrics.
            sound: whether it changed anything; a step that was skipped does not count in the means.
            timed: whether time has passed since the last one. The last step before a pause is noted right after the
                one before it.
            ends: whether the window ends with it.
        """
        window = self.window
        if sound:
            for name, value in {"steps": 1, **values}.items():
                window[name] += value
        else:
            window["skipped"] += 1
        speed = self._speedometer.step() if timed else self._speedometer.rate
        count = window["steps"] or np.nan  # each may have been skipped
        means = {name: window[name] / count for name in values}
        share, waited = self.data_wait.so_far()
        epoch = f"epoch {-(-step // self._epoch_steps)}/{self._config.epochs}"
        status = f"loss {means['loss']:.4f}  accuracy {100 * means['accuracy']:.1f} %"
        status += f"  activity {means['activity']:.4f}" if "activity" in means else ""
        status += "" if speed is None else f"  {speed:.0f} images/s"
        status += "" if share is None else f"  data wait {100 * share:.0f} %"
        self._display.step(step, epoch, status)
        if not ends:
            return
        self._display.report(step, epoch, status)
        if self._metrics is not None:
            means |= {"skipped": window["skipped"]} if "skipped" in window else {}
            means["learning_rate"] = float(np.asarray(self._schedule(step - 1)))
            means |= {"images_per_second": speed, "data_wait_share": share, "data_wait_seconds": waited}
            self._metrics.write(step, step / self._epoch_steps, "train", means)
        self.window = dict.fromkeys(window, 0)
        self.data_wait.clear()
        if share is not None and share > STARVED and not self._told_of_waiting:
            self._told_of_waiting = True
            self._display.say(
                f"warning: {100 * share:.0f} % of the time since the last line was spent waiting for images: raise "
                f"workers, which is {self._config.workers}, or give the images a faster disk or a cheaper preparation"
            )
