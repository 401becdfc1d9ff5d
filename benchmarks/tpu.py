"""The training step and inference as XLA's TPU compiler compiles them; needs no TPU and runs nothing.

    pip install libtpu==0.0.52                      # matches the jaxlib of requirements.lock
    python -m benchmarks.tpu                        # MLP-SPE-T, 224 px, B=4, T=4: six programs, minutes each
    python -m benchmarks.tpu --depths 1 1 --dim 24 --image-size 64 --tasks train --dtypes float32 --remat none

"fusions" and "copies" exclude those inside a fusion; products are convolutions and dots, custom calls are kernels.
These, "FLOPs" and "bytes" count the body of a loop, and so the blocks of a stage, once. "cycles" is the compiler's
estimate with all iterations of loops, without transfers that run concurrently; "in copies" is the share of copies.
"temporaries" is the TPU memory beside arguments and results.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import sys
import time
from collections import Counter

# Before JAX starts: arrays are on the CPU, and libtpu neither queries machine metadata nor locks chips.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import ours
from benchmarks.report import fail, head, line, make_parser
from spiking_mlp_jax.cli.options import positive
from spiking_mlp_jax.models.config import CHOICES, VARIANTS, ModelConfig

COLUMNS = (
    *("task", "dtype", "remat", "fusions", "copies", "transposes", "products", "custom calls"),
    *("FLOPs, G", "bytes, G", "cycles, M", "in copies, %", "temporaries, GB", "compile, s"),
)
# Custom calls that only allocate or alias memory.
NO_WORK = ('custom_call_target="AllocateBuffer"', 'custom_call_target="ConcatBitcast"')


def computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """A compiled program's computations by name, as (opcode, line) of each instruction; and the entry's name.

    Args:
        text: from `jax.stages.Compiled.as_text`.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    entry = name = ""
    for row in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", row):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        # Types have no lower-case word before a parenthesis.
        elif instruction := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = .*?(?<=[ )}\]])([a-z][a-z0-9-]*)\(", row):
            found[name].append((instruction[1], row))
    return found, entry


def counts(text: str) -> dict[str, int]:
    """Numbers of instructions by kind, as the module's docstring defines them."""
    program, _ = computations(text)
    fused = {_named("calls", row) for rows in program.values() for opcode, row in rows if opcode == "fusion"}
    all_of_it = Counter(opcode for rows in program.values() for opcode, _ in rows)
    alone = [instruction for name, rows in program.items() if name not in fused for instruction in rows]
    opcodes = Counter(opcode for opcode, _ in alone)
    calls = [row for opcode, row in alone if opcode == "custom-call"]
    return {
        "fusions": opcodes["fusion"],
        "copies": opcodes["copy"],
        "transposes": all_of_it["transpose"],
        "products": all_of_it["convolution"] + all_of_it["dot"],
        "custom calls": sum(not any(target in row for target in NO_WORK) for row in calls),
    }


def cycles(text: str) -> tuple[int, int]:
    """The TPU compiler's estimated cycles, with all iterations of loops; total, and in copies.

    Raises:
        NotImplementedError: the program does not give a loop's number of iterations.
    """
    program, entry = computations(text)

    def of(name):
        total = copies = 0
        for opcode, row in program[name]:
            if opcode == "while":
                iterations, inside = _iterations(program, row), of(_named("body", row))
                total, copies = total + iterations * inside[0], copies + iterations * inside[1]
            elif opcode == "call":
                inside = of(_named("to_apply", row))
                total, copies = total + inside[0], copies + inside[1]
            elif estimate := re.search(r'"estimated_cycles":"(\d+)"', row):
                total += int(estimate[1])
                copies += int(estimate[1]) * (opcode == "copy")
        return total, copies

    return of(entry)


def _iterations(program, row):
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', row):
        return int(known[1])
    # Loops over blocks and steps count from 0 up to a constant.
    ends = [re.search(r"constant\((\d+)\)", row) for opcode, row in program[_named("condition", row)]]
    ends = [int(end[1]) for end in ends if end]
    if len(ends) != 1:
        raise NotImplementedError(f"unknown number of iterations of this loop: {row.strip()[:80]}")
    return ends[0]


def _named(attribute, row):
    found = re.search(rf"\b{attribute}=%?([\w.-]+)", row)
    assert found is not None, f"no {attribute} in {row}"
    return found[1]


def compile_for(where: jax.sharding.Sharding, config: ModelConfig, task: str, batch: int):
    """The compiled "train" or "inference" program, and the seconds of compilation."""
    function, arguments = ours.make_step(config) if task == "train" else ours.make_logits(config)
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, config.in_channels), jnp.float32)
    labels = (jax.ShapeDtypeStruct((batch,), jnp.int32),) if task == "train" else ()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (*arguments, images, *labels)
    )
    start = time.perf_counter()
    compiled = function.lower(*shapes).compile()
    return compiled, time.perf_counter() - start


