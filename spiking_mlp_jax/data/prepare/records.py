"""Writes images as ArrayRecord files for TensorFlow Datasets; it can be killed at any moment and rerun.

    DIR/NAME/VERSION/dataset_info.json, features.json, ...       written last; they make the dataset visible to readers
                     NAME-train.array_record-00000-of-00258      complete shards, renamed once they are on disk
                     preparation/train.json                      what the shards are made from
                     preparation/train-00000.json                the result of a shard
                     preparation/train.report.json               the result of all
                     preparation/*.partial                       incomplete files

Images keep their order on disk, which in ImageNet is by class: Grain shuffles them in each epoch and reads any order
equally fast, whereas writing them shuffled would take a million seeks in a tar of 138 GB. The content of a shard
depends on the images alone, so that a resumed preparation writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spiking_mlp_jax.data.image import DAMAGED, decode_image
from spiking_mlp_jax.data.prepare.listing import SPLITS, Listing
from spiking_mlp_jax.data.tfds import serializer, write_info
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.lock import locked

FORMAT = 1  # of the shards; those of another format are rewritten
SHARD_BYTES = 512 * 2**20  # 258 + 12 files for ImageNet, far below the usual limit of 1024 open files
# One record per group, so that a random read loads one image; images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_JPEG_QUALITY = 100  # as in TFDS, for the same images
_WORK = "preparation"


def prepare(
    parts: Sequence[Listing],
    out: Path,
    name: str,
    version: str,
    *,
    jpeg_only: bool,
    shard_bytes: int = SHARD_BYTES,
    skip_broken: bool = False,
    workers: int = 1,
    progress: Callable[[str, int, int], None] = lambda split, images, of: None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """Write the missing shards, then TFDS's metadata.

    Every image is decoded once. Images that some decoders cannot read (CMYK, neither JPEG nor PNG) become RGB JPEGs of
    quality 100 without chroma subsampling; the others are stored unchanged.

    Args:
      parts: the splits.
      out: TFDS's data folder; created if missing.
      name: of the dataset, e.g. "imagenet2012".
      version: of the dataset, e.g. "5.1.0".
      jpeg_only: convert PNG files to JPEG, too.
      shard_bytes: approximate size of a shard.
      skip_broken: skip images that cannot be decoded.
      workers: threads, each with its own shard. Pillow and the writer release the GIL.
      progress: called with the split, the images done and their total, from any thread.
      stopping: polled after each image; True stops.

    Returns:
      A report of each split: "split", "images", "shard_lengths", "bytes", "classes" (images per class), "converted"
      (original kind of each re-encoded image), "skipped" (the error of each); None if stopped.

    Raises:
      InputError: the folder holds other shards or another process writes to it, the disk is too small or full, or
        images are corrupt; a file lists all of them.
    """
    folder = out / name / version
    work = folder / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {work} ({error.strerror}): use another --out") from error
    with locked(work, doing="preparing images in"), warnings.catch_warnings():
        # Pillow warns about odd metadata, which is common and harmless.
        warnings.simplefilter("ignore")
        for leftover in work.glob("*.partial"):
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
        jobs = [_Job(part, folder, name, jpeg_only, shard_bytes) for part in parts]
        _check_space(folder, jobs)
        serialize = serializer(jobs[0].listing.class_names, jpeg_only)
        reports = []
        for job in jobs:
            if not job.run(serialize, skip_broken, workers, progress, stopping):
                return None
            reports.append(job.report())
            _write_json(work / f"{job.split}.report.json", reports[-1])
            (work / f"{job.split}.broken.json").unlink(missing_ok=True)
        # Including splits that were prepared before.
        known = [report for path in sorted(work.glob("*.report.json")) if (report := _read_json(path)) is not None]
        write_info(folder, name, known, jpeg_only, work)
    return reports


@dataclasses.dataclass
class _Job:
    """One split: its division into shards, and which of them exist."""

    listing: Listing
    folder: Path
    name: str
    jpeg_only: bool
    shard_bytes: int

    def __post_init__(self):
        self.split, self.work = self.listing.split, self.folder / _WORK
        sizes = self.listing.sizes
        total = int(sizes.sum())
        count = max(1, -(-total // self.shard_bytes))
        # A shard starts at the first image beyond its share of the bytes; no shard is empty.
        starts = np.searchsorted(np.cumsum(sizes) - sizes, np.arange(count) * total // count)
        self.edges = [*sorted(set(starts.tolist()) - {len(sizes)}), len(sizes)]
        self.shards = len(self.edges) - 1
        self._compare()

    def _compare(self) -> None:
        plan = {
            "format": FORMAT,
            "images": len(self.listing),
            "bytes": int(self.listing.sizes.sum()),
            "shards": self.shards,
            "jpeg_only": self.jpeg_only,
            "digest": self.listing.digest(),
            "class_names": list(self.listing.class_names),
        }
        for path in self.work.glob("*.json"):
            other = path.name.removesuffix(".json")
            if other not in SPLITS.values() or not any(self.folder.glob(f"{self.name}-{other}.array_record-*")):
                continue  # not a plan, or not started
            before = _read_json(path) or {}
            same = plan if other == self.split else {"class_names", "jpeg_only"}
            if differing := [key for key in same if before.get(key) != plan[key]]:
                what = ", ".join(
                    key if isinstance(plan[key], list | str) else f"{key} {before.get(key)} instead of {plan[key]}"
                    for key in differing
                )
                raise InputError(
                    f"{self.folder} holds {other} images prepared from another source than {self.listing.source} or "
                    f"with other options ({what}): use another --out, or delete that folder"
                )
        _write_json(self.work / f"{self.split}.json", plan)

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.name}-{self.split}.array_record-{number:05}-of-{self.shards:05}"

    def _result_file(self, number: int) -> Path:
        return self.work / f"{self.split}-{number:05}.json"

    def result(self, number: int) -> dict[str, Any] | None:
        """The result of a shard; None if its file is missing or has changed."""
        result, shard = _read_json(self._result_file(number)), self.shard(number)
        if result is None or not shard.is_file() or shard.stat().st_size != result["bytes"]:
            return None
        return result

    def missing(self) -> list[int]:
        return [number for number in range(self.shards) if self.result(number) is None]

    def bytes_missing(self) -> int:
        """Estimated bytes to write; records are slightly larger than images, and files are padded to 64 KiB."""
        sizes = self.listing.sizes
        return sum(int(sizes[self.edges[n] : self.edges[n + 1]].sum() * 1.005) + 2**18 for n in self.missing())

    def run(self, serialize, skip_broken, workers, progress, stopping) -> bool:
        """Write the missing shards; False if stopped."""
        missing = self.missing()
        done = len(self.listing) - sum(self.edges[n + 1] - self.edges[n] for n in missing)
        progress(self.split, done, len(self.listing))
        count, halt, lock = done, threading.Event(), threading.Lock()
        broken: dict[str, str] = {}

        def advance():
            nonlocal count
            with lock:
                count += 1
                progress(self.split, count, len(self.listing))

        def write(number):
            if halt.is_set():
                return
            skipped = self._write(number, serialize, skip_broken, advance, lambda: halt.is_set() or stopping())
            if skipped and not skip_broken:
                with lock:
                    broken.update(skipped)

        with ThreadPoolExecutor(max(1, min(workers, len(missing)))) as pool:
            try:
                futures = [pool.submit(write, number) for number in missing]
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                halt.set()
                for future in finished:
                    future.result()
            except BaseException:
                # Also Ctrl-C: leaving the block waits for the threads, which would continue with their shards.
                halt.set()
                pool.shutdown(cancel_futures=True)
                raise
        if stopping():
            return not self.missing()
        if broken:
            listing = self.work / f"{self.split}.broken.json"
            _write_json(listing, broken)
            first = ", ".join(f"{name}: {reason}" for name, reason in list(broken.items())[:3])
            raise InputError(
                f"{len(broken)} of the images in {self.listing.source} cannot be decoded ({first}; all are listed in "
                f"{listing}): repair or download them again, or add --skip-broken to skip them"
            )
        return True

    def _write(self, number, serialize, skip_broken, advance, stopping) -> dict[str, str]:
        """Write a shard under a temporary name, check and rename it; return its corrupt images."""
        from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

        listing, start, stop = self.listing, self.edges[number], self.edges[number + 1]
        partial = self.work / f"{self.shard(number).name}.partial"
        converted, skipped, images = {}, {}, 0
        try:
            writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
            try:
                for name, label, data in zip(
                    listing.names[start:stop],
                    listing.labels[start:stop].tolist(),
                    listing.read(start, stop),
                    strict=True,
                ):
                    if stopping():
                        return {}
                    try:
                        data, was = checked(data, self.jpeg_only)
                    except InputError as error:
                        skipped[name] = str(error)
                    else:
                        writer.write(serialize(data, label, name))
                        images += 1
                        if was:
                            converted[name] = was
                    advance()
            finally:
                writer.close()
            if skipped and not skip_broken:
                return skipped
            if not images:
                raise InputError(
                    f"none of the {len(skipped)} images from {listing.names[start]} on can be decoded: "
                    f"repair {listing.source} first"
                )
            reader = ArrayRecordReader(str(partial))
            written = reader.num_records()
            reader.close()
            if written != images:
                raise InputError(f"{partial} holds {written} of {images} images after writing: check the disk")
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
                size = file.seek(0, os.SEEK_END)
            result = {"images": images, "bytes": size, "converted": converted, "skipped": skipped}
            _write_json(self._result_file(number), result)
            partial.replace(self.shard(number))
            return skipped
        except (RuntimeError, OSError) as error:  # array_record raises only RuntimeError
            raise InputError(
                f"cannot write {partial} ({error}): check the disk and its space, then rerun the same command"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def report(self) -> dict[str, Any]:
        """The result of all shards."""
        results = [self.result(number) for number in range(self.shards)]
        whole = [result for result in results if result is not None]
        if len(whole) < self.shards:
            raise InputError(
                f"shards of {self.split} vanished from {self.folder}: rerun the same command to write them"
            )
        skipped = {name: reason for result in whole for name, reason in result["skipped"].items()}
        kept = [name not in skipped for name in self.listing.names] if skipped else slice(None)
        counts = np.bincount(self.listing.labels[kept], minlength=len(self.listing.class_names)).tolist()
        return {
            "split": self.split,
            "images": sum(counts),
            "shard_lengths": [result["images"] for result in whole],
            "bytes": sum(result["bytes"] for result in whole),
            "classes": dict(zip(self.listing.class_names, counts, strict=True)),
            "converted": {name: was for result in whole for name, was in result["converted"].items()},
            "skipped": skipped,
        }


def checked(data: bytes, jpeg_only: bool) -> tuple[bytes, str]:
    """Decode an image and return the bytes to store.

    A JPEG is decoded at 1/8 of its size, which reads the complete file but computes few pixels.

    Args:
      data: the bytes of the file.
      jpeg_only: convert PNG to JPEG.

    Returns:
      The bytes to store, and the original kind if re-encoded ("CMYK JPEG", "RGBA PNG", ...), otherwise "".

    Raises:
      InputError: the image cannot be decoded; the message does not name it.
    """
    if not data:
        raise InputError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            # MPO is a JPEG with further images after the first, which decoders ignore.
            kind, mode = (picture.format or "").replace("MPO", "JPEG"), picture.mode
            if kind == "JPEG":
                picture.draft(None, (1, 1))
            if (kind == "JPEG" and mode in ("L", "RGB")) or (kind == "PNG" and not jpeg_only):
                picture.load()
                return data, ""
        buffer = io.BytesIO()
        pixels = decode_image(data, "")
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(
            buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0
        )
        return buffer.getvalue(), f"{mode} {kind}"
    except Image.UnidentifiedImageError:
        raise InputError("not an image") from None
    except DAMAGED as error:
        reason = error.__cause__ if isinstance(error, InputError) else error
        raise InputError(" ".join(str(reason).split()) or type(reason).__name__) from error


def _check_space(folder: Path, jobs: Sequence[_Job]) -> None:
    needed, free = sum(job.bytes_missing() for job in jobs), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder} has {free / 1e9:,.1f} GB free, but needs about {needed / 1e9:,.1f} GB more: "
            "free disk space, or use another --out"
        )


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}): free disk space, then rerun the same command to resume"
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
