"""`spiking-mlp prepare`: what is written is what the archives hold, however often it was killed; bad input is named."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spiking_mlp_jax.data.image import decode_image
from spiking_mlp_jax.data.prepare import imagenet
from spiking_mlp_jax.data.prepare.listing import list_folder
from spiking_mlp_jax.data.prepare.records import checked, prepare
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.errors import InputError
from tests.support.archives import SYNSETS, TAIL, encoded, tar, train_files, train_tar, val_files
from tests.support.preparing import NAME, VERSION, command, listed, nothing, records, shards, write, write_archives

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared" / "data" / "imagenet_samples.tar"
# Of TFDS's list; the first picture is that of a sea snake.
VAL_LABELS = ("n01751748", "n09193705", "n02105855", "n04263257", "n03125729", "n01735189")


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return write_archives(tmp_path_factory.mktemp("archives"))


# --- ImageNet's archives


def test_imagenet_through_the_command_without_tensorflow(archives, tmp_path):
    # A TensorFlow that cannot be imported unnoticed stands first on the path.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").touch()
    out = tmp_path / "out"
    program = (
        "import sys, numpy as np; from spiking_mlp_jax.cli.main import main; status = main(sys.argv[2:]); "
        "import tensorflow_datasets as tfds; "
        f"source = tfds.builder_from_directory(sys.argv[1] + '/{NAME}/{VERSION}').as_data_source(); "
        "print(sorted(source), source['train'][1]['image'].shape, source['train'][3]['image'].shape); "
        "assert 'tensorflow' not in sys.modules; sys.exit(status)"
    )
    arguments = ["prepare", "imagenet", "--train", archives / "train.tar", "--val", archives / "val.tar", "--out", out]
    done = subprocess.run(
        [sys.executable, "-c", program, str(out), *map(str, arguments), "--partial"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "train: 16 images in 1 shard, 0.00 GB; 3 of 1,000 classes, 0 to 6 images each" in done.stdout
    assert "2 re-encoded as RGB or gray JPEG: 1 CMYK JPEG, 1 RGB PNG" in done.stdout
    assert "['train', 'validation'] (40, 48, 3) (40, 48, 3)" in done.stdout
    assert "train: 16 of 16 images" in done.stderr, "plain lines where there is no terminal"

    train, test = (open_source(f"tfds:{NAME}", split, out) for split in ("train", "test"))
    wanted = [(synset, data) for synset, files in train_files().items() for data in files.values()]
    assert len(train) == len(wanted)
    assert train.class_names == tuple(sorted(train.class_names))
    for item, (synset, data) in zip((train[i] for i in range(len(train))), wanted, strict=True):
        assert train.class_names[item["label"]] == synset
        np.testing.assert_allclose(item["image"].astype(int), decode_image(data, "x").astype(int), atol=12)
    assert [test.class_names[test[i]["label"]] for i in range(len(test))] == list(VAL_LABELS)
    for i, data in enumerate(val_files().values()):
        np.testing.assert_array_equal(test[i]["image"], decode_image(data, "x"))


def test_records_hold_the_files_byte_for_byte_save_the_odd_ones(archives, tmp_path):
    (report,) = write(listed(archives / "train.tar"), tmp_path)
    files = {name: data for inner in train_files().values() for name, data in inner.items()}
    found = records(tmp_path / NAME / VERSION, "train")
    names = [record["file_name"].decode() for record in found]
    assert names == list(files), "the archive's order"
    assert report["converted"] == {f"{SYNSETS[0]}_1.JPEG": "CMYK JPEG", "n02105855_2933.JPEG": "RGB PNG"}
    assert report["classes"][SYNSETS[1]] == 6
    assert sum(report["classes"].values()) == sum(report["shard_lengths"]) == report["images"] == 16
    assert len(report["shard_lengths"]) > 2, "or the test says little"
    for name, record in zip(names, found, strict=True):
        if name not in report["converted"]:
            assert record["image"] == files[name]
            continue
        with Image.open(io.BytesIO(record["image"])) as kept:
            assert (kept.format, kept.mode) == ("JPEG", "RGB")
            np.testing.assert_allclose(np.array(kept, int), decode_image(files[name], "x").astype(int), atol=12)


def test_the_installed_lists_are_imagenets():
    names, truth = imagenet.class_names(), imagenet.validation_labels(None)
    assert list(names) == sorted(set(names))
    assert len(names) == 1000
    assert tuple(truth[:6]) == VAL_LABELS
    assert {truth.count(name) for name in names} == {50}


def test_validation_labels_from_files(tmp_path):
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(i + 1, name, "word") for i, name in enumerate(("n15075141", *SYNSETS[:2]))], kind)
    savemat(tmp_path / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    (tmp_path / "ids.txt").write_text("2\n3\n1\n")
    assert imagenet.validation_labels(tmp_path / "ids.txt") == list(SYNSETS)
    (tmp_path / "names.txt").write_text("\n".join(SYNSETS))
    assert imagenet.validation_labels(tmp_path / "names.txt") == list(SYNSETS)

    (tmp_path / "ids.txt").write_text("2\n4\n")
    with pytest.raises(InputError, match=r"meta.mat cannot be read or lacks them"):
        imagenet.validation_labels(tmp_path / "ids.txt")
    (tmp_path / "names.txt").write_text("n01440764\ntench\n")
    with pytest.raises(InputError, match=r'line 2 of .*names.txt must be .*got "tench"'):
        imagenet.validation_labels(tmp_path / "names.txt")
    with pytest.raises(InputError, match="cannot read the validation labels"):
        imagenet.validation_labels(tmp_path / "nowhere.txt")

    (tmp_path / "val.tar").write_bytes(tar(val_files(3)))
    with pytest.raises(InputError, match=r"val_00000003.JPEG in .* has no label, there are 2"):
        (tmp_path / "names.txt").write_text("n01440764\nn01440764\n")
        imagenet.list_val(tmp_path / "val.tar", tmp_path / "names.txt", nothing)


def test_counts_are_compared_with_the_published_set(archives, tmp_path, capsys):
    assert command("imagenet", "--train", archives / "train.tar", "--out", tmp_path) == 2
    printed = capsys.readouterr().err
    assert "holds 16 images where ImageNet's train set has 1,281,167 and 1000 classes do not have 732 to 1,3" in printed
    assert "--partial" in printed
    assert not shards(tmp_path), "refused before anything is written"

    val = imagenet.list_val(archives / "val.tar", None, nothing)
    with pytest.raises(InputError, match=r"holds 6 images where ImageNet's validation set has 50,000 and 1000 classes"):
        imagenet.check_counts(val)
    # The numbers of the published set, one class too full.
    import dataclasses

    labels = np.repeat(np.arange(1000), 50)
    whole = dataclasses.replace(val, labels=labels, names=["x"] * len(labels))
    imagenet.check_counts(whole)
    labels[0] = 3
    with pytest.raises(InputError, match=r"and 2 classes do not have 50 \(n01440764 has 49, n01491361 has 51\)"):
        imagenet.check_counts(whole)


def cut(size):
    return lambda data: data[:size]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: tar(val_files(1)),
            "holds ILSVRC2012_val_00000001.JPEG, which is not the tar of one of .* synsets",
        ),
        (lambda data: tar({"n00000001.tar": b""}), "holds n00000001.tar, which is not the tar of one of"),
        (
            lambda data: train_tar({SYNSETS[0]: {"n02105855_1.JPEG": b"x"}}),
            r"n02105855_1.JPEG, .* not an image n01440764",
        ),
        (lambda data: train_tar({}), "holds no images"),
        (lambda data: tar({f"{SYNSETS[0]}.tar": tar({"n01440764_1.JPEG": b"x", "a/n01440764_1.JPEG": b"y"})}), "once"),
        (gzip.compress, "is not an uncompressed tar"),
        (lambda data: b"", "is not an uncompressed tar"),
        (lambda data: b"plain text " * 400, "is not an uncompressed tar"),
        (cut(20_000), "is truncated within n"),
        (cut(-TAIL - 9_000), "is truncated within n15075141.tar"),
        (lambda data: data[: 1024 + 512] + b"\xff" * 2000 + data[3536:], "is corrupt at byte|is truncated"),
        (
            lambda data: data[:512] + tar({"n01440764_9.JPEG": b"x" * 512})[:1024] + b"\xee" * 512 + data[2048:],
            "corrupt",
        ),
    ],
)
def test_other_layouts_and_damage_are_refused(archives, tmp_path, change, message):
    path = tmp_path / "train.tar"
    path.write_bytes(change((archives / "train.tar").read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        listed(path)
    assert str(path) in str(caught.value)


def test_a_cut_anywhere_in_the_archive_is_noticed(archives, tmp_path):
    data, path = (archives / "train.tar").read_bytes(), tmp_path / "train.tar"
    end = len(data.rstrip(b"\0"))
    for size in np.random.default_rng(0).integers(0, end, 25).tolist():
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"train\.tar"):
            listed(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagenet",), "nothing to prepare: give --train, --val or both"),
        (("imagenet", "--train", "nowhere.tar"), "there is no nowhere.tar"),
        (("imagenet", "--train", ROOT, "--partial"), 'is a folder, not a tar: for unpacked images use "spiking-mlp'),
        (("folder", "--data", "nowhere"), "nowhere is not a folder"),
        (("folder", "--data", ROOT / "docs"), "has no folder train, val or test"),
        (("folder", "--data", ROOT / "docs", "--name", "My Set"), '"My Set" cannot name a dataset'),
    ],
)
def test_impossible_requests(tmp_path, capsys, arguments, message):
    assert command(*arguments, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("out", "message"), [("gs://bucket/x", "is not on this machine"), ("FILE", "not a fold")])
def test_impossible_outputs(archives, tmp_path, capsys, out, message):
    out = str(tmp_path / "file") if out == "FILE" else out
    (tmp_path / "file").touch()
    assert command("imagenet", "--val", archives / "val.tar", "--partial", "--out", out) == 2
    assert message in capsys.readouterr().err


def test_help_is_there(capsys):
    assert command() == 0
    assert "imagenet" in capsys.readouterr().out


# --- pictures


def test_broken_pictures_are_all_named_then_left_out(tmp_path, capsys):
    files = train_files()
    files[SYNSETS[0]][f"{SYNSETS[0]}_15.JPEG"] = encoded(1)[:700]
    files[SYNSETS[1]][f"{SYNSETS[1]}_1.JPEG"] = b""
    files[SYNSETS[2]][f"{SYNSETS[2]}_8.JPEG"] = b"<html>not found</html>"
    (tmp_path / "train.tar").write_bytes(train_tar(files))
    out = tmp_path / "out"
    arguments = ("imagenet", "--partial", "--train", tmp_path / "train.tar", "--out", out)
    assert command(*arguments) == 2
    message = capsys.readouterr().err
    assert "3 of the images in" in message
    assert "--skip-broken" in message
    named = json.loads((out / NAME / VERSION / "preparation" / "train.broken.json").read_text())
    assert named == {
        "n01440764_15.JPEG": named["n01440764_15.JPEG"],
        "n02105855_1.JPEG": "empty file",
        "n15075141_8.JPEG": "not an image",
    }
    assert "truncated" in named["n01440764_15.JPEG"]
    assert not (out / NAME / VERSION / "dataset_info.json").exists()

    assert command(*arguments, "--skip-broken") == 0
    assert "3 broken and skipped: n01440764_15.JPEG, n02105855_1.JPEG" in capsys.readouterr().out
    found = [record["file_name"].decode() for record in records(out / NAME / VERSION, "train")]
    assert found == [name for inner in files.values() for name in inner if name not in named]
    report = json.loads((out / NAME / VERSION / "preparation" / "train.report.json").read_text())
    assert [report["classes"][synset] for synset in SYNSETS] == [4, 5, 4]


def test_an_archive_without_a_single_picture(tmp_path):
    (tmp_path / "train.tar").write_bytes(train_tar({SYNSETS[0]: {"n01440764_1.JPEG": b"x"}}))
    with pytest.raises(InputError, match=r"none of the 1 images from n01440764_1.JPEG on can be decoded"):
        write(listed(tmp_path / "train.tar"), tmp_path, skip_broken=True)


def test_decoding_at_an_eighth_finds_the_same_damage():
    rng = np.random.default_rng(0)
    for seed in range(40):
        data = bytearray(encoded(seed, progressive=bool(seed % 2)))
        if seed % 4 < 2:
            del data[int(rng.integers(20, len(data))) :]
        else:
            data[int(rng.integers(200, len(data)))] ^= int(rng.integers(1, 256))
        outcomes = []
        for decode in (lambda data: checked(data, True), lambda data: decode_image(data, "x")):
            try:
                decode(bytes(data))
                outcomes.append("whole")
            except InputError:
                outcomes.append("broken")
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("mode", "kind", "jpeg_only", "was"),
    [
        ("RGB", "JPEG", True, ""),
        ("L", "JPEG", True, ""),
        ("CMYK", "JPEG", False, "CMYK JPEG"),
        ("RGBA", "PNG", True, "RGBA PNG"),
        ("RGBA", "PNG", False, ""),
        ("L", "PNG", True, "L PNG"),
        ("P", "GIF", False, "P GIF"),
    ],
)
def test_what_is_stored(mode, kind, jpeg_only, was):
    data = encoded(3, mode, kind)
    kept, said = checked(data, jpeg_only)
    assert said == was
    if not was:
        assert kept == data
        return
    with Image.open(io.BytesIO(kept)) as stored:
        assert (stored.format, stored.mode) == ("JPEG", "L" if mode == "L" else "RGB")
        np.testing.assert_allclose(np.array(stored, int), decode_image(data, "x").squeeze().astype(int), atol=12)


# --- folders of images


def test_folder_becomes_the_same_set(tmp_path, capsys):
    data, out = tmp_path / "My Flowers", tmp_path / "out"
    for split, count in (("train", 4), ("val", 2)):
        for k, name in enumerate(("rose", "aster")):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                kind, suffix = (("JPEG", ".JPEG"), ("PNG", ".png"))[i % 2]
                (data / split / name / f"{i}{suffix}").write_bytes(encoded(10 * k + i, kind=kind))
    assert command("folder", "--data", data, "--out", out) == 0
    assert "--config.dataset=tfds:my_flowers" in capsys.readouterr().out
    for split in ("train", "test"):
        before, after = open_source("folder", split, data), open_source("tfds:my_flowers", split, out)
        assert before.class_names == after.class_names == ("aster", "rose")
        assert len(before) == len(after)
        for i in range(len(before)):
            np.testing.assert_array_equal(before[i]["image"], after[i]["image"])
            assert before[i]["label"] == after[i]["label"]
    found = records(out / "my_flowers" / "1.0.0", "train")
    assert found[0]["file_name"] == b"aster/0.JPEG"
    assert found[0]["image"] == (data / "train" / "aster" / "0.JPEG").read_bytes()

    # A file that comes later makes it another set; one that goes meanwhile is named.
    listing = list_folder(data, "train")
    (data / "train" / "rose" / "0.JPEG").unlink()
    with pytest.raises(InputError, match=r"cannot read .*rose/0.JPEG"):
        prepare([listing], tmp_path / "other", "x", "1.0.0", jpeg_only=False)
    assert command("folder", "--data", data, "--out", out) == 2
    assert "images 7 instead of 8" in capsys.readouterr().err.replace("images 8 instead of 7", "images 7 instead of 8")


# --- real ones, where they are


@pytest.mark.skipif(not SAMPLES.is_file(), reason="needs real ImageNet JPEGs")
def test_real_imagenet_pictures(tmp_path):
    files: dict[str, dict[str, bytes]] = {}
    with tarfile.open(SAMPLES) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            assert content is not None
            files.setdefault(member.name[:9], {})[member.name] = content.read()
    (tmp_path / "train.tar").write_bytes(train_tar(files))
    (report,) = write(listed(tmp_path / "train.tar"), tmp_path, shard_bytes=2**20)
    assert (report["images"], report["skipped"], report["converted"]) == (125, {}, {})
    found = {record["file_name"].decode(): record for record in records(tmp_path / NAME / VERSION, "train")}
    names = imagenet.class_names()
    for synset, inner in files.items():
        for name, data in inner.items():
            assert hashlib.sha256(found[name]["image"]).digest() == hashlib.sha256(data).digest()
            assert names[found[name]["label"]] == synset
