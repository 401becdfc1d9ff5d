"""Neurons, surrogate gradients, norms and layers."""
