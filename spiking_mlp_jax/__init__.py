"""Spiking MLPs with multiplication-free inference, in JAX and Flax NNX.

    import spiking_mlp_jax as smlp

    model = smlp.from_pretrained("fashion_mnist")        # or smlp.create_model("mlp_spe_t", num_classes=10)
    smlp.classify(model, ["shoe.png"])
    smlp.evaluate(model, "fashion_mnist").accuracy
    smlp.save(smlp.compile("fashion_mnist"), "net.smlp")  # integers only, no multiplications
    smlp.Engine("net.smlp").predict(images)              # without JAX

Names are imported on first use: JAX and Flax take seconds to import, and compiled networks run without them.
"""

from __future__ import annotations

import importlib
import operator
from typing import TYPE_CHECKING, Any

from spiking_mlp_jax.utils import __version__

# ruff: noqa: F401
if TYPE_CHECKING:
    from spiking_mlp_jax import analysis, cli, data, deploy, interop, models, nn, sweep, train, utils
    from spiking_mlp_jax.analysis.evaluate import evaluate
    from spiking_mlp_jax.deploy.audit import audit
    from spiking_mlp_jax.deploy.compile import compile, save
    from spiking_mlp_jax.deploy.engine import Engine
    from spiking_mlp_jax.deploy.fold import fold
    from spiking_mlp_jax.deploy.predict import classify
    from spiking_mlp_jax.deploy.quantize import quantize
    from spiking_mlp_jax.interop import official
    from spiking_mlp_jax.models.config import ModelConfig
    from spiking_mlp_jax.models.registry import create_model, list_models
    from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
    from spiking_mlp_jax.nn import surrogate
    from spiking_mlp_jax.nn.neuron import integrate_and_fire, lif, plif
    from spiking_mlp_jax.train.config import default_config, load_config
    from spiking_mlp_jax.train.loop import fit

    from_pretrained = SpikingMLP.from_pretrained

# Where each name comes from: a module and, after the colon, what is taken from it.
_HOMES = {
    "Engine": "deploy.engine:Engine",
    "ModelConfig": "models.config:ModelConfig",
    "SpikingMLP": "models.spiking_mlp:SpikingMLP",
    "audit": "deploy.audit:audit",
    "classify": "deploy.predict:classify",
    "compile": "deploy.compile:compile",
    "create_model": "models.registry:create_model",
    "default_config": "train.config:default_config",
    "evaluate": "analysis.evaluate:evaluate",
    "fit": "train.loop:fit",
    "fold": "deploy.fold:fold",
    "from_pretrained": "models.spiking_mlp:SpikingMLP.from_pretrained",
    "integrate_and_fire": "nn.neuron:integrate_and_fire",
    "lif": "nn.neuron:lif",
    "list_models": "models.registry:list_models",
    "load_config": "train.config:load_config",
    "official": "interop.official",
    "plif": "nn.neuron:plif",
    "quantize": "deploy.quantize:quantize",
    "save": "deploy.compile:save",
    "surrogate": "nn.surrogate",
    **{x: x for x in ("analysis", "cli", "data", "deploy", "interop", "models", "nn", "sweep", "train", "utils")},
}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    globals()[name] = found = operator.attrgetter(attribute)(found) if attribute else found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
