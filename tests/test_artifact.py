"""Artifacts: what is written is read, what cannot run is refused, and no damage does more than that."""

import dataclasses
import json
import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from random_integer import random_images, random_integer_net

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.infer import artifact, reference
from spiking_mlp_jax.infer.artifact_layout import pack, unpack
from spiking_mlp_jax.infer.network import IntegerNet, array_shapes

TINY = dict(image_size=4, in_channels=1, num_classes=2, patch_size=1, depths=(1, 1), expansion=1, time_steps=2)
DATA = {"dataset": "d", "resize_mode": "pad", "eval_resize": 0, "mean": [0.25], "std": [0.5], "class_names": ["ä", "b"]}


def tiny_net(seed, **fields):
    return random_integer_net(seed, **{**TINY, "dim": 3, "data": DATA, **fields})


def equal(one: IntegerNet, other: IntegerNet) -> bool:
    return (
        one.description == other.description
        and one.arrays.keys() == other.arrays.keys()
        and all(x.dtype == other.arrays[name].dtype for name, x in one.arrays.items())
        and all(np.array_equal(x, other.arrays[name]) for name, x in one.arrays.items())
    )


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
    artifact.save(changed(net, data={**DATA, "mean": (np.float64(0.25),), "more": {"a": [None, True]}}), tmp_path / "a")
    assert artifact.load(tmp_path / "a").description.data == {**DATA, "more": {"a": [None, True]}}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_arrays_lie_in_the_file(tmp_path, bits):
    artifact.save(tiny_net(1, bits=bits, per_token=True), tmp_path / "a")
    net = artifact.load(tmp_path / "a")
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
    artifact.save(net, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
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
    artifact.save(net, tmp_path / "a")
    np.save(tmp_path / "images.npy", random_images(net, 3))
    program = """
import sys
for name in ("jax", "jaxlib", "flax", "PIL", "safetensors"):
    sys.modules[name] = None
import numpy as np
from spiking_mlp_jax.infer import artifact, export_c, reference
net = artifact.load(sys.argv[1] + "/a")
artifact.save(net, sys.argv[1] + "/b")
export_c.export_c(net, sys.argv[1] + "/b.c")
np.save(sys.argv[1] + "/logits.npy", reference.run(net, np.load(sys.argv[1] + "/images.npy")))
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
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
    ("data", {"x": float("nan")}, "cannot be written as JSON"),
    ("data", {"x": "\ud800"}, "the header is no JSON"),
    ("data", {"x": "long" * 300_000}, "the header has 12"),
]


@pytest.mark.parametrize(("field", "value", "sentence"), REFUSED_FIELDS)
def test_no_impossible_description_is_written(tmp_path, field, value, sentence):
    net = tiny_net(6, encoding="spe", neuron="lif", leak=1)
    assert sentence in refusal(lambda: artifact.save(changed(net, **{field: value}), tmp_path / "a"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [("fraction", 31), ("fraction", -1), ("word", 8), ("word", 16.0), ("threshold", 1 << 31), ("reset", None)],
)
def test_no_impossible_format_is_written(tmp_path, field, value):
    net = tiny_net(7)
    formats = {**net.description.formats}
    formats["head"] = dataclasses.replace(formats["head"], **{field: value})
    assert f"{field} of head must be" in refusal(lambda: artifact.save(changed(net, formats=formats), tmp_path / "a"))


def test_no_impossible_arrays_are_written(tmp_path):
    net = tiny_net(8, per_token=True, bits=4, step_kernels=True)
    kernel, shift, signs = (net.arrays[name] for name in ("head.kernel", "head.shift", "stage0.block0.project.signs"))
    below = net.arrays["stage0.block0.expand.below"]
    for name, value, sentence in [
        ("head.kernel", kernel.astype(np.int16), "head.kernel must be int8"),
        ("head.kernel", kernel[..., :1], "head.kernel must have the shape [S, 6, 2]"),
        ("head.kernel", kernel[:1], "the arrays of head do not have one number of S"),
        ("head.kernel", np.full_like(kernel, -8), "head.kernel must hold -7 to 7"),
        ("head.shift", np.full_like(shift, 32), "head.shift must hold -31 to 31"),
        ("stage0.block0.project.signs", signs * 0 + 2, "signs must hold -1 to 1"),
        ("stage0.block0.project.signs", signs[:, :0], "signs must have the shape [16, k]"),
        ("stage0.block0.project.signs", np.repeat(signs, 17, 1), "signs must have the shape"),
        ("stage0.block0.expand.below", below.astype(np.uint8), "below must be bool"),
        ("head.more", kernel, 'there is an array "head.more"'),
    ]:
        assert sentence in refusal(lambda: artifact.save(changed(net, {name: value}), tmp_path / "a"))  # noqa: B023
    missing = IntegerNet(net.description, {name: x for name, x in net.arrays.items() if name != "head.bias"})
    assert 'the array "head.bias" is missing' in refusal(lambda: artifact.save(missing, tmp_path / "a"))
    far = changed(net, {"head.bias": np.full_like(net.arrays["head.bias"], 2**31 - 1)})
    assert "potentials at head can reach" in refusal(lambda: artifact.check(far))


def test_foreign_files_are_named(tmp_path):
    file = tmp_path / "net.smlp"
    assert f"there is no file {file}" in refusal(lambda: artifact.load(file))
    assert "there is no file" in refusal(lambda: artifact.load(tmp_path))
    assert "there is no file" in refusal(lambda: artifact.load("a\0b"))
    os.mkfifo(tmp_path / "pipe")
    assert "there is no file" in refusal(lambda: artifact.load(tmp_path / "pipe"))
    for content, sentence in [
        (b"", "has only 0 bytes"),
        (b"\x89SMLP\r\n\x1a", "has only 8 bytes"),
        (b"PK\3\4" * 100, "is no artifact"),
        (json.dumps({"description": 1} | dict.fromkeys(map(str, range(99)))).encode(), "is no artifact"),
    ]:
        file.write_bytes(content)
        assert re.fullmatch(rf"{re.escape(str(file))} .*{sentence}.*", refusal(lambda: artifact.load(file)))
    artifact.save(tiny_net(0), file)
    data = file.read_bytes()
    for content, sentence in [
        (data[:8] + struct.pack("<I", 2) + data[12:], "has format 2, but this version reads format 1"),
        (data[:-1], f"has {len(data) - 1} bytes, but declares {len(data)}"),
        (data + b"\0", f"has {len(data) + 1} bytes, but declares {len(data)}"),
        (data.replace(b"\r\n", b"\n"), "is no artifact"),
        (data[:12] + struct.pack("<I", len(data)) + data[16:], "its header would have"),
        (data[:100] + b"\0" + data[101:], "its hash does not fit"),
    ]:
        file.write_bytes(content)
        assert re.fullmatch(rf"{re.escape(str(file))} .*{sentence}.*", refusal(lambda: artifact.load(file)))


@pytest.mark.parametrize("wrong", [None, 3, b"net.smlp"])
def test_what_is_no_network_and_no_path(wrong, tmp_path):
    assert "an artifact is loaded from a path" in refusal(lambda: artifact.load(wrong))
    assert "an integer network is saved" in refusal(lambda: artifact.save(wrong, tmp_path / "a"))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(lambda: artifact.save(tiny_net(0), tmp_path / "file" / "net.smlp"))
    (tmp_path / "folder").mkdir()
    assert "cannot be written" in refusal(lambda: artifact.save(tiny_net(0), tmp_path / "folder"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


# Mutations: as accidents make them, which the hash finds, and as someone makes them who also writes the hash.


def rehashed(data: bytes) -> bytes:
    """The same file with the length and the hash that belong to it."""
    prefix = data[:16] + struct.pack("<Q", len(data)) + data[24:32]
    return prefix + artifact.digest(prefix, data[64:]) + data[64:]


def parts(data: bytes):
    length = struct.unpack("<I", data[12:16])[0]
    return data[64 : 64 + length], data[-(-(64 + length) // 64) * 64 :]


def with_header(data: bytes, header: bytes) -> bytes:
    start = -(-(64 + len(header)) // 64) * 64
    return rehashed(
        data[:12] + struct.pack("<I", len(header)) + data[16:64] + header.ljust(start - 64, b"\0") + parts(data)[1]
    )


NUMBERS = [b"-1", b"0", b"1", b"2", b"3", b"4", b"16", b"32", b"255", b"-2147483648", b"2147483647", b"4294967296"]
NUMBERS += [b"1" + b"0" * 30, b"9" * 5000, b"1.0", b"0.5", b"1e999", b"-1e400", b"NaN", b"Infinity", b"-Infinity"]
NUMBERS += [b"true", b"false", b"null", b'"4"', b'""', b"[]", b"{}", b"[4]", b"[" * 5000, b"[[[[1]]]]", b'{"a":1}']
VALUES = [-1, 0, 1, 2, 3, 4, 8, 17, 300, 10**9, 2**63, 1e300, 2.5, True, None, "", "spe", "plain", "lif", "if", [], {}]
VALUES += [[1], [1, 1], [[]], "\x00", "a" * 1000, {"fraction": 1, "word": 16, "threshold": 1, "reset": 0}]


def places(document, found=None):
    """Every (container, key) of a JSON document."""
    found = [] if found is None else found
    for key in list(document) if isinstance(document, dict) else range(len(document)):
        found.append((document, key))
        if isinstance(document[key], dict | list):
            places(document[key], found)
    return found


def mutate_document(rng, data):
    """Changes values of the header, one or a few at a time, and keeps it JSON."""
    document = json.loads(parts(data)[0])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # The description more often than the many entries of the table.
        inside = document.get(rng.choice(("description", "description", "arrays")))
        container, key = rng.choice(places(inside if isinstance(inside, dict | list) and inside else document))
        action = rng.randrange(6)
        if action == 0 and isinstance(container, dict):
            container[str(key) + rng.choice(("", "x"))] = container.pop(key)
        elif action == 1:
            del container[key]
        elif action == 2 and type(container[key]) is int:
            container[key] += rng.choice((-64, -2, -1, 1, 2, 64, 1 << 31))
        elif action == 3 and isinstance(container[key], bool):
            container[key] = not container[key]
        else:
            container[key] = rng.choice(VALUES)
        if not document:
            break
    return with_header(data, json.dumps(document).encode())


def mutate_text(rng, data):
    """Changes the header's text: numbers, names twice, nesting, cuts."""
    header = parts(data)[0]
    action = rng.randrange(5)
    if action == 0:
        name = rng.choice(re.findall(rb'"[a-z_]+":', header))
        header = header.replace(name, name + b"0," + name, 1)
    elif action == 1:
        at = rng.randrange(len(header))
        header = header[:at] + rng.randbytes(rng.randrange(4)) + header[at + rng.randrange(4) :]
    elif action == 2:
        header = rng.choice((header[: rng.randrange(len(header))], header * 2, header + b" " * 64, b"", b"{}"))
    else:
        spans = [found.span() for found in re.finditer(rb"-?\d+(\.\d+)?", header)]
        start, end = rng.choice(spans[:60]) if action == 3 else rng.choice(spans)
        header = header[:start] + rng.choice(NUMBERS) + header[end:]
    return with_header(data, header)


def mutate_arrays(rng, data):
    """Changes bytes of the arrays, cuts them or appends to them."""
    start = len(data) - len(parts(data)[1])
    changed = bytearray(data)
    action = rng.randrange(8)
    if action == 0:
        changed = changed[: rng.randrange(start, len(data))]
    elif action == 1:
        changed += bytes(rng.randrange(1, 200))
    else:
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(start, len(data))
            changed[at] = rng.choice((changed[at] ^ 1 << rng.randrange(8), 0, 1, 127, 128, 255))
    return rehashed(bytes(changed))


def mutate_blindly(rng, data, other):
    """An accident: bits flipped, a cut, a gap, parts of another file."""
    action = rng.randrange(6)
    changed = bytearray(data)
    if action < 2:
        for _ in range(rng.choice((1, 1, 2, 20))):
            at = rng.randrange(rng.choice((64, len(data))))
            changed[at] ^= 1 << rng.randrange(8)
    elif action == 2:
        del changed[rng.randrange(len(data)) :]
    elif action == 3:
        at = rng.randrange(len(data))
        del changed[at : at + rng.randrange(1, 300)]
    elif action == 4:
        at = rng.randrange(len(data))
        changed[at:at] = rng.randbytes(rng.randrange(1, 300))
    else:
        at = rng.randrange(len(data))
        changed[at:] = other[at:]
    return bytes(changed)


def mutate_prefix(rng, data):
    """The first bytes, with the hash that belongs to them."""
    changed = bytearray(data)
    changed[8 + rng.randrange(24)] ^= 1 << rng.randrange(8)
    return bytes(changed[:32]) + artifact.digest(bytes(changed[:32]), bytes(changed[64:])) + bytes(changed[64:])


def test_ten_thousand_mutations(tmp_path):
    nets = [
        tiny_net(0, encoding="spe", per_token=True, neuron="lif", bits=8, dim=3),
        tiny_net(1, encoding="plain", per_token=False, bits=4, step_kernels=True),
        tiny_net(2, encoding="plain", per_token=True, neuron="if", leak=0, bits=2, depths=(1,), data={}),
    ]
    originals = []
    for net in nets:
        artifact.save(net, tmp_path / "net")
        originals.append((tmp_path / "net").read_bytes())
    images = [random_images(net, 1) for net in nets]
    rng = random.Random(0)
    kinds = [mutate_document, mutate_text, mutate_arrays, mutate_blindly, mutate_prefix]
    count = dict.fromkeys(("same", "legal", "refused"), 0)
    reasons = set()
    for i in range(10_000):
        which = rng.randrange(3)
        data, (kind,) = originals[which], rng.choices(kinds, (30, 20, 15, 25, 10))
        mutated = kind(rng, data, originals[which - 1]) if kind is mutate_blindly else kind(rng, data)
        (tmp_path / "net").write_bytes(mutated)
        if watched := i % 50 == 0:
            tracemalloc.start()
        try:
            net = artifact.load(tmp_path / "net")
        except InputError as error:
            sentence = str(error)
            assert sentence.startswith(str(tmp_path / "net")) and "\n" not in sentence and len(sentence) < 1000
            reasons.add(re.sub(r"[\d'\"].*", "", sentence[len(str(tmp_path)) + 5 :]))
            count["refused"] += 1
        else:
            if equal(net, nets[which]):
                # Only what JSON does not distinguish has changed.
                assert kind in (mutate_document, mutate_text, mutate_arrays) or mutated == data
                count["same"] += 1
            else:
                # Whoever computes the hash can write another network, but only one that runs; and a splice can be
                # the other file as a whole.
                assert kind in (mutate_document, mutate_text, mutate_arrays) or mutated in originals
                artifact.check(net)
                if kind is not mutate_arrays or i % 3 == 0:
                    c = net.description
                    shape = (1, c.image_size, c.image_size, c.in_channels)
                    reference.run(net, np.resize(images[which], shape))
                count["legal"] += 1
        finally:
            if watched:
                assert tracemalloc.get_traced_memory()[1] < 8 << 20
                tracemalloc.stop()
    assert min(count.values()) > 50 and count["refused"] > 5_000, count
    assert len(reasons) > 30, reasons
