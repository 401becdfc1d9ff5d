"""Networks as StableHLO: what a process that has only JAX computes with them, what is in a file, damaged files."""

import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop import stablehlo_file
from spiking_mlp_jax.interop.stablehlo import export_stablehlo, load
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import Pixels, normalize
from tests.support.random_model import meta_for, random_model

# Name: the network's fields, whether it is folded, whether it takes pixels, numbers of images.
CASES = {
    "float": (dict(depths=(1, 2)), False, False, (1, 3, 8)),
    "folded": (dict(depths=(1, 1), norm="tdbn"), True, True, (1, 3, 8)),
    "spe-tebn": (dict(depths=(1, 1), norm="tebn", neuron="plif"), False, True, (3,)),
    "plain-layer": (dict(depths=(1, 1), encoding="plain", norm="layer", v_reset=None), False, False, (3,)),
    "folded-plain-tebn": (dict(depths=(1, 1), encoding="plain", norm="tebn"), True, False, (3,)),
    # With so many steps a GPU and a TPU would run a kernel of `nn/kernels/neuron.py`.
    "kernels": (dict(depths=(1,), time_steps=9, remat="block", norm="tdbn", dtype="bfloat16"), False, False, (3,)),
}

# The same flags of XLA as here, by the environment, so that the same machine code is made.
FRESH = """
import json, pathlib, sys, zipfile
import jax, numpy
from jax import export
for path in pathlib.Path(sys.argv[1]).glob("*.zip"):
    with zipfile.ZipFile(path) as file:
        document = json.loads(file.read("config.json"))
        network = export.deserialize(bytearray(file.read("network.bin")))
    images = numpy.load(path.parent / f"{document['input']['dtype']}.npy")
    for count in document["data"]["counts"]:
        logits = network.call(images[:count])
        numpy.save(path.parent / f"{path.stem}.{count}.npy", numpy.asarray(logits), allow_pickle=False)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def inputs():
    """uint8 images and normalised ones, by dtype."""
    rng = np.random.default_rng(0)
    return {
        "uint8": rng.integers(256, size=(8, 16, 16, 1), dtype=np.uint8),
        "float32": rng.normal(size=(8, 16, 16, 1)).astype(np.float32),
    }


@functools.cache
def network(name):
    """The network of a case, which nothing changes."""
    model = random_model(**CASES[name][0])
    model.pixels = Pixels((0.25,), (0.5,))
    return model


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder with a file of each case and what a process without this package computed with it."""
    folder = tmp_path_factory.mktemp("files")
    for name, images in inputs().items():
        np.save(folder / f"{name}.npy", images)
    for name, (_, folded, pixels, counts) in CASES.items():
        export_stablehlo(network(name), folder / f"{name}.zip", data={"counts": counts}, folded=folded, pixels=pixels)
    command = [sys.executable, "-W", "error", "-c", FRESH, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=_without_this_package())
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "jax" in imported and not imported & {"spiking_mlp_jax", "flax", "safetensors", "optax"}
    return folder


def _without_this_package():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_process_with_jax_alone_computes_the_same_bits(fresh, name):
    _, folded, pixels, counts = CASES[name]
    model = network(name)
    net = fold(model) if folded else model

    @jax.jit
    def logits(images):
        return jnp.mean(net(normalize(images, (0.25,), (0.5,)) if pixels else images), 0)

    images = inputs()["uint8" if pixels else "float32"]
    for count in counts:
        found = np.load(fresh / f"{name}.{count}.npy")
        assert found.shape == (count, 3) and np.ptp(found) > 0
        np.testing.assert_array_equal(found, logits(images[:count]))


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_a_program_belongs_to_one_platform_or_one_machine(fresh, name):
    loaded = load(fresh / f"{name}.zip")
    program = loaded.exported.mlir_module()
    assert set(re.findall(r"custom_call @(\w+)", program)) == {"shape_assertion"}
    assert program.count("custom_call") == 1 and "callback" not in program
    assert loaded.exported.platforms == ("cpu", "cuda", "tpu") == tuple(loaded.document["platforms"])
    content = (fresh / f"{name}.zip").read_bytes()
    assert b".py" not in content and b"f64" not in program.encode()


def test_this_package_reads_what_it_wrote(fresh):
    loaded = load(fresh / "folded.zip")
    assert loaded.config["depths"] == [1, 1] and loaded.data == {"counts": [1, 3, 8]}
    assert loaded.document["kind"] == "folded" and loaded.document["jax_version"] == jax.__version__
    images = inputs()["uint8"]
    np.testing.assert_array_equal(loaded(images), np.load(fresh / "folded.8.npy"))
    for wrong in (
        images[0],
        images[:0],
        images[:, :8],
        images.astype(np.float32),
        jnp.zeros((2, 16, 16, 3), "uint8"),
        3,
    ):
        with pytest.raises(InputError, match=r"images must be uint8 \[batch, 16, 16, 1\], got"):
            loaded(wrong)


