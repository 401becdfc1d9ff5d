"""The command `prepare`: ImageNet's archives or a folder of images to ArrayRecord files."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from spiking_mlp_jax.cli.options import add_command, add_value, path_type, positive
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import output_folder, real_name
from spiking_mlp_jax.utils.progress import shown_progress


def add_commands(commands) -> None:
    """Add the parsers to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "prepare",
        "convert ImageNet's archives or a folder of images to ArrayRecord files",
        "Writes images into a few large files with random access, in the layout of TensorFlow Datasets and without "
        "TensorFlow. Every image is decoded once, so that training does not meet a corrupt one. After an interruption "
        "or a crash, the same command continues.",
        "spiking-mlp prepare imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar --out data\n"
        "  spiking-mlp prepare folder --data flowers --out data",
        "A folder of images can be used for training as it is; prepared, it is read faster from network drives.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT")

    imagenet = add_command(
        kinds,
        "imagenet",
        "from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
        "Writes DIR/imagenet2012/5.1.0, the same dataset that TFDS prepares. The archives are not unpacked. The 22 "
        "CMYK images and the PNG among the JPEGs become RGB JPEGs of quality 100.",
        "spiking-mlp prepare imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar --out data",
        "The labels of the validation images come with tensorflow-datasets. To train on the dataset, set "
        "--config.dataset=tfds:imagenet2012 --config.data_dir=DIR.",
        run=_imagenet,
    )
    imagenet.add_argument("--train", metavar="TAR", type=path_type, help="ILSVRC2012_img_train.tar, 138 GB")
    imagenet.add_argument("--val", metavar="TAR", type=path_type, help="ILSVRC2012_img_val.tar, 6.3 GB")
    imagenet.add_argument(
        "--val-labels",
        metavar="FILE",
        type=path_type,
        help="other labels of the validation images: one synset per line, or the ids of the development kit's "
        "ILSVRC2012_validation_ground_truth.txt with meta.mat in the same folder",
    )
    imagenet.add_argument("--partial", action="store_true", help="accept archives that do not hold all images")
    _add_options(imagenet)

    folder = add_command(
        kinds,
        "folder",
        "from folders train|val|test/<class>/*.jpg|jpeg|png",
        "Writes DIR/NAME/1.0.0. Val becomes the split that TFDS calls validation. PNG files are stored as they are.",
        "spiking-mlp prepare folder --data flowers --out data\n"
        "  spiking-mlp prepare folder --data ILSVRC2012 --out data --name my_imagenet",
        run=_folder,
    )
    folder.add_argument(
        "--data", metavar="DIR", type=path_type, required=True, help="folder that holds train, val or test"
    )
    folder.add_argument("--name", metavar="NAME", help="name of the dataset (default: that of the folder)")
    _add_options(folder)


def _add_options(parser) -> None:
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for TFDS datasets to write to")
    parser.add_argument("--skip-broken", action="store_true", help="skip images that cannot be decoded")
    parser.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="shards written at a time; 1 reads a hard disk sequentially (default: the number of cores)",
    )
    add_value(parser, "--shard-size", 512, "size of a file in MiB", metavar="MIB")


def _imagenet(chosen: argparse.Namespace) -> int:
    from spiking_mlp_jax.data.prepare import imagenet
    from spiking_mlp_jax.data.prepare.listing import load_listing

    if chosen.train is None and chosen.val is None:
        raise InputError("nothing to prepare: give --train, --val or both")
    out, name, version = _out(chosen), "imagenet2012", "5.1.0"
    for path in (chosen.train, chosen.val):
        if path is not None and not path.exists():
            raise InputError(f"there is no {path}: give the path of the tar from image-net.org")
    work = out / name / version / "preparation"
    parts = []
    with shown_progress("GB read") as progress:
        if chosen.train is not None:
            # Reading 1.3 million headers takes minutes on a slow disk.
            cached = work / "train.listing.npz"
            listing = load_listing("train", chosen.train, cached)
            if listing is None:
                listing = imagenet.list_train(
                    chosen.train, lambda done, of: progress("listing train", done / 1e9, of / 1e9)
                )
                _cache(listing, cached)
            parts.append(listing)
        if chosen.val is not None:
            # Not cached: labels from a file could have changed.
            parts.append(
                imagenet.list_val(
                    chosen.val,
                    chosen.val_labels,
                    lambda done, of: progress("listing validation", done / 1e9, of / 1e9),
                )
            )
    if not chosen.partial:
        for listing in parts:
            imagenet.check_counts(listing)
    return _prepare(chosen, parts, out, name, version, jpeg_only=True)


def _cache(listing, path: Path) -> None:
    from spiking_mlp_jax.data.prepare.listing import save_listing

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_listing(listing, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): give another --out") from error


def _folder(chosen: argparse.Namespace) -> int:
    from spiking_mlp_jax.data.prepare.listing import SPLITS, list_folder

    if not chosen.data.is_dir():
        raise InputError(f"{chosen.data} is not a folder: name one that holds train, val or test")
    name = chosen.name
    if name is None:
        name = re.sub(r"\W+", "_", real_name(chosen.data).lower(), flags=re.ASCII).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(
            f'"{name}" cannot name a dataset: give --name in lower-case letters, digits and _, e.g. "flowers"'
        )
    parts = [list_folder(chosen.data, part) for part in SPLITS if (chosen.data / part).is_dir()]
    if not parts:
        raise InputError(f"{chosen.data} has no folder train, val or test: put the class folders into one of them")
    return _prepare(chosen, parts, _out(chosen), name, "1.0.0", jpeg_only=False)


def _out(chosen) -> Path:
    if "://" in chosen.out:
        raise InputError(f"{chosen.out} is not on this machine: write to a disk, then copy the files there")
    return output_folder(chosen.out, "--out")


def _prepare(chosen, parts, out: Path, name: str, version: str, jpeg_only: bool) -> int:
    from spiking_mlp_jax.data.prepare.records import prepare
    from spiking_mlp_jax.utils.interrupt import StopRequest

    started = time.monotonic()
    with StopRequest() as stop, shown_progress("images") as progress:
        reports = prepare(
            parts,
            out,
            name,
            version,
            jpeg_only=jpeg_only,
            shard_bytes=chosen.shard_size * 2**20,
            skip_broken=chosen.skip_broken,
            workers=chosen.workers,
            progress=progress,
            stopping=lambda: stop.requested,
        )
    if reports is None:
        print("stopped: rerun the same command to resume", file=sys.stderr)
        return 130
    folder = out / name / version
    for report in reports:
        _print(report)
    print(f"{folder}: done after {time.monotonic() - started:,.0f} s; preparation/*.report.json has counts per class")
    print(f"train on it with --config.dataset=tfds:{name} --config.data_dir={out}")
    return 0


def _print(report: dict[str, Any]) -> None:
    counts = report["classes"].values()
    shards = len(report["shard_lengths"])
    print(
        f"{report['split']}: {report['images']:,} images in {shards:,} shard{'s' * (shards > 1)}, "
        f"{report['bytes'] / 1e9:,.2f} GB; {sum(count > 0 for count in counts):,} of {len(counts):,} classes, "
        f"{min(counts):,} to {max(counts):,} images each"
    )
    if report["converted"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(report["converted"].values()).items()))
        print(f"  {len(report['converted'])} re-encoded as RGB or gray JPEG: {kinds}")
    if report["skipped"]:
        print(f"  {len(report['skipped'])} broken and skipped: {', '.join(list(report['skipped'])[:5])}")
