import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import spiking_mlp_jax as smlp
from spiking_mlp_jax import ModelConfig
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop import official
from spiking_mlp_jax.models import folder as folders
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.config import ADDED
from spiking_mlp_jax.models.pixels import Pixels
from spiking_mlp_jax.train.logging import read_metrics
from tests.support.random_model import meta_for, random_model, set_value, variables

KINDS = [
    dict(),
    dict(encoding="plain"),
    dict(norm="layer"),
    dict(norm="tebn", time_steps=3),
    dict(norm="tdbn", norm_features="channel", v_threshold=0.7),
    dict(neuron="plif", v_reset=None, surrogate="atan"),
    dict(depths=(1, 2, 3), in_channels=3, num_classes=5, dtype="bfloat16", remat=True, decay_input=False),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved small network: (folder, model)."""
    model = random_model(depths=(1,))
    folder = tmp_path_factory.mktemp("weights")
    weights.save(folder, model, meta_for(model))
    return folder, model


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved folder, to be tampered with."""
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(folder, change):
    file = folder / "config.json"
    document = json.loads(file.read_text())
    document = change(document) or document
    file.write_text(json.dumps(document))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_round_trip_is_exact(kind, tmp_path):
    model = random_model(**kind)
    data = {"mean": [0.1] * model.config.in_channels, "std": [1 / 3] * model.config.in_channels}
    meta = meta_for(model, class_names=[f"class {i}" for i in range(model.config.num_classes)], **data)
    meta["note"] = {"é": [1, None, True]}
    weights.save(tmp_path / "a" / "b", model, meta)
    loaded, found = weights.load(tmp_path / "a" / "b")
    assert loaded.config == model.config
    assert found == meta
    before, after = variables(model), variables(loaded)
    assert before.keys() == after.keys()
    for name, variable in before.items():
        assert type(after[name]) is type(variable)
        assert after[name].dtype == variable.dtype
        assert np.asarray(after[name][...]).tobytes() == np.asarray(variable[...]).tobytes()
    assert loaded.norm.use_running_average


def test_loaded_network_computes_the_same_in_evaluation_mode(saved):
    folder, model = saved
    loaded, _ = weights.load(folder)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    logits = np.asarray(loaded(images))
    np.testing.assert_array_equal(logits, np.asarray(model(images)))
    # In training mode the first image's result would depend on the second.
    np.testing.assert_array_equal(np.asarray(loaded(np.concatenate([images[:1], images[:1]])))[:, 0], logits[:, 0])


def test_a_network_of_ones_own_is_saved_with_its_pixels(tmp_path):
    """Trained in a loop of one's own: it has neither metadata nor preprocessing before."""
    model = random_model(depths=(1,), in_channels=3)
    model.save(tmp_path / "bare")
    assert smlp.from_pretrained(tmp_path / "bare").pixels is None
    with pytest.raises(InputError, match="mean has 1 values for 3 channels"):
        model.save(tmp_path / "net", pixels=Pixels((0.5,), (0.25,)))
    names = tuple("abcdefghij")[: model.config.num_classes]
    pixels = Pixels((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "resize", class_names=names)
    model.save(tmp_path / "net", pixels=pixels)
    loaded = smlp.from_pretrained(tmp_path / "net")
    assert loaded.pixels == pixels
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    (guesses,) = smlp.classify(tmp_path / "net", [image], top=1)
    assert guesses[0].name in names and guesses == smlp.classify(loaded, [image], top=1)[0]
    smlp.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "net" / "config.json").read_bytes()


def test_an_older_file_lacks_fields_that_came_later(copy):
    edit_config(copy, lambda d: [d["model"].pop(name) for name in ADDED] and None)
    loaded, _ = weights.load(copy)
    assert loaded.config.neuron_backend == "auto"
    # Any other field has to be there: no default is taken silently for what a network was trained with.
    edit_config(copy, lambda d: d["model"].pop("remat") and None)
    with pytest.raises(InputError, match='lacks the model field "remat"'):
        weights.load(copy)


def test_files_are_as_documented(saved):
    folder, model = saved
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    document = json.loads((folder / "config.json").read_text())
    assert document["format"] == 1
    assert ModelConfig(**document["model"]) == model.config
    assert document["data"]["class_names"] == ["bird", "cat", "dog"]
    tensors = load_file(folder / "model.safetensors")
    assert tensors["stages.0.encode.conv.kernel"].shape == (4, 4, 1, 6)
    assert tensors["stages.0.blocks.token.height.kernel"].shape == (1, 4, 4)
    assert tensors["norm.num_batches"].dtype == np.int32
    for name in os.listdir(folder):
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        umask = os.umask(0)
        os.umask(umask)
        assert mode == 0o666 & ~umask


def test_saving_again_replaces_and_a_failure_leaves_the_old(copy):
    model, _ = weights.load(copy)
    set_value(model, "head.bias", 7)
    weights.save(copy, model, {})
    loaded, meta = weights.load(copy)
    assert meta == {}
    np.testing.assert_array_equal(variables(loaded)["head.bias"][...], 7)
    set_value(model, "head.bias", 8)
    for bad in ({"x": object()}, {"x": float("nan")}, {"format": 2}, {"data": {"mean": [0]}}):
        with pytest.raises(InputError):
            weights.save(copy, model, bad)
    np.testing.assert_array_equal(variables(weights.load(copy)[0])["head.bias"][...], 7)
    assert sorted(os.listdir(copy)) == ["config.json", "model.safetensors"]


def test_folders_of_earlier_versions_are_read_and_their_file_is_replaced(saved, copy):
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    assert weights.find(copy) == copy
    loaded, meta = weights.load(copy)
    for name, variable in variables(saved[1]).items():
        np.testing.assert_array_equal(variables(loaded)[name][...], variable[...])
    (copy / "model.safetensors").write_bytes((copy / "weights.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"holds both model.safetensors and weights.safetensors: remove"):
        weights.load(copy)
    (copy / "model.safetensors").unlink()
    weights.save(copy, loaded, meta)
    assert sorted(os.listdir(copy)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("format") and None, "no format number"),
        (lambda d: d.update(format=2), "format 2"),
        (lambda d: d.update(format=True), "format True"),
        (lambda d: d.pop("model") and None, "model"),
        (lambda d: d["model"].update(dims=3), 'unknown model field "dims": did you mean "dim"?'),
        (lambda d: d["model"].pop("tau") and None, 'lacks the model field "tau"'),
        (lambda d: d["model"].update(image_size=17), "image_size 17 does not divide"),
        (lambda d: d["model"].update(depths="11"), "depths"),
        (lambda d: d["data"].pop("std") and None, 'lacks "std"'),
        (lambda d: d["data"].update(std=[0.0]), "std"),
        (lambda d: d["data"].update(mean=["a"]), "mean"),
        (lambda d: d["data"].update(mean=[0.1, 0.2]), "mean has 2 values for 1 channels"),
        (lambda d: d["data"].update(class_names=["a", "b"]), "class_names"),
        (lambda d: d["data"].update(class_names=["a", "b", 3]), "class_names"),
        (lambda d: d["data"].update(resize_mode="stretch"), "resize_mode"),
        (lambda d: d["data"].update(eval_resize=True), "eval_resize"),
        (lambda d: d.update(data=[]), '"data"'),
        (lambda d: [1], "format number"),
    ],
)
def test_bad_config_is_refused(copy, change, message):
    edit_config(copy, change)
    with pytest.raises(InputError, match=r"config\.json") as caught:
        weights.load(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("head.bias") is None, 'lacks the tensor "head.bias"'),
        (lambda t: t.update({"head.bias2": t["head.bias"]}), 'holds the tensor "head.bias2"'),
        (lambda t: t.update({"head.bias": np.zeros(4, np.float32)}), '"head.bias".*shape'),
        (lambda t: t.update({"head.bias": t["head.bias"].astype(np.int64)}), '"head.bias".*I64'),
        (lambda t: t.update({"norm.num_batches": np.array(3, np.float32)}), '"norm.num_batches".*F32'),
        (lambda t: t.clear(), "lacks the tensor"),
    ],
)
def test_bad_tensor_is_named(copy, change, message):
    edit_tensors(copy, change)
    with pytest.raises(InputError, match=message):
        weights.load(copy)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_become_float32(copy, dtype):
    values = np.array([1 / 3, -2.5, 7.0], dtype)
    edit_tensors(copy, lambda t: t.update({"head.bias": values}))
    bias = variables(weights.load(copy)[0])["head.bias"][...]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, values.astype(np.float32))


