"""Runs integer networks on a CPU, event by event, with numpy and numba alone.

engine = Engine("net.smlp")
scores = engine.predict(images)
"""

from __future__ import annotations

import math
import numbers
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np

from spiking_mlp_jax.deploy import artifact, ranges
from spiking_mlp_jax.deploy.engine.compiled import run
from spiking_mlp_jax.deploy.engine.operands import Constants
from spiking_mlp_jax.deploy.engine.program import Program
from spiking_mlp_jax.deploy.network import Description, IntegerNet, check_images, is_whole
from spiking_mlp_jax.errors import InputError

# Many images in flight amortize a call from Python; the buffers of a few stay in the cache. Measured on the
# Fashion-MNIST network, in microseconds per image: 152 at 2^18, 128, 119, 113, 109 at 2^22.
IN_FLIGHT_BYTES = 1 << 21
# With fewer possible additions per time step, a second thread costs more than it gains.
WORTH_A_TEAM = 20_000_000


class Engine:
    """A network ready to run.

    Args:
        net: an `IntegerNet`, or the path of an artifact.
        threads: number of threads; None for one per core that this process may use.

    Attributes:
        net, description: the network and its description.
        threads: number of threads.
        score_scale: float; logits and scores multiplied by it are in the trained network's units. A score is a sum over
            steps, so `scores * score_scale / steps` are the mean logits.

    Raises:
        InputError: the artifact is missing or damaged, a sum is not proven to fit its word, or threads is not a
            positive integer.

    Examples:
        >>> from spiking_mlp_jax import compile
        >>> net = compile("fashion_mnist", images=8)
        >>> engine = Engine(net, threads=1)
        >>> images = np.zeros((2, 32, 32, 1), np.uint8)
        >>> engine.logits(images).shape, engine.predict(images).dtype
        ((4, 2, 10), dtype('int32'))
    """

    def __init__(self, net: IntegerNet | str | os.PathLike, threads: int | None = None):
        if not isinstance(net, IntegerNet):
            net = artifact.load(net)
        if threads is None:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not is_whole(threads) or threads < 1:
            raise InputError(f"threads must be a positive integer, got {threads!r}")
        ranges.check(net)
        self.net: IntegerNet = net
        self.description: Description = net.description
        self.threads = threads = int(threads)
        self.score_scale = 2.0 ** -self.description.formats["head"].fraction
        self._constants = Constants(net)
        self._begin()
        self._slots = max(1, IN_FLIGHT_BYTES // _bytes_in_flight(self.description))
        self._team = threads > 1 and _additions(net) >= WORTH_A_TEAM

    def __reduce__(self):
        # Threads, locks and buffers belong to a process: a copy, or another process, makes its own.
        return type(self), (self.net, self.threads)

    def _begin(self):
        """State of this process: after a fork there are no threads, and a lock may have been held."""
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._idle: dict[tuple[int, int, bool], list[Program]] = {}
        self._lock = threading.Lock()

    def logits(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
        """Logits at every time step.

        Args:
            images: uint8 [B, H, W, C].
            steps: time steps to run, 1 to T; None for T.

        Returns:
            int32 [steps, B, K], bit for bit those of `reference.run`.

        Raises:
            InputError: images of the wrong shape or dtype; steps out of range.
        """
        images = check_images(self.description, images)
        steps = self._steps(steps)
        found = np.empty((steps, len(images), self.description.num_classes), np.int32)

        def run(start, stop, team):
            program = self._take(stop - start, steps, keep=False)
            program.images[: images[start:stop].size] = images[start:stop].ravel()
            active = np.ones(stop - start, np.uint8)
            self._run(program, active, 0, team)
            found[:, start:stop] = program.logits[: stop - start, :, : found.shape[2]].transpose(1, 0, 2)
            self._give_back(program)

        self._over_images(run, len(images), self._slots)
        return found

    def predict(self, images: np.ndarray, steps: int | None = None, margin: float | None = None) -> np.ndarray:
        """Class scores.

        Args:
            images: uint8 [B, H, W, C].
            steps: maximum number of time steps, 1 to T; None for T.
            margin: None, or the lead at which an image is classified early, see `predict_early`.

        Returns:
            int32 [B, K], the sum of the logits over the steps that ran; the argmax is the class. With a margin, images
            may run for different numbers of steps (`predict_early` returns them): divide by these to compare scores.

        Raises:
            InputError: as `logits`; a margin that is negative or not a number.
        """
        if margin is not None:
            return self.predict_early(images, margin, steps=steps)[0]
        # Each logit is proven to fit; their sum over T steps is checked.
        return _int32(self.logits(images, steps).sum(0, dtype=np.int64))

    def predict_early(
        self, images: np.ndarray, margin: float, min_steps: int = 1, steps: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Class scores with an early exit.

        An image is classified after the first step, from `min_steps` on, at which the mean logit of its best class
        exceeds the second best's by at least `margin`. The comparison is of integers, without division: the lead of the
        summed logits against margin * 2^fraction * step, rounded up.

        Args:
            images: uint8 [B, H, W, C].
            margin: lead in units of the trained network's logits, at least 0; infinity for no early exit.
            min_steps: minimum number of steps, 1 to `steps`.
            steps: maximum number of steps; None for T.

        Returns:
            (scores int32 [B, K], steps int32 [B]): the sum of the logits over the steps that the image ran, and their
            number.

        Raises:
            InputError: as `logits`; a margin that is negative or not a number; min_steps out of range.
        """
        images = check_images(self.description, images)
        steps = self._steps(steps)
        if not isinstance(margin, numbers.Real) or isinstance(margin, bool) or not margin >= 0:
            raise InputError(f"margin must be a number of at least 0, got {margin!r}")
        if not is_whole(min_steps) or not 1 <= min_steps <= steps:
            raise InputError(f"min_steps must be an integer between 1 and {steps}, got {min_steps!r}")
        needed = [_threshold(float(margin), self.description.formats["head"].fraction, t) for t in range(1, steps + 1)]
        classes = self.description.num_classes
        scores = np.zeros((len(images), classes), np.int64)
        ran = np.zeros(len(images), np.int32)

        def run(start, stop, team):
            program = self._take(stop - start, 1, keep=True)
            program.images[: images[start:stop].size] = images[start:stop].ravel()
            active = np.ones(stop - start, np.uint8)
            sums = scores[start:stop]
            for t in range(steps):
                self._run(program, active, t, team)
                on = active != 0
                sums[on] += program.logits[: stop - start, 0, :classes][on]
                ran[start:stop][on] += 1
                if t + 1 >= min_steps and needed[t] is not None:
                    active[on & (_lead(sums) >= needed[t])] = 0
                if not active.any():
                    break
            self._give_back(program)

        self._over_images(run, len(images), self._slots)
        return _int32(scores), ran

    def _steps(self, steps) -> int:
        most = self.description.time_steps
        if steps is None:
            return most
        if not is_whole(steps) or not 1 <= steps <= most:
            raise InputError(f"steps must be an integer between 1 and {most}, got {steps!r}")
        return int(steps)

    def _over_images(self, run, count: int, most: int):
        """Call run(start, stop, team) for parts of a batch: one thread per part, or all threads for one part."""
        if self._process != os.getpid():
            self._begin()
        if self._pool is None or (count < self.threads and not self._team):
            parts, team = _cut(count, most), False
        elif count < self.threads:
            parts, team = [(0, count)], True
        else:
            parts, team = _cut(count, min(most, -(-count // self.threads))), False
        if team or self._pool is None or len(parts) == 1:
            for start, stop in parts:
                run(start, stop, team)
        else:
            list(self._pool.map(lambda part: run(*part, False), parts))

    def _take(self, slots: int, steps: int, keep: bool) -> Program:
        # Always buffers for `_slots` images, so that an incomplete last part reuses them.
        key = max(slots, self._slots), steps, keep
        with self._lock:
            idle = self._idle.setdefault(key, [])
            return idle.pop() if idle else Program(*key, self._constants)

    def _give_back(self, program: Program):
        with self._lock:
            self._idle[program.slots, program.steps, program.keep].append(program)

    def _run(self, program: Program, active: np.ndarray, t: int, team: bool):
        """All calls for `program.steps` time steps from t on."""
        scratch = program.scratch(self.threads if team else 1)
        for call in program.calls:
            if call.once and t:
                continue
            steps = program.stem_steps if call.once else program.steps
            arguments = call.arguments(t)
            pieces = _cut(call.extent, call.unit, self.threads) if team else [(0, call.extent)]
            if len(pieces) == 1:
                run(call.kernel, active, *pieces[0], steps, *arguments, *(scratch[0][: call.scratch]))
            else:
                assert self._pool is not None
                waiting = [
                    self._pool.submit(run, call.kernel, active, *piece, steps, *arguments, *(own[: call.scratch]))
                    for piece, own in zip(pieces, scratch, strict=False)
                ]
                for one in waiting:
                    one.result()


def _cut(extent: int, unit: int, parts: int | None = None) -> list[tuple[int, int]]:
    """0 to extent in pieces of `unit`, or in `parts` pieces whose sizes are multiples of it."""
    size = unit if parts is None else -(-extent // (unit * parts)) * unit
    return [(start, min(start + size, extent)) for start in range(0, extent, size)]


def _bytes_in_flight(c: Description) -> int:
    """Roughly the potentials of an image's largest stage."""
    return max(4 * c.time_steps * c.stage_side(i) ** 2 * c.stage_dim(i) for i in range(c.stages))


def _additions(net: IntegerNet) -> int:
    """Additions in one time step if every neuron fired."""
    c, total = net.description, 0
    for i, depth in enumerate(c.depths):
        total += depth * c.stage_side(i) ** 2 * c.stage_dim(i) ** 2 * (3 + 2 * c.expansion)
    return total


def _threshold(margin: float, fraction: int, step: int) -> int | None:
    """margin * 2^fraction * step, rounded up exactly; None for infinity."""
    if math.isinf(margin):
        return None
    return math.ceil(Fraction(margin) * (1 << fraction) * step)


def _lead(sums: np.ndarray) -> np.ndarray:
    """The lead of the best class over the second best; the largest integer if there is only one."""
    if sums.shape[1] == 1:
        return np.full(len(sums), np.iinfo(np.int64).max)
    best = np.partition(sums, -2, -1)
    return best[:, -1] - best[:, -2]


def _int32(scores: np.ndarray) -> np.ndarray:
    if scores.size and max(int(scores.max()), -int(scores.min()) - 1) >= 1 << 31:
        raise InputError("the sum of the logits exceeds 32 bits; sum logits() in 64 bits instead")
    return scores.astype(np.int32)
