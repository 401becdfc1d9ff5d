"""Datasets of TensorFlow Datasets (TFDS) in ArrayRecord files, read and written without TensorFlow.

tensorflow_datasets is imported in functions: it takes a second, and most users never need it. It imports no TensorFlow.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mlp_jax.data.image import Encoded, decode_image
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import user_path

_INFO_FILE = "dataset_info.json"


def find_version(name: str, data_dir: Path | None) -> Path:
    """The folder of a prepared dataset that holds `dataset_info.json`.

    Args:
      name: "name", "name/config", each optionally followed by ":version" (default: the newest).
      data_dir: TFDS's data folder, the dataset's folder in it, or the version's folder; None: $TFDS_DATA_DIR or
        ~/tensorflow_datasets.

    Raises:
      InputError: it is missing; the message names the folder.
    """
    path, _, version = name.partition(":")
    root = data_dir or user_path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    if data_dir is not None and (root / _INFO_FILE).is_file():
        return root
    for folder in (root / path, root) if data_dir is not None else (root / path,):
        # Datasets with configs have one more level. The default config is not recorded, so the name must hold it.
        found = [info.parent for info in folder.glob(f"*/{_INFO_FILE}") if re.fullmatch(r"[\d.]+", info.parent.name)]
        found = [entry for entry in found if version in ("", entry.name)]
        if found:
            return max(found, key=lambda entry: [int(part or 0) for part in entry.name.split(".")])
    raise InputError(
        f'no prepared TFDS dataset "{name}" in {root}: prepare it with file_format="array_record" or set data_dir to '
        "its folder"
    )


class TfdsSource:
    """One split of a prepared dataset, decoded on access.

    Args:
      folder: the version's folder, see `find_version`.
      split: "train" or "test"; "validation" replaces a test split that is missing or has no labels.

    Raises:
      InputError: there is no such split, no `image` or `label`, or no random access.
    """

    def __init__(self, folder: Path, split: str):
        import tensorflow_datasets as tfds
        from google.protobuf.json_format import ParseError

        self._arguments = (folder, split)
        self._where = f"{folder} ({split})"
        try:
            builder = tfds.builder_from_directory(folder)
        except (OSError, ValueError, ParseError) as error:
            raise InputError(f"cannot open the TFDS dataset in {folder} ({error}): prepare it again") from error
        features = builder.info.features
        is_dict = isinstance(features, tfds.features.FeaturesDict)
        label: Any = features["label"] if is_dict and "label" in features else None
        if not (is_dict and "image" in features and isinstance(label, tfds.features.ClassLabel)):
            raise InputError(
                f"the TFDS dataset in {folder} has no image and class label: use an image-classification dataset"
            )
        self.class_names: tuple[str, ...] = tuple(label.names)
        # Images are decoded by `decode_image`, as in every other source.
        encoded = isinstance(features["image"], tfds.features.Image)
        decoders: Any = {"image": tfds.decode.SkipDecoding()} if encoded else None
        as_data_source: Any = builder.as_data_source  # TFDS's decorator hides its parameters from type checkers

        names = [split, "validation"] if split == "test" else [split]
        names = [name for name in names if name in builder.info.splits]
        if not names:
            raise InputError(
                f'the TFDS dataset in {folder} has no split "{split}", only {", ".join(builder.info.splits)}: '
                "use another dataset"
            )
        try:
            self._records = as_data_source(split=names[0], decoders=decoders)
            # The test splits of competitions, e.g. ImageNet's, label every image -1.
            if len(names) == 2 and self._records[0]["label"] < 0:
                names = names[1:]
                self._records = as_data_source(split=names[0], decoders=decoders)
        except NotImplementedError as error:
            raise InputError(
                f'the TFDS dataset in {folder} has no random access: prepare it with file_format="array_record"'
            ) from error
        except RuntimeError as error:  # the only error that array_record raises
            raise InputError(f"cannot read the TFDS dataset in {folder} ({error}): prepare it again") from error
        self._files = builder.info.splits[names[0]].filepaths

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> dict:
        record = self.encoded(index)
        image = record["image"]
        return {**record, "image": decode_image(*image) if isinstance(image, Encoded) else image}

    def encoded(self, index: int, /) -> dict:
        """{"image": Encoded, or uint8 [H, W, C] if images are stored as arrays, "label": np.int32}."""
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise InputError(f"cannot read {index} of {self._where} ({error}): prepare it again") from error
        image = record["image"]
        if isinstance(image, bytes):
            image = Encoded(image, f"{index} of {self._where}")
        label = np.int32(record["label"])
        if not 0 <= label < len(self.class_names):
            raise InputError(
                f"{index} of {self._where} has label {label}, but there are only {len(self.class_names)} "
                "classes, from 0: prepare it again"
            )
        return {"image": image, "label": label}

    def fingerprint(self) -> str:
        """A digest of the record files' names and sizes."""
        sizes = "".join(f"{file.name} {file.stat().length}\0" for file in self._files)
        return hashlib.blake2b(sizes.encode(), digest_size=16).hexdigest()

    def __reduce__(self):
        return TfdsSource, self._arguments  # open files cannot be pickled; workers open their own


