"""Reads a JAX program and lists what it computes with: `audit(fn, *args)`."""

from spiking_mlp_jax.deploy.audit.interpreter import Report, Row, abstract, audit

__all__ = ["Report", "Row", "abstract", "audit"]
