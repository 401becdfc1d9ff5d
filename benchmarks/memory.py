"""Memory of a training step against depth and time steps, with and without remat.

    python -m benchmarks.memory                # MLP-SPE-T, 224 px, B=4; about eight minutes on two cores
    python -m benchmarks.memory --dtype bfloat16 --batch 8

Programs are compiled, not run. Temporaries are what the compiler reserves beside arguments and results; the peak is all
of these. Depth x 2 means twice the blocks in every stage.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import ours
from benchmarks.report import head, line, make_parser
from spiking_mlp_jax.cli.options import positive
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import CHOICES, VARIANTS, ModelConfig

DEPTHS, TIME_STEPS = (1, 2, 4), (1, 2, 4, 8)


def planned(compiled: jax.stages.Compiled) -> Any:
    """The compiler's memory plan of a program; fields are in bytes.

    Raises:
        InputError: this backend's compiler reports none.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise InputError(f"the compiler of {jax.default_backend()} reports no memory plan: set JAX_PLATFORMS=cpu")
    return memory


def sizes(config: ModelConfig, batch: int) -> tuple[float, float]:
    """GB of a training step's temporaries, and of these with weights, optimizer state and images."""
    step, state = ours.make_step(config)
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, config.in_channels), jnp.float32)
    compiled = step.lower(*state, images, jax.ShapeDtypeStruct((batch,), jnp.int32)).compile()
    memory = planned(compiled)
    return memory.temp_size_in_bytes / 1e9, (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9


def main() -> int:
    parser = make_parser(__doc__, "memory")
    parser.add_argument("--variant", choices=VARIANTS, default="mlp_spe_t")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--dtype", choices=CHOICES["dtype"], default="float32")
    parser.add_argument("--remat", nargs="+", choices=CHOICES["remat"], default=list(CHOICES["remat"]))
    args = parser.parse_args()
    try:
        base = ModelConfig.variant(args.variant, image_size=args.image_size, dtype=args.dtype)
    except ValueError as error:
        parser.error(str(error))
    networks = {f"T={steps}": dataclasses.replace(base, time_steps=steps) for steps in TIME_STEPS}
    for factor in DEPTHS:
        depths = tuple(factor * depth for depth in base.depths)
        networks[f"T={base.time_steps}, depth x {factor}"] = dataclasses.replace(base, depths=depths)
    print(f"{args.variant}, {args.image_size} px, B={args.batch}, {args.dtype}, {jax.devices()[0].device_kind}\n")
    print(head(["", *(f"{kind}, GB, remat={remat}" for remat in args.remat for kind in ("temporaries", "peak"))]))
    for name, config in networks.items():
        try:
            cells = [size for r in args.remat for size in sizes(dataclasses.replace(config, remat=r), args.batch)]
        except InputError as error:
            parser.error(str(error))
        print(line([name, *(f"{size:.2f}" for size in cells)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