def test_the_same_numbers_give_the_same_bytes_and_float64_is_rounded(fresh, tmp_path):
    fields, _, _, counts = CASES["kernels"]
    with jax.enable_x64(True):
        model = random_model(**fields)
        assert model.head.kernel.dtype == jnp.float64
        export_stablehlo(model, tmp_path / "kernels.zip", data={"counts": counts})
    assert (tmp_path / "kernels.zip").read_bytes() == (fresh / "kernels.zip").read_bytes()


def test_the_model_is_left_as_it_was_and_its_mode_does_not_matter(tmp_path):
    model = random_model(depths=(1,))
    export_stablehlo(model, tmp_path / "eval.zip")
    model.train()
    export_stablehlo(model, tmp_path / "train.zip")
    assert stablehlo_file.read(tmp_path / "eval.zip") == stablehlo_file.read(tmp_path / "train.zip")
    assert not model.norm.use_running_average


@pytest.mark.slow
def test_float_and_folded_give_the_same_classes_as_the_network_on_real_images(tmp_path):
    folder = weights.find("fashion_mnist")
    model, meta = weights.load(folder)
    c, data = model.config, meta["data"]
    source = open_source("fashion_mnist", "test", None)
    fitting = c.image_size, c.in_channels, data["resize_mode"], data["eval_resize"]
    images = np.stack([fit_image(source[i]["image"], *fitting) for i in range(200)])
    logits = []
    for options in ([], ["--folded"]):
        path = tmp_path / f"net{len(options)}.zip"
        assert main(["export-stablehlo", "fashion_mnist", "-o", str(path), "--pixels", *options]) == 0
        loaded = load(path)
        assert loaded.data == data and loaded.config["dim"] == c.dim
        logits.append(np.asarray(loaded(images)))
    expected = jax.jit(lambda x: jnp.mean(model(normalize(x, data["mean"], data["std"])), 0))(images)
    np.testing.assert_array_equal(logits[0], expected)
    np.testing.assert_array_equal(*(found.argmax(1) for found in logits))
    assert np.mean(logits[0].argmax(1) == [source[i]["label"] for i in range(200)]) > 0.85


