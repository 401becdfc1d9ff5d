"""Spike trains: counts, inter-spike intervals, regularity, bursts.

A train is one neuron's spikes over the T steps of one image. An interval is the number of steps between successive
spikes of a train, 1 to T - 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spiking_mlp_jax.analysis.activity import stream
from spiking_mlp_jax.analysis.activity.stream import SPIKES
from spiking_mlp_jax.nn.dynamics import MAX_UNROLLED_STEPS

# With three steps, a train with two intervals has two of length 1: nothing can vary.
LEAST_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Spike trains of one layer, over its neurons and the images.

    Attributes:
        counts: int64 [T + 1], trains with 0, 1, ..., T spikes.
        lengths: int64 [T - 1], intervals of 1, ..., T - 1 steps; longer ones do not fit into T.
        following: share of the spikes at steps 2 to T whose neuron also fired in the step before (bursts). NaN without
            such spikes.
        cv: coefficient of variation of a train's intervals, standard deviation (of n values, not n - 1) over mean;
            mean over the trains with at least two intervals. 0 is regular. NaN without such trains, and for T < 4,
            where it could only be 0.
        cv_trains: number of those trains.
        lv: local variation, 3 ((I - J) / (I + J))^2, mean over all pairs I, J of adjacent intervals of a train: 0 is
            regular, 1 a long Poisson process. NaN as for cv.
        lv_pairs: number of those pairs.

    References: Softky, Koch, J. Neurosci. 13, 1993 (cv); Shinomoto, Shima, Tanji, Neural Comput. 15, 2003 (lv).
    """

    counts: Int[np.ndarray, " T1"]
    lengths: Int[np.ndarray, " T-1"]
    following: float
    cv: float
    cv_trains: int
    lv: float
    lv_pairs: int

    @property
    def steps(self) -> int:
        """T."""
        return len(self.counts) - 1

    @property
    def count_shares(self) -> Float[np.ndarray, " T1"]:
        """Share of the trains with 0, 1, ..., T spikes."""
        return self.counts / self.counts.sum()

    @property
    def rate(self) -> float:
        """Mean firing rate, spikes per neuron and step."""
        return float(self.count_shares @ np.arange(self.steps + 1) / self.steps)

    @property
    def fano(self) -> float:
        """Variance over mean of the spike count, over neurons and images together; NaN without spikes.

        Independent spikes at one rate p give 1 - p; different rates of neurons or images give more.
        """
        counts, share = np.arange(self.steps + 1), self.count_shares
        mean = share @ counts
        return float((share @ counts**2 - mean**2) / mean) if mean else float("nan")

    def independent_counts(self) -> Float[np.ndarray, " T1"]:
        """`count_shares` if every neuron fired at every step independently at the layer's rate."""
        from scipy.stats import binom

        return binom.pmf(np.arange(self.steps + 1), self.steps, self.rate)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; NaN stays."""
        return {
            "spike_counts": self.counts.tolist(),
            "intervals": self.lengths.tolist(),
            "following": self.following,
            "fano": self.fano,
            "cv": self.cv,
            "cv_trains": self.cv_trains,
            "lv": self.lv,
            "lv_pairs": self.lv_pairs,
        }


def intervals_of(trains: dict[str, dict[str, np.ndarray]]) -> dict[str, Intervals]:
    """By layer, from the sums of `Trains`."""

    def ratio(total, count):
        return float(total) / int(count) if count else float("nan")

    found = {}
    for name, sums in trains.items():
        steps = len(sums["counts"]) - 1
        measurable = steps >= LEAST_STEPS
        trains_of, pairs = (int(sums[key]) if measurable else 0 for key in ("cv_trains", "lv_pairs"))
        lengths = sums["lengths"]
        found[name] = Intervals(
            counts=sums["counts"],
            lengths=lengths,
            following=ratio(lengths[0] if steps > 1 else 0, sums["later"]),
            cv=ratio(sums["cv"], trains_of),
            cv_trains=trains_of,
            lv=ratio(sums["lv"], pairs),
            lv_pairs=pairs,
        )
    return found


class Trains(stream.Part):
    """Sums over the spike trains of a layer."""

    def observe(self, name, value, mask):
        """See `stream.Part`."""
        if not name.endswith(SPIKES):
            return None
        steps = value.shape[1]
        fired = jnp.moveaxis((value > 0) & mask[:, None, None, None, None], 1, 0)
        zero = jnp.zeros(fired.shape[1:], jnp.int32)

        def step(state, inputs):
            """From the time of a train's last spike (0 for none), its last interval (0), its intervals' number, sum,
            sum of squares, and the sum of local variations."""
            last, before, number, total, squares, local = state
            time, spike = inputs
            interval = jnp.where(spike & (last > 0), time - last, 0)
            pair = (interval > 0) & (before > 0)
            ratio = (interval - before) / jnp.maximum(interval + before, 1).astype(jnp.float32)
            state = (
                jnp.where(spike, time, last),
                jnp.where(interval > 0, interval, before),
                number + (interval > 0),
                total + interval,
                squares + interval**2,
                local + jnp.where(pair, 3 * ratio**2, 0),
            )
            return state, interval

        start = (zero, zero, zero, zero, zero, zero.astype(jnp.float32))
        times = jnp.arange(1, steps + 1, dtype=jnp.int32)
        unroll = steps if steps <= MAX_UNROLLED_STEPS else 1
        (_, _, number, total, squares, local), found = jax.lax.scan(step, start, (times, fired), unroll=unroll)
        spikes = jnp.sum(fired, 0, dtype=jnp.int32)
        several = number >= 2
        # Integers until the root.
        variance = (number * squares - total**2).astype(jnp.float32)
        cv = jnp.sqrt(variance) / jnp.maximum(total, 1)
        real = jnp.broadcast_to(mask[:, None, None, None], spikes.shape)
        return {
            "counts": jnp.stack([jnp.sum(real & (spikes == n), dtype=jnp.int32) for n in range(steps + 1)]),
            "lengths": _stack([jnp.sum(found == n, dtype=jnp.int32) for n in range(1, steps)]),
            "later": jnp.sum(fired[1:], dtype=jnp.int32),
            "cv": jnp.sum(jnp.where(several, cv, 0)),
            "cv_trains": jnp.sum(several, dtype=jnp.int32),
            "lv": jnp.sum(local),
            "lv_pairs": jnp.sum(jnp.maximum(number - 1, 0), dtype=jnp.int32),
        }


def _stack(counts):
    return jnp.stack(counts) if counts else jnp.zeros(0, jnp.int32)
