"""Training on many devices: memory, communication, speed bounds, and hours for 100 epochs of ImageNet.

    python -m benchmarks.scaling                                   # all networks of configs/imagenet.py on 8 devices
    python -m benchmarks.scaling --devices 64 --batch-size 512 --no-compile
    python -m benchmarks.scaling --devices 8 --fsdp 8 --accumulate 2 --variants mlp_spe_b

Nothing is run. "temporaries" are what this machine's compiler plans for one device's share of a step, gradients
included, extrapolated linearly from micro-batches of 4 and 8 images because compiling for many images takes minutes;
--no-compile omits them. Everything else is computed; `benchmarks/roofline.py` has formulas and the chips' figures.
Bounds are not forecasts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Before JAX starts: a step is always compiled for one CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
# Memory is planned before machine code is generated; optimizing that would take long.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

from benchmarks import roofline
from benchmarks.memory import planned
from benchmarks.report import fail, head, line, make_parser, refusal, write_json
from spiking_mlp_jax.cli.options import positive
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import VARIANTS
from spiking_mlp_jax.train.config import Config, load_config, model_config, validate
from spiking_mlp_jax.train.dry_run import macs_per_step, parameter_count
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import abstract_batch, abstract_with_sharding, make_mesh
from spiking_mlp_jax.train.state import abstract_state
from spiking_mlp_jax.train.step import make_train_step

IMAGENET = Path(__file__).parents[1] / "configs" / "imagenet.py"
TRAINING_IMAGES = 1_281_167
# Micro-batch sizes that are compiled.
COMPILED = (4, 8)
MEMORY = ["network", "parameters, M", *(f"{x}, MB" for x in ("parameters", "optimizer", "gathered", "images"))]
MEMORY += ["temporaries, GB", "sum, GB"]
WORK = ("network", "TFLOP", "in memory, GB", "sent, MB", "messages")
SPEED = ("network", "chip", "compute, ms", "memory, ms", "links, ms", "steps/s", "images/s", "hours", "fits")


def measure(config: Config, devices: int, compile_it: bool) -> dict[str, Any]:
    """All figures of one experiment, in bytes, FLOPs and seconds."""
    model, optimizer = model_config(config), make_optimizer(config, 1)
    graphdef, state = abstract_state(model, optimizer)
    images = config.batch_size // devices
    work = roofline.device_work(config, state, macs_per_step(model), devices)
    parameters, own = roofline.bytes_of(state.params), roofline.device_bytes(state.params, config.fsdp)
    found: dict[str, Any] = {
        "parameter_count": parameter_count(state),
        "parameter_bytes": own,
        "optimizer_bytes": roofline.device_bytes(state.opt_state, config.fsdp),
        "average_bytes": roofline.bytes_of(state.stats),
        # Sharded parameters are gathered for a step.
        "gathered_bytes": parameters if config.fsdp > 1 else 0,
        "image_bytes": images * (model.image_size**2 * model.in_channels + 4),
        "temporary_bytes": temporaries(config, graphdef, state, optimizer, images) if compile_it else None,
        **{name: getattr(work, name) for name in ("flops", "memory_bytes", "link_bytes", "messages")},
        "chips": {},
    }
    names = ("parameter_bytes", "optimizer_bytes", "average_bytes", "gathered_bytes", "image_bytes")
    found["total_bytes"] = sum(found[name] for name in names) + (found["temporary_bytes"] or 0)
    steps = roofline.training_steps(TRAINING_IMAGES, config.batch_size, config.epochs)
    for name, chip in roofline.CHIPS.items():
        if devices > chip.group and chip.outside is None:
            continue
        least = roofline.bounds(work, chip, model.dtype, devices)
        found["chips"][name] = {
            **{part: getattr(least, part) for part in ("compute", "memory", "link", "step")},
            "steps_per_s": 1 / least.step,
            "images_per_s": config.batch_size / least.step,
            "hours": least.hours(steps),
            "fits": found["total_bytes"] <= chip.memory if compile_it else None,
        }
    return found


def temporaries(config: Config, graphdef, state, optimizer, images: int) -> float:
    """Temporaries that the compiler plans for a device's share of a step, in bytes; linear in the micro-batch size."""
    micro = images // config.accumulate
    if micro in COMPILED:
        return _planned(config, graphdef, state, optimizer, micro)
    few, more = (_planned(config, graphdef, state, optimizer, count) for count in COMPILED)
    return more + (more - few) * (micro - COMPILED[1]) / (COMPILED[1] - COMPILED[0])