def row(where: jax.sharding.Sharding, config: ModelConfig, task: str, batch: int) -> list[str]:
    """The cells of COLUMNS for one program."""
    compiled, seconds = compile_for(where, config, task, batch)
    text, cost, memory = compiled.as_text(), compiled.cost_analysis(), compiled.memory_analysis()
    assert text is not None and cost is not None and memory is not None, "the TPU compiler reports all of these"
    total, copies = cycles(text)
    return [
        *(task, config.dtype, str(config.remat) if task == "train" else "-"),
        *map(str, counts(text).values()),
        *(f"{cost['flops'] / 1e9:.1f}", f"{cost['bytes accessed'] / 1e9:.2f}"),
        *(f"{total / 1e6:.1f}", f"{100 * copies / max(total, 1):.1f}"),
        *(f"{memory.temp_size_in_bytes / 1e9:.3f}", f"{seconds:.0f}"),
    ]


def _reason(error):
    return str(error).splitlines()[0]


def main() -> int:
    parser = make_parser(__doc__, "tpu")
    parser.add_argument("--topology", default="v5e:1x1", help="topology to compile for; one of its chips is used")
    parser.add_argument("--variant", choices=VARIANTS, default="mlp_spe_t")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--time-steps", type=int, default=4)
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--depths", type=int, nargs="+", help="blocks of each stage, instead of the variant's")
    parser.add_argument("--dim", type=int, help="channels of the first stage, instead of the variant's")
    parser.add_argument("--neuron-backend", choices=CHOICES["neuron_backend"], default="auto")
    parser.add_argument("--tasks", nargs="+", choices=("train", "inference"), default=["train", "inference"])
    parser.add_argument("--dtypes", nargs="+", choices=CHOICES["dtype"], default=list(CHOICES["dtype"]))
    parser.add_argument("--remat", nargs="+", choices=CHOICES["remat"], default=list(CHOICES["remat"]))
    args = parser.parse_args()
    changed = {name: value for name in ("depths", "dim") if (value := getattr(args, name)) is not None}
    names = ("image_size", "time_steps", "neuron_backend")
    try:
        config = ModelConfig.variant(args.variant, **{name: getattr(args, name) for name in names}, **changed)
    except ValueError as error:
        parser.error(str(error))
    if importlib.util.find_spec("libtpu") is None:
        return fail("libtpu, the TPU compiler, is not installed: pip install libtpu==0.0.52")
    try:
        device = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices[0]
    except jax.errors.JaxRuntimeError as error:
        return fail(f'libtpu cannot compile for --topology "{args.topology}": {_reason(error)}')
    print(
        f"{args.variant}, depths {','.join(map(str, config.depths))}, {config.image_size} px, B={args.batch}, "
        f"T={config.time_steps}, neurons {config.neuron_backend}, {device.device_kind}, jax {jax.__version__}, "
        f"libtpu {importlib.metadata.version('libtpu')}\n"
    )
    where = jax.sharding.SingleDeviceSharding(device)
    print(head(COLUMNS), flush=True)
    for task in args.tasks:
        for dtype in args.dtypes:
            for remat in args.remat if task == "train" else ["none"]:
                one = dataclasses.replace(config, dtype=dtype, remat=remat)
                try:
                    cells = row(where, one, task, args.batch)
                except jax.errors.JaxRuntimeError as error:
                    # E.g. a batch that exceeds the TPU's memory.
                    return fail(f"libtpu refuses {task}, {dtype}, remat {remat}: {_reason(error)}")
                print(line(cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
