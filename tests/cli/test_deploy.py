"""`spiking-mlp` with compiled networks: compile, predict, evaluate, audit, export-c."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.deploy import artifact, reference
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.deploy.quantize import quantize
from spiking_mlp_jax.models import weights
from tests.support.random_model import CLASSES, make_data, make_workdir, meta_for, random_model

# What an edge device does not have. Importing any of it fails.
NOT_INSTALLED = (
    *("jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain", "ml_collections"),
    *("tensorflow_datasets", "safetensors", "matplotlib"),
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = make_workdir(tmp_path_factory.mktemp("run"), random_model(norm_features="channel"))
    make_data(folder / "data", split="train")
    return folder


@pytest.fixture(scope="module")
def network(workdir):
    path = workdir / "net.smlp"
    assert main(["compile", str(workdir), "-o", str(path), "--images", "8"]) == 0
    return path


def an_image(workdir):
    return str(next((workdir / "data" / "test" / CLASSES[0]).iterdir()))


def answer(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_compile_says_what_it_made(workdir, capsys, tmp_path):
    path = tmp_path / "small.smlp"
    assert (
        main(["compile", str(workdir / "weights"), "-o", str(path), "--bits", "4", "--data-dir", str(workdir / "data")])
        == 0
    )
    said = capsys.readouterr().out
    net = artifact.load(path)
    assert "4 bits" in said and f"{path.stat().st_size:,} bytes" in said
    assert net.description.bits == 4 and net.description.data["class_names"] == list(CLASSES)


def test_predict(workdir, network, capsys):
    image = an_image(workdir)
    found = answer(capsys, "predict", network, image, "--json", "--top", 3)
    scores = {entry["class"]: entry["score"] for entry in found["images"][0]["classes"]}
    assert set(scores) == set(CLASSES) and sum(scores.values()) == pytest.approx(1)
    floating = answer(capsys, "predict", workdir, image, "--json", "--top", 3)
    for entry in floating["images"][0]["classes"]:
        assert scores[entry["class"]] == pytest.approx(entry["score"], abs=0.25)


def test_predict_without_jax(workdir, network):
    code = f"""
import sys
for name in {NOT_INSTALLED!r}:
    sys.modules[name] = None
