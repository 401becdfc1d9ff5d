"""Small archives in ImageNet's layout, of JPEGs made here."""

import io
import tarfile

import numpy as np
from PIL import Image

SYNSETS = ("n01440764", "n02105855", "n15075141")  # the labels 0, 158 - 1 and 999
TAIL = 2 * tarfile.BLOCKSIZE  # of zeros that end a tar


def picture(seed, size=(48, 40), mode="RGB"):
    """A gradient with noise and an edge, so that a JPEG of it has something of everything."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = np.stack([np.sin(6 * x + phase) * np.cos(5 * y - phase) for phase in rng.uniform(0, 6, 3)], -1)
    pixels = 127 + 90 * waves + rng.normal(0, 12, waves.shape) + 40 * (x > rng.uniform())[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)


def encoded(seed, mode="RGB", kind="JPEG", **options):
    buffer = io.BytesIO()
    picture(seed, mode=mode).save(buffer, kind, **options)
    return buffer.getvalue()


def tar(files):
    """The bytes of a tar of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def train_files(count=5):
    """{synset: {name: bytes}}; among them a CMYK JPEG, a grey and a progressive one, and a PNG in disguise."""
    files = {
        synset: {f"{synset}_{7 * i + 1}.JPEG": encoded(100 * k + i) for i in range(count)}
        for k, synset in enumerate(SYNSETS)
    }
    files[SYNSETS[0]][f"{SYNSETS[0]}_1.JPEG"] = encoded(500, "CMYK")
    files[SYNSETS[0]][f"{SYNSETS[0]}_8.JPEG"] = encoded(501, "L")
    files[SYNSETS[1]]["n02105855_2933.JPEG"] = encoded(502, kind="PNG")
    files[SYNSETS[2]][f"{SYNSETS[2]}_1.JPEG"] = encoded(503, progressive=True)
    return files


def train_tar(files):
    return tar({f"{synset}.tar": tar(inner) for synset, inner in files.items()})


def val_files(count=6):
    return {f"ILSVRC2012_val_{i:08}.JPEG": encoded(1000 + i) for i in range(1, count + 1)}
