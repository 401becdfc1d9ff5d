"""Damaged artifacts: as accidents do it, which the hash finds, and as someone does it who also writes the hash."""

import json
import random
import re
import struct
import tracemalloc

import numpy as np
import pytest

from spiking_mlp_jax.deploy import artifact, reference
from spiking_mlp_jax.errors import InputError
from tests.support.artifacts import equal, tiny_net
from tests.support.random_integer import random_images


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


@pytest.mark.slow
def test_ten_thousand_mutations(tmp_path):
    nets = [
        tiny_net(0, encoding="spe", per_token=True, neuron="lif", bits=8, dim=3),
        tiny_net(1, encoding="plain", per_token=False, bits=4, step_kernels=True),
        tiny_net(2, encoding="plain", per_token=True, neuron="if", leak=0, bits=2, depths=(1,), data={}),
    ]
    originals = []
    for net in nets:
        artifact.save(net, tmp_path / "net.smlp")
        originals.append((tmp_path / "net.smlp").read_bytes())
    images = [random_images(net, 1) for net in nets]
    rng = random.Random(0)
    kinds = [mutate_document, mutate_text, mutate_arrays, mutate_blindly, mutate_prefix]
    count = dict.fromkeys(("same", "legal", "refused"), 0)
    reasons = set()
    for i in range(10_000):
        which = rng.randrange(3)
        data, (kind,) = originals[which], rng.choices(kinds, (30, 20, 15, 25, 10))
        mutated = kind(rng, data, originals[which - 1]) if kind is mutate_blindly else kind(rng, data)
        (tmp_path / "net.smlp").write_bytes(mutated)
        if watched := i % 50 == 0:
            tracemalloc.start()
        try:
            net = artifact.load(tmp_path / "net.smlp")
        except InputError as error:
            sentence = str(error)
            assert sentence.startswith(str(tmp_path / "net.smlp")) and "\n" not in sentence and len(sentence) < 1000
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