from spiking_mlp_jax.cli.main import main
sys.exit(main(["predict", {str(network)!r}, {an_image(workdir)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert CLASSES[0] in done.stdout


def test_steps_and_margin(workdir, network, capsys):
    image = an_image(workdir)
    one = answer(capsys, "predict", network, image, "--json", "--steps", 1)
    assert "1 time step" in one["score"]
    early = answer(capsys, "predict", network, image, "--json", "--margin", 0)
    assert early["images"][0]["steps"] == 1
    never = answer(capsys, "predict", network, image, "--json", "--margin", "inf")
    assert never["images"][0]["steps"] == 2
    assert "steps must be an integer between 1 and 2, got 3" in refusal(capsys, "predict", network, image, "--steps", 3)
    assert "--margin needs a compiled network (.smlp)" in refusal(capsys, "predict", workdir, image, "--margin", 1)


def test_evaluate(workdir, network, capsys):
    found = answer(capsys, "evaluate", network, "--data-dir", workdir / "data", "--against", workdir, "--json")
    assert found["images"] == 12 and 0 <= found["accuracy"] <= 1 and found["steps"] == 2
    net = artifact.load(network)
    from spiking_mlp_jax.data.sources import open_source

    source = open_source("folder", "test", str(workdir / "data"))
    items = [source[i] for i in range(len(source))]
    classes = reference.run(net, np.stack([item["image"] for item in items])).sum(0).argmax(1)
    assert found["accuracy"] == np.mean(classes == [item["label"] for item in items])
    assert main(["evaluate", str(network), "--data-dir", str(workdir / "data"), "--limit", "5"]) == 0
    assert "of 5 test images" in capsys.readouterr().out


def test_audit(workdir, network, capsys):
    assert main(["audit", str(network)]) == 0
    table = capsys.readouterr().out
    assert "accumulate" in table and "multiplication " not in table and "ok: no multiplication" in table
    assert main(["audit", str(network), "--compiled"]) == 0
    assert main(["audit", str(workdir)]) == 1
    assert "not ok" in capsys.readouterr().out
    assert main(["audit", str(workdir), "--folded"]) == 1
    left = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "multiplication " in line}
    assert left == {"stage0.encode", "head"} or left == {"stage0.encode", "dot_general"}


def test_export_c_keeps_its_input(network, tmp_path, capsys):
    before = network.read_bytes()
    (tmp_path / "net.c").write_bytes(before)
    for arguments in (["export-c", network, "-o", network], ["export-c", tmp_path / "net.c"]):
        assert "is the network itself" in refusal(capsys, *arguments)
    assert network.read_bytes() == before == (tmp_path / "net.c").read_bytes()


WITHOUT_JAX = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from spiking_mlp_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "status"),
    [("evaluate {} --data-dir {}/../data", 0), ("audit {}", 2), ("cost {}", 2), ("compile x -o {}.2.smlp", 2)],
)
def test_without_jax(network, command, status):
    arguments = [part.format(network).replace("net.smlp/..", "") for part in command.split()]
    done = subprocess.run([sys.executable, "-c", WITHOUT_JAX, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr.startswith("error: this needs jax") and done.stderr.count("\n") == 1, done.stderr


def test_export_c(network, capsys):
    assert main(["export-c", str(network)]) == 0
    assert "bytes of RAM" in capsys.readouterr().out
    assert "*" not in network.with_suffix(".c").read_text()


def test_mistakes(workdir, network, capsys, tmp_path):
    (tmp_path / "foreign.smlp").write_text("not a network")
    assert "foreign.smlp" in refusal(capsys, "predict", tmp_path / "foreign.smlp", an_image(workdir))
    assert "missing.smlp" in refusal(capsys, "audit", tmp_path / "missing.smlp")
    assert "cannot be written" in refusal(capsys, "compile", workdir, "-o", tmp_path / "no" / "net.smlp")
    assert "from 2 to 8, got 9" in refusal(capsys, "compile", workdir, "-o", tmp_path / "net.smlp", "--bits", 9)
    assert "--folded needs a trained network" in refusal(capsys, "audit", network, "--folded")
    assert "--compiled needs a compiled network (.smlp), got" in refusal(capsys, "audit", workdir, "--compiled")
    assert "export-c needs a compiled network (.smlp), got" in refusal(capsys, "export-c", workdir)
    assert not list(tmp_path.glob("*net.smlp*"))


def test_layer_norm_cannot_be_compiled(capsys, tmp_path):
    folder = make_workdir(tmp_path / "run", random_model(norm="layer"))
    make_data(folder / "data", split="train")
    assert "LayerNorm" in refusal(capsys, "compile", folder, "-o", tmp_path / "net.smlp")


def test_weights_without_data(capsys, tmp_path):
    weights.save(tmp_path / "bare", random_model(), {})
    assert 'no "data"' in refusal(capsys, "compile", tmp_path / "bare", "-o", tmp_path / "net.smlp")


def test_pixels(compiled_for_pixels, tmp_path, capsys):
    network, c = compiled_for_pixels
    pixels = np.random.default_rng(0).integers(0, 256, (2, c.image_size, c.image_size), np.uint8)
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(name)
    assert main(["pixels", str(network), *names, "-o", str(tmp_path / "images.bin")]) == 0
    assert (tmp_path / "images.bin").read_bytes() == pixels.tobytes()
    capsys.readouterr()
    for output in (names[0], str(network)):
        assert main(["pixels", str(network), *names, "-o", output]) == 2
        assert "would be overwritten" in capsys.readouterr().err


@pytest.fixture
def compiled_for_pixels(tmp_path):
    model = random_model(depths=(1,))
    net = quantize(fold(model, (0.3,), (0.4,)), np.zeros((1, 16, 16, 1), np.uint8), data=meta_for(model)["data"])
    artifact.save(net, tmp_path / "net.smlp")
    return tmp_path / "net.smlp", net.description
