"""ONNX files, run by onnxruntime: the folded network's numbers and the integer network's integers."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest

from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.deploy import artifact, ranges, reference
from spiking_mlp_jax.deploy.engine import Engine
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.quantize import quantize
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.onnx import graph as onnx_graph
from spiking_mlp_jax.interop.onnx.floating import float_model
from spiking_mlp_jax.interop.onnx.integer import integer_model
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import normalize
from tests.support.artifacts import tiny_net
from tests.support.random_integer import random_images, random_integer_net
from tests.support.random_model import CLASSES, make_workdir, meta_for, random_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def session(model, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    given = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def output(model, images, name="logits"):
    return session(model).run([name], {"images": images})[0]


def computed(folded, images):
    """The folded network's own logits, averaged over the steps."""
    return np.asarray(jax.jit(lambda folded, images: folded(images))(folded, images)).mean(0)


def rounded(x, steps):
    return np.round(np.clip(x, -3, 3) * steps).astype(np.float32) / steps


def on_a_grid(folded):
    """The network with numbers of few bits: sums in float32 are exact then, in whatever order, and so are spikes."""
    arrays = {
        layer: {
            key: x if x.dtype == bool else rounded(np.asarray(x), 2**12 if layer == "head" else 16)
            for key, x in entries.items()
        }
        for layer, entries in folded.arrays.items()
    }
    for layer, entries in arrays.items():
        if layer.endswith(".neurons"):
            entries["tau"] = np.float32(2 if "height" in layer else 4)
    return dataclasses.replace(folded, arrays=arrays)


VARIANTS = [
    dict(),
    dict(norm_features="channel"),
    dict(encoding="plain"),
    dict(encoding="plain", norm_features="channel", norm="tebn", in_channels=3),
    dict(norm="tebn"),
    dict(norm="tdbn", time_steps=1),
    dict(neuron="if", v_reset=-0.25),
    dict(neuron="plif", encoding="plain"),
    dict(neuron="plif", tau_per_channel=True),
    dict(neuron="plif", v_reset=None, norm="tebn", decay_input=False),
    dict(v_reset=None),
    dict(v_reset=-0.25, v_threshold=0.75, tau=4.0),
    dict(decay_input=False, v_reset=-0.5, norm_features="channel", time_steps=3),
    dict(tau=3.0, norm_features="channel"),
    dict(tau=3.0, decay_input=False, encoding="plain"),
    dict(depths=(2, 1, 1), time_steps=4),
    dict(depths=(1,), patch_size=2, dim=5),
]


def variant(seed=0, **fields):
    """A folded network on the grid with scales of both signs and zero, and pixels that are on it too."""
    folded = fold(random_model(seed, **fields))
    for layer, entries in folded.arrays.items():
        if layer.endswith(".expand") and "below" in entries:
            tokens = np.arange(len(entries["below"]))
            entries["constant"] = tokens % 5 == 1
            entries["below"] = (tokens % 3 == 0) & (tokens % 5 != 1)
    images = np.random.default_rng(seed).integers(-16, 17, (7, 16, 16, folded.config.in_channels)) / 8
    return on_a_grid(folded), images.astype(np.float32)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_variant_in_floating_point(fields):
    folded, images = variant(seed=3, **fields)
    expected = computed(folded, images)
    model = session(float_model(folded))
    for count in (1, 3, 7):
        found = model.run(["logits"], {"images": images[:count]})[0]
        # The last mean alone may round.
        np.testing.assert_allclose(found, expected[:count], rtol=1e-6, atol=1e-6)
    assert np.ptp(expected, 0).max() > 0.01, "images that all give the same show nothing"


@functools.cache
def shipped(name="fashion_mnist", count=64):
    """A shipped network, folded, and test images of its own."""
    model, meta = weights.load(weights.find(name))
    c, data = model.config, meta["data"]
    source = open_source(data["dataset"], "test")
    fitting = c.image_size, c.in_channels, data["resize_mode"], data["eval_resize"]
    return fold(model), data, np.stack([fit_image(source[i]["image"], *fitting) for i in range(count)])


