"""Sources: embedded Fashion-MNIST, IDX files, image folders, and what each says to bad input."""

import importlib.util
import json
import os
import pickle
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.idx import read_idx
from spiking_mlp_jax.data.image import DamagedImageError
from spiking_mlp_jax.data.sources import (
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_FILE,
    array_sources,
    differences,
    identity,
    open_source,
    spread,
)
from spiking_mlp_jax.errors import InputError
from tests.support.small_sources import encoded, idx_bytes, write_folder, write_idx

ROOT = Path(__file__).parents[2]
DEBIAN_FILES = Path("/usr/share/datasets/fashion-mnist")


# --- what every source is asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fashion_mnist", "val"), 'unknown split "val"'),
        (("cifar10", "train"), 'unknown dataset "cifar10": the known ones are fashion_mnist'),
        (("fashion_mnst", "train"), 'did you mean "fashion_mnist"'),
        (("tfds", "train"), 'did you mean "tfds:<name>"'),
        (("npz:", "train"), 'did you mean "npz:<file>"'),
        (("arrays", "train"), "arrays passed to fit"),
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
        (LABELS, lambda b: idx_bytes(np.zeros((6, 1, 1))), f"{LABELS} is not an IDX file of bytes with 1 dim"),
        (IMAGES, lambda b: b"", f"{IMAGES} is not an IDX file"),
        (IMAGES, lambda b: b[:9], f"{IMAGES} should hold"),
        (IMAGES, lambda b: b[:-1], f"{IMAGES} should hold 180 bytes of data, but holds 179"),
        (LABELS, lambda b: b + b"\0", f"{LABELS} should hold 6 bytes of data, but holds 7"),
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
    with pytest.raises(InputError, match=f"cannot read IDX file .*{IMAGES}.gz"):
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


def write_color_idx(folder, channels=3, name="idx4"):
    for prefix, count in (("train", 6), ("t10k", 3)):
        pixels = np.arange(count * 5 * 4 * channels).reshape(count, 5, 4, channels)
        (folder / f"{prefix}-images-{name}-ubyte").write_bytes(idx_bytes(pixels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count) % 3))


@pytest.mark.parametrize("name", ["idx4", "idx3"])
def test_idx_in_color(tmp_path, name):
    write_color_idx(tmp_path, name=name)
    image = open_source("idx", "test", tmp_path)[1]["image"]
    np.testing.assert_array_equal(image, np.arange(60, 120).reshape(5, 4, 3))


def test_idx_of_other_channels(tmp_path):
    write_color_idx(tmp_path, channels=2)
    with pytest.raises(InputError, match=r"train-images-idx4-ubyte holds images of shape \(5, 4, 2\)"):
        open_source("idx", "train", tmp_path)


# --- arrays, and .npz files of them


def arrays(**changed):
    rng = np.random.default_rng(0)
    found = {
        "train_images": rng.integers(256, size=(6, 5, 4, 3), dtype=np.uint8),
        "train_labels": np.arange(6) % 2,
        "test_images": rng.integers(256, size=(3, 5, 4), dtype=np.uint8),
        "test_labels": np.arange(3),
    } | changed
    return {name: array for name, array in found.items() if array is not None}


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_npz(tmp_path, monkeypatch, pack):
    pack(tmp_path / "own.npz", **arrays())
    train = open_source("npz:own.npz", "train", tmp_path)
    monkeypatch.chdir(tmp_path)
    test = pickle.loads(pickle.dumps(open_source("npz:own.npz", "test")))
    assert (len(train), len(test)) == (6, 3)
    assert train.class_names == test.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(train[4]["image"], arrays()["train_images"][4])
    np.testing.assert_array_equal(test[2]["image"][..., 0], arrays()["test_images"][2])
    assert (test[2]["label"], test[2]["label"].dtype) == (2, np.int32)
    pack(tmp_path / "own.npz", **arrays(class_names=["a", "b", "ç"]))
    assert open_source(f"npz:{tmp_path}/own.npz", "train").class_names == ("a", "b", "ç")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_images": None, "test_labels": None}, "has no test_images and no test_labels, it holds train_images"),
        ({"train_images": np.zeros((6, 5, 4, 3), np.float32)}, r"train_images in .*own.npz holds float32: convert"),
        ({"train_images": np.zeros((6, 3, 5, 5), np.uint8)}, r"channels come last, use images.transpose\(0, 2, 3, 1\)"),
        ({"train_images": np.zeros((6, 5), np.uint8)}, r"has shape \(6, 5\): use \[N, H, W\]"),
        ({"train_images": np.zeros((6, 5, 4, 2), np.uint8)}, "with 1, 3 or 4 channels"),
        ({"train_images": np.zeros((0, 5, 4), np.uint8)}, "train_images .* is empty"),
        ({"train_images": np.zeros((5, 5, 4), np.uint8)}, "holds 5 train_images but 6 train_labels"),
        ({"train_labels": np.eye(6)}, r"train_labels in .* has shape \(6, 6\): .* labels.argmax\(1\)"),
        ({"train_labels": np.ones((6, 1), int)}, r"has shape \(6, 1\): use one integer per image, \[N\]$"),
        ({"train_labels": np.zeros(6)}, "train_labels in .* holds float64: use integers"),
        ({"train_labels": np.arange(6) - 1}, "holds the label -1"),
        ({"test_labels": np.array([0, 1, 2**40])}, "holds the label 1099511627776"),
        ({"class_names": ["a", "b"]}, "labels in .* go up to 2, but there are only 2 class_names"),
        ({"class_names": ["a", "b", "a"]}, "class_names in .* must be different strings"),
        (
            {"class_names": np.array(["a", None, 1], object)},
            "class_names in .* cannot be read .*as strings",
        ),
        ({"class_names": 3}, "class_names in .* must be different strings"),
    ],
)
def test_npz_mistakes(tmp_path, changed, message):
    np.savez(tmp_path / "own.npz", **arrays(**changed))
    with pytest.raises(InputError, match=message):
        open_source("npz:own.npz", "train", tmp_path)


