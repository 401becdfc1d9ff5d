"""`create_model` and `list_models`: a network by its name."""

from __future__ import annotations

import dataclasses
import fnmatch

from flax import nnx

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.adapt import ADAPTABLE, adapt
from spiking_mlp_jax.models.config import VARIANTS, ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP


def create_model(name: str, *, pretrained: bool = False, seed: int = 0, **fields) -> SpikingMLP:
    """A network by name, in evaluation mode if it has been trained, else in training mode.

    Args:
        name: one of `list_models()`: a variant of the paper, such as "mlp_spe_t", or a network that comes with the
            package, such as "fashion_mnist". Case does not matter, nor whether words are parted by "-" or "_".
        pretrained: take the trained weights that come with the package; else parameters are drawn.
        seed: of what is drawn.
        **fields: of `ModelConfig`, in place of the named network's own. With pretrained weights, image_size resamples
            what knows the grid and num_classes gives a new head (`docs/finetuning.md`); a field that changes nothing of
            the weights' shapes, as time_steps or tau, is taken as it is.

    Returns:
        the model. With pretrained weights it carries how pictures become its inputs (`.pixels`), without the names of
        classes if num_classes is another.

    Raises:
        InputError: an unknown name or field, an impossible value, a variant whose weights are not in the package, or a
            field that trained weights do not fit.

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
        raise InputError(f"pretrained must be True or False, but it is {pretrained!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed must be a whole number from 0 to 4294967295, but it is {seed!r}")
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
    network, _ = weights.load(folder)
    return _adapted(network, dataclasses.replace(network.config, **fields), seed, plain) if fields else network


def list_models(filter: str | None = None, pretrained: bool = False) -> list[str]:
    """Names that `create_model` knows.

    Args:
        filter: a pattern with * and ?, such as "*spe*"; None: all.
        pretrained: only those whose trained weights come with the package.

    Examples:
        >>> list_models("mlp_spe*")
        ['mlp_spe_b', 'mlp_spe_s', 'mlp_spe_t']
        >>> "cifar10" in list_models(pretrained=True)
        True

    Raises:
        InputError: filter is no text.
    """
    if filter is not None and not isinstance(filter, str):
        raise InputError(f'filter must be a pattern such as "*spe*", but it is {filter!r}')
    names = {*weights.pretrained_names(), *(() if pretrained else VARIANTS)}
    return sorted(name for name in names if filter is None or fnmatch.fnmatch(name, filter.lower().replace("-", "_")))


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