def test_real_images_in_floating_point():
    folded, data, images = shipped()
    expected = computed(folded, normalize(images, data["mean"], data["std"]))
    model = session(float_model(folded, pixels=True, data=data))
    found = model.run(None, {"images": images})[0]
    # Sums are taken in another order: a potential next to its threshold may fall on the other side, and one spike more
    # moves a logit visibly. Nearly all images have no such potential and differ by roundings.
    apart = np.abs(found - expected).max(1)
    assert np.mean(apart < 1e-4) > 0.9
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.99
    normalised = float_model(folded, data=data)
    np.testing.assert_array_equal(output(normalised, normalize(images, data["mean"], data["std"])), found)


def test_real_images_in_integers():
    folded, _, images = shipped()
    net = quantize(folded, images[:8])
    model = session(integer_model(net))
    logits, steps = model.run(["logits", "step_logits"], {"images": images})
    engine = Engine(net, 1)
    np.testing.assert_array_equal(steps, engine.logits(images))
    np.testing.assert_allclose(logits, engine.predict(images) * engine.score_scale / 4, rtol=1e-6)
    # One image at a time gives the same.
    np.testing.assert_array_equal(model.run(["step_logits"], {"images": images[:1]})[0], steps[:, :1])


def test_integers_are_the_references():
    nets = [random_integer_net(seed) for seed in range(14)]
    for name in ("encoding", "per_token", "neuron", "decay_input", "soft_reset", "leak", "time_steps", "bits"):
        assert len({getattr(net.description, name) for net in nets}) > 1
    assert {len(net.arrays["head.kernel"]) for net in nets} >= {1, 4}
    for seed, net in enumerate(nets):
        images, model = random_images(net, 7, seed), session(integer_model(net))
        expected = reference.run(net, images)
        for count in (1, 3, 7) if seed < 6 else (7,):
            found = model.run(["step_logits"], {"images": images[:count]})[0]
            np.testing.assert_array_equal(found, expected[:, :count], str(seed))


def wide(net, seed):
    """The network with potentials that need all 32 bits at every place that the range analysis lets grow."""
    rng = np.random.default_rng(seed)
    arrays = {name: x.copy() for name, x in net.arrays.items()}
    for name, x in arrays.items():
        if name.endswith((".bias", ".offset")):
            for size in (1 << 30, 1 << 29, 1 << 28):
                before = x.copy()
                x += rng.choice([-size, 0, size], x.shape).astype(np.int32)
                try:
                    ranges.check(IntegerNet(net.description, arrays))
                    break
                except InputError:
                    x[...] = before
    arrays["head.shift"].flat[0] = -31
    return IntegerNet(net.description, arrays)


def test_potentials_of_32_bits():
    seen = set()
    for seed in range(8):
        c = random_integer_net(seed).description
        net = random_integer_net(seed, per_token=seed % 2 == 0, soft_reset=seed % 3 == 0)
        formats = {place: dataclasses.replace(form, word=32) for place, form in net.description.formats.items()}
        net = wide(IntegerNet(dataclasses.replace(net.description, formats=formats), net.arrays), seed)
        seen |= {place.rpartition(".")[2] for place, found in ranges.check(net).items() if ranges.bits(*found) == 32}
        images = random_images(net, 3, seed)
        np.testing.assert_array_equal(
            output(integer_model(net), images, "step_logits"), reference.run(net, images), str(c)
        )
    assert seen >= {"stage0", "height", "width", "hidden", "head"}


