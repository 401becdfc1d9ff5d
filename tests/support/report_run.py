"""The folder of a small training run whose names try to break out of the report."""

import dataclasses
import html.parser
import json
from pathlib import Path

import jax
import numpy as np

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.analysis.report.page import make_page
from spiking_mlp_jax.analysis.report.run import open_run
from spiking_mlp_jax.data.pipeline import eval_batches
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.topology import intermediate_names
from spiking_mlp_jax.train.evaluate import evaluate_model
from tests.support.random_model import make_data, meta_for, random_model

NAMES = ["</script><script>window.broken = 1</script>", "\"quoted\" & 'single' &amp; $style", "<img src=x onerror=a()>"]
STEPS = 3
PER_CLASS = 4


def make_run(folder: Path) -> Path:
    """A workdir with all files of a training run, and its data."""
    workdir = folder / 'a <b> & "run"'
    model = random_model(depths=(1, 1), time_steps=STEPS)
    data = make_data(folder / "data", PER_CLASS)
    weights.save(workdir / "weights", model, meta_for(model, class_names=NAMES))
    settings = {"data_dir": str(data), "learning_rate": 0.1, "dataset": "<i>folder</i>"}
    (workdir / "config.json").write_text(json.dumps(settings))
    (workdir / "versions.json").write_text(json.dumps({"jax": "<u>1</u>"}))
    lines = [{"step": s, "split": "train", "loss": 2 - s / 20, "accuracy": s / 40} for s in range(1, 21)]
    lines += [{"step": s, "split": "eval", "loss": 1.0, "accuracy": 0.4 + s / 200} for s in (10, 20)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batches = eval_batches(open_source("folder", "test", data), batch_size=5, image_size=16, in_channels=1)
    result = evaluate_model(model, batches, [0.25], [0.5])
    (workdir / "evaluation.json").write_text(json.dumps({"step": 20, **result.to_dict()}))
    return workdir


def page_of(where, **options) -> str:
    """The report, without progress."""
    run = open_run(str(where), **options)
    return make_page(run, f"spiking-mlp report '{where}'", 5, lambda *_: None, print)


@dataclasses.dataclass(frozen=True)
class Truth:
    """The network's response to its test images, computed without the report.

    Attributes:
        logits: [T, N, K].
        labels: [N].
        spikes: by layer in the network's order, [N, T, H, W, C].
        model, inputs: the network and normalised images.
    """

    logits: np.ndarray
    labels: np.ndarray
    spikes: dict[str, np.ndarray]
    model: SpikingMLP
    inputs: np.ndarray


def truth_of(workdir: Path) -> Truth:
    """Runs the network of a workdir."""
    model, _ = weights.load(workdir / "weights")
    source = open_source("folder", "test", workdir.parent / "data")
    records = [source[i] for i in range(len(source))]
    images = np.stack([fit_image(record["image"], 16, 1) for record in records])
    inputs = (images.astype(np.float32) / 255 - np.float32(0.25)) / np.float32(0.5)
    run = jax.jit(lambda x: model(x, observe=lambda name, x: x if name.endswith(".spikes") else None))
    logits, spikes = run(inputs)
    ordered = {
        name: np.asarray(spikes[name]).astype(bool) for name in intermediate_names(model.config) if name in spikes
    }
    labels = np.array([record["label"] for record in records])
    return Truth(np.asarray(logits, np.float64), labels, ordered, model, inputs)


class Page(html.parser.HTMLParser):
    """What the tests need of a parsed page.

    Attributes:
        tags: (name, attributes) of all elements.
        data: value of each <data> with an id.
        rows: of tables, the texts of their cells; a <data> counts as its value.
        scripts: contents of the script elements.
        told: all text outside of scripts and styles.
    """

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.data, self.rows, self.scripts, self.told = [], {}, [], [], ""
        self._raw, self._in_cell, self._in_data = None, False, False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag in ("script", "style"):
            self._raw = tag
            self.scripts += [""] if tag == "script" else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        if tag == "data":
            self._in_data = True
            if self._in_cell:
                self.rows[-1][-1] += attributes["value"]
            if "id" in attributes:
                self.data[attributes["id"]] = float(attributes["value"])

    def handle_endtag(self, tag):
        if tag == self._raw:
            self._raw = None
        if tag in ("td", "th"):
            self._in_cell = False
        if tag == "data":
            self._in_data = False

    def handle_data(self, data):
        if self._raw == "script":
            self.scripts[-1] += data
        elif self._raw is None:
            self.told += data
            if self._in_cell and not self._in_data:
                self.rows[-1][-1] += data
