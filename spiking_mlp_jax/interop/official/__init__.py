"""The paper's official PyTorch code: `load` its weights as a network, `dump` a network's weights under its names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from spiking_mlp_jax.interop.official.state import load_state_dict, state_dict

if TYPE_CHECKING:
    from spiking_mlp_jax.interop.official.conversion import (
        Converted,
        convert,
        dump,
        load,
        missing_statistics,
        not_finite,
    )

__all__ = ["Converted", "convert", "dump", "load", "load_state_dict", "missing_statistics", "not_finite", "state_dict"]


def __getattr__(name: str):
    # Conversion imports packages that the network does not need.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.conversion"), name)
