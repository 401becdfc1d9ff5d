"""Writes pictures as ArrayRecord files that TensorFlow Datasets reads, so that it can be killed at any moment.

    DIR/NAME/VERSION/dataset_info.json, features.json, ...       written last; they make the set visible to readers
                     NAME-train.array_record-00000-of-00258      shards, whole: named so once they are on the disk
                     preparation/train.json                      what the shards are made of
                     preparation/train-00000.json                what came of a shard
                     preparation/train.report.json               what came of all
                     preparation/*.partial                       being written

Pictures stay in the order in which they lie on the disk, class after class in ImageNet's: Grain shuffles all of them
in each epoch, which reads any order equally fast, whereas shuffled writing would read a tar of 138 GB in a million
jumps. What a shard holds depends on the pictures alone, so that an interrupted preparation ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spiking_mlp_jax.data.image import DAMAGED, decode_image
from spiking_mlp_jax.data.prepare.pictures import SPLITS, Pictures
from spiking_mlp_jax.data.prepare.tfds_files import serializer, write_info
from spiking_mlp_jax.errors import InputError

FORMAT = 1  # of the shards: another number starts anew
SHARD_BYTES = 512 * 2**20  # ImageNet in 258 + 12 files: far below the usual limit of 1024 open ones
# One record a group, so that a random read gets one picture; pictures are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_JPEG_QUALITY = 100  # as TFDS takes it for the same pictures
_WORK = "preparation"


def prepare(
    parts: Sequence[Pictures],
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
    """Writes the shards that are missing, then the files that make them a TFDS set.

    Every picture is decoded. What other decoders than Pillow do not read, CMYK and anything that is no JPEG, becomes
    a JPEG in RGB of quality 100 without chroma subsampling; the others are stored byte for byte.

    Args:
      parts: the splits.
      out: TFDS's data folder, made if missing.
      name: of the set, such as "imagenet2012".
      version: of the set, such as "5.1.0".
      jpeg_only: whether PNG files become JPEGs, too.
      shard_bytes: about how large a shard is.
      skip_broken: whether pictures that cannot be decoded are left out.
      workers: threads; each works on a shard. Pillow and the writer let them run side by side.
      progress: told the split, how many of its images are done and of how many; from any thread.
      stopping: asked after each image.

    Returns:
      A report of each split: "split", "images", "shard_lengths", "bytes", "classes" (images of each), "converted"
      (what each re-encoded picture was), "skipped" (what was wrong with each); None if it was stopped.

    Raises:
      InputError: the folder holds other shards or is being written to, the disk is too small or full, or
        pictures are broken: all of them are named in a file.
    """
    folder = out / name / version
    work = folder / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make the folder {work} ({error.strerror}): give another --out.") from error
    with _lock(work), warnings.catch_warnings():
        # Pillow warns of odd metadata, which the set is full of and which harms nothing.
        warnings.simplefilter("ignore")
        for leftover in work.glob("*.partial"):
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
        jobs = [_Job(part, folder, name, jpeg_only, shard_bytes) for part in parts]
        _check_space(folder, jobs)
        serialize = serializer(jobs[0].pictures.class_names, jpeg_only)
        reports = []
        for job in jobs:
            if not job.run(serialize, skip_broken, workers, progress, stopping):
                return None
            reports.append(job.report())
            _write_json(work / f"{job.split}.report.json", reports[-1])
            (work / f"{job.split}.broken.json").unlink(missing_ok=True)
        # Those of splits that were prepared before, too.
        known = [report for path in sorted(work.glob("*.report.json")) if (report := _read_json(path)) is not None]
        write_info(folder, name, known, jpeg_only, work)
    return reports


@dataclasses.dataclass
class _Job:
    """One split: which picture belongs to which shard, and which shards are there."""

    pictures: Pictures
    folder: Path
    name: str
    jpeg_only: bool
    shard_bytes: int

    def __post_init__(self):
        self.split, self.work = self.pictures.split, self.folder / _WORK
        sizes = self.pictures.sizes
        total = int(sizes.sum())
        count = max(1, -(-total // self.shard_bytes))
        # A shard starts with the first picture behind its share of the bytes; large pictures leave no shard empty.
        starts = np.searchsorted(np.cumsum(sizes) - sizes, np.arange(count) * total // count)
        self.edges = [*sorted(set(starts.tolist()) - {len(sizes)}), len(sizes)]
        self.shards = len(self.edges) - 1
        self._compare()

    def _compare(self) -> None:
        plan = {
            "format": FORMAT,
            "images": len(self.pictures),
            "bytes": int(self.pictures.sizes.sum()),
            "shards": self.shards,
            "jpeg_only": self.jpeg_only,
            "digest": self.pictures.digest(),
            "class_names": list(self.pictures.class_names),
        }
        for path in self.work.glob("*.json"):
            other = path.name.removesuffix(".json")
            if other not in SPLITS.values() or not any(self.folder.glob(f"{self.name}-{other}.array_record-*")):
                continue  # no plan, or one that was not begun
            before = _read_json(path) or {}
            same = plan if other == self.split else {"class_names", "jpeg_only"}
            if differing := [key for key in same if before.get(key) != plan[key]]:
                what = ", ".join(
                    key if isinstance(plan[key], list | str) else f"{key} {before.get(key)} instead of {plan[key]}"
                    for key in differing
                )
                raise InputError(
                    f"{self.folder} holds the {other} images of something else than {self.pictures.source} and these "
                    f"options ({what}): give another --out, or delete that folder."
                )
        _write_json(self.work / f"{self.split}.json", plan)

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.name}-{self.split}.array_record-{number:05}-of-{self.shards:05}"

    def _result_file(self, number: int) -> Path:
        return self.work / f"{self.split}-{number:05}.json"

    def result(self, number: int) -> dict[str, Any] | None:
        """What came of a shard; None if it is not there, or not the file it was."""
        result, shard = _read_json(self._result_file(number)), self.shard(number)
        if result is None or not shard.is_file() or shard.stat().st_size != result["bytes"]:
            return None
        return result

    def missing(self) -> list[int]:
        return [number for number in range(self.shards) if self.result(number) is None]

    def bytes_missing(self) -> int:
        """About how many bytes there are to write; records are a little larger and files end on 64 KiB."""
        sizes = self.pictures.sizes
        return sum(int(sizes[self.edges[n] : self.edges[n + 1]].sum() * 1.005) + 2**18 for n in self.missing())

    def run(self, serialize, skip_broken, workers, progress, stopping) -> bool:
        """Writes the missing shards; whether it came to the end."""
        missing = self.missing()
        done = len(self.pictures) - sum(self.edges[n + 1] - self.edges[n] for n in missing)
        progress(self.split, done, len(self.pictures))
        count, halt, lock = done, threading.Event(), threading.Lock()
        broken: dict[str, str] = {}

        def advance():
            nonlocal count
            with lock:
                count += 1
                progress(self.split, count, len(self.pictures))

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
                # Ctrl-C too: leaving the block waits for the threads, which would go on with their shards.
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
                f"{len(broken)} of the images in {self.pictures.source} cannot be decoded ({first}; all are named in "
                f"{listing}): repair or download them again, or add --skip-broken to leave them out."
            )
        return True

    def _write(self, number, serialize, skip_broken, advance, stopping) -> dict[str, str]:
        """Writes a shard under another name, makes sure of it and renames it; the broken pictures in it."""
        from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

        pictures, start, stop = self.pictures, self.edges[number], self.edges[number + 1]
        partial = self.work / f"{self.shard(number).name}.partial"
        converted, skipped, images = {}, {}, 0
        try:
            writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
            try:
                for name, label, data in zip(
                    pictures.names[start:stop],
                    pictures.labels[start:stop].tolist(),
                    pictures.read(start, stop),
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
                    f"None of the {len(skipped)} images from {pictures.names[start]} on can be decoded: "
                    f"repair {pictures.source} first."
                )
            reader = ArrayRecordReader(str(partial))
            written = reader.num_records()
            reader.close()
            if written != images:
                raise InputError(f"{partial} holds {written} of {images} images after writing: check the disk.")
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
                size = file.seek(0, os.SEEK_END)
            result = {"images": images, "bytes": size, "converted": converted, "skipped": skipped}
            _write_json(self._result_file(number), result)
            partial.replace(self.shard(number))
            return skipped
        except (RuntimeError, OSError) as error:  # array_record knows RuntimeError only
            raise InputError(
                f"Cannot write {partial} ({error}): make sure of the disk and its free space; the same command goes on."
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def report(self) -> dict[str, Any]:
        """What came of all shards."""
        results = [self.result(number) for number in range(self.shards)]
        whole = [result for result in results if result is not None]
        if len(whole) < self.shards:
            raise InputError(f"Shards of {self.split} vanished from {self.folder}: start again to write them.")
        skipped = {name: reason for result in whole for name, reason in result["skipped"].items()}
        kept = [name not in skipped for name in self.pictures.names] if skipped else slice(None)
        counts = np.bincount(self.pictures.labels[kept], minlength=len(self.pictures.class_names)).tolist()
        return {
            "split": self.split,
            "images": sum(counts),
            "shard_lengths": [result["images"] for result in whole],
            "bytes": sum(result["bytes"] for result in whole),
            "classes": dict(zip(self.pictures.class_names, counts, strict=True)),
            "converted": {name: was for result in whole for name, was in result["converted"].items()},
            "skipped": skipped,
        }


def checked(data: bytes, jpeg_only: bool) -> tuple[bytes, str]:
    """Decodes a picture and says how to store it.

    A JPEG is decoded at an eighth of its size, which reads the whole file but computes few pixels.

    Args:
      data: the bytes of the file.
      jpeg_only: whether a PNG has to become a JPEG.

    Returns:
      The bytes to store, and what the picture was if they are new ones: "CMYK JPEG", "RGBA PNG", ..., otherwise "".

    Raises:
      InputError: the picture cannot be decoded; the message says why, without its name.
    """
    if not data:
        raise InputError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            # MPO is a JPEG with further pictures behind the first, which decoders ignore.
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
        raise InputError("no picture") from None
    except DAMAGED as error:
        reason = error.__cause__ if isinstance(error, InputError) else error
        raise InputError(" ".join(str(reason).split()) or type(reason).__name__) from error


def _check_space(folder: Path, jobs: Sequence[_Job]) -> None:
    needed, free = sum(job.bytes_missing() for job in jobs), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder} has {free / 1e9:,.1f} GB free, but about {needed / 1e9:,.1f} GB are still to be written: "
            "make room, or give another --out."
        )


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[None]:
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"Another process writes to {work.parent}: wait for it or stop it.") from error
        except OSError:
            pass  # a file system without locks
        yield


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"Cannot write {path} ({error.strerror}): make room; the same command goes on.") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
