"""The configuration that an official state belongs to, as far as its names and shapes tell.

What they do not tell is how a neuron computes and how often an image is shown: see `ASSUMED`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.interop.official.state import plain_name
from spiking_mlp_jax.models.config import CHOICES, ModelConfig

# Fields on which the scores depend and of which a state says nothing, or leaves two possibilities: their defaults are
# the paper's. `norm` and `neuron` are among the told ones where the names settle them.
ASSUMED = ("time_steps", "norm", "norm_features", "neuron", "tau", "v_threshold", "v_reset", "decay_input")
# Fields that only training asks for, and those of running that change no score beyond rounding.
TRAINING = ("detach_reset", "surrogate", "surrogate_alpha", "remat", "dtype", "neuron_backend")
FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


def infer_config(state: Mapping[str, np.ndarray], **known: Any) -> ModelConfig:
    """The configuration of an official state.

    Args:
        state: official names, as `official.load` accepts them, to arrays; only their shapes are looked at.
        known: fields of ModelConfig. Those that the state does not tell take the paper's values where they are left
            out.

    Raises:
        InputError: the state is of no network of this package, or contradicts a field that is given.

    Examples:
        >>> from spiking_mlp_jax import weights
        >>> from spiking_mlp_jax.interop import official
        >>> model, _ = weights.load(weights.find("fashion_mnist"))
        >>> config = infer_config(official.dump(model))
        >>> config.depths, config.image_size, config.encoding
        ((1, 2), 32, 'spe')
    """
    for name in known:
        if name not in FIELDS:
            raise InputError(f'ModelConfig has no field "{name}": {nearest(name, FIELDS)}')
    # A field's value is checked by itself before it is compared: "4" is not 4.
    fields = {}
    for name, possible in possible_fields(state).items():
        if name in known and _plain(known[name]) not in possible:
            told = " or ".join(_shown(value) for value in possible)
            raise InputError(
                f"{name} cannot be {_shown(known[name])}, because the weights are of a network with {name} {told}"
            )
        fields[name] = possible[0]
    try:
        return ModelConfig(**{**fields, **known})
    except InputError as error:
        raise InputError(f"the weights and the given fields are of no possible network: {error}") from error


def possible_fields(state: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """What a state tells of ModelConfig's fields: to each the values that it allows, the most likely one first.

    Args:
        state: as in `infer_config`.

    Raises:
        InputError: an entry that every official network has is missing or of a shape that none has.
    """
    shapes = _Shapes(state)
    dim, in_channels, patch, _ = shapes.of("to_patch_embedding.0.0.weight", 4)
    blocks = shapes.count("token_mix")
    sides = [shapes.of(f"token_mix.{n}.proj_h.1.weight", 4)[0] for n in range(blocks)]
    widths = [shapes.of(f"token_mix.{n}.proj_w.1.weight", 4)[0] for n in range(blocks)]
    if sides != widths:
        raise InputError("the weights mix other numbers of rows than of columns: only square images are supported")
    stages = [(side, len(list(group))) for side, group in groupby(sides)]
    embeddings = shapes.count("to_patch_embedding")
    if len(stages) != embeddings or any(side << i != sides[0] for i, (side, _) in enumerate(stages)):
        raise InputError(
            f"the weights have {embeddings} stages whose blocks mix {', '.join(map(str, sides))} rows: in a network of "
            "this package each stage has blocks, with half as many rows as those before"
        )
    channels, hidden = dim, shapes.of("channel_mix.0.1.net.0.weight", 2)[0]
    if hidden % channels:
        raise InputError(f"the channel block has {hidden} hidden channels, which is no multiple of its {channels}")
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
        # Of this norm's two kinds of features there is only one.
        return fields | {"norm": ("layer",)}
    else:
        fields["norm"] = ("batch", "tdbn")
    features = shapes.norm("channel_mix.0.1.net.1.weight"), shapes.norm("channel_mix.0.1.net.4.weight")
    token, channel = (features == ((n,), (m,)) for n, m in ((sides[0] ** 2,) * 2, (hidden, channels)))
    if token or channel:
        fields["norm_features"] = ("token",) * token + ("channel",) * channel
    return fields


class _Shapes:
    """The shapes of a state's entries, under the names that they have before distributed training."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.shapes = {plain_name(str(name)): np.shape(array) for name, array in state.items()}

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of an entry that must be there, with so many axes and nothing empty."""
        if name not in self.shapes:
            raise InputError(f'the state has no entry "{name}": it is of no network of the official code{self._hint()}')
        shape = self.shapes[name]
        if len(shape) != axes or 0 in shape:
            raise InputError(f'the entry "{name}" must have {axes} axes, but its shape is {shape}')
        return shape

    def norm(self, name: str) -> tuple[int, ...]:
        """The shape of a norm's entry; () where there is none."""
        module, leaf = name.rsplit(".", 1)
        # The conversion to SyncBN puts each norm into a container.
        return self.shapes.get(name) or self.shapes.get(f"{module}.0.{leaf}") or ()

    def count(self, name: str) -> int:
        """How many modules there are in a list, which begins with number 0."""
        found = {int(match[1]) for key in self.shapes if (match := re.match(rf"{name}\.(\d{{1,6}})\.", key))}
        if found != set(range(len(found))) or not found:
            raise InputError(f'the state lacks some of the modules "{name}.0", "{name}.1", ...{self._hint()}')
        return len(found)

    def _hint(self) -> str:
        if "head.kernel" in self.shapes:
            return "; its names are this package's own, so give the folder that the file lies in"
        return f'; its first name is "{next(iter(self.shapes))[:80]}"' if self.shapes else ""


def parse_fields(texts: list[str]) -> dict[str, Any]:
    """The fields of a command line's FIELD=VALUE, such as "tau=1.5", "depths=2,8,14,2" or "v_reset=None".

    Raises:
        InputError: no such field, or one that is there twice; values are checked by ModelConfig.
    """
    import ast

    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f'"--set {text}" is not FIELD=VALUE, such as time_steps=4')
        if name not in FIELDS:
            raise InputError(f'--set: there is no field "{name}": {nearest(name, FIELDS)}')
        if name in fields:
            raise InputError(f"--set has {name} twice: give it once")
        try:
            # A field of words takes them as they are.
            fields[name] = value if name in CHOICES else ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise InputError(f'--set {name} cannot be "{value}": give a number, True, False, None or a list') from error
    return fields


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


def _shown(value) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
