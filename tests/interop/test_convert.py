"""`spiking-mlp convert`: official weights to weights folders and back, bit for bit and running nothing."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.cli.weights import _class_names
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop import official
from spiking_mlp_jax.interop.official.config import infer_config, possible_fields
from spiking_mlp_jax.interop.official.files import read_state, write_state
from spiking_mlp_jax.models import weights
from tests.models.test_official import FILES, GOLDEN, close, entries
from tests.support.random_model import meta_for, random_model, variables
from tests.support.tiny import tiny_config

KINDS = [
    dict(),
    dict(encoding="plain", neuron="plif", decay_input=False),
    dict(norm="tebn", time_steps=3, norm_features="channel"),
    dict(norm="tdbn", norm_features="channel", v_threshold=0.7, v_reset=None),
    dict(norm="layer", encoding="plain", tau=1.5, depths=(2, 1)),
    dict(neuron="plif", norm="tebn", depths=(1,), in_channels=3, num_classes=5, expansion=3),
    dict(neuron="if", depths=(1, 1, 1), image_size=32),
]
NORMALISED = ["--mean", "0.5", "--std", "0.25"]


def abstract_state(**kind):
    """The names and shapes of a configuration's official state, without its numbers."""
    config = tiny_config(**kind)
    model = nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    for variable in variables(model).values():
        variable.set_value(np.zeros(variable.shape, variable.dtype))
    return config, official.state_dict(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A weights folder, its model, and the model's official state."""
    folder = tmp_path_factory.mktemp("saved") / "net"
    model = random_model()
    weights.save(folder, model, meta_for(model))
    return folder, model, official.state_dict(model)


def said(capsys, *arguments):
    assert main(["convert", *map(str, arguments)]) == 0
    return capsys.readouterr()


def refusal(capsys, *arguments):
    assert main(["convert", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def same(a, b):
    assert list(a) == list(b) or set(a) == set(b)
    for name, array in a.items():
        assert array.dtype == b[name].dtype and array.shape == b[name].shape
        assert array.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(("kind", "suffix"), [*zip(KINDS, [".npz", ".safetensors"] * 4, strict=False)], ids=str)
def test_a_folder_comes_back_from_a_file_bit_for_bit(kind, suffix, tmp_path, capsys):
    model = random_model(**kind)
    c = model.config
    meta = meta_for(model, class_names=[f"kind {i}" for i in range(c.num_classes)])
    weights.save(tmp_path / "a", model, meta)
    file = tmp_path / f"net{suffix}"
    said(capsys, tmp_path / "a", "-o", file)
    same(read_state(file), official.state_dict(model))
    other = tmp_path / "other.safetensors" if suffix == ".npz" else tmp_path / "other.npz"
    write_state(other, read_state(file))
    same(read_state(other), official.state_dict(model))
    said(capsys, file, "-o", tmp_path / "b", "--like", tmp_path / "a")
    config, found = weights.read_config(tmp_path / "b")
    assert config == c and found["data"] == meta["data"]
    assert found["converted_from"] == {"file": file.name, "assumed": []}
    assert (tmp_path / "a" / weights.TENSORS).read_bytes() == (tmp_path / "b" / weights.TENSORS).read_bytes()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_names_and_shapes_tell_the_configuration(kind):
    config, state = abstract_state(**kind)
    possible = possible_fields(state)
    for name, values in possible.items():
        assert getattr(config, name) in values
    untold = {name: value for name, value in kind.items() if len(possible.get(name, ())) != 1}
    untold.setdefault("time_steps", config.time_steps)
    assert infer_config(state, **untold) == config
    # The names that distributed training adds do not matter.
    norms = {name.rsplit(".", 1)[0] for name in state if name.endswith("running_mean")}
    wrapped = {}
    for name, array in state.items():
        module, leaf = name.rsplit(".", 1)
        wrapped[f"module.{module}.0.{leaf}" if module in norms else f"module.{name}"] = array
    assert infer_config(wrapped, **untold) == config


def test_what_nothing_tells_is_as_in_the_paper():
    c = infer_config(abstract_state()[1])
    assert (c.time_steps, c.norm, c.neuron, c.tau, c.v_threshold, c.v_reset) == (4, "batch", "lif", 2.0, 1.0, 0.0)
    assert c.decay_input and infer_config(abstract_state(norm="tebn", time_steps=3)[1]).time_steps == 3


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("depths", (2, 2), "(1, 2)"),
        ("encoding", "plain", '"spe"'),
        ("norm", "tebn", '"batch" or "tdbn"'),
        ("neuron", "plif", '"lif" or "if"'),
        ("norm_features", "channel", '"token"'),
        ("image_size", 32, "16"),
    ],
)
def test_a_field_that_contradicts_the_weights_is_refused(field, value, told):
    with pytest.raises(InputError) as caught:
        infer_config(abstract_state()[1], **{field: value})
    assert field in str(caught.value) and str(value) in str(caught.value) and told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("to_patch_embedding.0.0.weight"), '"to_patch_embedding.0.0.weight"'),
        (lambda s: s.pop("mlp_head.1.bias"), '"mlp_head.1.bias"'),
        (lambda s: s.update({"mlp_head.1.bias": np.zeros(())}), "1 axes"),
        (lambda s: s.update({"token_mix.1.proj_w.1.weight": np.zeros((3, 3, 1, 1))}), "square"),
        (lambda s: s.update({"token_mix.7.x": np.zeros(1)}), "token_mix.0"),
        (lambda s: s.update({"to_patch_embedding.2.x": np.zeros(1)}), "3 stages"),
        (lambda s: s.update({"channel_mix.0.1.net.0.weight": np.zeros((7, 6))}), "not a multiple"),
        (lambda s: s.clear(), "to_patch_embedding"),
    ],
)
def test_states_of_no_network_are_refused(change, message):
    state = abstract_state()[1]
    change(state)
    with pytest.raises(InputError, match=message):
        infer_config(state)


