"""SpikingJelly's side of a comparison, with the functions of `ours.py`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.spikingjelly_twin import Twin
from spiking_mlp_jax.models.config import ModelConfig

Arrays = dict[str, np.ndarray]
Read = Callable[[], Arrays]


def outputs(config: ModelConfig, read: Read, images: np.ndarray, labels: np.ndarray) -> Arrays:
    """See `ours.outputs`."""
    twin = Twin(config).double()
    twin.load_official(read())
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    logits = twin(pixels)
    loss = torch.nn.functional.cross_entropy(logits.mean(0), torch.from_numpy(labels))
    loss.backward()
    gradients = {f"gradient.{name}": p.grad.numpy() for name, p in twin.named_parameters() if p.grad is not None}
    twin.eval()
    with torch.no_grad():
        evaluation = twin(pixels)
    return {
        "training": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "evaluation": evaluation.numpy(),
        **gradients,
    }


def training(config: ModelConfig, read: Read, images: np.ndarray, labels: np.ndarray):
    """A function that runs one training step to completion; nothing is compiled ahead."""
    twin, pixels, autocast = _prepared(config, read, images)
    targets = torch.from_numpy(labels).to(pixels.device)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)

    def run():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = torch.nn.functional.cross_entropy(twin(pixels).mean(0), targets)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        _wait()

    return _with_first_call(run)


def inference(config: ModelConfig, read: Read, images: np.ndarray, labels: np.ndarray):
    """A function that computes the logits of a batch in evaluation mode."""
    twin, pixels, autocast = _prepared(config, read, images)
    twin.eval()

    def run():
        with torch.no_grad(), autocast():
            twin(pixels)
        _wait()

    return _with_first_call(run)


def device_facts() -> dict[str, Any]:
    """Device and versions; `device_peak_bytes` on a GPU."""
    facts: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("torch", "spikingjelly")}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return facts


def _prepared(config, read, images):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    twin = Twin(config)
    twin.load_official(read())
    twin.to(device)
    pixels = torch.from_numpy(images).float().permute(0, 3, 1, 2).contiguous().to(device)
    mixed = config.dtype == "bfloat16"
    autocast = (lambda: torch.autocast(device, torch.bfloat16)) if mixed else contextlib.nullcontext
    return twin, pixels, autocast


def _with_first_call(run):
    # The first call chooses kernels, where the other side compiles.
    start = time.perf_counter()
    run()
    return run, {"first_call_s": time.perf_counter() - start}


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
