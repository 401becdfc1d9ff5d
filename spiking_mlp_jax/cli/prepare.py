"""The command `spiking-mlp prepare`: ImageNet's archives or a folder of images into files that train fast anywhere."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from spiking_mlp_jax.errors import InputError

_REPORT_SECONDS = 30  # between lines where there is no terminal


def add_commands(commands, command, positive) -> None:
    """Adds the command's parsers.

    Args:
        commands: of argparse.
        command: function that makes one with a summary, a description, examples and a note.
        positive: type of whole numbers from 1 on.
    """
    parser = command(
        commands,
        "prepare",
        "turn ImageNet's archives or a folder of images into ArrayRecord files",
        "Writes images into a few large files with random access, in the layout of TensorFlow Datasets and without "
        "TensorFlow. Every image is decoded once, so that training meets none that is broken. Interrupted or killed, "
        "it goes on with the same command.",
        "spiking-mlp prepare imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar --out data\n"
        "  spiking-mlp prepare folder --data flowers --out data",
        "A folder of images can be trained on as it is; prepared, it is read faster from network drives.",
    )
    parser.set_defaults(run=lambda chosen: parser.print_help())
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT")

    imagenet = command(
        kinds,
        "imagenet",
        "from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
        "Writes DIR/imagenet2012/5.1.0, the same set that TFDS prepares. The archives are not unpacked. The 22 CMYK "
        "images and the PNG among the JPEGs become RGB JPEGs of quality 100.",
        "spiking-mlp prepare imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar --out data",
        "The labels of the validation images come with tensorflow-datasets. Training takes the set as "
        "--config.dataset=tfds:imagenet2012 --config.data_dir=DIR.",
    )
    imagenet.add_argument("--train", metavar="TAR", type=Path, help="ILSVRC2012_img_train.tar, 138 GB")
    imagenet.add_argument("--val", metavar="TAR", type=Path, help="ILSVRC2012_img_val.tar, 6.3 GB")
    imagenet.add_argument(
        "--val-labels",
        metavar="FILE",
        type=Path,
        help="other labels of the validation images: a synset a line, or the ids of the development kit's "
        "ILSVRC2012_validation_ground_truth.txt with its meta.mat beside it",
    )
    imagenet.add_argument("--partial", action="store_true", help="take archives that do not hold all images")
    _options(imagenet, positive)
    imagenet.set_defaults(run=_imagenet)

    folder = command(
        kinds,
        "folder",
        "from folders train|val|test/<class>/*.jpg|jpeg|png",
        "Writes DIR/NAME/1.0.0. Val becomes the split that TFDS calls validation. PNG files stay what they are.",
        "spiking-mlp prepare folder --data flowers --out data\n"
        "  spiking-mlp prepare folder --data ILSVRC2012 --out data --name my_imagenet",
    )
    folder.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder that holds train, val or test")
    folder.add_argument("--name", metavar="NAME", help="name of the set (default: the folder's)")
    _options(folder, positive)
    folder.set_defaults(run=_folder)


def _options(parser, positive) -> None:
    parser.add_argument("--out", metavar="DIR", required=True, help="data folder to write to, as of TFDS")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded")
    parser.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="shards worked on at a time; 1 reads a hard disk without jumps (default: the number of cores)",
    )
    parser.add_argument(
        "--shard-size", type=positive, default=512, metavar="MIB", help="size of a file in MiB (default: 512)"
    )


def _imagenet(chosen: argparse.Namespace) -> int:
    from spiking_mlp_jax.data.prepare import imagenet
    from spiking_mlp_jax.data.prepare.pictures import load_listing, save_listing

    if chosen.train is None and chosen.val is None:
        raise InputError("there is nothing to prepare: give --train, --val or both")
    out, name, version = _out(chosen), "imagenet2012", "5.1.0"
    for path in (chosen.train, chosen.val):
        if path is not None and not path.exists():
            raise InputError(f"there is no {path}: give the path of the tar that image-net.org hands out")
    work = out / name / version / "preparation"
    parts = []
    with _Progress("GB read") as progress:
        for split, archive in (("train", chosen.train), ("validation", chosen.val)):
            if archive is None:
                continue
            kept = work / f"{split}.listing.npz"
            # Labels from a file could have changed, and the headers of 50,000 pictures are read fast.
            pictures = load_listing(split, archive, kept) if split == "train" else None
            if pictures is None:

                def show(done, of, split=split):
                    progress(f"listing {split}", done / 1e9, of / 1e9)

                if split == "train":
                    pictures = imagenet.train_pictures(archive, show)
                    _keep(save_listing, pictures, kept)
                else:
                    pictures = imagenet.val_pictures(archive, chosen.val_labels, show)
            if not chosen.partial:
                imagenet.check_counts(pictures)
            parts.append(pictures)
    return _prepare(chosen, parts, out, name, version, jpeg_only=True)


def _keep(save, pictures, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(pictures, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): give another --out") from error


def _folder(chosen: argparse.Namespace) -> int:
    from spiking_mlp_jax.data.prepare.pictures import SPLITS, folder_pictures

    if not chosen.data.is_dir():
        raise InputError(f"{chosen.data} is not a folder: give one that holds train, val or test")
    name = chosen.name
    if name is None:
        name = re.sub(r"\W+", "_", chosen.data.resolve().name.lower(), flags=re.ASCII).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f'"{name}" is no name of a set: give --name in small letters, digits and _, such as "flowers"')
    parts = [folder_pictures(chosen.data, part) for part in SPLITS if (chosen.data / part).is_dir()]
    if not parts:
        raise InputError(f"{chosen.data} holds no folder train, val or test: put the class folders into one of them")
    return _prepare(chosen, parts, _out(chosen), name, "1.0.0", jpeg_only=False)


def _out(chosen) -> Path:
    if "://" in chosen.out:
        raise InputError(f"{chosen.out} is no folder on this machine: write to a disk, then copy the files there")
    out = Path(chosen.out).expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder: give another --out")
    return out


def _prepare(chosen, parts, out: Path, name: str, version: str, jpeg_only: bool) -> int:
    from spiking_mlp_jax.data.prepare.records import prepare
    from spiking_mlp_jax.utils.interrupt import StopRequest

    started = time.monotonic()
    with StopRequest() as stop, _Progress("images") as progress:
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
        print("stopped: the same command goes on with the shards that are missing", file=sys.stderr)
        return 130
    folder = out / name / version
    for report in reports:
        _tell(report)
    print(f"{folder}: ready after {time.monotonic() - started:,.0f} s; preparation/*.report.json counts every class")
    print(f"train on it with --config.dataset=tfds:{name} --config.data_dir={out}")
    return 0


def _tell(report: dict[str, Any]) -> None:
    counts = report["classes"].values()
    shards = len(report["shard_lengths"])
    print(
        f"{report['split']}: {report['images']:,} images in {shards:,} shard{'s' * (shards > 1)}, "
        f"{report['bytes'] / 1e9:,.2f} GB; {sum(count > 0 for count in counts):,} of {len(counts):,} classes, "
        f"{min(counts):,} to {max(counts):,} images each"
    )
    if report["converted"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(report["converted"].values()).items()))
        print(f"  {len(report['converted'])} re-encoded as RGB or grey JPEG: {kinds}")
    if report["skipped"]:
        print(f"  {len(report['skipped'])} broken and left out: {', '.join(list(report['skipped'])[:5])}")


class _Progress:
    """A bar with the rate and the time left on a terminal, a line now and then elsewhere. Threads may call it."""

    def __init__(self, unit: str):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._unit, self._lock = unit, threading.Lock()
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._shown = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, disable=not self.live)

    @property
    def live(self) -> bool:
        return self._console.is_terminal

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: float, of: float) -> None:
        """Shows how far it is.

        Args:
            what: such as "train".
            done: of the unit.
            of: how many there are.
        """
        now = time.monotonic()
        with self._lock:
            if what not in self._tasks:
                self._first[what] = now, done
                self._tasks[what] = self._bar.add_task(what, total=of, status="")
                self._bar.update(self._tasks[what], completed=done)
            elif now - self._shown < (0.1 if self.live else _REPORT_SECONDS) and done < of:
                return
            self._shown = now
            start, before = self._first[what]
            rate = (done - before) / (now - start) if now > start else 0.0
            digits = 0 if self._unit == "images" else 1
            status = f"{done:,.{digits}f} of {of:,.{digits}f} {self._unit}"
            if rate > 0:
                status += f", {rate:,.{digits}f}/s"
            if self.live:
                self._bar.update(self._tasks[what], completed=done, status=status)
                return
            if rate > 0 and done < of:
                minutes, seconds = divmod(round((of - done) / rate), 60)
                status += f", {minutes}:{seconds:02} left"
            self._console.print(f"{what}: {status}")
