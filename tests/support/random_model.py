"""Networks with random values and the folder of a small training run, without initialising or training."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.models import weights
from tests.support.tiny import tiny_config

CLASSES = ("bird", "cat", "dog")


def random_model(seed=0, **overrides) -> SpikingMLP:
    """A network of `tiny_config` in evaluation mode whose parameters, statistics and counters are all random."""
    config = tiny_config(**overrides)
    model = nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    for name, variable in variables(model).items():
        values = rng.normal(0.3, 0.5, variable.shape)
        values = np.abs(values) + 0.1 if name.endswith(".var") else values
        if np.issubdtype(variable.dtype, np.integer):
            values = rng.integers(1000, size=variable.shape)
        variable.set_value(jnp.asarray(values, variable.dtype))
    model.eval()
    return model


def variables(model) -> dict[str, nnx.Variable]:
    """A network's variables by dotted path."""
    return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}


def set_value(model, name, values):
    """Gives one variable, by its dotted path, the values, or one value everywhere."""
    variable = variables(model)[name]
    variable.set_value(jnp.asarray(np.broadcast_to(values, variable.shape), variable.dtype))


def meta_for(model, **overrides) -> dict:
    """What a training run saves beside a network's weights."""
    config = model.config
    data = {
        "dataset": "folder",
        "resize_mode": "pad",
        "eval_resize": 0,
        "mean": [0.25] * config.in_channels,
        "std": [0.5] * config.in_channels,
        "class_names": list(CLASSES),
    }
    return {"data": {**data, **overrides}, "result": {"step": 20, "accuracy": 0.5}}


def make_data(folder: Path, per_class=4, size=16, split="test") -> Path:
    """An image folder with one split."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / split / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def make_workdir(folder: Path, model: SpikingMLP) -> Path:
    """What a training run leaves: weights, config.json, metrics.jsonl, and its data in `folder`/data."""
    data = make_data(folder / "data")
    weights.save(folder / "weights", model, meta_for(model))
    (folder / "config.json").write_text(json.dumps({"data_dir": str(data), "eval_batch_size": 5}))
    lines = [{"step": s, "split": "train", "loss": 2 - s / 20, "accuracy": s / 40} for s in range(1, 21)]
    lines += [{"step": s, "split": "eval", "loss": 1.0, "accuracy": 0.4 + s / 200} for s in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
