"""Sources: embedded Fashion-MNIST, IDX files, image folders, TFDS sets, and what each says to bad input."""

import gzip
import importlib.util
import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax.data.idx import read_idx
from spiking_mlp_jax.data.image import decode_image, read_image
from spiking_mlp_jax.data.sources import FASHION_MNIST_CLASSES, FASHION_MNIST_FILE, open_source
from spiking_mlp_jax.errors import InputError

ROOT = Path(__file__).parent.parent
DEBIAN_FILES = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder, images=6, classes=3, size=5, suffix=""):
    """The four standard files, with image i filled with the value i and labelled i % classes."""
    pack = gzip.compress if suffix else bytes
    for prefix, count in (("train", images), ("t10k", images // 2)):
        pixels = np.broadcast_to(np.arange(count)[:, None, None], (count, size, size + 1))
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(pixels)))
        labels = np.arange(count) % classes
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))


def encoded(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root, splits=("train", "val"), classes=("cat", "ant", "bee"), count=2):
    for split in splits:
        for shade, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = np.full((4, 6, 3), 10 * shade + i, np.uint8)
                (root / split / name / f"{i}.png").write_bytes(encoded(picture))


# --- what every source is asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fashion_mnist", "val"), 'Split "val"'),
        (("cifar10", "train"), 'Data set "cifar10" is unknown: the known ones are fashion_mnist'),
        (("fashion_mnst", "train"), 'did you mean "fashion_mnist"'),
        (("tfds", "train"), 'did you mean "tfds:<name>"'),
        (("idx", "train"), "needs data_dir"),
        (("folder", "train", ""), "needs data_dir"),
        (("idx", "train", "no/such/place"), "no/such/place is not a folder"),
    ],
)
def test_impossible_requests(arguments, message):
    with pytest.raises(InputError, match=message):
        open_source(*arguments)


# --- embedded Fashion-MNIST


