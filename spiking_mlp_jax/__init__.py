"""Spiking MLPs with multiplication-free inference, in JAX and Flax NNX."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spiking_mlp_jax.deploy.predict import classify
    from spiking_mlp_jax.models.config import ModelConfig
    from spiking_mlp_jax.models.registry import create_model, list_models
    from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

__version__ = "0.1.0"
__all__ = ["ModelConfig", "SpikingMLP", "__version__", "classify", "create_model", "list_models"]
_MODULES = {
    "ModelConfig": "models.config",
    "SpikingMLP": "models.spiking_mlp",
    "classify": "deploy.predict",
    "create_model": "models.registry",
    "list_models": "models.registry",
}


def __getattr__(name):
    # Loaded on first use: JAX and Flax take seconds to import, which `spiking-mlp --help` should not wait for.
    if name in _MODULES:
        return getattr(importlib.import_module(f"spiking_mlp_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
