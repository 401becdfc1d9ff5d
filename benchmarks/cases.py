"""The networks that are measured, their batch sizes, and the sides of a comparison."""

from __future__ import annotations

import dataclasses
from typing import Any

from spiking_mlp_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and its batch size; with `in_pairs` each side runs with the peer alone, as memory is short for all."""

    title: str
    config: ModelConfig
    batch: int
    in_pairs: bool = False


@dataclasses.dataclass(frozen=True)
class Side:
    """A side of a comparison.

    Attributes:
        title: its name in the table.
        module: file of this folder that runs it: "ours", "theirs" or "deployed".
        overrides: ModelConfig fields that differ from the case's.
        keep_memory: run as the trainer does on CPUs, where host_memory="auto" is "keep".
        environment: additional environment variables.
    """

    title: str
    module: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep_memory: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def _spe(name: str, time_steps: int = 4, **fields) -> ModelConfig:
    return ModelConfig.variant(f"mlp_{name}", time_steps=time_steps, **fields)


CASES = {
    "spe_t": Case("MLP-SPE-T, 224 px, B=4, T=4", _spe("spe_t"), 4),
    "spe_t_T1": Case("MLP-SPE-T, 224 px, B=4, T=1", _spe("spe_t", 1), 4),
    "spe_t_T2": Case("MLP-SPE-T, 224 px, B=4, T=2", _spe("spe_t", 2), 4),
    "spe_t_T8": Case("MLP-SPE-T, 224 px, B=4, T=8", _spe("spe_t", 8), 4, in_pairs=True),
    "spe_s": Case("MLP-SPE-S, 224 px, B=4, T=4", _spe("spe_s"), 4),
    "fashion_mnist": Case(
        "Fashion-MNIST net: dim 24, depths 1,2, 28 px, patch 2, B=128, T=4",
        ModelConfig(image_size=28, in_channels=1, num_classes=10, patch_size=2, dim=24, depths=(1, 2)),
        128,
    ),
    # The network of configs/cifar10.py.
    "cifar10": Case(
        "CIFAR-10 net: dim 96, depths 2,4,2, 32 px, patch 2, B=128, T=4",
        ModelConfig(image_size=32, num_classes=10, patch_size=2, dim=96, depths=(2, 4, 2)),
        128,
    ),
    # Spikes and products in bfloat16, on both sides.
    "spe_t_bf16": Case("MLP-SPE-T, 224 px, B=4, T=4, bfloat16", _spe("spe_t", dtype="bfloat16"), 4),
}
CASES["fashion_mnist_bf16"] = Case(
    "Fashion-MNIST net as above, bfloat16",
    dataclasses.replace(CASES["fashion_mnist"].config, dtype="bfloat16"),
    128,
)
GPU_CASES = {
    f"gpu_{name}": Case(
        f"MLP-{name.upper().replace('_', '-')}, 224 px, B={batch}, T={steps}, bfloat16",
        _spe(name, steps, dtype="bfloat16"),
        batch,
        in_pairs=True,
    )
    for name, steps, batch in (("spe_t", 4, 32), ("spe_s", 4, 32), ("spe_b", 6, 16))
}
# For `python -m benchmarks.engine`: the shipped network and the paper's.
DEPLOYED_CASES = {
    "deployed_fashion_mnist": Case(
        "Shipped Fashion-MNIST net: dim 48, depths 1,2, 32 px, patch 4, T=4",
        ModelConfig(image_size=32, in_channels=1, num_classes=10, patch_size=4, dim=48, depths=(1, 2)),
        128,
    ),
    "deployed_spe_t": Case("MLP-SPE-T, 224 px, T=4", _spe("spe_t"), 4),
}
# Only checks that everything runs.
QUICK_CASES = {
    "quick": Case(
        "quick check: dim 6, depths 1,2, 16 px, patch 2, B=8, T=4",
        ModelConfig(image_size=16, in_channels=1, num_classes=10, patch_size=2, dim=6, depths=(1, 2)),
        8,
    )
}
# On a GPU SpikingJelly chooses a kernel; these two force one.
PEER = Side("SpikingJelly", "theirs")
PEER_KERNELS = [
    Side(f"SpikingJelly, {title} neurons", "theirs", environment={"SJ_LIF_CUDA_IMPLEMENTATION": name})
    for title, name in (("CUDA", "cuda"), ("Triton", "triton"))
]
CPU_SIDES = {
    "train": [
        PEER,
        Side("ours", "ours", keep_memory=True),
        Side('ours, host_memory="default"', "ours"),
        Side('ours, remat="block"', "ours", {"remat": "block"}, keep_memory=True),
    ],
    "inference": [PEER, Side("ours", "ours")],
}
GPU_SIDES = {
    "train": [
        PEER,
        *PEER_KERNELS,
        Side("ours, XLA neurons", "ours", {"neuron_backend": "xla"}),
        Side("ours, Pallas neurons", "ours", {"neuron_backend": "pallas"}),
        Side('ours, XLA, remat="block"', "ours", {"neuron_backend": "xla", "remat": "block"}),
    ],
    "inference": [
        PEER,
        *PEER_KERNELS,
        Side("ours, XLA neurons", "ours", {"neuron_backend": "xla"}),
        Side("ours, Pallas neurons", "ours", {"neuron_backend": "pallas"}),
    ],
}
