"""Compiler counts of FLOPs, bytes and temporaries: the same on every machine, compared with a record.

    python -m benchmarks.counts            # prints counts and recorded counts; status 1 if one has grown
    python -m benchmarks.counts --quick    # skips the three slowest compilations
    python -m benchmarks.counts --record   # records them, in benchmarks/counts.json

"flops" and "bytes" are of the lowered program; "compiled_flops", "compiled_bytes" and "temporaries" of the program that
XLA compiles for CPUs with AVX2. A record is valid for one version of JAX.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Before JAX starts: the result must not depend on this machine's instruction set or devices.
os.environ["XLA_FLAGS"] = "--xla_cpu_max_isa=AVX2"
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import ours
from benchmarks.cases import CASES
from benchmarks.report import fail, make_parser, write_json

RECORD = Path(__file__).with_name("counts.json")
# Growth that is still not a regression.
TOLERANCE = 0.02
PROGRAMS = {
    "fashion_mnist train": ("fashion_mnist", "train", {}),
    "fashion_mnist train remat": ("fashion_mnist", "train", {"remat": "block"}),
    "fashion_mnist inference": ("fashion_mnist", "inference", {}),
    "spe_t train": ("spe_t", "train", {}),
    "spe_t train remat": ("spe_t", "train", {"remat": "block"}),
    "spe_t train bfloat16": ("spe_t", "train", {"dtype": "bfloat16"}),
    "spe_t inference": ("spe_t", "inference", {}),
}
SLOW = ("spe_t train", "spe_t train remat", "spe_t train bfloat16")


def count(case: str, task: str, overrides: dict) -> dict[str, float]:
    """The counts of one program, compiled only."""
    config = dataclasses.replace(CASES[case].config, **overrides)
    batch = CASES[case].batch
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, config.in_channels), jnp.float32)
    function, arguments = ours.make_step(config) if task == "train" else ours.make_logits(config)
    labels = (jax.ShapeDtypeStruct((batch,), jnp.int32),) if task == "train" else ()
    lowered = function.lower(*arguments, images, *labels)
    compiled = lowered.compile()
    written, made, memory = lowered.cost_analysis(), compiled.cost_analysis(), compiled.memory_analysis()
    assert written is not None and made is not None and memory is not None, "the CPU compiler counts all of these"
    return {
        "flops": written["flops"],
        "bytes": written["bytes accessed"],
        "compiled_flops": made["flops"],
        "compiled_bytes": made["bytes accessed"],
        "temporaries": memory.temp_size_in_bytes,
    }


def main() -> int:
    parser = make_parser(__doc__, "counts")
    parser.add_argument("--record", action="store_true", help="record the counts instead of comparing them")
    parser.add_argument("--quick", action="store_true", help=f"skip {' and '.join(SLOW)}")
    args = parser.parse_args()
    if args.quick and args.record:
        parser.error("--record needs all programs: remove --quick")
    chosen = {name: program for name, program in PROGRAMS.items() if not (args.quick and name in SLOW)}
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {"jax": jax.__version__, "programs": {}}
    if not args.record and recorded["jax"] != jax.__version__:
        return fail(f"recorded with JAX {recorded['jax']}, this is JAX {jax.__version__}: record again with --record")
    counts, grown = {}, 0
    for name, program in chosen.items():
        counts[name] = count(*program)
        for kind, value in counts[name].items():
            before = recorded["programs"].get(name, {}).get(kind)
            change = "new" if before is None else f"{100 * (value / before - 1):+.1f} %"
            worse = before is not None and value > before * (1 + TOLERANCE)
            grown += worse
            print(f"{name:<28}{kind:<16}{value / 1e9:10.3f} G  {change}{'  GROWN' if worse else ''}", flush=True)
    if args.record:
        write_json(RECORD, {"jax": jax.__version__, "programs": counts})
        return 0
    missing = sorted(recorded["programs"].keys() ^ PROGRAMS.keys())
    if missing:
        fail(f"{', '.join(missing)}: not in both the record and the programs")
    return 1 if grown or missing else 0


if __name__ == "__main__":
    sys.exit(main())