@pytest.mark.parametrize("file", FILES)
def test_official_states_give_the_official_logits(file, tmp_path, capsys, x64):
    golden = np.load(GOLDEN / f"{file}.npz", allow_pickle=False)
    said_config = json.loads(str(golden["config"]))
    write_state(tmp_path / "official.npz", entries(golden, "state/"))
    given = ["--set", "norm=tdbn"] if said_config.get("norm") == "tdbn" else []
    statistics = ["--mean", 0, 0, 0, "--std", 1, 1, 1]
    text = said(capsys, tmp_path / "official.npz", "-o", tmp_path / "net", *given, *statistics).out
    assert f"depths {tuple(said_config['depths'])}" in text.splitlines()[1]
    assert "tau 2.0" in text.splitlines()[-2]
    model, _ = weights.load(tmp_path / "net")
    close(nnx.jit(lambda m, x: m(x))(model, golden["image_nchw"].transpose(0, 2, 3, 1)), golden["eval_logits"])


def test_short_floats_are_widened_exactly_and_long_ones_are_rounded_aloud(saved, tmp_path, capsys):
    _, _, state = saved
    short = {n: a.astype(np.float16) if a.dtype.kind == "f" else a for n, a in state.items()}
    short["mlp_head.1.bias"] = np.array([1.5, -2, 3e38]).astype(ml_dtypes.bfloat16)
    save_file(short, tmp_path / "short.safetensors")
    read = read_state(tmp_path / "short.safetensors")
    for name, array in read.items():
        assert array.dtype == (np.float32 if array.dtype.kind == "f" else np.int64)
        np.testing.assert_array_equal(array, np.asarray(short[name], array.dtype))
    long = {n: a.astype(np.float64) / 3 if a.dtype.kind == "f" else a for n, a in state.items()}
    write_state(tmp_path / "long.npz", long)
    same(read_state(tmp_path / "long.npz"), long)
    heard = said(capsys, tmp_path / "long.npz", "-o", tmp_path / "net", *NORMALISED)
    assert "rounded to float32" in heard.err
    bias = variables(weights.load(tmp_path / "net")[0])["head.bias"][...]
    np.testing.assert_array_equal(bias, long["mlp_head.1.bias"].astype(np.float32))