def changed(path, target, **members):
    """A copy of a file with some members replaced, or left out where they are None, and a hash that fits."""
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    found |= {stablehlo_file.NETWORK: members["network"]} if "network" in members else {}
    document = json.loads(found[stablehlo_file.CONFIG])
    document |= members.get("document", {})
    document.setdefault("sha256", "")
    if "sha256" not in members.get("document", {}):
        document["sha256"] = hashlib.sha256(found[stablehlo_file.NETWORK] or b"").hexdigest()
    found[stablehlo_file.CONFIG] = json.dumps(document).encode()
    found |= members.get("raw", {})
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in found.items():
            if content is not None:
                archive.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(document={"format": 2}), "has format 2, but this version reads format 1"),
        (dict(document={"sha256": "0" * 64}), "is damaged: the hash"),
        (
            dict(document={"calling_convention_version": 99, "jax_version": "9.9"}),
            "was written by JAX 9.9 with",
        ),
        (dict(document={"calling_convention_version": None}), "with calling convention None"),
        (dict(document={"input": {"dtype": "uint8", "shape": ["b", 8, 8, 1]}}), '"input" in config.json of'),
        (dict(document={"output": 3}), '"output" in config.json of'),
        (dict(document={"model": None}), 'has no object "model"'),
        (dict(network=b""), "network.bin in .* cannot be read by JAX"),
        (dict(network=bytes(1000)), "network.bin in .* cannot be read by JAX"),
        (dict(network=b"abcd" * 300), "network.bin in .* cannot be read by JAX"),
        (dict(raw={"network.bin": None}), "has no network.bin: it is not a complete file"),
        (dict(raw={"config.json": None}), "has no config.json: it is not a complete file"),
        (dict(raw={"config.json": b"{"}), "cannot be read as JSON"),
        (dict(raw={"config.json": b"\xff"}), "cannot be read as JSON"),
        (dict(raw={"config.json": b"[]"}), "has format None"),
        (dict(raw={"config.json": bytes((1 << 20) + 1)}), "has 1,048,577 bytes, above the limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_told_in_a_sentence(fresh, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        load(changed(fresh / "kernels.zip", tmp_path / "changed.zip", **change))


def test_damaged_and_foreign_files(fresh, tmp_path):
    content = (fresh / "kernels.zip").read_bytes()
    path = tmp_path / "damaged.zip"
    rng = np.random.default_rng(0)
    damaged = [b"", b"not a zip", content[:-200], content[: len(content) // 2], content[1000:]]
    for _ in range(30):
        flipped = bytearray(content)
        flipped[rng.integers(content.find(b"README.txt"))] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    read = 0
    for wrong in damaged:
        path.write_bytes(wrong)
        # Some bits mean nothing to a reader, such as the date.
        try:
            load(path)
            read += 1
        except InputError as error:
            assert str(path) in str(error)
    assert read <= 3
    for missing in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(InputError, match="there is no file"):
            load(missing)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (stablehlo_file.CONFIG, stablehlo_file.NETWORK):
            archive.writestr(name, bytes(1000))
    bad = bytearray(packed.getvalue())
    bad[bad.find(stablehlo_file.CONFIG.encode()) + len(stablehlo_file.CONFIG)] = 0xFF
    path.write_bytes(bad)
    with pytest.raises(InputError, match="is not an exported network, or damaged"):
        load(path)


def test_another_platform_than_exported_for(tmp_path):
    export_stablehlo(random_model(depths=(1,)), tmp_path / "net.zip", platforms=("tpu", "cuda", "tpu"))
    loaded = load(tmp_path / "net.zip")
    assert loaded.exported.platforms == ("cuda", "tpu") and loaded.data is None
    with pytest.raises(InputError, match="exported for cuda, tpu, but this machine's platform is cpu"):
        loaded(inputs()["float32"])


def refusal(capsys, *arguments):
    assert main(["export-stablehlo", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_on_the_command_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "net.stablehlo.zip"
    for name, model in (("some", random_model(depths=(1,), norm="layer")), ("bare", random_model(depths=(1,)))):
        weights.save(tmp_path / name, model, meta_for(model) if name == "some" else {})
    some, bare = tmp_path / "some", tmp_path / "bare"
    assert 'there is no platform "gpu": the known ones are cpu, cuda, tpu' in refusal(
        capsys, some, "-o", out, "--platforms", "cpu,gpu"
    )
    assert 'did you mean "cuda"?' in refusal(capsys, some, "-o", out, "--platforms", "cudaa")
    assert "LayerNorm" in refusal(capsys, some, "-o", out, "--folded")
    assert "mean and std of the pixels are unknown" in refusal(capsys, bare, "-o", out, "--pixels")
    assert "cannot be written" in refusal(capsys, some, "-o", tmp_path)
    assert "cannot be written" in refusal(capsys, some, "-o", tmp_path / "no" / "net.zip")
    (tmp_path / "net.smlp").write_bytes(b"\x89SMLP\r\n\x1a")
    assert "is a compiled network" in refusal(capsys, tmp_path / "net.smlp", "-o", out)
    assert "there is no folder" in refusal(capsys, tmp_path / "none", "-o", out)
    with pytest.raises(InputError, match="expected a SpikingMLP, got FoldedNet"):
        export_stablehlo(fold(random_model(depths=(1,))), out)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="at least one platform is needed"):
        export_stablehlo(random_model(depths=(1,)), out, platforms=())
    monkeypatch.setattr(jax.export.Exported, "serialize", _no_flatbuffers)
    assert "pip install flatbuffers" in refusal(capsys, bare, "-o", out)
    assert not out.exists()


def _no_flatbuffers(_):
    raise ImportError("Please install 'flatbuffers' in order to use Exported serialization")


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    model = random_model(depths=(1,))
    weights.save(tmp_path / "weights", model, meta_for(model))
    out = tmp_path / "net.stablehlo.zip"
    arguments = [str(tmp_path), "-o", str(out), "--pixels", "--platforms", "tpu, cpu"]
    assert main(["export-stablehlo", *arguments]) == 0
    said = capsys.readouterr().out
    assert f"{out.stat().st_size:,} bytes, for cpu, tpu" in said
    assert "images uint8 [b, 16, 16, 1], pixels" in said and "logits float32 [b, 3], averaged over 2 time steps" in said
    with zipfile.ZipFile(out) as archive:
        assert "(8, 16, 16, 1)" in archive.read("README.txt").decode()
        assert {info.date_time[0] for info in archive.infolist()} == {1980}


def test_the_lines_in_the_file_run(tmp_path):
    export_stablehlo(random_model(depths=(1,)), tmp_path / "net's.zip")
    with zipfile.ZipFile(tmp_path / "net's.zip") as archive:
        readme = archive.read("README.txt").decode()
    lines = [line[4:] for line in readme.splitlines() if line.startswith("    ") and "pip" not in line]
    names: dict = {}
    exec("\n".join(lines).replace("net's.zip", f"{tmp_path}/net's.zip"), names)
    assert names["logits"].shape == (8, 3)
