"""The engine's side of a comparison, without JAX."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import cores
from spiking_mlp_jax.deploy.engine import Engine

NETWORK = "net.smlp"


def inference(config, read: Path, images: np.ndarray, labels: np.ndarray):
    """A function that scores a batch of raw pixels; the facts have the seconds of engine set-up and first call."""
    start = time.perf_counter()
    engine = Engine(read, threads=cores())
    engine.predict(images)
    return lambda: engine.predict(images), {"first_call_s": time.perf_counter() - start}


def device_facts() -> dict[str, Any]:
    """Versions."""
    return {"device": "cpu", "platform": "cpu", "numba": importlib.metadata.version("numba")}
