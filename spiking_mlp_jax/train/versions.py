"""What a run was made with, for whoever wants to repeat it."""

from __future__ import annotations

import importlib.metadata
import platform

import jax

PACKAGES = (
    "spiking-mlp-jax jax jaxlib flax optax orbax-checkpoint grain numpy chex ml-collections "
    "tensorflow-datasets safetensors"
)


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that results may depend on, by name; and the devices."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {name: _version(name) for name in PACKAGES.split()}
    return found | {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