@pytest.mark.parametrize("damage", ["text", "cut", "flipped", "single", "pickle", "empty", "zip", "folder", "missing"])
def test_npz_damage_names_the_file(tmp_path, damage):
    file = tmp_path / "own.npz"
    np.savez_compressed(file, **arrays())
    content = file.read_bytes()
    file.write_bytes({"text": b"no archive", "cut": content[:-40], "empty": b""}.get(damage, content))
    if damage == "flipped":
        file.write_bytes(content[:80] + b"\xff" * 40 + content[120:])
    if damage == "single":
        with file.open("wb") as out:
            np.save(out, np.zeros(3))
    if damage == "pickle":
        file.write_bytes(pickle.dumps({"train_images": 1}))
    if damage == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for name in ("train_images", "train_labels", "test_images", "test_labels"):
                archive.writestr(name, "no array")
    if damage in ("folder", "missing"):
        file.unlink()
    if damage == "folder":
        file.mkdir()
    with pytest.raises(InputError, match=r"own\.npz"):
        open_source("npz:own.npz", "train", tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros(3), r"train_data must be a pair \(images, labels\), got ndarray"),
        ((np.zeros((2, 4, 4), np.uint8),), "must be a pair"),
        ((np.zeros((2, 4, 4)), [0, 1]), r"train_data\[0\] holds float64"),
        ((np.zeros((2, 4, 4), np.uint8), [0, 3]), "labels in train_data go up to 3, but num_classes is 3"),
        ((np.zeros((2, 4, 4), np.uint8), [0]), "holds 2 images but 1 labels"),
        (([np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)], [0, 1]), "arrays of one shape"),
    ],
)
def test_array_mistakes(data, message):
    with pytest.raises(InputError, match=message):
        array_sources(data, None, 3)


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


def test_the_identity_of_a_folder(tmp_path):
    def now():
        return identity({split: open_source("folder", split, tmp_path / "data") for split in ("train", "test")})

    write_folder(tmp_path / "data", count=2)
    before = now()
    assert before["class_names"] == ["ant", "bee", "cat"] and before["train"]["images"] == 6
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    assert identity({"train": open_source("folder", "train", tmp_path / "copy")})["train"] == before["train"]
    assert json.loads(json.dumps(before)) == before == now() and not differences(before, now())
    file = tmp_path / "data" / "train" / "bee" / "0.png"
    file.rename(file.with_name("9.png"))
    assert differences(before, now()) == ["the training images differ in names, sizes or contents"]
    file.with_name("9.png").rename(file)
    file.write_bytes(file.read_bytes() + b" ")
    assert differences(before, now()) == ["the training images differ in names, sizes or contents"]
    for split in ("train", "val"):
        (tmp_path / "data" / split / "ant").rename(tmp_path / "data" / split / "zebra")
    assert differences(before, now())[:3] == [
        'class 0 is "ant" there, "bee" now',
        'class 1 is "bee" there, "cat" now',
        'class 2 is "cat" there, "zebra" now',
    ]
    assert differences({}, now()) == []


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
        (break_empty_class, r"class folder .*bee has no .jpg"),
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


def test_a_limit_takes_evenly_spaced_images():
    source = open_source("fashion_mnist", "train")
    assert spread(source, None) is source and spread(source, 10**6) is source
    some = spread(source, 30)
    assert len(some) == 30
    labels = [int(some[i]["label"]) for i in range(30)]
    assert len(set(labels)) == 10
    assert (some.positions[0], some.positions[-1]) == (0, len(source) - 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([b"caf\xe9"], r"class name 'caf\\udce9' in .* is not printable UTF-8"),
        (["two\nlines"], r"class name 'two\\nlines' in .* is not printable UTF-8"),
        (["caf\u00e9", "cafe\u0301"], "class names .* look the same: merge or rename one"),
    ],
)
def test_class_names_are_readable_text(tmp_path, names, message):
    for name in [b"ant", *names]:
        folder = os.path.join(os.fsencode(tmp_path), b"train", os.fsencode(name))
        os.makedirs(folder)
        with open(os.path.join(folder, b"1.png"), "wb") as file:
            file.write(encoded(np.zeros((4, 4), np.uint8)))
    with pytest.raises(InputError, match=message):
        open_source("folder", "train", tmp_path)


def test_a_file_that_vanishes_counts_as_damaged(tmp_path):
    write_folder(tmp_path)
    source = open_source("folder", "train", tmp_path)
    os.unlink(source.path(0))
    with pytest.raises(DamagedImageError, match="No such file"):
        source[0]
    said = []
    damaged = Damaged(source, 0.5, said.append)
    damaged.sift({"damaged": np.array([0, -1])})
    assert len(said) == 1 and source.path(0) in said[0]
