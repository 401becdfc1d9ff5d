"""Image-classification sets prepared by TensorFlow Datasets, read without TensorFlow."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mlp_jax.data.image import Encoded, decode_image
from spiking_mlp_jax.errors import InputError

_INFO_FILE = "dataset_info.json"


def find_version(name: str, data_dir: Path | None) -> Path:
    """The folder of a prepared set, the one that holds `dataset_info.json`.

    Args:
      name: "name", "name/config", each optionally followed by ":version"; without one the newest is taken.
      data_dir: TFDS's data folder, the set's folder in it, or the version's folder itself; None is
        $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      InputError: nothing was found; the message names the place.
    """
    path, _, version = name.partition(":")
    root = data_dir or Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if data_dir is not None and (root / _INFO_FILE).is_file():
        return root
    for folder in (root / path, root) if data_dir is not None else (root / path,):
        # A set with configurations has one more level; which one is the default is not written there, so the
        # name must say it.
        found = [info.parent for info in folder.glob(f"*/{_INFO_FILE}") if re.fullmatch(r"[\d.]+", info.parent.name)]
        found = [entry for entry in found if version in ("", entry.name)]
        if found:
            return max(found, key=lambda entry: [int(part or 0) for part in entry.name.split(".")])
    raise InputError(
        f'No prepared TFDS set "{name}" in {root}: prepare it with file_format="array_record" or give its '
        "folder as data_dir."
    )


class TfdsSource:
    """One split of a prepared set; pictures are decoded here when asked for.

    Args:
      folder: the version's folder, see `find_version`.
      split: "train" or "test"; "validation" stands in for a test split that is missing or has no labels.

    Raises:
      InputError: the set has no such split, no `image` or `label`, or is not stored for random access.
    """

    def __init__(self, folder: Path, split: str):
        # Imported here because it takes a second and most users never need it.
        import tensorflow_datasets as tfds
        from google.protobuf.json_format import ParseError

        self._arguments = (folder, split)
        self._where = f"{folder} ({split})"
        try:
            builder = tfds.builder_from_directory(folder)
        except (OSError, ValueError, ParseError) as error:
            raise InputError(f"Cannot open the TFDS set in {folder} ({error}): prepare it again.") from error
        features = builder.info.features
        is_dict = isinstance(features, tfds.features.FeaturesDict)
        label: Any = features["label"] if is_dict and "label" in features else None
        if not (is_dict and "image" in features and isinstance(label, tfds.features.ClassLabel)):
            raise InputError(f"The TFDS set in {folder} has no image and class label: use an image-classification set.")
        self.class_names: tuple[str, ...] = tuple(label.names)
        # Encoded pictures are decoded by `decode_image`, like those of every other source.
        encoded = isinstance(features["image"], tfds.features.Image)
        decoders: Any = {"image": tfds.decode.SkipDecoding()} if encoded else None
        as_data_source: Any = builder.as_data_source  # TFDS's decorator hides its parameters from type checkers

        names = [split, "validation"] if split == "test" else [split]
        names = [name for name in names if name in builder.info.splits]
        if not names:
            raise InputError(
                f'The TFDS set in {folder} has no split "{split}", only {", ".join(builder.info.splits)}: '
                "use another set."
            )
        try:
            self._records = as_data_source(split=names[0], decoders=decoders)
            # A competition's test split (ImageNet's is one) labels every image -1.
            if len(names) == 2 and self._records[0]["label"] < 0:
                self._records = as_data_source(split=names[1], decoders=decoders)
        except NotImplementedError as error:
            raise InputError(
                f'The TFDS set in {folder} has no random access: prepare it with file_format="array_record".'
            ) from error
        except RuntimeError as error:  # array_record's only kind of error
            raise InputError(f"Cannot read the TFDS set in {folder} ({error}): prepare it again.") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> dict:
        record = self.encoded(index)
        image = record["image"]
        return {**record, "image": decode_image(*image) if isinstance(image, Encoded) else image}

    def encoded(self, index: int, /) -> dict:
        """{"image": Encoded, or uint8 [H, W, C] where pictures are stored so, "label": np.int32}."""
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise InputError(f"Cannot read {index} of {self._where} ({error}): prepare it again.") from error
        image = record["image"]
        if isinstance(image, bytes):
            image = Encoded(image, f"{index} of {self._where}")
        label = np.int32(record["label"])
        if not 0 <= label < len(self.class_names):
            raise InputError(
                f"{index} of {self._where} has label {label}, but the set names {len(self.class_names)} classes "
                "from 0: prepare it again."
            )
        return {"image": image, "label": label}

    def __reduce__(self):
        return TfdsSource, self._arguments  # open record files do not travel; a worker opens its own
