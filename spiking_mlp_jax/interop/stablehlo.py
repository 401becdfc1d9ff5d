"""Networks as StableHLO, which JAX alone runs on CPUs, NVIDIA GPUs and TPUs; one file for any batch size.

The program consists of XLA operations: no kernel of this package, no callback to Python. With one version of JAX the
same network gives the same bytes: the file holds no dates and no source locations. `stablehlo_file.py` defines it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.interop import stablehlo_file
from spiking_mlp_jax.interop.stablehlo_file import CONFIG, NETWORK
from spiking_mlp_jax.models.pixels import Pixels, normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

if TYPE_CHECKING:
    from jaxtyping import Array, Float

PLATFORMS = ("cpu", "cuda", "tpu")
MISSING = "JAX needs flatbuffers for exports: pip install flatbuffers"


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """An exported network.

    Attributes:
        document: its config.json.
        exported: the program, e.g. for `exported.mlir_module()`.
        run: its call, compiled for each batch size.
    """

    document: dict[str, Any]
    exported: jax_export.Exported
    run: Callable[[Any], Any]

    @property
    def config(self) -> dict[str, Any]:
        """The fields of the network's ModelConfig."""
        return self.document["model"]

    @property
    def data(self) -> dict[str, Any] | None:
        """Preprocessing and class names, if they were known."""
        return self.document["data"]

    def __call__(self, images: Any) -> Float[Array, "B K"]:
        """Logits averaged over the time steps.

        Args:
            images: as `document["input"]` says: normalized float32, or uint8 pixels, [B, H, W, C].

        Raises:
            InputError: images of another shape or dtype; the network was not exported for this machine's platform.
        """
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        size, dtype = tuple(self.document["input"]["shape"][1:]), self.document["input"]["dtype"]
        if images.shape[1:] != size or not images.shape[0] or images.dtype != dtype:
            shape = ", ".join(map(str, size))
            raise InputError(f"images must be {dtype} [batch, {shape}], got {images.dtype} {images.shape}")
        # NVIDIA's GPUs are "gpu" here and "cuda" for lowering.
        platform = jax.default_backend().replace("gpu", "cuda")
        if platform not in self.exported.platforms:
            raise InputError(
                f"the network was exported for {', '.join(self.exported.platforms)}, but this machine's platform is "
                f"{platform}: export it for {platform}, too"
            )
        return self.run(images)


