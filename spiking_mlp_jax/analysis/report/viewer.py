"""What the viewer shows: every spike of some example images, packed, and a still of the first one for paper."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8

from spiking_mlp_jax.analysis.activity.measure import SPIKES, in_network_order
from spiking_mlp_jax.analysis.report.markup import data_uri, percent, picture, signed_map, table, text
from spiking_mlp_jax.analysis.report.measure import Mistake, Progress
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.data.damaged import next_decodable
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.models.pixels import normalize

BUDGET = 700_000  # bytes of spikes in a page, before they become text a third longer
LAYERS = 36
CLASSES = 12
STILL_STEPS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An image and what it causes.

    Attributes:
        position: its place among all test images.
        image: as the network saw it.
        label: its class.
        logits: at each step.
        layers: by name, in the network's order: each spike, or if all of these were too many, the share of a token's
            channels that spike, uint8 for 0 to 1.
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


def examples(run: Run, mistakes: Sequence[Mistake], count: int, progress: Progress) -> list[Example]:
    """Runs the network on images that lie evenly spaced, and on its two worst mistakes.

    Args:
        run: with a source.
        mistakes: the most confident first.
        count: how many images.
        progress: called with what is done, how much of it and of how much.
    """
    source, c = run.source, run.config
    assert source is not None
    wrong = [mistake.index for mistake in mistakes[: min(2, count - 1)]]
    spaced = np.linspace(0, len(source) - 1, min(count - len(wrong), len(source))).round().astype(int).tolist()
    graphdef, variables = nnx.split(run.model)

    @jax.jit
    def spikes_of(variables, image):
        keep = lambda name, value: value[0].astype(bool) if name.endswith(SPIKES) else None  # noqa: E731
        logits, seen = nnx.merge(graphdef, variables, copy=True)(image[None], observe=keep)
        return logits[:, 0], seen

    found = []
    chosen = list(dict.fromkeys(spaced + wrong))
    for done, index in enumerate(chosen):
        progress("example images", done, len(chosen))
        record = next_decodable(source, index)
        image = fit_image(record["image"], *run.fitting)
        logits, seen = spikes_of(variables, normalize(image, run.data["mean"], run.data["std"]))
        ordered = {name.removesuffix(SPIKES): spikes for name, spikes in in_network_order(seen, c).items()}
        shown = {name: np.asarray(ordered[name]) for name in shown_layers(list(ordered))}
        bits = BUDGET / len(chosen) / len(shown) * 8
        layers = {name: spikes if spikes.size <= bits else _share(spikes) for name, spikes in shown.items()}
        found.append(Example(run.position(index), image, int(record["label"]), np.asarray(logits), layers))
    progress("example images", len(chosen), len(chosen))
    return found


def shown_layers(names: list[str]) -> list[str]:
    """Of few layers all; of many what encodings and blocks hand on, and of very many some of these, evenly spaced."""
    if len(names) > LAYERS:
        names = [name for name in names if name.endswith((".encode", ".channel"))]
    if len(names) > LAYERS:
        names = [names[i] for i in np.linspace(0, len(names) - 1, LAYERS).round().astype(int)]
    return names


def _share(spikes):
    return np.rint(255 * spikes.mean(-1)).astype(np.uint8)


def viewer_data(run: Run, found: Sequence[Example]) -> str:
    """Everything as JSON that can stand in an element `script`: no character in it ends one.

    {"steps": T, "classes": [name], "layers": [{"name", "stage", "main", "side", "channels", "bits"}],
    "examples": [{"label", "shown": [class], "logits": float32 [T, K], "spikes": [a layer's bits [T, h, w, c], first
    bit highest, or bytes [T, h, w]]}]}; arrays are little endian in base64.
    """
    c = run.config
    layers = []
    for name, spikes in found[0].layers.items():
        stage = int(name.split(".")[0].removeprefix("stage"))
        layers.append(
            {
                "name": name.split(".", 1)[1],
                "stage": stage,
                "main": name.count(".") == 1 or name.endswith((".token", ".channel")),
                "side": spikes.shape[1],
                "channels": spikes.shape[3] if spikes.ndim == 4 else 0,
            }
        )
    stages = [
        f"Stage {i}: {c.stage_side(i)} by {c.stage_side(i)} tokens of {c.stage_dim(i)} channels"
        for i in range(c.stages)
    ]
    document = {
        "steps": c.time_steps,
        "classes": run.data["class_names"],
        "stages": stages,
        "layers": layers,
        "examples": [
            {
                "label": example.label,
                "shown": shown_classes(example),
                "logits": _packed(example.logits.astype("<f4")),
                "spikes": [_packed(_bits(spikes)) for spikes in example.layers.values()],
            }
            for example in found
        ],
    }
    return script_json(document)


def script_json(document: Any) -> str:
    """JSON without the characters that mean something in HTML or end a line in JavaScript."""
    encoded = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shown_classes(example: Example) -> list[int]:
    """Of few classes all, of many those with the highest scores at the end, and the true one."""
    scores = example.scores[-1]
    if len(scores) <= CLASSES:
        return list(range(len(scores)))
    best = np.argsort(-scores, kind="stable")[: CLASSES - 1].tolist()
    return best if example.label in best else [*best, example.label]


def _bits(spikes):
    return np.packbits(spikes.reshape(-1)) if spikes.dtype == bool else spikes


def _packed(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def choices(run: Run, found: Sequence[Example]) -> str:
    """A button with a picture for each example; the viewer's script makes them work."""
    names = run.data["class_names"]
    buttons = []
    for i, example in enumerate(found):
        best = int(example.scores[-1].argmax())
        verdict = "" if best == example.label else f", taken for {names[best]}"
        alt = f"Test image {example.position}: {names[example.label]}{verdict}"
        wrong = "" if best == example.label else ' class="wrong"'
        buttons.append(
            f'<button type="button" data-example="{i}" aria-pressed="false"{wrong}>'
            f"{picture(example.image, alt, 'pixels')}</button>"
        )
    return "".join(buttons)


def still(run: Run, example: Example) -> str:
    """All steps of one example at once: what each stage hands on, and the leading classes."""
    names, steps = run.data["class_names"], len(example.logits)
    columns = list(range(steps))
    if steps > STILL_STEPS:
        columns = np.linspace(0, steps - 1, STILL_STEPS).round().astype(int).tolist()
    last = {name.split(".")[0]: name for name in example.layers}
    rows = []
    for stage, name in last.items():
        spikes = example.layers[name]
        share = spikes.mean(-1) if spikes.ndim == 4 else spikes / 255
        most = max(float(share.max()), 1e-9)
        cells = []
        for t in columns:
            pixels = signed_map(np.sqrt(share[t] / most), 1.0)
            rate = float(share[t].mean())
            alt = f"{stage}, step {t + 1}: {percent(rate)} of the neurons spike"
            cells.append(f'<img class="pixels tint token" src="{data_uri(pixels)}" alt="{alt}"><br>{percent(rate)}')
        rows.append((f"<code>{text(name)}</code>", *cells))
    leading = []
    for t in columns:
        best = np.argsort(-example.scores[t], kind="stable")[:3].tolist()
        leading.append("<br>".join(f"{text(names[k])} {percent(float(example.scores[t, k]), 0)}" for k in best))
    rows.append(("leading classes", *leading))
    head = ("", *(f"step {t + 1}" for t in columns))
    caption = (
        f"{picture(example.image, f'Test image {example.position}', 'pixels small')} Test image {example.position}, "
        f"{text(names[example.label])}, at all steps. A square is a token, stronger where more of its channels spike."
    )
    return table(head, rows, caption, kind="still")