def test_values_that_are_not_finite_are_refused(saved, tmp_path, capsys):
    _, _, state = saved
    assert official.not_finite(state) == ""
    write_state(tmp_path / "net.npz", {**state, "mlp_head.1.bias": np.array([0, np.nan, 1], np.float32)})
    assert '"mlp_head.1.bias" contain NaN or inf' in refusal(
        capsys, tmp_path / "net.npz", "-o", tmp_path / "net", *NORMALISED
    )
    assert not (tmp_path / "net").exists()


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_file_is_run(saved, tmp_path, capsys):
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Touch(mark)], object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("mlp_head.1.bias.npy", buffer.getvalue())
    assert "were not run" in refusal(capsys, tmp_path / "bad.npz", "-o", tmp_path / "net")
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Touch(mark)}))
    assert "bad.pth" in refusal(capsys, tmp_path / "bad.pth", "-o", tmp_path / "net")
    assert not mark.exists() and not (tmp_path / "net").exists()
    # It would have been made, had it been run.
    pickle.loads(pickle.dumps(Touch(mark))).close()
    assert mark.exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_files_are_refused(suffix, saved, tmp_path):
    write_state(tmp_path / f"whole{suffix}", saved[2])
    content = (tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in (0, 5, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=path.name):
            read_state(path)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(content)
        for at in rng.integers(len(content), size=4):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            read_state(path)
        except InputError:
            refused += 1
    assert refused > 10
    if suffix == ".npz":
        # The first member's compression, in its own header and in the last one, is of a kind that nobody knows.
        changed = bytearray(content)
        changed[8] = changed[content.index(b"PK\x01\x02") + 10] = 77
        path.write_bytes(changed)
        with pytest.raises(InputError, match="not supported"):
            read_state(path)
    # Names lie: the kind is told by what is in a file.
    (tmp_path / "net.bin").write_bytes(content)
    same(read_state(tmp_path / "net.bin"), saved[2])


def test_pytorch_is_named_where_it_is_needed(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert "pip install torch" in refusal(capsys, saved[0], "-o", tmp_path / "net.pth")
    (tmp_path / "old.pth").write_bytes(b"\x80\x02}q\x00.")
    assert "pip install torch" in refusal(capsys, tmp_path / "old.pth", "-o", tmp_path / "net")
    assert sorted(os.listdir(tmp_path)) == ["old.pth"]


def test_images_of_a_converted_network(saved, tmp_path, capsys):
    folder, _, state = saved
    write_state(file := tmp_path / "net.npz", state)
    assert "--mean" in refusal(capsys, file, "-o", tmp_path / "net")
    said(capsys, file, "-o", tmp_path / "like", "--like", folder, "--classes", "x,y, z", "--resize-mode", "resize")
    before, data = (weights.read_config(where)[1]["data"] for where in (folder, tmp_path / "like"))
    assert data == {**before, "class_names": ["x", "y", "z"], "resize_mode": "resize"}
    (tmp_path / "names.txt").write_text("ü\nb\n\nc\n", encoding="utf-8")
    assert _class_names(str(tmp_path / "names.txt")) == ["ü", "b", "c"]
    state = abstract_state(in_channels=3, num_classes=1000)[1]
    write_state(file := tmp_path / "imagenet.npz", state)
    heard = said(capsys, file, "-o", tmp_path / "imagenet").out
    data = weights.read_config(tmp_path / "imagenet")[1]["data"]
    assert data["mean"] == [0.485, 0.456, 0.406] and data["class_names"][0] == "n01440764"
    assert data["resize_mode"] == "resize_crop" and "mean [0.485" in heard and "n01440764 to" in heard


def test_what_lies_there_is_not_lost(saved, tmp_path, capsys):
    folder, _, state = saved
    write_state(file := tmp_path / "net.npz", state)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "holds other files" in refusal(capsys, file, "-o", tmp_path / "run", *NORMALISED)
    assert "is a file" in refusal(capsys, file, "-o", Path(__file__), *NORMALISED)
    assert "would be overwritten" in refusal(capsys, folder, "-o", folder / weights.TENSORS)
    assert "replacing the weights" not in said(capsys, file, "-o", tmp_path / "net", *NORMALISED).out
    assert "replacing the weights" in said(capsys, file, "-o", tmp_path / "net", *NORMALISED).out


def test_mistakes(saved, tmp_path, capsys):
    folder, _, state = saved
    write_state(file := tmp_path / "net.npz", state)
    net = tmp_path / "net"
    assert "there is no file" in refusal(capsys, tmp_path / "no.pth", "-o", net)
    assert "there is no folder" in refusal(capsys, "fashion", "-o", tmp_path / "net.npz")
    assert "must end in" in refusal(capsys, folder, "-o", tmp_path / "net.onnx")
    assert "becomes a weights folder: -o needs a folder, got" in refusal(
        capsys, file, "-o", tmp_path / "net.safetensors"
    )
    assert "--set needs a file of official weights, got the network" in refusal(
        capsys, folder, "-o", tmp_path / "x.npz", "--set", "tau=3"
    )
    assert "this package's own" in refusal(capsys, folder / weights.TENSORS, "-o", net)
    assert "--key needs a PyTorch checkpoint" in refusal(capsys, file, "-o", net, "--key", "model")
    assert 'did you mean "tau"' in refusal(capsys, file, "-o", net, "--set", "tua=3")
    assert "FIELD=VALUE" in refusal(capsys, file, "-o", net, "--set", "tau")
    assert "twice" in refusal(capsys, file, "-o", net, "--set", "tau=2", "--set", "tau=3")
    assert "tau cannot be" in refusal(capsys, file, "-o", net, "--set", "tau=__import__('os')")
    assert "tau must be at least" in refusal(capsys, file, "-o", net, "--set", "tau=0.5")
    assert "depths cannot be (3, 3)" in refusal(capsys, file, "-o", net, "--set", "depths=3,3")
    assert "mean has 2 values" in refusal(capsys, file, "-o", net, "--mean", 0, 0, "--std", 1)
    assert "2 class names" in refusal(capsys, file, "-o", net, *NORMALISED, "--classes", "a,b")
    assert 'unknown dataset "mnist"' in refusal(capsys, file, "-o", net, *NORMALISED, "--dataset", "mnist")
    assert "resize_mode" in refusal(capsys, file, "-o", net, *NORMALISED, "--resize-mode", "shrink")
    assert "no folder" in refusal(capsys, file, "-o", net, "--like", "fashion")
    (tmp_path / "text.pth").write_text("hello")
    assert "is not a PyTorch, .safetensors or .npz file" in refusal(capsys, tmp_path / "text.pth", "-o", net)
    assert "cannot be written" in refusal(capsys, file, "-o", file / "net", *NORMALISED)
    assert not net.exists()


@pytest.mark.parametrize("kind", [">f4", ">f2", ">f8", "longdouble"])
def test_arrays_of_other_machines(kind, tmp_path):
    state = official.state_dict(random_model())
    foreign = {name: a.astype(kind) if a.dtype.kind == "f" else a.astype(">i8") for name, a in state.items()}
    np.savez(tmp_path / "foreign.npz", allow_pickle=False, **foreign)
    if kind == "longdouble":
        with pytest.raises(InputError, match=r"which JAX does not have: save it as float64"):
            read_state(tmp_path / "foreign.npz")
        return
    found = read_state(tmp_path / "foreign.npz")
    for name, array in found.items():
        assert array.dtype.isnative and array.dtype != np.float16
        np.testing.assert_array_equal(array, foreign[name])
    assert main(["convert", str(tmp_path / "foreign.npz"), "-o", str(tmp_path / "w"), *NORMALISED]) == 0


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_load_and_dump(suffix, saved, tmp_path, capsys):
    folder, model, state = saved
    file = tmp_path / f"net{suffix}"
    same(official.dump(model, file), state)
    same(read_state(file), state)
    said(capsys, folder, "-o", tmp_path / f"command{suffix}")
    assert file.read_bytes() == (tmp_path / f"command{suffix}").read_bytes()
    for source in (file, state):
        again = official.load(source, like=folder)
        same(official.state_dict(again), state)
        assert again.config == model.config and again.pixels == weights.load(folder)[0].pixels
    # What the command makes of the file is what `load` makes of it.
    said(capsys, file, "-o", tmp_path / "net", *NORMALISED, "--set", "time_steps=3", "--classes", "x,y,z")
    loaded = official.load(file, mean=[0.5], std=[0.25], class_names=["x", "y", "z"], time_steps=3)
    expected = weights.load(tmp_path / "net")[0]
    assert loaded.config == expected.config and loaded.pixels == expected.pixels
    same(official.state_dict(loaded), official.state_dict(expected))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    np.testing.assert_array_equal(loaded(images), expected(images))
    assert official.load(file).pixels is None
    with pytest.raises(InputError, match="mean and std of the training images are missing: give 1 of each"):
        official.load(file, class_names=["x", "y", "z"])
    with pytest.raises(InputError, match="must end in"):
        official.dump(model, tmp_path / "net.onnx")


def test_prefixes_of_training_are_taken_off(tmp_path):
    state = official.state_dict(random_model())
    assert infer_config({f"module._orig_mod.{name}": a for name, a in state.items()}) == infer_config(state)
    # Lightning's prefix; and counters, which some tools leave out.
    lightning = {f"model.{name}": a for name, a in state.items() if not name.endswith("num_batches_tracked")}
    assert infer_config(lightning) == infer_config(state)
    model = SpikingMLP(infer_config(state), rngs=nnx.Rngs(0))
    official.load_state_dict(model, lightning)
    for name, array in official.state_dict(model).items():
        expected = np.zeros_like(array) if name.endswith("num_batches_tracked") else state[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_negative_variances_are_told():
    state = official.state_dict(random_model())
    assert official.not_finite(state) == ""
    state["batch_norm.running_var"] = -state["batch_norm.running_var"]
    assert "batch_norm.running_var" in official.not_finite(state)


def test_a_network_that_is_not_there_comes_before_its_options(capsys, tmp_path):
    assert main(["convert", str(tmp_path / "none"), "-o", "x", *NORMALISED]) == 2
    assert "there is no folder" in capsys.readouterr().err
