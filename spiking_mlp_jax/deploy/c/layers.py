"""What the templates of a stage's encoding and of a block need; each writes its constants, in the order of the file."""

from __future__ import annotations

from typing import Any

import numpy as np

from spiking_mlp_jax.deploy.c.source import Source


def stage(source: Source, i: int) -> dict[str, Any]:
    """Of a stage: its number, the layers of its encoding, and its blocks."""
    name = f"stage{i}.encode"
    parts = [f"{name}.{key}" for key in ("cells", "edge1", "edge2")] if i and source.nodes else [name]
    layers = [source.layer(part) for part in parts]
    blocks = [_block(source, i, f"stage{i}.block{j}") for j in range(source.c.depths[i])]
    return {"index": i, "layers": layers, "held_step": source.held_step(i), "blocks": blocks}


def _block(source: Source, i: int, key: str) -> dict[str, Any]:
    c, name = source.c, key.replace(".", "_")
    layers = [source.layer(f"{key}.{part}") for part in ("height", "width", "fuse", "expand", "project")]
    counters = [("from", "at", source.grid(i)), ("kept", "at", source.held_step(i))]
    for layer in layers[2:]:
        counters += layer.counters()
    found: dict[str, Any] = {"key": key, "name": name, "stage": i, "layers": layers, "counters": counters}
    found |= {"here": c.formats[f"stage{i}"], "hidden": c.formats[f"{key}.hidden"], "identity_steps": False}
    if c.encoding == "plain":
        low, high = (source.arrays[f"{key}.identity.{entry}"] for entry in ("low", "high"))
        source.constant("int32_t", f"{name}_identity_low", low)
        source.constant("int32_t", f"{name}_identity_high", high)
        found |= {"identity": c.formats[f"{key}.identity"], "identity_steps": len(low) > 1}
        counters += [("identity_at", "0", c.stage_dim(i))] * (len(low) > 1)
    if c.per_token:
        _per_token_constants(source, key, name)
        steps = [len(source.arrays[f"{key}.{part}.offset"]) > 1 for part in ("expand", "project")]
        tokens = c.stage_side(i) ** 2
        counters += [
            (f"{part}_at", "0", tokens) for part, many in zip(("expand", "project"), steps, strict=True) if many
        ]
        found |= {"offset_steps": steps, "terms": source.arrays[f"{key}.project.signs"].shape[1]}
    return found


def _per_token_constants(source: Source, key: str, name: str) -> None:
    """The constants of each token's neurons and second norm."""
    a = {
        entry: source.arrays[f"{key}.{entry}"]
        for entry in ("expand.threshold", "expand.reset", "expand.below", "expand.constant")
    }
    source.constant("int32_t", f"{name}_level", a["expand.threshold"].astype(np.int64) << source.c.leak)
    source.constant("int32_t", f"{name}_reset", a["expand.reset"])
    turned = a["expand.below"].astype(np.uint8) | a["expand.constant"].astype(np.uint8) << 1
    source.constant("uint8_t", f"{name}_turned", turned, "1: fires at or below its level; 2: sees its offset alone")
    for part in ("expand", "project"):
        source.constant("int32_t", f"{name}_{part}_offset", source.arrays[f"{key}.{part}.offset"])
    for entry in ("exponents", "signs"):
        source.constant("int8_t", f"{name}_{entry}", source.arrays[f"{key}.project.{entry}"])