def export_stablehlo(
    model: SpikingMLP,
    path: str | os.PathLike[str],
    *,
    data: dict[str, Any] | None = None,
    folded: bool = False,
    pixels: bool = False,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Write a network with its weights, in evaluation mode, as StableHLO.

    It computes in float32 (float64 weights are rounded), and in bfloat16 where a network of dtype="bfloat16" does.
    Neurons run XLA's program, whatever `neuron_backend` is.

    Args:
        model: with concrete parameters and running statistics, in any mode; not changed.
        path: of the file, e.g. net.stablehlo.zip.
        data: the weights' "data", for config.json; None where it is unknown.
        folded: export the network with its norms folded, whose logits are the same up to rounding.
        pixels: take uint8 pixels and normalize them by `model.pixels`.
        platforms: some of "cpu", "cuda", "tpu".

    Returns:
        the content of config.json.

    Raises:
        InputError: an unknown platform; `folded` with LayerNorms; `pixels` where mean and std are not known; the file
            cannot be written; flatbuffers is not installed.

    Examples:
        >>> model = SpikingMLP.from_pretrained("fashion_mnist")
        >>> export_stablehlo(model, "net.stablehlo.zip", platforms=("gpu",))
        Traceback (most recent call last):
            ...
        spiking_mlp_jax.errors.InputError: there is no platform "gpu": the known ones are cpu, cuda, tpu
    """
    chosen = check_platforms(platforms)
    if not isinstance(model, SpikingMLP):
        raise InputError(f"expected a SpikingMLP, got {type(model).__name__}")
    try:
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"data is not JSON ({error}): use finite numbers, strings and lists") from error
    c, normalization = model.config, model.pixels
    if pixels and normalization is None:
        raise InputError(
            'mean and std of the pixels are unknown: load weights that have "data", or export for normalized images'
        )
    with jax.enable_x64(False):
        plain = _plain(model)
        exported = _exported(fold(plain) if folded else plain, c, normalization if pixels else None, chosen)
    try:
        network = bytes(exported.serialize())
    except ImportError as error:
        raise InputError(MISSING) from error
    taken = ("uint8", "pixels") if pixels else ("float32", "(pixels / 255 - mean) / std, with mean and std of data")
    described = {
        "kind": "folded" if folded else "float",
        "model": dataclasses.asdict(c),
        "data": data,
        "input": {"dtype": taken[0], "shape": ["b", c.image_size, c.image_size, c.in_channels], "meaning": taken[1]},
        "output": {
            "dtype": "float32",
            "shape": ["b", c.num_classes],
            "meaning": "logits, averaged over the time steps; the class with the largest is the answer",
        },
        "platforms": chosen,
        "jax_version": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
    }
    return stablehlo_file.write(path, network, described)


def load(path: str | os.PathLike[str]) -> Loaded:
    """Read an exported network.

    Raises:
        InputError: no such file, another kind of file, a damaged one, or one that this version of the
            package or of JAX cannot read.
    """
    document, network = stablehlo_file.read(path)
    version, writer = document.get("calling_convention_version"), document.get("jax_version")
    least = jax_export.minimum_supported_calling_convention_version
    most = jax_export.maximum_supported_calling_convention_version
    if not isinstance(version, int) or not least <= version <= most:
        raise InputError(
            f"{path} was written by JAX {writer} with calling convention {version!r}, but JAX {jax.__version__} reads "
            f"{least} to {most}: use a version closer to {writer}"
        )
    try:
        exported = jax_export.deserialize(bytearray(network))
    except ImportError as error:
        raise InputError(MISSING) from error
    # On other bytes, flatbuffers and MLIR raise exceptions of any kind.
    except Exception as error:
        raise InputError(
            f"{NETWORK} in {path} cannot be read by JAX {jax.__version__} ({type(error).__name__}): it was written by "
            f"JAX {writer}; use that version, or export the network again"
        ) from error
    _check_document(path, document, exported)
    return Loaded(document, exported, jax.jit(exported.call))


def check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    """The platforms without repetitions, in the order of `PLATFORMS`.

    Raises:
        InputError: one is unknown, or there are none.
    """
    if isinstance(platforms, str):
        raise InputError(f'platforms must be a list of names, got "{platforms}"')
    for name in platforms:
        if name not in PLATFORMS:
            # The nearest in letters to "gpu" is "tpu".
            known = f"the known ones are {', '.join(PLATFORMS)}" if name == "gpu" else nearest(name, PLATFORMS)
            raise InputError(f'there is no platform "{name}": {known}')
    if not platforms:
        raise InputError(f"at least one platform is needed: name some of {', '.join(PLATFORMS)}")
    return tuple(name for name in PLATFORMS if name in platforms)


def _plain(model: SpikingMLP) -> SpikingMLP:
    """The network in float32 and evaluation mode, without platform-specific kernels."""
    config = dataclasses.replace(model.config, neuron_backend="xla", remat="none")
    plain = nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    values = dict(nnx.to_flat_state(nnx.state(model)))
    for place, variable in nnx.to_flat_state(nnx.state(plain)):
        variable.set_value(jnp.asarray(np.asarray(values[place][...]), variable.dtype))
    plain.eval()
    return plain


def _exported(network, c, normalization: Pixels | None, platforms) -> jax_export.Exported:
    def logits(images):
        if normalization is not None:
            images = normalize(images, normalization.mean, normalization.std)
        return jnp.mean(network(images), 0)

    (batch,) = jax_export.symbolic_shape("b")
    dtype = jnp.float32 if normalization is None else jnp.uint8
    shape = jax.ShapeDtypeStruct((batch, c.image_size, c.image_size, c.in_channels), dtype)
    with _without_source_locations():
        return jax_export.export(jax.jit(logits), platforms=platforms)(shape)


@contextmanager
def _without_source_locations() -> Iterator[None]:
    """Keep the paths of source files out of a program: they differ between machines."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _check_document(path, document, exported) -> None:
    """Check that config.json describes the program beside it."""
    for key, avals in (("input", exported.in_avals), ("output", exported.out_avals)):
        stated = document.get(key)
        found = [{"dtype": str(x.dtype), "shape": [*map(str, x.shape[:1]), *x.shape[1:]]} for x in avals]
        if not isinstance(stated, dict) or [{name: stated.get(name) for name in ("dtype", "shape")}] != found:
            raise InputError(f'"{key}" in {CONFIG} of {path} does not match its {NETWORK}: export the network again')
    for name, kinds in (("model", dict), ("data", dict | None)):
        if name not in document or not isinstance(document[name], kinds):
            raise InputError(f'{CONFIG} in {path} has no object "{name}": export the network again')