@pytest.mark.parametrize(("split", "count"), [("train", 20_000), ("test", 10_000)])
def test_embedded(split, count):
    source = open_source("fashion_mnist", split)
    assert len(source) == count
    assert source.class_names == FASHION_MNIST_CLASSES
    item = source[count - 1]
    assert item["image"].shape == (28, 28, 1)
    assert item["image"].dtype == np.uint8
    assert item["label"].dtype == np.int32
    labels = [int(source[i]["label"]) for i in range(count)]
    np.testing.assert_array_equal(np.bincount(labels), count // 10)

    sent = pickle.dumps(source)
    assert len(sent) < 1_000, "a worker reads the file itself"
    np.testing.assert_array_equal(pickle.loads(sent)[7]["image"], source[7]["image"])


def test_embedded_file_is_small_and_licensed():
    assert FASHION_MNIST_FILE.stat().st_size <= 15e6
    notice = (FASHION_MNIST_FILE.parent / "LICENSE").read_text()
    assert "MIT License" in notice
    assert "Zalando" in notice


@pytest.fixture(scope="module")
def embed():
    spec = importlib.util.spec_from_file_location("embed", ROOT / "scripts" / "embed_fashion_mnist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_embedding_takes_the_first_of_each_class_in_order(embed):
    labels = np.array([1, 1, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(embed.select(labels, 2), [0, 1, 2, 4])


def test_embedding_is_reproducible_and_checked(embed, tmp_path, monkeypatch, capsys):
    write_idx(tmp_path, images=40, classes=10)
    out = tmp_path / "out.npz"

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["embed", "--idx", str(tmp_path), "--out", str(out), *flags])
        return embed.main(), capsys.readouterr()

    status, printed = run()
    assert status == 2
    assert "too few training images" in printed.err

    monkeypatch.setattr(embed, "PER_CLASS", 3)
    assert run()[0] == 0
    first = out.read_bytes()
    assert run()[0] == 0
    assert out.read_bytes() == first
    assert not list(tmp_path.glob("*.partial"))
    with np.load(out, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["train_labels"], np.arange(30) % 10)
        np.testing.assert_array_equal(arrays["train_images"][:, 0, 0], np.arange(30))
        assert arrays["test_images"].shape == (20, 5, 6)
        arrays = dict(arrays)
    assert "identical" in run("--check")[1].out

    np.savez_compressed(out, **arrays)
    status, printed = run("--check")
    assert status == 0
    assert "same arrays" in printed.out

    arrays["test_images"][0, 0, 0] ^= 1
    np.savez_compressed(out, **arrays)
    status, printed = run("--check")
    assert status == 1
    assert "different: test_images" in printed.out


@pytest.mark.skipif(not DEBIAN_FILES.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_embedded_file_is_what_the_script_makes(embed):
    assert embed.check(embed.build(DEBIAN_FILES), FASHION_MNIST_FILE) in ("identical", "same arrays")


# --- IDX files


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    write_idx(tmp_path, suffix=suffix)
    train, test = open_source("idx", "train", tmp_path), open_source("idx", "test", tmp_path)
    assert (len(train), len(test)) == (6, 3)
    assert train.class_names == test.class_names == ("0", "1", "2")
    item = pickle.loads(pickle.dumps(train))[5]
    assert item["image"].shape == (5, 6, 1)
    assert item["image"].max() == 5
    assert item["label"] == 2
    assert item["label"].dtype == np.int32


def test_fashion_mnist_uses_full_idx_files(tmp_path):
    write_idx(tmp_path, images=8)
    source = open_source("fashion_mnist", "train", tmp_path)
    assert len(source) == 8
    assert source.class_names == FASHION_MNIST_CLASSES


def test_fashion_mnist_with_foreign_labels(tmp_path):
    write_idx(tmp_path, images=24, classes=12)
    with pytest.raises(InputError, match=r"labels in .* go up to 11, but there are only 10"):
        open_source("fashion_mnist", "train", tmp_path)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (IMAGES, lambda b: b"\x89PNG" + b[4:], f"{IMAGES} is not an IDX file .* 0x89504e47"),
        (LABELS, lambda b: idx_bytes(np.zeros((6, 1, 1))), f"{LABELS} is not an IDX file with 1 dim"),
        (IMAGES, lambda b: b"", f"{IMAGES} is not an IDX file"),
        (IMAGES, lambda b: b[:9], f"{IMAGES} announces"),
        (IMAGES, lambda b: b[:-1], f"{IMAGES} announces 180 bytes of data but holds 179"),
        (LABELS, lambda b: b + b"\0", f"{LABELS} announces 6 bytes of data but holds 7"),
        (IMAGES, lambda b: idx_bytes(np.zeros((0, 5, 6))), f"{IMAGES} is empty"),
        (LABELS, lambda b: idx_bytes(np.zeros(5)), f"{IMAGES} holds 6 images but .*{LABELS} holds 5"),
        (LABELS, None, f"has no {LABELS}"),
        ("t10k-labels-idx1-ubyte", None, "has no t10k-labels-idx1-ubyte"),
    ],
)
def test_idx_damage_names_the_file(tmp_path, name, change, message):
    write_idx(tmp_path)
    if change is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(InputError, match=message):
        open_source("idx", "train", tmp_path)


@pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b[:30] + b"\xff" * 9 + b[39:], lambda b: b"plain"])
def test_idx_damaged_gzip_names_the_file(tmp_path, change):
    write_idx(tmp_path, suffix=".gz")
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=f"Cannot read IDX file .*{IMAGES}.gz"):
        open_source("idx", "train", tmp_path)


@given(
    st.one_of(
        st.binary(max_size=64),
        st.binary(max_size=64).map(lambda tail: bytes((0, 0, 8, 3)) + tail),
    )
)
@example(bytes((0, 0, 8, 3)) + b"\xff" * 12)
@settings(max_examples=100, deadline=None)
def test_idx_any_bytes(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some-idx3-ubyte"
        path.write_bytes(data)
        try:
            array = read_idx(path, 3)
        except InputError as error:
            assert "some-idx3-ubyte" in str(error)
        else:
            assert idx_bytes(array) == data


# --- pictures


def test_decode_modes():
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12
    colour = np.stack([grey, grey[::-1], 255 - grey], axis=-1)
    alpha = np.full((4, 5, 1), 255, np.uint8)
    alpha[0] = 0

    np.testing.assert_array_equal(decode_image(encoded(grey), "x"), grey[..., None])
    np.testing.assert_array_equal(decode_image(encoded(colour), "x"), colour)
    black = colour.copy()
    black[0] = 0
    transparent = np.concatenate([colour, alpha], axis=-1)
    np.testing.assert_array_equal(decode_image(encoded(transparent), "x"), black)
    grey_alpha = np.concatenate([grey[..., None], alpha], axis=-1)
    assert decode_image(encoded(grey_alpha), "x").shape == (4, 5, 1)
    np.testing.assert_array_equal(decode_image(encoded(grey_alpha), "x")[0], 0)
    sixteen = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_image(encoded(sixteen), "x"), grey[..., None])
    np.testing.assert_array_equal(decode_image(encoded(grey > 100), "x"), 255 * (grey > 100)[..., None])


