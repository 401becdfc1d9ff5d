"""`spiking-mlp convert` and PyTorch: modules of SpikingJelly's layers load our files, and we theirs; same logits."""

import argparse
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.interop import official
from spiking_mlp_jax.interop.official.files import read_state
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import normalize
from tests.interop.test_convert import Touch, refusal, said
from tests.support.random_model import meta_for, random_model, variables

torch = pytest.importorskip("torch", reason="PyTorch is in the environment of `make test-tools`")
pytest.importorskip("spikingjelly", reason="SpikingJelly is in the environment of `make test-tools`")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.tools

KINDS = [
    dict(),
    dict(encoding="plain", norm_features="channel"),
    dict(v_reset=None, decay_input=False, tau=1.5),
]
STATISTICS = ["--mean", 0.25, "--std", 0.5]


def twin_of(config):
    """The PyTorch module with the official names, in float64 and evaluation mode."""
    from benchmarks.spikingjelly_twin import Twin

    return Twin(config).double().eval()


def theirs(twin, images):
    """Logits [T, B, K] of a module for images [B, H, W, C]."""
    with torch.no_grad():
        return twin(torch.from_numpy(np.asarray(images, np.float64)).permute(0, 3, 1, 2)).numpy()


def in_float64(model):
    """A network whose float32 numbers have become float64, as `Module.double()` does."""
    for variable in variables(model).values():
        if jnp.issubdtype(variable.dtype, jnp.floating):
            variable.set_value(jnp.asarray(np.asarray(variable[...]), jnp.float64))
    return model


def ours(folder, images):
    """Logits [T, B, K] of a weights folder in float64."""
    model = in_float64(weights.load(folder)[0])
    return np.asarray(jax.jit(lambda x: model(x))(jnp.asarray(images, jnp.float64)))


def images_for(config, count=3):
    size = (count, config.image_size, config.image_size, config.in_channels)
    return np.random.default_rng(1).normal(size=size)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def loaded(path):
    return safetensors_torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def random_twin(**kind):
    """A module with random weights and statistics, all of them float32 numbers, and its configuration."""
    model = random_model(**kind)
    twin = twin_of(model.config)
    twin.load_official(official.state_dict(model))
    return twin.float().double(), model.config


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_module_loads_what_we_write(kind, suffix, tmp_path, capsys, x64):
    model = random_model(**kind)
    weights.save(tmp_path / "net", model, meta_for(model))
    file = tmp_path / f"net{suffix}"
    said(capsys, tmp_path / "net", "-o", file)
    twin = twin_of(model.config)
    assert str(twin.load_state_dict(loaded(file), strict=True)) == "<All keys matched successfully>"
    images = images_for(model.config)
    expected = theirs(twin, images)
    assert np.ptp(expected) > 0.1
    close(ours(tmp_path / "net", images), expected)
    # And back, bit for bit, without the network.
    said(capsys, file, "-o", tmp_path / "again", "--like", tmp_path / "net")
    for name, array in official.state_dict(weights.load(tmp_path / "again")[0]).items():
        assert array.tobytes() == official.state_dict(model)[name].tobytes()


@pytest.mark.parametrize("name", weights.pretrained_names())
def test_shipped_networks_in_pytorch(name, tmp_path, capsys, x64):
    file = tmp_path / "net.pth"
    said(capsys, name, "-o", file)
    config, meta = weights.read_config(weights.find(name))
    data = meta["data"]
    source = open_source("fashion_mnist", "test")
    pixels = np.stack([np.pad(np.squeeze(source[i]["image"]), 2) for i in range(0, 10000, 250)])[..., None]
    if config.in_channels == 3:
        # CIFAR-10 does not come with the package: coloured garments on coloured grounds stand in for its images.
        light, dark = np.random.default_rng(0).integers(0, 256, (2, len(pixels), 1, 1, 3))
        pixels = (dark + pixels / 255 * (light - dark)).astype(np.uint8)
    images = normalize(pixels, data["mean"], data["std"])
    twin = twin_of(config)
    twin.load_state_dict(loaded(file), strict=True)
    expected, found = theirs(twin, images), ours(weights.find(name), images)
    close(found, expected)
    classes = found.mean(0).argmax(1)
    np.testing.assert_array_equal(classes, expected.mean(0).argmax(1))
    assert len(set(classes.tolist())) > 2


