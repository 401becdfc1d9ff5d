"""Pallas kernels and how they are sharded."""