@pytest.mark.parametrize(
    ("mode", "kind", "transparent"),
    [
        ("P", "PNG", False),
        ("P", "PNG", True),
        ("P", "GIF", False),
        ("CMYK", "JPEG", False),
        ("RGB", "JPEG", False),
    ],
)
def test_decode_to_rgb(mode, kind, transparent):
    picture = Image.new("RGB", (6, 4), (200, 100, 0)).convert(mode)
    options = {"transparency": picture.getpixel((0, 0))} if transparent else {}
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    image = decode_image(buffer.getvalue(), "x")
    assert image.shape == (4, 6, 3)
    np.testing.assert_allclose(image[1, 1].astype(int), (0, 0, 0) if transparent else (200, 100, 0), atol=30)


def test_decode_applies_the_camera_rotation():
    wide = np.zeros((2, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(wide, exif=exif), "x").shape == (6, 2, 3)


@given(st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns about odd metadata, then reads or refuses
def test_decode_any_damage(data):
    kind, options = data.draw(st.sampled_from([("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True})]))
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    content = bytearray(encoded(picture, kind, **options))
    del content[data.draw(st.integers(0, len(content))) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), "the picture")
    except InputError as error:
        assert "the picture" in str(error)
    else:
        assert image.dtype == np.uint8
        assert image.ndim == 3


def test_read_image_names_the_path(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png"):
        read_image(tmp_path / "nowhere.png")
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"Cannot decode image .*notes.png"):
        read_image(str(tmp_path / "notes.png"))


# --- image folders


def test_folder(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "bee" / "0.png").rename(tmp_path / "train" / "bee" / "0.JPEG")
    (tmp_path / "train" / "bee" / "notes.txt").touch()
    (tmp_path / "train" / "bee" / "._0.png").touch()
    (tmp_path / "train" / ".hidden").mkdir()
    source = open_source("folder", "train", tmp_path)
    assert source.class_names == ("ant", "bee", "cat")
    assert len(source) == 6
    items = [pickle.loads(pickle.dumps(source))[i] for i in range(6)]
    assert [int(item["label"]) for item in items] == [0, 0, 1, 1, 2, 2]
    assert [int(item["image"][0, 0, 0]) for item in items] == [10, 11, 20, 21, 0, 1]
    assert items[0]["image"].shape == (4, 6, 3)
    assert items[0]["label"].dtype == np.int32
    assert len(open_source("folder", "test", tmp_path)) == 6, "val stands in for test"


def test_folder_prefers_test_to_val(tmp_path):
    write_folder(tmp_path, splits=("val",), count=1)
    write_folder(tmp_path, splits=("test",), count=3)
    assert len(open_source("folder", "test", tmp_path)) == 9


def break_missing(root):
    shutil.rmtree(root / "train")


def break_no_classes(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def break_empty_class(root):
    for name in ("0.png", "1.png"):
        (root / "train" / "bee" / name).unlink()


def break_disagreement(root):
    shutil.rmtree(root / "val" / "bee")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (break_missing, "has no folder train"),
        (break_no_classes, "train has no class folders"),
        (break_empty_class, r"Class folder .*bee has no .jpg"),
        (break_disagreement, r'train and .*val have different classes \("bee"'),
    ],
)
def test_folder_mistakes(tmp_path, break_it, message):
    write_folder(tmp_path)
    break_it(tmp_path)
    with pytest.raises(InputError, match=message):
        open_source("folder", "train", tmp_path)


def test_folder_unreadable_image_names_the_path(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "train" / "ant" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"ant/1.png"):
        open_source("folder", "train", tmp_path)[1]


def test_folder_without_test_and_val(tmp_path):
    write_folder(tmp_path, splits=("train",))
    with pytest.raises(InputError, match="has no folder test"):
        open_source("folder", "test", tmp_path)


# --- TFDS sets


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
    with pytest.raises(InputError, match=rf"0 of .* has label {label}, but the set names 2 classes"):
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
        ("dataset_info.json", "Cannot open the TFDS set in"),
        ("features.json", "Cannot open the TFDS set in"),
        ("tiny_shapes-train.array_record-00000-of-00001", "Cannot read 0 of .*1.2.0 \\(train\\)"),
        ("tiny_shapes-test.array_record-00000-of-00001", "Cannot read the TFDS set in"),
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
