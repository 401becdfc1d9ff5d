"""The zip file of an exported network; needs no JAX.

network.bin   the program with its weights, serialized by `jax.export`
config.json   {"format": 1, "kind": "float" or "folded", "model", "data", "input", "output", "platforms",
              "jax_version", "calling_convention_version", "sha256" of network.bin}
README.txt    how to run it without this package
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.files import write_whole

FORMAT = 1
NETWORK, CONFIG, README = "network.bin", "config.json", "README.txt"
# The limit of flatbuffers, and far more than a configuration needs.
MOST_BYTES = {NETWORK: 1 << 31, CONFIG: 1 << 20}


def write(path: str | os.PathLike[str], network: bytes, described: dict[str, Any]) -> dict[str, Any]:
    """Write the file; the same arguments give the same bytes.

    Args:
        path: of the file.
        network: the serialized program.
        described: config.json without "format" and "sha256".

    Returns:
        the content of config.json.

    Raises:
        InputError: it cannot be written.
    """
    document = {"format": FORMAT, **described, "sha256": hashlib.sha256(network).hexdigest()}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    members = {NETWORK: network, CONFIG: text.encode(), README: _readme(Path(path).name, document).encode()}
    file = io.BytesIO()
    # Stored, because weights hardly compress.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            # The default date is constant.
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, content)
    write_whole(path, [file.getvalue()])
    return document


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], bytes]:
    """The content of config.json, and the serialized program, whose hash is checked.

    Raises:
        InputError: no such file, another kind of file, a damaged one, or one of another format.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}: give one that `spiking-mlp export-stablehlo` wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            config, network = (_member(archive, path, name) for name in (CONFIG, NETWORK))
    except InputError:
        raise
    # zipfile raises the last three for what it cannot unpack, e.g. with a password.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} is not an exported network, or damaged ({error}): copy or export it again") from error
    try:
        document = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{CONFIG} in {path} cannot be read as JSON ({error}): copy or export it again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise InputError(
            f"{path} has format {found!r}, but this version reads format {FORMAT}: use the version that wrote it"
        )
    if document.get("sha256") != hashlib.sha256(network).hexdigest():
        raise InputError(f"{path} is damaged: the hash of its {NETWORK} does not match; copy or export it again")
    return document, network


def _member(archive, path, name) -> bytes:
    try:
        size = archive.getinfo(name).file_size
    except KeyError as error:
        raise InputError(
            f"{path} has no {name}: it is not a complete file of `spiking-mlp export-stablehlo`"
        ) from error
    if size > MOST_BYTES[name]:
        raise InputError(f"{name} in {path} has {size:,} bytes, above the limit {MOST_BYTES[name]:,}: export again")
    return archive.read(name)


def _readme(name, document) -> str:
    shape = ", ".join(map(str, document["input"]["shape"][1:]))
    return f"""A spiking MLP as StableHLO.
It needs flatbuffers and JAX {document["jax_version"]} or a version of the following six months:

    pip install jax flatbuffers

    import zipfile, numpy, jax
    from jax import export
    network = export.deserialize(bytearray(zipfile.ZipFile({name!r}).read("{NETWORK}")))
    images = numpy.zeros((8, {shape}), "{document["input"]["dtype"]}")
    logits = jax.jit(network.call)(images)

{CONFIG} describes images and logits, and the data the network was trained on.
"""
