"""ModelConfig: every choice that defines a spiking MLP, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import field
from typing import Any

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.topology import Geometry
from spiking_mlp_jax.nn.dynamics import BACKENDS
from spiking_mlp_jax.nn.surrogate import SURROGATES

VARIANTS: dict[str, dict[str, Any]] = {
    "mlp_t": dict(dim=80, depths=(2, 8, 14, 2), encoding="plain"),
    "mlp_s": dict(dim=96, depths=(2, 8, 14, 2), encoding="plain"),
    "mlp_spe_t": dict(dim=78, depths=(2, 8, 14, 2), encoding="spe"),
    "mlp_spe_s": dict(dim=96, depths=(2, 8, 14, 2), encoding="spe"),
    # Not published: these dimensions reproduce the paper's count of 66 M parameters.
    "mlp_spe_b": dict(dim=108, depths=(2, 10, 24, 2), encoding="spe"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig(Geometry):
    """What a spiking MLP is made of.

    Args:
        image_size: side of the square input images, in pixels; a multiple of patch_size * 2^(stages - 1).
        in_channels: channels of the input images.
        num_classes: number of classes.
        patch_size: side of a patch of the stem, in pixels.
        dim: channels of the first stage; each later stage doubles them. A multiple of 3 with "spe".
        depths: blocks of each stage.
        expansion: hidden channels of the channel block, as a multiple of its channels.
        encoding: "spe" (spiking patch encoding) or "plain" (strided convolution) between stages.
        norm: "batch"; "tdbn" and "tebn" replace it everywhere; "layer" replaces it in row, column and channel mixing.
        norm_features: features of the channel block's BatchNorms: "token" as the official code has it, or
            "channel", which folds into the weights exactly. Unused with norm="layer".
        time_steps: T, number of simulation time steps.
        neuron: "lif", "if" (no leak) or "plif" (each layer learns its tau).
        tau_per_channel: with "plif", each channel of a layer learns its own tau.
        tau: membrane time constant in steps (at least 1; the initial value for "plif", above 1).
        v_threshold: firing threshold, above v_reset.
        v_reset: potential after a spike; None for a soft reset.
        decay_input: whether the input is divided by tau, as the leak is.
        detach_reset: stop the gradient through the spike in the reset.
        surrogate: "sigmoid", "atan", "triangle", "rectangle" or "dspike".
        surrogate_alpha: the surrogate's sharpness.
        remat: what the backward pass recomputes: "none", or "block" to save only the binary input of each block.
            False and True are accepted for these, as in older files.
        dtype: "float32" or "bfloat16", of spikes and the linear layers that take them; parameters, stem, norms,
            potentials and head stay float32.
        neuron_backend: "xla", "pallas" (a kernel on NVIDIA GPUs and TPUs; on CPUs interpreted, slowly, for tests) or
            "auto": the kernel on GPUs and TPUs if time_steps > 8, where XLA's scan would write the state of each step
            to memory; for fewer steps XLA fuses the unrolled loop with its neighbours. Judged from the compiled
            programs, not measured on a GPU. float64, and more steps than fit into a TPU's memory, always use XLA.

    Raises:
        InputError: an invalid value; the message names the field.

    Examples:
        >>> config = ModelConfig(image_size=32, patch_size=4, dim=48, depths=(1, 2), num_classes=10)
        >>> config.stage_dim(1), config.stage_side(1)
        (96, 4)
        >>> ModelConfig(tau=0.5)
        Traceback (most recent call last):
            ...
        spiking_mlp_jax.errors.InputError: tau must be at least 1 step, got 0.5
    """

    image_size: int = field(default=224, metadata={"least": 1})
    in_channels: int = field(default=3, metadata={"least": 1})
    num_classes: int = field(default=1000, metadata={"least": 1})
    patch_size: int = field(default=4, metadata={"least": 1})
    dim: int = field(default=78, metadata={"least": 1})
    depths: tuple[int, ...] = (2, 8, 14, 2)
    expansion: int = field(default=3, metadata={"least": 1})
    encoding: str = field(default="spe", metadata={"choices": ("spe", "plain")})
    norm: str = field(default="batch", metadata={"choices": ("batch", "layer", "tdbn", "tebn")})
    norm_features: str = field(default="token", metadata={"choices": ("token", "channel")})
    time_steps: int = field(default=4, metadata={"least": 1})
    neuron: str = field(default="lif", metadata={"choices": ("lif", "if", "plif")})
    tau_per_channel: bool = field(default=False, metadata={"added": True})
    tau: float = 2.0
    v_threshold: float = 1.0
    v_reset: float | None = 0.0
    decay_input: bool = True
    detach_reset: bool = True
    surrogate: str = field(default="sigmoid", metadata={"choices": tuple(SURROGATES)})
    surrogate_alpha: float = 4.0
    remat: str = field(default="none", metadata={"choices": ("none", "block")})
    dtype: str = field(default="float32", metadata={"choices": ("float32", "bfloat16")})
    neuron_backend: str = field(default="auto", metadata={"choices": BACKENDS, "added": True})

    def __post_init__(self):
        for name, least in MINIMA.items():
            object.__setattr__(self, name, _integer(name, getattr(self, name), least))
        if not isinstance(self.depths, tuple | list) or not self.depths:
            raise InputError(f"depths must list the blocks of each stage, such as (2, 8, 14, 2), got {self.depths!r}")
        object.__setattr__(self, "depths", tuple(_integer("depths", depth, 1) for depth in self.depths))
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", "block" if self.remat else "none")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                wrong = " ".join(str(getattr(self, name)).split())
                raise InputError(f'{name} cannot be "{wrong}": {nearest(wrong, known)}')
        for name in ("tau_per_channel", "decay_input", "detach_reset"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_neuron()
        self._check_geometry()

    def _check_neuron(self):
        for name in ("tau", "v_threshold", "v_reset", "surrogate_alpha"):
            value = getattr(self, name)
            if name == "v_reset" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value!r}")
        if self.tau_per_channel and self.neuron != "plif":
            raise InputError(f'tau_per_channel needs neuron="plif", got "{self.neuron}"')
        if self.neuron == "plif" and not self.tau > 1:
            raise InputError(f'tau must be above 1 with neuron="plif", which learns it, got {self.tau}')
        if not self.tau >= 1:
            raise InputError(f"tau must be at least 1 step, got {self.tau}")
        if not self.v_threshold > (self.v_reset or 0.0):
            raise InputError(
                f"v_threshold must be above the potential after a spike ({self.v_reset or 0.0}), got {self.v_threshold}"
            )
        if not self.surrogate_alpha > 0:
            raise InputError(f"surrogate_alpha must be positive, got {self.surrogate_alpha}")

    def _check_geometry(self):
        step = self.patch_size * 2 ** (self.stages - 1)
        if self.image_size % step:
            raise InputError(
                f"image_size {self.image_size} does not divide into patches of {self.patch_size} "
                f"over {self.stages} stages: make it a multiple of {step}"
            )
        # Only stages after the first have the three nodes, but they have dim * 2^i channels: 3 must divide dim itself.
        if self.encoding == "spe" and self.stages > 1 and self.dim % 3:
            low, high = self.dim // 3 * 3, self.dim // 3 * 3 + 3
            near = f"{low} or {high}" if low else f"{high}"
            raise InputError(
                f'dim {self.dim} is not divisible by the 3 nodes of encoding="spe": take {near}, or "plain"'
            )

    @property
    def per_token(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the norms of the channel block have the tokens for features."""
        return self.norm != "layer" and self.norm_features == "token"

    @classmethod
    def variant(cls, name: str, **overrides) -> ModelConfig:
        """The paper's networks: mlp_t, mlp_s, mlp_spe_t, mlp_spe_s or mlp_spe_b, with any field overridden.

        Raises:
            InputError: an unknown variant, field or impossible value.

        Examples:
            >>> ModelConfig.variant("mlp_spe_t", time_steps=2).depths
            (2, 8, 14, 2)
            >>> ModelConfig.variant("mlp_spe")
            Traceback (most recent call last):
                ...
            spiking_mlp_jax.errors.InputError: there is no variant "mlp_spe": did you mean "mlp_spe_t"?
        """
        if name not in VARIANTS:
            raise InputError(f'there is no variant "{name}": {nearest(name, VARIANTS)}')
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in overrides:
            if key not in fields:
                raise InputError(f'ModelConfig has no field "{key}": {nearest(key, fields)}')
        return cls(**{**VARIANTS[name], **overrides})


def _integer(name, value, least):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name} must be a whole number, but it holds {value!r}")
    if value < least:
        raise InputError(f"{name} must be at least {least}, but it holds {value}")
    return int(value)


def _declared(what: str) -> dict[str, Any]:
    fields = dataclasses.fields(ModelConfig)
    return {field.name: field.metadata[what] for field in fields if what in field.metadata}


MINIMA: dict[str, int] = _declared("least")
CHOICES: dict[str, tuple[str, ...]] = _declared("choices")
# Fields that came after the first files were written: a file without them has their defaults.
ADDED = tuple(_declared("added"))