def _planned(config, graphdef, state, optimizer, micro):
    images = micro * config.accumulate
    mesh = make_mesh(jax.devices()[:1])
    alone: Any = config.copy_and_resolve_references()  # pyright: ignore[reportAttributeAccessIssue]
    alone.update(batch_size=images, fsdp=1)
    step = make_train_step(alone, graphdef, optimizer, mesh)
    batch = abstract_batch(images, config.image_size, config.in_channels, mesh)
    return planned(step.lower(abstract_with_sharding(state, mesh), batch).compile()).temp_size_in_bytes


def tables(found: dict[str, dict[str, Any]]) -> str:
    """All figures as three markdown tables."""
    lines = ["memory of each device", "", head(MEMORY)]
    for name, x in found.items():
        parts = (x["parameter_bytes"], x["optimizer_bytes"], x["gathered_bytes"], x["image_bytes"])
        compiled = x["temporary_bytes"] is not None
        sizes = [f"{x[key] / 1e9:.2f}" if compiled else "-" for key in ("temporary_bytes", "total_bytes")]
        cells = [name, f"{x['parameter_count'] / 1e6:.2f}", *(f"{part / 1e6:.1f}" for part in parts), *sizes]
        lines.append(line(cells))
    lines += ["", "work of each device in a step, at least", "", head(WORK)]
    for name, x in found.items():
        cells = (f"{x['flops'] / 1e12:.2f}", f"{x['memory_bytes'] / 1e9:.1f}", f"{x['link_bytes'] / 1e6:.1f}")
        lines.append(line([name, *cells, str(x["messages"])]))
    lines += ["", "bounds on the speed", "", head(SPEED)]
    for name, x in found.items():
        for chip, y in x["chips"].items():
            times = [f"{1000 * y[part]:.2f}" for part in ("compute", "memory", "link")]
            speed = [f"{y['steps_per_s']:.2f}", f"{y['images_per_s']:,.0f}", f"{y['hours']:.1f}"]
            lines.append(line([name, chip, *times, *speed, {True: "yes", False: "no", None: "-"}[y["fits"]]]))
    return "\n".join(lines)


def main() -> int:
    parser = make_parser(__doc__, "scaling")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--devices", type=positive, default=8)
    parser.add_argument("--batch-size", type=positive, help="images per step, over all devices (default: the config's)")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--statistics", choices=("global", "device"), help="default: the config's")
    parser.add_argument("--no-compile", action="store_true", help="skip the temporaries")
    parser.add_argument("--json", help="also write all figures here")
    args = parser.parse_args()
    if args.json and (why := refusal(Path(args.json))):
        parser.error(f"--json {why}")
    found = {}
    try:
        for variant in args.variants:
            config: Any = load_config(f"{IMAGENET}:{variant}")
            config.update(fsdp=args.fsdp, accumulate=args.accumulate)
            config.batch_size = args.batch_size or config.batch_size
            config.eval_batch_size = config.batch_size
            config.norm_statistics = args.statistics or config.norm_statistics
            validate(config, args.devices)
            print(f"{variant} ...", file=sys.stderr, flush=True)
            found[variant] = measure(config, args.devices, not args.no_compile)
    except InputError as error:
        return fail(error)
    print(
        f"configs/imagenet.py, {config.batch_size} images per step on {args.devices} devices, fsdp {args.fsdp}, "
        f"accumulate {args.accumulate}, norm statistics {config.norm_statistics}, {config.dtype}, "
        f"{config.epochs} epochs of {TRAINING_IMAGES:,} images\n"
    )
    print(tables(found))
    if args.json:
        write_json(args.json, {"arguments": vars(args), "networks": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
