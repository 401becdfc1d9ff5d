"""Writes an integer network as one C99 file."""

from spiking_mlp_jax.deploy.c.export import Memory, export_c, memory, to_c

__all__ = ["Memory", "export_c", "memory", "to_c"]
