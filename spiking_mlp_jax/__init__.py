"""Spiking MLPs with multiplication-free inference, in JAX and Flax NNX."""

from spiking_mlp_jax.config import ModelConfig
from spiking_mlp_jax.model import SpikingMLP

__version__ = "0.1.0"
__all__ = ["ModelConfig", "SpikingMLP", "__version__"]
