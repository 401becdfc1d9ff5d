"""What makes ArrayRecord files a TFDS set: records, and the descriptions beside them. TensorFlow is not imported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def _features(class_names: Sequence[str], jpeg_only: bool) -> Any:
    # Imported here because it takes a second and most users never need it. It does not import TensorFlow.
    import tensorflow_datasets as tfds

    # Those of TFDS's own imagenet2012.
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg" if jpeg_only else None),
            "label": tfds.features.ClassLabel(names=list(class_names)),
            "file_name": tfds.features.Text(),
        }
    )


def serializer(class_names: Sequence[str], jpeg_only: bool) -> Callable[[bytes, int, str], bytes]:
    """The function that makes a record of a picture.

    Args:
      class_names: one for each label.
      jpeg_only: whether all pictures are JPEGs.

    Returns:
      function of the encoded picture, its label and its file's name to the record's bytes, which depend on these alone.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = _features(class_names, jpeg_only)
    serializer = ExampleSerializer(features.get_serialized_info())

    def serialize(image: bytes, label: int, name: str) -> bytes:
        example = {"image": image, "label": label, "file_name": os.fsencode(name)}
        # A record is a protobuf map, whose order changes from process to process unless it is asked not to.
        return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)

    return serialize


def write_info(
    folder: Path, name: str, reports: Sequence[Mapping[str, Any]], jpeg_only: bool, temporary_in: Path
) -> None:
    """Writes the files by which TFDS knows a set: dataset_info.json, which readers look for first, comes last.

    Args:
      folder: of the set's version, such as DIR/imagenet2012/5.1.0; holds the shards.
      name: of the set.
      reports: of each split: "split", "shard_lengths", "bytes", and "classes" by name in the order of the labels.
      jpeg_only: whether all pictures are JPEGs.
      temporary_in: folder on the same disk where the files are written before they get their place.
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