def _features(class_names: Sequence[str], jpeg_only: bool) -> Any:
    import tensorflow_datasets as tfds

    # As in TFDS's imagenet2012.
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg" if jpeg_only else None),
            "label": tfds.features.ClassLabel(names=list(class_names)),
            "file_name": tfds.features.Text(),
        }
    )


def serializer(class_names: Sequence[str], jpeg_only: bool) -> Callable[[bytes, int, str], bytes]:
    """A function that encodes an image as a record.

    Args:
      class_names: one for each label.
      jpeg_only: all images are JPEGs.

    Returns:
      function of the encoded image, its label and its file name; it returns the record's bytes, deterministically.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = _features(class_names, jpeg_only)
    serializer = ExampleSerializer(features.get_serialized_info())

    def serialize(image: bytes, label: int, name: str) -> bytes:
        example = {"image": image, "label": label, "file_name": os.fsencode(name)}
        # By default the order of a protobuf map differs between processes.
        return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)

    return serialize


def write_info(
    folder: Path, name: str, reports: Sequence[Mapping[str, Any]], jpeg_only: bool, temporary_in: Path
) -> None:
    """Write TFDS's metadata; dataset_info.json, which makes the dataset visible to readers, comes last.

    Args:
      folder: of the dataset's version, e.g. DIR/imagenet2012/5.1.0; holds the shards.
      name: of the dataset.
      reports: for each split "split", "shard_lengths", "bytes", and "classes" with its keys in the order of the labels.
      jpeg_only: all images are JPEGs.
      temporary_in: folder on the same disk for temporary files.
    """
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core.dataset_info import DatasetIdentity
    from tensorflow_datasets.core.splits import SplitDict

    version = tfds.core.Version(folder.name)
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(name=name, version=version, data_dir=str(folder), module_name=""),
        description=f"{name}, prepared by spiking-mlp-jax",
        features=_features(list(reports[0]["classes"]), jpeg_only),
        supervised_keys=("image", "label"),
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(epath.Path(folder), dataset_name=name, filetype_suffix="array_record")
    info.set_splits(
        SplitDict(
            [
                tfds.core.SplitInfo(
                    name=report["split"],
                    shard_lengths=report["shard_lengths"],
                    num_bytes=report["bytes"],
                    filename_template=template.replace(split=report["split"]),
                )
                for report in reports
            ]
        )
    )
    with tempfile.TemporaryDirectory(suffix=".partial", dir=temporary_in) as temporary:
        info.write_to_directory(temporary)
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == "dataset_info.json"):
            path.replace(folder / path.name)
