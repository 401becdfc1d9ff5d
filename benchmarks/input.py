"""Speed of reading training images, stage by stage.

    python -m benchmarks.input FOLDER                     # JPEGs in FOLDER and below, at 224 px, on all cores
    python -m benchmarks.input FOLDER --size 32 --processes 1

Every stage starts from a file's bytes. Each process repeats all stages in rounds, so that other load affects all alike.
"images/s" is the wall-clock rate of all processes together; "CPU ms" is CPU time per image, which a busy machine
changes less. A stage's cost is its CPU time minus that of crop and flip in the same round, median over rounds. Last
come batches as a training run gets them, through Grain, with threads and with workers. Mixup and cutmix are not
included: they are part of the training step.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.report import fail, head, line, make_parser
from spiking_mlp_jax.cli.options import positive
from spiking_mlp_jax.data.image import Encoded, decode_image, read_encoded
from spiking_mlp_jax.data.pipeline import train_batches
from spiking_mlp_jax.data.randaugment import parse_rand_augment
from spiking_mlp_jax.data.sources import IMAGE_SUFFIXES
from spiking_mlp_jax.data.transforms import Augment, fit_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = Augment(random_resized_crop=True, flip=True, mean=MEAN, std=STD)
ADDED = {
    "RandAugment": {"rand_augment": parse_rand_augment("rand-m9-mstd0.5-inc1")},
    "color jitter": {"color_jitter": 0.4},
    "random erasing": {"random_erasing": 0.25},
}
# That of configs/imagenet.py, without color jitter.
RECIPE = dataclasses.replace(BASE, **ADDED["RandAugment"], **ADDED["random erasing"])
CROP = "decode, crop, flip"


class Files:
    """A source of `length` images that repeats some files."""

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
    """The timed functions of an encoded image."""
    found: dict[str, Callable[[Encoded, np.random.Generator], object]] = {
        "decode": lambda image, rng: decode_image(*image),
        CROP: lambda image, rng: BASE(image, size, 3, rng),
    }
    for name, fields in ADDED.items():
        augment = dataclasses.replace(BASE, **fields)
        found[f"  + {name}"] = lambda image, rng, augment=augment: augment(image, size, 3, rng)
    found["  complete recipe"] = lambda image, rng: RECIPE(image, size, 3, rng)
    found["evaluation: decode, resize, crop"] = lambda image, rng: fit_image(
        decode_image(*image), size, 3, "resize_crop"
    )
    return found


def time_stages(paths: list[str], size: int, rounds: int, start, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds per image of each stage and round; a first round, not counted, warms up."""
    encoded_images = [read_encoded(path) for path in paths]
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in stages(size)}
    for number in range(rounds + 1):
        for name, stage in stages(size).items():
            start.wait()
            wall, cpu = time.perf_counter(), time.process_time()
            for image in encoded_images:
                stage(image, rng)
            passed = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                found[name].append((passed[0] / len(encoded_images), passed[1] / len(encoded_images)))
        if seed == 0:
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return found


def through_grain(paths: list[str], size: int, augment: Augment, workers: int, images: int) -> tuple[float, float]:
    """Images/s in batches of 64, and this process's CPU seconds per image."""
    source = Files(paths, images + 64 * 40)
    batches = train_batches(
        source, batch_size=64, image_size=size, in_channels=3, augment=augment, seed=0, epochs=1, workers=workers
    )
    for _ in range(20):  # starts workers, compiles, fills the queues
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(images // 64):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    batches.close()
    return images // 64 * 64 / wall, cpu / (images // 64 * 64)


def main() -> int:
    parser = make_parser(__doc__, "input")
    parser.add_argument("folder", type=Path, help="folder of images, searched recursively")
    parser.add_argument("--size", type=positive, default=224, help="image size of the network (224)")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="processes (the cores)")
    parser.add_argument("--turns", type=positive, default=7, help="rounds (7)")
    parser.add_argument("--images", type=positive, default=500, help="maximum number of files (500)")
    parser.add_argument("--batches", type=positive, default=30, help="batches of 64 images through Grain (30)")
    args = parser.parse_args()
    paths = sorted(str(path) for path in args.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    paths = paths[:: max(1, -(-len(paths) // args.images))]
    if not paths:
        return fail(f"{args.folder} holds no {', '.join(IMAGE_SUFFIXES)}: name a folder of images")
    with multiprocessing.get_context("spawn").Manager() as manager:
        start = manager.Barrier(args.processes)
        context = multiprocessing.get_context("spawn")
        with context.Pool(args.processes) as pool:
            jobs = [(paths, args.size, args.turns, start, seed) for seed in range(args.processes)]
            results = pool.starmap(time_stages, jobs, chunksize=1)
    print(f"{len(paths)} files, {args.size} px, {args.processes} processes on {os.cpu_count()} cores\n")
    print(head(["stage", "images/s", "CPU ms", "images per CPU second", "cost, ms"]))
    for name in results[0]:
        together = zip(*(result[name] for result in results), strict=True)
        rate = statistics.median(sum(1 / wall for wall, _ in one) for one in together)
        cpu = statistics.median(cpu for result in results for _, cpu in result[name])
        pairs = [zip(result[name], result[CROP], strict=True) for result in results]
        cost = statistics.median(mine[1] - base[1] for pair in pairs for mine, base in pair)
        shown = f"{1000 * cost:+.2f}" if name.startswith("  ") else ""
        print(line([name.strip(), f"{rate:,.0f}", f"{1000 * cpu:.2f}", f"{1 / cpu:,.0f}", shown]))
    for augment, name in ((BASE, CROP), (RECIPE, "complete recipe")):
        for workers in (0, args.processes):
            rate, cpu = through_grain(paths, args.size, augment, workers, 64 * args.batches)
            # The CPU time of workers is not counted.
            shown = "| |" if workers else f"{1000 * cpu:.2f} | {1 / cpu:,.0f} |"
            print(f"| batches through Grain, {name}, {workers or 'no'} workers | {rate:,.0f} | {shown} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
