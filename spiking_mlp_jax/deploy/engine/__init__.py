"""Runs integer networks with numpy and numba, without JAX."""

from spiking_mlp_jax.deploy.engine.engine import Engine

__all__ = ["Engine"]
