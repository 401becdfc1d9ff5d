"""The configuration of an official state: from names and shapes; the paper's values for the rest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.interop.official.state import plain_name
from spiking_mlp_jax.models.config import ModelConfig

# Fields that change the logits and that a state may leave open; their defaults are the paper's.
ASSUMED = ("time_steps", "norm", "norm_features", "neuron", "tau", "v_threshold", "v_reset", "decay_input")
# Fields of training, and of execution, which change logits only by rounding.
TRAINING = ("detach_reset", "surrogate", "surrogate_alpha", "remat", "dtype", "neuron_backend")
FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


@dataclasses.dataclass(frozen=True)
class Origins:
    """Where the fields of a converted network's configuration come from: names of fields."""

    inferred: tuple[str, ...]
    given: tuple[str, ...]
    assumed: tuple[str, ...]


def choose_config(
    state: Mapping[str, np.ndarray], given: Mapping[str, Any], like: ModelConfig | None = None
) -> tuple[ModelConfig, Origins]:
    """The configuration of a state, and the origin of each field.

    Args:
        state: official names, with or without prefixes of training, to arrays; only shapes are read.
        given: fields of ModelConfig that the user sets.
        like: a configuration for the fields that neither the state nor the user determines.

    Raises:
        InputError: as `infer_config`.
    """
    possible = possible_fields(state)
    inferred = tuple(name for name, values in possible.items() if len(values) == 1)
    given = dict(given)
    for name in (*ASSUMED, *TRAINING) if like is not None else ():
        value = getattr(like, name)
        if name not in inferred and value in possible.get(name, (value,)):
            given.setdefault(name, value)
    config = infer_config(state, **given)
    assumed = tuple(n for n in ASSUMED if n not in inferred and n not in given and _matters(n, config))
    return config, Origins(inferred, tuple(name for name in given if name not in inferred), assumed)


def missing_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields that change a network's logits but that its official state does not determine, with their values."""
    inferred = {"layer": ("norm",), "tebn": ("norm", "time_steps")}.get(config.norm, ())
    inferred += ("neuron",) if config.neuron == "plif" else ()
    names = [n for n in ASSUMED if n not in inferred and n != "norm_features" and _matters(n, config)]
    return {name: getattr(config, name) for name in names}


def infer_config(state: Mapping[str, np.ndarray], **known: Any) -> ModelConfig:
    """The configuration of an official state.

    Args:
        state: as for `choose_config`.
        known: fields of ModelConfig. Fields that neither these nor the state determine have the paper's values.

    Raises:
        InputError: the state belongs to no network of this package, or contradicts a given field.

    Examples:
        >>> from spiking_mlp_jax import SpikingMLP
        >>> from spiking_mlp_jax.interop.official.state import state_dict
        >>> config = infer_config(state_dict(SpikingMLP.from_pretrained("fashion_mnist")))
        >>> config.depths, config.image_size, config.encoding
        ((1, 2), 32, 'spe')
    """
    for name in known:
        if name not in FIELDS:
            raise InputError(f'ModelConfig has no field "{name}": {nearest(name, FIELDS)}')
    fields = {}
    for name, possible in possible_fields(state).items():
        value = tuple(known[name]) if isinstance(known.get(name), list) else known.get(name)
        if name in known and value not in possible:
            allowed = " or ".join(map(_shown, possible))
            raise InputError(f"{name} cannot be {_shown(value)}, because the weights have {name} {allowed}")
        fields[name] = possible[0]
    try:
        return ModelConfig(**{**fields, **known})
    except InputError as error:
        raise InputError(f"the weights and the given fields are inconsistent: {error}") from error


