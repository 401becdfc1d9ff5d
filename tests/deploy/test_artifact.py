"""Artifacts: what is written is read, what cannot run is refused, and no damage does more than that."""

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from spiking_mlp_jax.deploy import artifact, reference
from spiking_mlp_jax.deploy.artifact import pack, unpack
from spiking_mlp_jax.deploy.network import IntegerNet, array_shapes
from spiking_mlp_jax.errors import InputError
from tests.support.artifacts import DATA, equal, tiny_net
from tests.support.random_integer import random_images, random_integer_net


def changed(net, arrays=None, **fields):
    return IntegerNet(dataclasses.replace(net.description, **fields), {**net.arrays, **(arrays or {})})


def refusal(action) -> str:
    """The sentence of the InputError that an action raises."""
    with pytest.raises(InputError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 1000
    return sentence


def test_what_is_saved_is_loaded(tmp_path):
    file = tmp_path / "deep" / "net.smlp"
    for seed in range(40):
        net = random_integer_net(seed)
        artifact.save(net, file)
        assert equal(artifact.load(str(file)), net)
        assert file.stat().st_size == artifact.size(net)
    assert [f.name for f in file.parent.iterdir()] == ["net.smlp"]


def test_what_comes_with_the_pictures_is_kept(tmp_path):
    net = tiny_net(0)
    artifact.save(
        changed(net, data={**DATA, "mean": (np.float64(0.25),), "more": {"a": [None, True]}}), tmp_path / "a.smlp"
    )
    assert artifact.load(tmp_path / "a.smlp").description.data == {**DATA, "more": {"a": [None, True]}}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_arrays_lie_in_the_file(tmp_path, bits):
    artifact.save(tiny_net(1, bits=bits, per_token=True), tmp_path / "a.smlp")
    net = artifact.load(tmp_path / "a.smlp")
    maps = set()
    for name, x in net.arrays.items():
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 0
        base = x
        while isinstance(base.base, np.ndarray):
            base = base.base
        mapped = isinstance(base, np.memmap)
        assert mapped == (bits > 4 or not name.endswith(".kernel"))
        assert x.ctypes.data % x.itemsize == 0
        maps |= {id(base)} if mapped else set()
    assert len(maps) == 1


def test_nibbles_take_half_the_bytes(tmp_path):
    fields = dict(image_size=32, patch_size=4, dim=48, expansion=3, encoding="spe", per_token=False, step_kernels=False)
    eight, four = (tiny_net(3, bits=bits, **fields) for bits in (8, 4))
    kernels = sum(x.size for name, x in four.arrays.items() if name.endswith(".kernel"))
    # But for where each array begins and what the header says of it.
    assert abs(artifact.size(eight) - artifact.size(four) - kernels // 2) < 64 * len(four.arrays)


def test_every_nibble_survives():
    values = np.arange(-8, 8, dtype=np.int8)[::-1]
    for count in (16, 15, 1):
        packed = pack(values[:count])
        assert packed.size == (count + 1) // 2
        assert np.array_equal(unpack(packed, (count,)), values[:count])
    assert pack(np.array([1, -2, 3], np.int8)).tolist() == [0xE1, 0x03]


def test_the_bytes_are_as_documented(tmp_path):
    net = tiny_net(2, bits=8)
    artifact.save(net, tmp_path / "a.smlp")
    data = (tmp_path / "a.smlp").read_bytes()
    magic, version, length, total = struct.unpack("<8sIIQ", data[:24])
    assert (magic, version, total) == (b"\x89SMLP\r\n\x1a", 1, len(data))
    entries = json.loads(data[64 : 64 + length])["arrays"]
    start = -(-(64 + length) // 64) * 64
    assert [entry["name"] for entry in entries] == list(array_shapes(net.description))
    for entry in entries:
        at = start + entry["offset"]
        stored = np.frombuffer(data[at : at + entry["size"]], np.dtype(entry["dtype"]).newbyteorder("<"))
        assert at % 64 == 0
        assert np.array_equal(stored.reshape(entry["shape"]), net.arrays[entry["name"]])


def test_loads_and_runs_without_jax(tmp_path):
    net = tiny_net(5)
    artifact.save(net, tmp_path / "a.smlp")
    np.save(tmp_path / "images.npy", random_images(net, 3))
    program = """
import sys
for name in ("jax", "jaxlib", "flax", "PIL", "safetensors"):
    sys.modules[name] = None
import numpy as np
from spiking_mlp_jax.deploy import artifact, reference
from spiking_mlp_jax.deploy.c import export
net = artifact.load(sys.argv[1] + "/a.smlp")
artifact.save(net, sys.argv[1] + "/b.smlp")
export.export_c(net, sys.argv[1] + "/b.c")
np.save(sys.argv[1] + "/logits.npy", reference.run(net, np.load(sys.argv[1] + "/images.npy")))
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert (tmp_path / "a.smlp").read_bytes() == (tmp_path / "b.smlp").read_bytes()
    expected = reference.run(net, random_images(net, 3))
    assert np.array_equal(np.load(tmp_path / "logits.npy"), expected)


REFUSED_FIELDS = [
    ("image_size", 0, "image_size must be a whole number from 1"),
    ("image_size", 5, "image_size must be a multiple of 2"),
    ("image_size", 4.0, "image_size must be a whole number"),
    ("time_steps", 10**6, "time_steps must be a whole number from 1 to 256"),
    ("dim", 4, 'dim must be a multiple of 3 with encoding "spe"'),
    ("dim", True, "dim must be a whole number"),
    ("depths", (), "depths must list"),
    ("depths", (1,) * 9, "depths must list"),
    ("depths", (1, 10**9), "depths must be a whole number from 1 to 256"),
    ("depths", (200, 200), "depths must not sum to more than 256"),
    ("encoding", "SPE", "encoding must be one of spe, plain"),
    ("neuron", "plif", "neuron must be one of lif, if"),
    ("neuron", "if", 'leak must be 0 with neuron "if"'),
    ("leak", 17, "leak must be"),
    ("bits", 1, "bits must be a whole number from 2 to 8"),
    ("soft_reset", 1, "soft_reset must be true or false"),
    ("formats", {}, 'formats lacks "stage0"'),
    ("data", [], "data must be an object"),
    ("data", {"mean": [0.5, 0.5]}, '"mean" of data must be 1 numbers'),
    ("data", {"std": [0]}, '"std" of data must hold numbers above 0'),
    ("data", {"class_names": ["a"]}, '"class_names" of data must be 2 strings'),
    ("data", {"eval_resize": True}, '"eval_resize" of data must be a number'),
    ("data", {"x": float("nan")}, "the description is not JSON"),
    ("data", {"x": "\ud800"}, "the header is not JSON"),
    ("data", {"x": "long" * 300_000}, "the header has 12"),
]


@pytest.mark.parametrize(("field", "value", "sentence"), REFUSED_FIELDS)
def test_no_impossible_description_is_written(tmp_path, field, value, sentence):
    net = tiny_net(6, encoding="spe", neuron="lif", leak=1)
    assert sentence in refusal(lambda: artifact.save(changed(net, **{field: value}), tmp_path / "a.smlp"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [("fraction", 31), ("fraction", -1), ("word", 8), ("word", 16.0), ("threshold", 1 << 31), ("reset", None)],
)
def test_no_impossible_format_is_written(tmp_path, field, value):
    net = tiny_net(7)
    formats = {**net.description.formats}
    formats["head"] = dataclasses.replace(formats["head"], **{field: value})
    assert f"{field} of head must be" in refusal(
        lambda: artifact.save(changed(net, formats=formats), tmp_path / "a.smlp")
    )


def test_no_impossible_arrays_are_written(tmp_path):
    net = tiny_net(8, per_token=True, bits=4, step_kernels=True)
    kernel, shift, signs = (net.arrays[name] for name in ("head.kernel", "head.shift", "stage0.block0.project.signs"))
    below = net.arrays["stage0.block0.expand.below"]
    for name, value, sentence in [
        ("head.kernel", kernel.astype(np.int16), "head.kernel must be int8"),
        ("head.kernel", kernel[..., :1], "head.kernel must have the shape [S, 6, 2]"),
        ("head.kernel", kernel[:1], "the arrays of head must have the same S"),
        ("head.kernel", np.full_like(kernel, -8), "head.kernel must hold -7 to 7"),
        ("head.shift", np.full_like(shift, 32), "head.shift must hold -31 to 31"),
        ("stage0.block0.project.signs", signs * 0 + 2, "signs must hold -1 to 1"),
        ("stage0.block0.project.signs", signs[:, :0], "signs must have the shape [16, k]"),
        ("stage0.block0.project.signs", np.repeat(signs, 17, 1), "signs must have the shape"),
        ("stage0.block0.expand.below", below.astype(np.uint8), "below must be bool"),
        ("head.more", kernel, 'unexpected array "head.more"'),
    ]:
        assert sentence in refusal(lambda: artifact.save(changed(net, {name: value}), tmp_path / "a.smlp"))  # noqa: B023
    missing = IntegerNet(net.description, {name: x for name, x in net.arrays.items() if name != "head.bias"})
    assert 'the array "head.bias" is missing' in refusal(lambda: artifact.save(missing, tmp_path / "a.smlp"))
    far = changed(net, {"head.bias": np.full_like(net.arrays["head.bias"], 2**31 - 1)})
    assert "potentials at head can reach" in refusal(lambda: artifact.check(far))


def test_foreign_files_are_named(tmp_path):
    file = tmp_path / "net.smlp"
    assert f"there is no file {file}" in refusal(lambda: artifact.load(file))
    assert "there is no file" in refusal(lambda: artifact.load(tmp_path))
    assert "is not a path" in refusal(lambda: artifact.load("a\0b"))
    os.mkfifo(tmp_path / "pipe")
    assert "there is no file" in refusal(lambda: artifact.load(tmp_path / "pipe"))
    for content, sentence in [
        (b"", "has only 0 bytes"),
        (b"\x89SMLP\r\n\x1a", "has only 8 bytes"),
        (b"PK\3\4" * 100, "is not a .smlp file"),
        (json.dumps({"description": 1} | dict.fromkeys(map(str, range(99)))).encode(), "is not a .smlp file"),
    ]:
        file.write_bytes(content)
        assert re.fullmatch(rf"{re.escape(str(file))} .*{sentence}.*", refusal(lambda: artifact.load(file)))
    artifact.save(tiny_net(0), file)
    data = file.read_bytes()
    for content, sentence in [
        (data[:8] + struct.pack("<I", 2) + data[12:], "has format 2, but this version reads format 1"),
        (data[:-1], f"has {len(data) - 1} bytes, but declares {len(data)}"),
        (data + b"\0", f"has {len(data) + 1} bytes, but declares {len(data)}"),
        (data.replace(b"\r\n", b"\n"), "is not a .smlp file"),
        (data[:12] + struct.pack("<I", len(data)) + data[16:], "a header of"),
        (data[:100] + b"\0" + data[101:], "its hash does not match"),
    ]:
        file.write_bytes(content)
        assert re.fullmatch(rf"{re.escape(str(file))} .*{sentence}.*", refusal(lambda: artifact.load(file)))


@pytest.mark.parametrize("wrong", [None, 3, b"net.smlp"])
def test_what_is_no_network_and_no_path(wrong, tmp_path):
    assert "load takes a path" in refusal(lambda: artifact.load(wrong))
    assert "save takes an integer network" in refusal(lambda: artifact.save(wrong, tmp_path / "a.smlp"))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(lambda: artifact.save(tiny_net(0), tmp_path / "file" / "net.smlp"))
    (tmp_path / "folder.smlp").mkdir()
    assert "cannot be written" in refusal(lambda: artifact.save(tiny_net(0), tmp_path / "folder.smlp"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder.smlp"]
