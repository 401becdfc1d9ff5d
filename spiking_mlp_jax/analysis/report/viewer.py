"""The viewer's data: every spike of some example images, and a still of the first one for paper."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8

from spiking_mlp_jax.analysis.activity.stream import SPIKES, in_network_order
from spiking_mlp_jax.analysis.report.figures import signed_map
from spiking_mlp_jax.analysis.report.measure import Mistake, Progress, fitted_image
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.data.sources import spaced
from spiking_mlp_jax.models.pixels import normalize

BUDGET = 700_000  # bytes of spikes in a page, before base64
LAYERS = 36
CLASSES = 12
STILL_STEPS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An image and the network's response to it.

    Attributes:
        position: its place among all test images.
        image: as the network saw it.
        label: its class.
        logits: at each step.
        layers: by name, in the network's order: every spike; over the budget, the share of each token's channels that
            spike, as uint8 (255 is 1).
    """

    position: int
    image: UInt8[np.ndarray, "H W C"]
    label: int
    logits: Float[np.ndarray, "T K"]
    layers: dict[str, Bool[np.ndarray, "T h w c"] | UInt8[np.ndarray, "T h w"]]

    @property
    def scores(self) -> Float[np.ndarray, "T K"]:
        """Softmax of the mean logits of the first 1, 2, ... T steps."""
        mean = np.cumsum(self.logits, 0, dtype=np.float64) / np.arange(1, len(self.logits) + 1)[:, None]
        powers = np.exp(mean - mean.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    @property
    def predicted(self) -> int:
        """The class after the last step."""
        return int(self.scores[-1].argmax())

    def still(self) -> dict[str, Any]:
        """The steps side by side: the output of each stage as (step, pixels, firing rate), and the leading classes."""
        columns = spaced(len(self.logits), STILL_STEPS)
        stages = {}
        for name in {name.split(".")[0]: name for name in self.layers}.values():
            spikes = self.layers[name]
            share = spikes.mean(-1) if spikes.ndim == 4 else spikes / 255
            most = max(float(share.max()), 1e-9)
            stages[name] = [(t, signed_map(np.sqrt(share[t] / most), 1.0), float(share[t].mean())) for t in columns]
        best = {t: np.argsort(-self.scores[t], kind="stable")[:3].tolist() for t in columns}
        leading = [[(k, float(self.scores[t, k])) for k in classes] for t, classes in best.items()]
        return {"heads": [f"step {t + 1}" for t in columns], "stages": stages, "leading": leading}


def examples(run: Run, mistakes: Sequence[Mistake], count: int, progress: Progress) -> list[Example]:
    """Runs the network on evenly spaced images and on its two worst mistakes.

    Args:
        run: with a source.
        mistakes: the most confident first.
        count: number of images.
        progress: called with what is done, how much of it and of how much.
    """
    assert run.source is not None
    wrong = [mistake.index for mistake in mistakes[: min(2, count - 1)]]
    graphdef, variables = nnx.split(run.trained.model)
    c, pixels = run.trained.model.config, run.trained.pixels

    @jax.jit
    def spikes_of(variables, image):
        keep = lambda name, value: value[0].astype(bool) if name.endswith(SPIKES) else None  # noqa: E731
        logits, seen = nnx.merge(graphdef, variables, copy=True)(image[None], observe=keep)
        return logits[:, 0], seen

    found = []
    chosen = list(dict.fromkeys(spaced(len(run.source), count - len(wrong)) + wrong))
    for done, index in enumerate(chosen):
        progress("example images", done, len(chosen))
        image, label = fitted_image(run, index)
        logits, seen = spikes_of(variables, normalize(image, pixels.mean, pixels.std))
        ordered = {name.removesuffix(SPIKES): spikes for name, spikes in in_network_order(seen, c).items()}
        shown = {name: np.asarray(ordered[name]) for name in shown_layers(list(ordered))}
        bits = BUDGET / len(chosen) / len(shown) * 8
        layers = {
            name: spikes if spikes.size <= bits else np.rint(255 * spikes.mean(-1)).astype(np.uint8)
            for name, spikes in shown.items()
        }
        found.append(Example(run.position(index), image, label, np.asarray(logits), layers))
    progress("example images", len(chosen), len(chosen))
    return found


def shown_layers(names: list[str]) -> list[str]:
    """All of at most 36 layers; of more the outputs of encodings and blocks; if too many, evenly spaced ones."""
    if len(names) > LAYERS:
        names = [name for name in names if name.endswith((".encode", ".channel"))]
    return [names[i] for i in spaced(len(names), LAYERS)]


def viewer_data(run: Run, found: Sequence[Example]) -> dict[str, Any]:
    """What viewer.js reads, as JSON values.

    {"steps": T, "classes": [name], "stages": [title], "layers": [{"name", "stage", "main", "side", "channels"}],
    "examples": [{"label", "shown": [class], "logits": float32 [T, K], "spikes": [a layer's bits [T, h, w, c], first
    bit highest, or bytes [T, h, w] (channels 0)]}]}; arrays are little endian in base64.
    """
    c = run.trained.model.config
    layers = []
    for name, spikes in found[0].layers.items():
        stage, rest = name.split(".", 1)
        layers.append(
            {
                "name": rest,
                "stage": int(stage.removeprefix("stage")),
                "main": name.count(".") == 1 or name.endswith((".token", ".channel")),
                "side": spikes.shape[1],
                "channels": spikes.shape[3] if spikes.ndim == 4 else 0,
            }
        )
    return {
        "steps": c.time_steps,
        "classes": run.trained.data["class_names"],
        "stages": [
            f"Stage {i}: {c.stage_side(i)} by {c.stage_side(i)} tokens of {c.stage_dim(i)} channels"
            for i in range(c.stages)
        ],
        "layers": layers,
        "examples": [
            {
                "label": example.label,
                "shown": shown_classes(example),
                "logits": _base64(example.logits.astype("<f4")),
                "spikes": [_base64(np.packbits(x) if x.dtype == bool else x) for x in example.layers.values()],
            }
            for example in found
        ],
    }


def shown_classes(example: Example) -> list[int]:
    """All of at most 12 classes; of more those with the highest scores at the end, and the true one."""
    scores = example.scores[-1]
    if len(scores) <= CLASSES:
        return list(range(len(scores)))
    best = np.argsort(-scores, kind="stable")[: CLASSES - 1].tolist()
    return best if example.label in best else [*best, example.label]


def _base64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
