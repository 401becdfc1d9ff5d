"""Spiking MLPs with multiplication-free inference, in JAX and Flax NNX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spiking_mlp_jax.config import ModelConfig
    from spiking_mlp_jax.model import SpikingMLP

__version__ = "0.1.0"
__all__ = ["ModelConfig", "SpikingMLP", "__version__"]


def __getattr__(name):
    # Loaded on first use: JAX and Flax take seconds to import, which `spiking-mlp --help` should not wait for.
    if name in ("ModelConfig", "SpikingMLP"):
        from spiking_mlp_jax import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
