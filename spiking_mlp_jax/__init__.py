"""Spiking MLPs with multiplication-free inference, in JAX and Flax NNX."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spiking_mlp_jax.config import ModelConfig
    from spiking_mlp_jax.create import create_model, list_models
    from spiking_mlp_jax.model import SpikingMLP
    from spiking_mlp_jax.predict import classify

__version__ = "0.1.0"
__all__ = ["ModelConfig", "SpikingMLP", "__version__", "classify", "create_model", "list_models"]
_MODULES = {
    "ModelConfig": "config",
    "SpikingMLP": "model",
    "classify": "predict",
    "create_model": "create",
    "list_models": "create",
}


def __getattr__(name):
    # Loaded on first use: JAX and Flax take seconds to import, which `spiking-mlp --help` should not wait for.
    if name in _MODULES:
        return getattr(importlib.import_module(f"spiking_mlp_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
