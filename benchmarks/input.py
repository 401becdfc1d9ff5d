"""How fast training images are read, stage by stage.

    python -m benchmarks.input FOLDER                     # JPEGs in FOLDER and below, at 224 px, on all cores
    python -m benchmarks.input FOLDER --size 32 --processes 1

Every stage begins with a file's bytes. Each process goes through all stages once, then through all again, so that what
else the machine does hits all alike. "images/s" is what all processes did together, by the clock; "CPU ms" is the time
that an image took of a core, which a busy machine changes less. A stage's cost is its CPU time less that of the crop
and flip in the same turn, median of the turns. At last come whole batches as a training run gets them, through Grain,
with threads and with workers. Mixup and cutmix belong to the training step and are not here.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spiking_mlp_jax.data.image import Encoded, decode_image, read_encoded
from spiking_mlp_jax.data.pipeline import train_batches
from spiking_mlp_jax.data.randaugment import parse_rand_augment
from spiking_mlp_jax.data.sources import IMAGE_SUFFIXES
from spiking_mlp_jax.data.transforms import Augment, fit_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = Augment(random_resized_crop=True, flip=True, mean=MEAN, std=STD)
ADDED = {
    "RandAugment": {"rand_augment": parse_rand_augment("rand-m9-mstd0.5-inc1")},
    "colour jitter": {"color_jitter": 0.4},
    "random erasing": {"random_erasing": 0.25},
}
# As configs/imagenet.py has it: without colour jitter.
RECIPE = dataclasses.replace(BASE, **ADDED["RandAugment"], **ADDED["random erasing"])
CROP = "decode, crop, flip"


class Files:
    """Files as a source of so many images, over and over again."""

    class_names: tuple[str, ...] = ("any",)

    def __init__(self, paths: list[str], length: int):
        self.paths, self.length = paths, length

    def __len__(self) -> int:
        return self.length

    def encoded(self, index: int, /) -> dict:
        return {"image": read_encoded(self.paths[index % len(self.paths)]), "label": np.int32(0)}

    def __getitem__(self, index: int, /) -> dict:
        record = self.encoded(index)
        return {**record, "image": decode_image(*record["image"])}


def stages(size: int) -> dict[str, Callable[[Encoded, np.random.Generator], object]]:
    """What is timed: functions of an encoded picture."""
    found: dict[str, Callable[[Encoded, np.random.Generator], object]] = {
        "decode": lambda picture, rng: decode_image(*picture),
        CROP: lambda picture, rng: BASE(picture, size, 3, rng),
    }
    for name, fields in ADDED.items():
        augment = dataclasses.replace(BASE, **fields)
        found[f"  + {name}"] = lambda picture, rng, augment=augment: augment(picture, size, 3, rng)
    found["  whole recipe"] = lambda picture, rng: RECIPE(picture, size, 3, rng)
    found["evaluation: decode, resize, crop"] = lambda picture, rng: fit_image(
        decode_image(*picture), size, 3, "resize_crop"
    )
    return found


def take_turns(paths: list[str], size: int, turns: int, start, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds per image of each stage, one pair for each turn; the first turn, not counted, warms up."""
    pictures = [read_encoded(path) for path in paths]
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in stages(size)}
    for turn in range(turns + 1):
        for name, stage in stages(size).items():
            start.wait()
            wall, cpu = time.perf_counter(), time.process_time()
            for picture in pictures:
                stage(picture, rng)
            passed = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                found[name].append((passed[0] / len(pictures), passed[1] / len(pictures)))
        if seed == 0:
            print(f"turn {turn} of {turns}", file=sys.stderr, flush=True)
    return found


def through_grain(paths: list[str], size: int, augment: Augment, workers: int, images: int) -> tuple[float, float]:
    """Images per second of whole batches of 64, and CPU seconds an image took of this process."""
    source = Files(paths, images + 64 * 40)
    batches = train_batches(
        source, batch_size=64, image_size=size, in_channels=3, augment=augment, seed=0, epochs=1, workers=workers
    )
    for _ in range(20):  # starting workers, compiling, filling the queues
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(images // 64):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    batches.close()
    return images // 64 * 64 / wall, cpu / (images // 64 * 64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the images, also in folders of its own")
    parser.add_argument("--size", type=int, default=224, help="side of the images a network takes (224)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="how many read at once (the cores)")
    parser.add_argument("--turns", type=int, default=7, help="of each stage (7)")
    parser.add_argument("--images", type=int, default=500, help="at most so many files (500)")
    parser.add_argument("--batches", type=int, default=30, help="of 64 images, through Grain (30)")
    args = parser.parse_args()
    paths = sorted(str(path) for path in args.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    paths = paths[:: max(1, -(-len(paths) // args.images))]
    if not paths:
        print(f"error: {args.folder} holds no {', '.join(IMAGE_SUFFIXES)}: name a folder of images", file=sys.stderr)
        return 2
    with multiprocessing.get_context("spawn").Manager() as manager:
        start = manager.Barrier(args.processes)
        context = multiprocessing.get_context("spawn")
        with context.Pool(args.processes) as pool:
            jobs = [(paths, args.size, args.turns, start, seed) for seed in range(args.processes)]
            results = pool.starmap(take_turns, jobs, chunksize=1)
    print(f"{len(paths)} files, {args.size} px, {args.processes} processes on {os.cpu_count()} cores\n")
    print("| stage | images/s | CPU ms | images per CPU second | cost, ms |\n|---|---|---|---|---|")
    for name in results[0]:
        together = zip(*(result[name] for result in results), strict=True)
        rate = statistics.median(sum(1 / wall for wall, _ in turn) for turn in together)
        cpu = statistics.median(cpu for result in results for _, cpu in result[name])
        pairs = [zip(result[name], result[CROP], strict=True) for result in results]
        cost = statistics.median(mine[1] - base[1] for pair in pairs for mine, base in pair)
        shown = f"{1000 * cost:+.2f}" if name.startswith("  ") else ""
        print(f"| {name.strip()} | {rate:,.0f} | {1000 * cpu:.2f} | {1 / cpu:,.0f} | {shown} |")
    for augment, name in ((BASE, CROP), (RECIPE, "whole recipe")):
        for workers in (0, args.processes):
            rate, cpu = through_grain(paths, args.size, augment, workers, 64 * args.batches)
            # Workers' time is their own.
            shown = "| |" if workers else f"{1000 * cpu:.2f} | {1 / cpu:,.0f} |"
            print(f"| batches through Grain, {name}, {workers or 'no'} workers | {rate:,.0f} | {shown} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