def test_float64_is_exact_with_x64(copy, x64):
    values = np.array([1 / 3, -2.5, 7.0])
    edit_tensors(copy, lambda t: t.update({"head.bias": values}))
    np.testing.assert_array_equal(variables(weights.load(copy)[0])["head.bias"][...], values)


def test_weights_of_another_configuration_are_refused(copy):
    edit_config(copy, lambda d: d["model"].update(dim=9))
    with pytest.raises(InputError, match="has shape"):
        weights.load(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_damaged_files(copy, name):
    file = copy / name
    whole = file.read_bytes()
    for content in (b"", whole[:7], whole[: len(whole) // 2], whole[:-3], b"\xff" * 100, b"{" * 100_000):
        file.write_bytes(content)
        with pytest.raises(InputError, match=name):
            weights.load(copy)
    file.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        weights.load(copy)
    with pytest.raises(InputError, match="no weights folder"):
        weights.load(copy / "missing")
    with pytest.raises(InputError, match="at most 255 bytes"):
        weights.load(copy / ("x" * 300))


@given(data=st.data())
def test_any_change_of_the_config_is_understood_or_refused(saved, data):
    document = json.loads((saved[0] / "config.json").read_text())
    section = data.draw(st.sampled_from([document, document["model"], document["data"]]))
    section[data.draw(st.sampled_from(sorted(section)) | st.text(max_size=5))] = data.draw(JSON)
    folder = saved[0].parent / "changed"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps(document))
    try:
        config, _ = weights.read_config(folder)
    except InputError as error:
        assert str(folder) in str(error)
    else:
        assert isinstance(config, ModelConfig)


@pytest.mark.slow
@settings(max_examples=15)
@given(cut=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 400))
def test_a_cut_or_flipped_tensor_file_never_loads_as_something_else(saved, cut, flip):
    whole = (saved[0] / "model.safetensors").read_bytes()
    folder = saved[0].parent / "cut"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((saved[0] / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        weights.load(folder)
    # A changed byte of the header can, at worst, exchange two tensors of one shape.
    (folder / "model.safetensors").write_bytes(whole[:flip] + bytes([whole[flip] ^ 1]) + whole[flip + 1 :])
    try:
        weights.load(folder)
    except InputError as error:
        assert "model.safetensors" in str(error)


def test_find_takes_workdirs_folders_and_names(saved, tmp_path, monkeypatch):
    folder, model = saved
    monkeypatch.setattr(folders, "PRETRAINED", tmp_path / "pretrained")
    weights.save(tmp_path / "run" / "weights", model, {})
    weights.save(tmp_path / "pretrained" / "fashion_mnist", model, {})
    assert weights.find(tmp_path / "run") == tmp_path / "run" / "weights"
    assert weights.find(str(folder)) == folder
    assert weights.find("fashion_mnist") == tmp_path / "pretrained" / "fashion_mnist"
    assert weights.pretrained_path("fashion_mnist") == tmp_path / "pretrained" / "fashion_mnist"
    assert weights.pretrained_names() == ["fashion_mnist"]
    with pytest.raises(InputError, match='did you mean "fashion_mnist"'):
        weights.pretrained_path("fasion_mnist")
    with pytest.raises(InputError, match='did you mean "fashion_mnist"'):
        weights.find("fasion-mnist")
    with pytest.raises(InputError, match="holds no"):
        weights.find(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        weights.find(tmp_path / "file")
    with pytest.raises(InputError, match="at most 255 bytes"):
        weights.find("x" * 5000)


@pytest.mark.parametrize("name", weights.pretrained_names())
def test_shipped_networks_load(name):
    model, meta = weights.load(weights.pretrained_path(name))
    assert len(meta["data"]["class_names"]) == model.config.num_classes
    assert sum(file.stat().st_size for file in weights.pretrained_path(name).iterdir()) < 5e6


@pytest.mark.parametrize("name", weights.pretrained_names())
def test_shipped_networks_are_the_best_of_their_logs(name):
    _, meta = weights.read_config(weights.pretrained_path(name))
    evaluations = [x for x in read_metrics(Path(__file__).parents[2] / "docs/runs" / name) if x["split"] == "eval"]
    best = max(evaluations, key=lambda x: x["accuracy"])
    assert meta["result"] == {
        "step": best["step"],
        "accuracy": best["accuracy"],
        "loss": best["loss"],
        "images": 10_000,
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    model = random_model(depths=(1,))
    model.stages[0].encode.conv.kernel[...] = model.stages[0].encode.conv.kernel[...].at[0, 0, 0, 0].set(value)
    with pytest.raises(InputError, match="NaN or inf"):
        fold(model)
    weights.save(tmp_path, model, meta_for(model))
    with pytest.raises(InputError, match=r'"stages\.0\.encode\.conv\.kernel".*NaN or inf'):
        weights.load(tmp_path)


def test_impossible_values_are_refused_wherever_they_come_from(tmp_path):
    model = random_model(depths=(1,))
    state = official.state_dict(model)
    for name, value, message in (("mlp_head.1.weight", np.nan, "NaN"), ("batch_norm.running_var", -1.0, "negative")):
        wrong = {**state, name: np.full_like(state[name], value)}
        before = np.asarray(model.head.kernel[...])
        with pytest.raises(InputError, match=message):
            official.load_state_dict(model, wrong)
        np.testing.assert_array_equal(model.head.kernel[...], before)
    model.norm.var[...] = -model.norm.var[...]
    weights.save(tmp_path, model, meta_for(model))
    with pytest.raises(InputError, match=r'"norm\.var" in .* contains negative variances'):
        weights.load(tmp_path)