def checkpoint(twin, shape):
    """What training scripts save of a module."""
    state = {name: x.float() if x.is_floating_point() else x for name, x in twin.state_dict().items()}
    if shape == "plain":
        return state
    if shape == "distributed":
        return {f"module.{name}": x for name, x in state.items()}
    if shape == "wrapped":
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9).state_dict()
        arguments = argparse.Namespace(lr=0.1, model="mlp", betas=[0.9, 0.99], opt=None)
        return {"model": state, "optimizer": optimizer, "epoch": 3, "args": arguments}
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[shape]
    return {"state_dict": {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("shape", ["plain", "distributed", "wrapped", "float16", "bfloat16"])
def test_checkpoints_of_a_module_give_its_logits(shape, zipped, tmp_path, capsys, x64):
    twin, config = random_twin(time_steps=3)
    saved = checkpoint(twin, shape)
    torch.save(saved, tmp_path / "official.pth.tar", _use_new_zipfile_serialization=zipped)
    heard = said(capsys, tmp_path / "official.pth.tar", "-o", tmp_path / "net", "--set", "time_steps=3", *STATISTICS)
    assert not heard.err and "given: time_steps 3" in heard.out
    if shape.endswith("16"):
        # The module with the rounded numbers is what has been handed over.
        twin.load_state_dict(saved["state_dict"])
    images = images_for(config)
    close(ours(tmp_path / "net", images), theirs(twin, images))


def test_float64_and_both_libraries_of_safetensors(tmp_path, capsys, x64):
    twin, config = random_twin()
    with torch.no_grad():
        twin.mlp_head[1].weight += 1e-12  # no longer a float32 number
    state = {name: x.contiguous() for name, x in twin.state_dict().items()}
    safetensors_torch.save_file(state, tmp_path / "a.safetensors")
    said(capsys, tmp_path / "a.safetensors", "-o", tmp_path / "net", "--set", "time_steps=2", *STATISTICS)
    said(capsys, tmp_path / "net", "-o", tmp_path / "b.safetensors")
    again = safetensors_torch.load_file(tmp_path / "b.safetensors")
    assert set(again) == set(state) and all(torch.equal(again[name], x) for name, x in state.items())
    images = images_for(config)
    close(ours(tmp_path / "net", images), theirs(twin, images))
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in state.items()}
    safetensors_torch.save_file(half, tmp_path / "half.safetensors")
    for name, array in read_state(tmp_path / "half.safetensors").items():
        np.testing.assert_array_equal(array, half[name].float().numpy() if half[name].is_floating_point() else array)
        assert array.dtype != np.float64


def test_checkpoints_with_several_states_ask_for_a_key(tmp_path, capsys):
    twin, _ = random_twin()
    state = checkpoint(twin, "plain")
    moved = {**state, "mlp_head.1.bias": state["mlp_head.1.bias"] + 1}
    torch.save({"model": state, "model_ema": moved}, file := tmp_path / "two.pth")
    assert '"model", "model_ema": choose one with --key' in refusal(capsys, file, "-o", tmp_path / "net")
    assert 'did you mean "model_ema"' in refusal(capsys, file, "-o", tmp_path / "net", "--key", "model_em")
    said(capsys, file, "-o", tmp_path / "net", "--key", "model_ema", *STATISTICS)
    bias = variables(weights.load(tmp_path / "net")[0])["head.bias"][...]
    np.testing.assert_array_equal(bias, moved["mlp_head.1.bias"].numpy())
    torch.save(state, file)
    assert "needs no --key" in refusal(capsys, file, "-o", tmp_path / "net", "--key", "model")
    for nothing in ({}, {"epoch": 3}, [state], state["mlp_head.1.bias"]):
        torch.save(nothing, file)
        assert "holds no state_dict" in refusal(capsys, file, "-o", tmp_path / "net")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_run(zipped, tmp_path, capsys):
    twin, _ = random_twin()
    mark, file = tmp_path / "mark", tmp_path / "bad.pth"
    torch.save({"model": checkpoint(twin, "plain"), "x": Touch(mark)}, file, _use_new_zipfile_serialization=zipped)
    assert "holds code (io.open), which was not run" in refusal(capsys, file, "-o", tmp_path / "net")
    torch.save(twin, file, _use_new_zipfile_serialization=zipped)
    assert "holds code (benchmarks.spikingjelly_twin.Twin)" in refusal(capsys, file, "-o", tmp_path / "net")
    # A Namespace is let through, but not what is hidden in it.
    hidden = argparse.Namespace(lr=Touch(mark))
    torch.save({"model": checkpoint(twin, "plain"), "args": hidden}, file, _use_new_zipfile_serialization=zipped)
    assert "holds code" in refusal(capsys, file, "-o", tmp_path / "net")
    assert not mark.exists() and sorted(os.listdir(tmp_path)) == ["bad.pth"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_files_of_pytorch_are_refused(zipped, tmp_path, capsys):
    twin, _ = random_twin()
    file = tmp_path / "cut.pth"
    torch.save(checkpoint(twin, "plain"), file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    for length in (3, 20, 200, len(content) // 2, len(content) - 4):
        file.write_bytes(content[:length])
        assert "cut.pth" in refusal(capsys, file, "-o", tmp_path / "net")
    file.write_bytes(b"\x80\x02" + struct.pack("<Q", 7) * 20)
    assert "cut.pth" in refusal(capsys, file, "-o", tmp_path / "net")


def test_tensors_that_are_no_plain_arrays_are_refused(tmp_path, capsys):
    twin, _ = random_twin()
    state = checkpoint(twin, "plain")
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        torch.save({**state, "mlp_head.1.bias": tensor}, tmp_path / "odd.pth")
        assert '"mlp_head.1.bias"' in refusal(capsys, tmp_path / "odd.pth", "-o", tmp_path / "net")


def test_what_else_checkpoints_hold(tmp_path, capsys):
    twin, _ = random_twin()
    state, file = checkpoint(twin, "plain"), tmp_path / "net.pth"
    beside = {"best": np.float64(71.2), "scaler": {"scale": torch.ones(1)}, "args": argparse.Namespace(lr=0.1)}
    torch.save({"state_dict": state, **beside}, file)
    said(capsys, file, "-o", tmp_path / "one", *STATISTICS)
    torch.save({"checkpoint": {"model": state, "optimizer": {"m": torch.ones(2)}}, **beside}, file)
    said(capsys, file, "-o", tmp_path / "two", "--key", "checkpoint.model", *STATISTICS)
    for name in ("one", "two"):
        bias = variables(weights.load(tmp_path / name)[0])["head.bias"][...]
        np.testing.assert_array_equal(bias, state["mlp_head.1.bias"].numpy())
    assert '"checkpoint.model"' in refusal(capsys, file, "-o", tmp_path / "net", "--key", "checkpoint.modle")