def test_the_file_says_what_it_is():
    folded, data, _ = shipped()
    for model, kind in (
        (float_model(folded, pixels=True, data=data), onnx.TensorProto.UINT8),
        (float_model(folded, data=data), onnx.TensorProto.FLOAT),
        (integer_model(tiny_net(1)), onnx.TensorProto.UINT8),
    ):
        onnx.checker.check_model(model, full_check=True)
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)] and model.ir_version == 8
        assert model.graph.input[0].type.tensor_type.elem_type == kind
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        said = {each.key: json.loads(each.value) for each in model.metadata_props}
        assert said["config"]["depths"] and said["classes"] and set(said["preprocessing"]) >= {"mean", "std"}
    said = session(float_model(folded, data=data)).get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == data["class_names"]
    assert json.loads(said["preprocessing"])["mean"] == data["mean"]


def test_weights_are_stored_once_for_all_steps():
    sizes = [
        sum(len(each.raw_data) for each in float_model(fold(random_model(time_steps=t))).graph.initializer)
        for t in (2, 8)
    ]
    assert sizes[1] < 1.01 * sizes[0]
    assert sizes[0] < 1.2 * sum(4 * x.size for e in fold(random_model()).arrays.values() for x in e.values())


def test_what_cannot_be_exported(monkeypatch):
    folded = fold(random_model())
    arrays = {**folded.arrays, "head": {**folded.arrays["head"], "bias": np.full((1, 3), np.nan)}}
    with pytest.raises(InputError, match="head has a bias with NaN or inf"):
        float_model(dataclasses.replace(folded, arrays=arrays))
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="the weights need more than the 1,000 bytes"):
        float_model(folded)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run"), random_model(norm_features="channel"))


def refusal(capsys, *arguments):
    assert main(["export-onnx", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_the_command(workdir, tmp_path, monkeypatch, capsys):
    network, out = tmp_path / "net.smlp", tmp_path / "float.onnx"
    artifact.save(tiny_net(2), network)
    assert main(["export-onnx", str(network)]) == 0
    said = capsys.readouterr().out
    assert "opset 17" in said and f"{(tmp_path / 'net.onnx').stat().st_size:,} bytes" in said
    images = random_images(tiny_net(2), 2)
    found = session(str(tmp_path / "net.onnx")).run(["step_logits"], {"images": images})[0]
    np.testing.assert_array_equal(found, reference.run(tiny_net(2), images))
    assert main(["export-onnx", str(workdir), "-o", str(out), "--pixels"]) == 0
    ends = session(str(out)).get_inputs()[0], session(str(out)).get_outputs()[0]
    assert [(end.name, end.type, end.shape) for end in ends] == [
        ("images", "tensor(uint8)", ["batch", 16, 16, 1]),
        ("logits", "tensor(float)", ["batch", 3]),
    ]
    assert json.loads(session(str(out)).get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)
    monkeypatch.chdir(tmp_path)
    assert main(["export-onnx", str(workdir / "weights")]) == 0
    assert (workdir / "weights.onnx").is_file() and not list(tmp_path.glob("*.tmp"))


def test_wrong_input(workdir, tmp_path, monkeypatch, capsys):
    network = tmp_path / "net.smlp"
    artifact.save(tiny_net(2), network)
    data = bytearray(network.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.smlp").write_bytes(data)
    assert "hash does not match" in refusal(capsys, tmp_path / "damaged.smlp")
    assert "there is no file" in refusal(capsys, tmp_path / "missing.smlp")
    assert "there is no folder" in refusal(capsys, tmp_path / "missing")
    assert "is the network itself" in refusal(capsys, network, "-o", network)
    assert "cannot be written" in refusal(capsys, network, "-o", tmp_path)
    assert "cannot be written" in refusal(capsys, network, "-o", tmp_path / "no" / "net.onnx")
    layer = random_model(norm="layer")
    weights.save(tmp_path / "layer", layer, meta_for(layer))
    assert "LayerNorm" in refusal(capsys, tmp_path / "layer")
    for name in ("onnx", "onnx.checker"):
        monkeypatch.setitem(sys.modules, name, None)
    for where in (network, workdir):
        assert "pip install 'spiking-mlp-jax[export]'" in refusal(capsys, where)
    assert not list(tmp_path.glob("*.onnx"))
