"""Sets that TFDS prepared, read without TensorFlow, and what is said to bad ones."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.errors import InputError
from tests.support.small_sources import encoded, write_idx

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A data folder with the set tiny_shapes, versions 1.0.0 and 1.2.0, prepared without TensorFlow."""
    import tensorflow_datasets as tfds

    class TinyShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["round", "square"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(10, 0),
                "validation": self._generate_examples(4, 100),
                "test": self._generate_examples(6, 0, labelled=self.version == "1.2.0"),
            }

        def _generate_examples(self, count, shade, labelled=True):
            for i in range(count):
                picture = encoded(np.full((8, 9, 3), shade + i, np.uint8))
                yield i, {"image": io.BytesIO(picture), "label": i % 2 if labelled else -1}

    folder = tmp_path_factory.mktemp("tfds")
    for version in ("1.2.0", "1.0.0"):
        TinyShapes.VERSION = tfds.core.Version(version)
        TinyShapes(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize("place", ["", "tiny_shapes", "tiny_shapes/1.2.0"])
def test_tfds(tfds_dir, place):
    source = open_source("tfds:tiny_shapes", "train", tfds_dir / place)
    assert len(source) == 10
    assert source.class_names == ("round", "square")
    for opened in (source, pickle.loads(pickle.dumps(source))):
        items = [opened[i] for i in range(10)]
        assert {int(item["image"][0, 0, 0]) for item in items} == set(range(10))
        assert all(item["label"] == item["image"][0, 0, 0] % 2 for item in items)
        assert items[0]["image"].shape == (8, 9, 3)
        assert items[0]["image"].dtype == np.uint8
        assert items[0]["label"].dtype == np.int32


def test_tfds_test_split_without_labels_is_replaced_by_validation(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    assert len(open_source("tfds:tiny_shapes", "test")) == 6
    assert len(open_source("tfds:tiny_shapes:1.0.0", "test")) == 4


@pytest.mark.parametrize("label", [-1, 2])
def test_tfds_label_without_a_name(tfds_dir, label):
    source: Any = open_source("tfds:tiny_shapes", "train", tfds_dir)
    source._records = [{"image": encoded(np.zeros((4, 4, 3), np.uint8)), "label": label}]
    with pytest.raises(InputError, match=rf"0 of .* has label {label}, but there are only 2 classes"):
        source[0]


def test_fashion_mnist_uses_a_tfds_copy(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir / "tiny_shapes" / "1.2.0", tmp_path / "fashion_mnist" / "3.0.1")
    for place in ("", "fashion_mnist", "fashion_mnist/3.0.1"):
        assert len(open_source("fashion_mnist", "train", tmp_path / place)) == 10


def test_fashion_mnist_with_an_empty_data_dir(tmp_path):
    with pytest.raises(InputError, match=r"neither the IDX files of Fashion-MNIST .* nor a prepared TFDS copy"):
        open_source("fashion_mnist", "train", tmp_path)


@pytest.mark.parametrize("missing", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
def test_fashion_mnist_names_the_missing_idx_file(tmp_path, missing):
    write_idx(tmp_path)
    (tmp_path / f"{missing}-ubyte").unlink()
    with pytest.raises(InputError, match=f"has no {missing}-ubyte"):
        open_source("fashion_mnist", "train" if missing.startswith("train") else "test", tmp_path)


def damaged(path):
    path.write_bytes(b"{not a record" * 20)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("dataset_info.json", "cannot open the TFDS dataset in"),
        ("features.json", "cannot open the TFDS dataset in"),
        ("tiny_shapes-train.array_record-00000-of-00001", "cannot read 0 of .*1.2.0 \\(train\\)"),
        ("tiny_shapes-test.array_record-00000-of-00001", "cannot read the TFDS dataset in"),
    ],
)
def test_tfds_damage_names_the_folder(tfds_dir, tmp_path, file, message):
    folder = tmp_path / "1.2.0"
    shutil.copytree(tfds_dir / "tiny_shapes" / "1.2.0", folder)
    damaged(folder / file)
    with pytest.raises(InputError, match=message):
        open_source("tfds:tiny_shapes", "test" if "test" in file else "train", folder)[0]


def test_tfds_stored_without_random_access(tfds_dir, tmp_path):
    folder = tmp_path / "1.2.0"
    shutil.copytree(tfds_dir / "tiny_shapes" / "1.2.0", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="no random access: prepare it with file_format"):
        open_source("tfds:tiny_shapes", "train", folder)


def test_tfds_with_other_features(tfds_dir, tmp_path):
    folder = tmp_path / "1.2.0"
    shutil.copytree(tfds_dir / "tiny_shapes" / "1.2.0", folder)
    features = folder / "features.json"
    features.write_text(features.read_text().replace('"label"', '"caption"'))
    with pytest.raises(InputError, match="has no image and class label"):
        open_source("tfds:tiny_shapes", "train", folder)


def test_tfds_missing_split(tfds_dir, tmp_path):
    folder = tmp_path / "1.2.0"
    shutil.copytree(tfds_dir / "tiny_shapes" / "1.2.0", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"name": "train"', '"name": "unlabelled"'))
    with pytest.raises(InputError, match=r'has no split "train", only .*unlabelled'):
        open_source("tfds:tiny_shapes", "train", folder)


def test_tfds_never_imports_tensorflow(tfds_dir, tmp_path):
    # A TensorFlow that cannot be imported unnoticed stands first on the path.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").touch()
    program = (
        "import sys; from spiking_mlp_jax.data.sources import open_source; "
        "assert 'tensorflow_datasets' not in sys.modules; "
        f"print(open_source('tfds:tiny_shapes', 'train', {str(tfds_dir)!r})[0]['image'].shape); "
        "assert 'tensorflow' not in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(8, 9, 3)"
