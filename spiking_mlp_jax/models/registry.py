"""Networks by name: `create_model`, `list_models`, `from_pretrained`."""

from __future__ import annotations

import dataclasses
import fnmatch
import os

from flax import nnx

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.adapt import ADAPTABLE, adapt
from spiking_mlp_jax.models.config import VARIANTS, ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP


def create_model(name: str, *, pretrained: bool = False, seed: int = 0, **fields) -> SpikingMLP:
    """A network by name: trained and in evaluation mode, or initialized and in training mode.

    Args:
        name: one of `list_models()`: a variant of the paper, e.g. "mlp_spe_t", or a network in the package, e.g.
            "fashion_mnist". Case does not matter; "-" and "_" are the same.
        pretrained: load the trained weights in the package; otherwise parameters are initialized.
        seed: of the initialization.
        **fields: fields of `ModelConfig` to override. With pretrained weights, image_size resamples the variables of
            the grid and num_classes initializes a new head (`docs/finetuning.md`); fields that do not affect the
            weights' shapes, e.g. time_steps or tau, can be anything.

    Returns:
        the model. With pretrained weights it has `.pixels`, without class names if num_classes differs, and, if no
        field is overridden, `.meta`.

    Raises:
        InputError: an unknown name or field, an invalid value, a variant without weights in the package, or a field
            that does not fit the trained weights.

    Examples:
        >>> model = create_model("mlp_spe_t", num_classes=10, image_size=32, depths=(1, 1), dim=12)
        >>> model.config.encoding, model.config.num_classes
        ('spe', 10)
        >>> create_model("fashion_mnist", pretrained=True).pixels.class_names[9]
        'Ankle boot'
        >>> create_model("mlp_spe_x")
        Traceback (most recent call last):
            ...
        spiking_mlp_jax.errors.InputError: there is no model "mlp_spe_x": did you mean "mlp_spe_t"?
    """
    shipped = weights.pretrained_names()
    names = list_models()
    plain = name.strip().lower().replace("-", "_") if isinstance(name, str) else name
    if plain not in names:
        raise InputError(f'there is no model "{name}": {nearest(str(name), names)}')
    if not isinstance(pretrained, bool):
        raise InputError(f"pretrained must be True or False, got {pretrained!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed must be a whole number from 0 to 4294967295, got {seed!r}")
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in fields:
        if key not in known:
            raise InputError(f'create_model has no argument "{key}": {nearest(key, known)}')
    if plain not in shipped:
        if pretrained:
            raise InputError(
                f'no trained weights of "{plain}" are in the package: those of the official code go through '
                "`spiking-mlp convert` and SpikingMLP.from_pretrained, and these are shipped: " + ", ".join(shipped)
            )
        return SpikingMLP(ModelConfig.variant(plain, **fields), rngs=nnx.Rngs(seed))
    folder = weights.pretrained_path(plain)
    if not pretrained:
        config, _ = weights.read_config(folder)
        return SpikingMLP(dataclasses.replace(config, **fields), rngs=nnx.Rngs(seed))
    network = SpikingMLP.from_pretrained(folder)
    return _adapted(network, dataclasses.replace(network.config, **fields), seed, plain) if fields else network


def list_models(filter: str | None = None, pretrained: bool = False) -> list[str]:
    """Names for `create_model`.

    Args:
        filter: a pattern with * and ?, e.g. "*spe*"; None: all.
        pretrained: only those with trained weights in the package.

    Examples:
        >>> list_models("mlp_spe*")
        ['mlp_spe_b', 'mlp_spe_s', 'mlp_spe_t']
        >>> "cifar10" in list_models(pretrained=True)
        True

    Raises:
        InputError: filter is not a string.
    """
    if filter is not None and not isinstance(filter, str):
        raise InputError(f'filter must be a pattern such as "*spe*", got {filter!r}')
    names = {*weights.pretrained_names(), *(() if pretrained else VARIANTS)}
    return sorted(name for name in names if filter is None or fnmatch.fnmatch(name, filter.lower().replace("-", "_")))


def from_pretrained(
    where: str | os.PathLike[str], *, revision: str | None = None, download: bool = False
) -> SpikingMLP:
    """A trained network in evaluation mode, with `.pixels` and `.meta`. See `SpikingMLP.from_pretrained`."""
    return SpikingMLP.from_pretrained(where, revision=revision, download=download)


def _adapted(network: SpikingMLP, config: ModelConfig, seed: int, name: str) -> SpikingMLP:
    model = SpikingMLP(config, rngs=nnx.Rngs(seed))
    saved = dataclasses.asdict(network.config) | {key: getattr(config, key) for key in ADAPTABLE}
    here = _shapes(model)
    there = _shapes(SpikingMLP(ModelConfig(**saved), rngs=nnx.Rngs(seed)))
    if here != there:
        different = [key for key, value in dataclasses.asdict(config).items() if saved[key] != value]
        raise InputError(
            f'the trained weights of "{name}" have no place for another {", ".join(different)}: leave that as it is, '
            "or take pretrained=False"
        )
    nnx.update(model, *adapt(network, config, seed))
    model.eval()
    pixels = network.pixels
    if pixels is not None and config.num_classes != network.config.num_classes:
        pixels = dataclasses.replace(pixels, class_names=())
    model.pixels = pixels
    return model


def _shapes(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {path: variable.shape for path, variable in flat}