def possible_fields(state: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """Values of ModelConfig's fields that a state allows, the default first.

    Raises:
        InputError: an entry that every official network has is missing, or has an impossible shape.
    """
    shapes = _Shapes(state)
    dim, in_channels, patch, _ = shapes.of("to_patch_embedding.0.0.weight", 4)
    blocks = shapes.count("token_mix")
    sides = [shapes.of(f"token_mix.{n}.proj_h.1.weight", 4)[0] for n in range(blocks)]
    widths = [shapes.of(f"token_mix.{n}.proj_w.1.weight", 4)[0] for n in range(blocks)]
    if sides != widths:
        raise InputError("the weights mix different numbers of rows and columns: only square images are supported")
    stages = [(side, len(list(group))) for side, group in groupby(sides)]
    embeddings = shapes.count("to_patch_embedding")
    if len(stages) != embeddings or any(side << i != sides[0] for i, (side, _) in enumerate(stages)):
        raise InputError(
            f"the weights have {embeddings} stages whose blocks mix {', '.join(map(str, sides))} rows: every stage "
            "needs blocks, with half as many rows as the stage before it"
        )
    channels, hidden = dim, shapes.of("channel_mix.0.1.net.0.weight", 2)[0]
    if hidden % channels:
        raise InputError(f"the channel block has {hidden} hidden channels, not a multiple of its {channels} channels")
    fields: dict[str, tuple[Any, ...]] = {
        "image_size": (sides[0] * patch,),
        "in_channels": (in_channels,),
        "num_classes": (shapes.of("mlp_head.1.bias", 1)[0],),
        "patch_size": (patch,),
        "dim": (dim,),
        "depths": (tuple(depth for _, depth in stages),),
        "expansion": (hidden // channels,),
        "encoding": ("plain",) if shapes.norm("token_mix.0.BN.weight") else ("spe",),
        "neuron": ("plif",) if "token_mix_lif.0.w" in shapes.shapes else ("lif", "if"),
    }
    if shapes.norm("token_mix.0.fuse.1.scale"):
        fields |= {"norm": ("tebn",), "time_steps": (shapes.norm("token_mix.0.fuse.1.scale")[0],)}
    elif not shapes.norm("token_mix.0.proj_h.2.running_mean"):
        # LayerNorm has one kind of features.
        return fields | {"norm": ("layer",)}
    else:
        fields["norm"] = ("batch", "tdbn")
    features = shapes.norm("channel_mix.0.1.net.1.weight"), shapes.norm("channel_mix.0.1.net.4.weight")
    token, channel = (features == ((n,), (m,)) for n, m in ((sides[0] ** 2,) * 2, (hidden, channels)))
    if token or channel:
        fields["norm_features"] = ("token",) * token + ("channel",) * channel
    return fields


class _Shapes:
    """The shapes of a state's entries, by their names without prefixes of training."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.shapes = {plain_name(str(name)): np.shape(array) for name, array in state.items()}

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a required entry with this many axes, none of them empty."""
        if name not in self.shapes:
            raise InputError(f'the state has no entry "{name}": not a network of the official code{self._hint()}')
        shape = self.shapes[name]
        if len(shape) != axes or 0 in shape:
            raise InputError(f'the entry "{name}" must have {axes} axes, but its shape is {shape}')
        return shape

    def norm(self, name: str) -> tuple[int, ...]:
        """The shape of a norm's entry; () if it is missing."""
        module, leaf = name.rsplit(".", 1)
        # The conversion to SyncBN wraps each norm in a container.
        return self.shapes.get(name) or self.shapes.get(f"{module}.0.{leaf}") or ()

    def count(self, name: str) -> int:
        """The number of modules in a list, numbered from 0."""
        found = {int(match[1]) for key in self.shapes if (match := re.match(rf"{name}\.(\d{{1,6}})\.", key))}
        if found != set(range(len(found))) or not found:
            raise InputError(f'the state lacks some of the modules "{name}.0", "{name}.1", ...{self._hint()}')
        return len(found)

    def _hint(self) -> str:
        if "head.kernel" in self.shapes:
            return "; its names are this package's own: give the folder of the file instead"
        return f'; its first name is "{next(iter(self.shapes))[:80]}"' if self.shapes else ""


def _matters(name: str, config: ModelConfig) -> bool:
    """Whether a field that the state leaves open changes the logits."""
    if name == "norm_features":
        return config.norm != "layer"
    if name == "tau":
        return config.neuron == "lif"
    return not (name == "decay_input" and config.neuron == "if")


def _shown(value) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
