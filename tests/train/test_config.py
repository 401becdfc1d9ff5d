"""Everything a user can get wrong is answered in one line, before anything is compiled."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax.cli import train
from spiking_mlp_jax.errors import ALIASES, InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.config import VARIANTS, ModelConfig
from spiking_mlp_jax.train.config import (
    FIELDS,
    MODEL_FIELDS,
    augmentation,
    default_config,
    load_config,
    migrate_config,
    mismatches,
    model_config,
    resize_mode,
    shipped_config,
    to_dict,
    validate,
)
from tests.support.small_sources import write_folder
from tests.support.tiers import rest_slow

ROOT = Path(__file__).parents[2]
FASHION = str(ROOT / "configs" / "fashion_mnist.py")
ALL = [f"{FASHION}{arg}" for arg in ("", ":full", ":demo", ":sparse")]
ALL += [str(ROOT / "configs" / f"cifar10.py{arg}") for arg in ("", ":32", ":224", ":one_step", ":small")]
ALL += [str(ROOT / "configs" / f"imagenet.py:{arg}") for arg in VARIANTS]


def refused(config, devices=1):
    with pytest.raises(InputError) as error:
        validate(config, devices)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", ALL)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    validate(config, 8)
    assert to_dict(config)["dim"] == model_config(config).dim


@pytest.mark.parametrize(("older", "remat"), [(False, "none"), (True, "block"), ("block", "block")])
def test_older_configurations_are_migrated(older, remat):
    today = to_dict(default_config())
    later = ("neuron_backend", "activity_weight", "activity_measure", "init_weights", "ema_decay", "eval_only")
    saved = {name: value for name, value in today.items() if name not in later}
    assert migrate_config({**saved, "remat": older}) == {**today, "remat": remat}
    assert migrate_config({**today, "neuron_backend": "xla"})["neuron_backend"] == "xla"


def test_imagenet_variants_are_the_papers():
    for name, fields in VARIANTS.items():
        model = model_config(load_config(f"{ROOT}/configs/imagenet.py:{name}"))
        assert {field: getattr(model, field) for field in fields} == fields


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dim", 25, "24 or 27"),
        ("image_size", 30, "image_size"),
        ("time_steps", 0, "time_steps"),
        ("epochs", 0, "epochs must be at least 1"),
        ("in_channels", 2, "1 (grey) or 3 (colour)"),
        ("learning_rate", -0.1, "learning_rate must be at least 0"),
        ("label_smoothing", 1.0, "label_smoothing must be below 1"),
        ("rand_augment", "rand-m9", "rand-m9-mstd0.5-inc1"),
        ("random_erasing", 1.1, "random_erasing must be at most 1"),
        ("crop_min_area", 0.0, "crop_min_area must be above 0"),
        ("color_jitter", -0.1, "color_jitter must be at least 0"),
        ("mix_switch", 2.0, "mix_switch must be at most 1"),
        ("momentum", 1.0, "momentum must be below 1"),
        ("optimizer", "sdg", '"sgd"'),
        ("schedule", "cosin", '"cosine"'),
        ("loss", "cross_entropi", '"cross_entropy"'),
        ("activity_weight", -0.1, "activity_weight must be at least 0"),
        ("activity_weight", float("inf"), "finite"),
        ("activity_measure", "synop", '"synops"'),
        ("ema_decay", 1.0, "ema_decay must be below 1"),
        ("profile_steps", "10", "A below B"),
        ("profile_steps", "15:10", "15:10"),
        ("profile_steps", "-1:2", "-1:2"),
        ("warmup_method", "lin", '"linear"'),
        ("resize_mode", "padd", '"pad"'),
        ("neuron", "liff", '"lif"'),
        ("batch_size", 100, "take 104"),
        ("accumulate", 3, "take a divisor"),
        ("fsdp", 3, "does not divide the 8 devices"),
        ("norm_statistics", "devices", '"device"'),
        ("eval_batch_size", 4, "take 8"),
        ("warmup_epochs", 10.0, "warmup_epochs"),
        ("std", (0.0,), "std"),
        ("mean", (0.1, 0.2), "mean"),
        ("crop_padding", 32, "crop_padding"),
        ("learning_rate", float("nan"), "finite"),
        ("mean", ("x",), "finite numbers"),
    ],
)
def test_impossible_values(field, value, said):
    config = load_config(FASHION + ":demo")
    config[field] = value
    message = refused(config, devices=8)
    assert field in message and said in message


def test_exclusive_crops():
    config = load_config(FASHION)
    config.random_resized_crop, config.crop_padding = True, 2
    assert "exclude" in refused(config)


def test_mixing_needs_pairs_on_each_device():
    config = load_config(FASHION)
    config.mixup, config.batch_size = 0.8, 24
    validate(config, 4)
    message = refused(config, 8)
    assert "batch_size 24" in message and "multiple of 16" in message


def test_unknown_and_missing_fields():
    config = default_config()
    config.time_stepz = 2
    assert '"time_steps"' in refused(config)
    config = default_config()
    del config.momentum
    assert '"momentum"' in refused(config)


def test_model_fields_have_the_same_defaults():
    assert set(MODEL_FIELDS) <= set(default_config())
    assert model_config(default_config()) == ModelConfig()


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-1, 3), st.floats(), st.text(max_size=2)), max_size=4).map(tuple),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(field=st.sampled_from(sorted(default_config())), value=ANYTHING)
def test_no_value_causes_anything_but_an_input_error(field, value):
    config = load_config(FASHION)
    with config.ignore_type():
        config[field] = value
    try:
        validate(config, 8)
    except InputError as error:
        assert len(str(error).splitlines()) == 1


def read(arguments):
    return train.experiment(*train.parser().parse_known_args(arguments))


def test_arguments():
    arguments = ["--config", FASHION + ":demo", "--workdir=x", "--config.dim=48", "--config.v_reset=None"]
    config = read([*arguments, "--noconfig.detach_reset", "--config.mean=(0.5,)", "--config.epochs", "3"])
    assert (config.dim, config.v_reset, config.detach_reset, config.mean, config.epochs) == (48, None, False, (0.5,), 3)
    chosen, words = train.parser().parse_known_args(arguments)
    assert chosen.workdir == "x" and words == arguments[3:]
    assert load_config(FASHION + ":demo", ["dim=48", "--config.epochs=3"]).to_dict() == {
        **load_config(FASHION + ":demo").to_dict(), "dim": 48, "epochs": 3
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("fashion_mnist", "fashion_mnist.py"),
        ("fashion_mnist:demo", "fashion_mnist.py:demo"),
        ("configs/imagenet.py:mlp_t", "imagenet.py:mlp_t"),
        ("imagenet:mlp_t", "imagenet.py:mlp_t"),
    ],
)
def test_shipped_names(name, path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert to_dict(load_config(name)) == to_dict(load_config(f"{ROOT}/configs/{path}"))


def test_names_that_are_not_shipped(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shipped_config("sweeps/norm") == str(ROOT / "configs" / "sweeps" / "norm.py")
    assert shipped_config("../train") is None
    with pytest.raises(InputError, match='there is no config file "fashion_mnst": did you mean "fashion_mnist"'):
        load_config("fashion_mnst:demo")
    with pytest.raises(InputError, match="defines no function get_config"):
        load_config("sweeps/norm")


def test_every_field_is_declared_once():
    assert sorted(default_config()) == sorted([*MODEL_FIELDS, *FIELDS])
    assert all(field.help and len(field.help) < 120 for field in FIELDS.values())
    described = re.findall(r"^    (?:  )?(?:  )?(\w+): ", (ModelConfig.__doc__ or "").partition("Raises")[0], re.M)
    assert described == list(MODEL_FIELDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config"),
        (["--config"], "--config"),
        ([f"--config={FASHION}", "--config.time_stepz=2"], 'did you mean "time_steps"'),
        ([f"--config={FASHION}", "--config.time_steps=abc"], "time_steps must be a whole number"),
        ([f"--config={FASHION}", "--config.tau=abc"], "tau must be a number"),
        ([f"--config={FASHION}", "--config.flip=5"], "flip must be True or False"),
        ([f"--config={FASHION}", "--noconfig.flop"], 'did you mean "flip"'),
        ([f"--config={FASHION}:dmeo"], 'did you mean "demo"'),
        ([f"--config={ROOT}/configs/imagenet.py:mlp_spe_x"], "mlp_spe_"),
        ([f"--config={ROOT}/configs/cifar10.py:225"], '"224"'),
        ([f"--config={ROOT}/configs/fashion_mnst.py"], "fashion_mnist.py"),
        (["--config=nowhere/at/all.py"], "there is no config file"),
        ([f"--config={FASHION}", "dim=48"], "write overrides as --config.NAME=VALUE"),
        ([f"--config={FASHION}", "48"], 'unexpected argument "48"'),
        ([f"--config={FASHION}", "--timeout=0"], "a whole number of at least 1"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(InputError) as error:
        read(arguments)
    assert said in str(error.value)


@pytest.mark.parametrize("path", ["nope.py", "./nope.py", "spiking_mlp_jax/nope.py"])
def test_only_configs_are_suggested(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as error:
        read([f"--config={path}"])
    assert "configs/cifar10.py" in str(error.value) and "train.py" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nx = (", r'broken.py" fails in line 2: SyntaxError'),
        ("import no_such_module", "fails in line 1: ModuleNotFoundError: No module"),
        ("\n\nx = {}['y']", "fails in line 3: KeyError: 'y'"),
        ("def get_config():\n    return {}['y']", "fails in line 2: KeyError: 'y'"),
        ("def get_config():\n    return nowhere", "fails in line 2: NameError"),
        ("def get_config():\n    return 1 / 0", "fails in line 2: ZeroDivisionError"),
        ("x = 1", "get_config"),
        ("def get_config(): return 1", "must return a ConfigDict"),
        ("from spiking_mlp_jax.train.config import *\ndef get_config(): default_config().dim = 'a'", "dim"),
        ("def get_config(arg): return arg", "fails: TypeError"),
    ],
)
def test_broken_config_files(tmp_path, text, said):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        load_config(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.time_stepz=2"], 'did you mean "time_steps"'),
        (["--config.dim=25"], "24 or 27"),
        (["--wrkdir=x"], "workdir"),
    ],
)
def test_train_py_answers_in_one_line(tmp_path, arguments, said):
    command = [sys.executable, str(ROOT / "train.py"), f"--config={FASHION}:demo", *arguments]
    if "wrkdir" not in arguments[0]:
        command.append(f"--workdir={tmp_path}/run")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("patch", "status", "said"),
    rest_slow(
        [
            ("config.load_config = stop", 130, "stopped: "),
            ("loop.fit = stop", 130, "stopped: "),
            ("loop.fit = lambda *_: loop.Result(3, True, 0.5); plots.plot_workdir = stop", 130, "stopped: "),
            ("loop.fit = lambda *_: loop.Result(3, True, None)", 2, "error: no weights and no plots"),
        ]
    ),
)
def test_train_py_ends_in_one_line(tmp_path, patch, status, said):
    script = f"""
import runpy, sys
from spiking_mlp_jax.analysis import plots
from spiking_mlp_jax.train import config, loop
def stop(*_):
    raise KeyboardInterrupt
{patch}
sys.argv = ["train.py", "--config={FASHION}", "--workdir={tmp_path}/run"]
runpy.run_path("{ROOT}/train.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == status
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_nothing_is_compiled_by_a_check(monkeypatch):
    config = load_config(FASHION)
    monkeypatch.setattr(jax, "jit", None)
    validate(config, 1)


# --- configs/folder.py


@pytest.mark.parametrize(
    ("side", "expected"),
    [(20, (32, 2, 48, 8)), (32, (32, 2, 48, 8)), (64, (64, 4, 48, 8)), (110, (128, 8, 48, 8)), (500, (128, 8, 48, 8))],
)
def test_folder_config_follows_the_images(tmp_path, side, expected):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (side + i, side)).save(tmp_path / split / name / f"{i}.png")
    config = load_config("folder", [f"data_dir={tmp_path}"])
    assert to_dict(config) == to_dict(load_config(f"folder:{tmp_path}"))
    assert to_dict(config) == to_dict(load_config("folder", ["--config.data_dir", str(tmp_path)]))
    assert (config.image_size, config.patch_size, config.dim, config.batch_size) == expected
    assert (config.num_classes, config.in_channels, config.data_dir) == (2, 3, str(tmp_path))
    validate(config, 1)


def test_folder_config_of_arrays(tmp_path):
    images, labels = np.zeros((40, 64, 64), np.uint8), np.arange(40) % 7
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    config = load_config("folder", [f"--config.dataset=npz:{tmp_path}/own.npz", "--config.dim=24"])
    assert (config.num_classes, config.in_channels, config.image_size, config.dim) == (7, 1, 64, 24)
    validate(config, 1)


def test_folder_config_takes_over_a_network(tmp_path):
    write_folder(tmp_path)
    config = load_config("folder:finetune=cifar10", [f"--config.data_dir={tmp_path}"])
    network, meta = weights.read_config(weights.find("cifar10"))
    assert model_config(config) == dataclasses.replace(network, num_classes=3)
    assert (config.init_weights, list(config.mean)) == ("cifar10", meta["data"]["mean"])
    validate(config, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("folder", "needs the folder of the images: --config.data_dir=DIR"),
        ("folder:no/such", "no/such is not a folder"),
        ("folder:finetune=", "names no network"),
        ("folder:finetune=cifar10", "needs the folder"),
    ],
)
def test_folder_config_mistakes(text, said):
    with pytest.raises(InputError, match=said):
        load_config(text)


def test_folder_config_of_no_network(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(InputError, match="cifar10"):
        load_config("folder:finetune=cifar11", [f"data_dir={tmp_path}"])


# --- fields that fit each other, and their list


@pytest.mark.parametrize(
    ("crop", "mode", "resolved", "said"),
    [
        (False, "auto", "pad", ""),
        (True, "auto", "resize_crop", ""),
        (True, "pad", "pad", "black borders"),
        (True, "resize", "resize", ""),
        (False, "resize_crop", "resize_crop", ""),
    ],
)
def test_evaluation_follows_from_training(crop, mode, resolved, said):
    config = load_config(FASHION)
    config.random_resized_crop, config.resize_mode = crop, mode
    validate(config, 1)
    assert (resize_mode(config), augmentation(config).resize_mode, to_dict(config)["resize_mode"]) == (resolved,) * 3
    assert said in " ".join(mismatches(config)) and bool(mismatches(config)) == bool(said)
    assert migrate_config({**to_dict(config), "resize_mode": "pad"})["resize_mode"] == "pad"


def test_useless_eval_resize_is_mentioned():
    config = load_config(FASHION)
    config.eval_resize = 40
    assert mismatches(config) == ['eval_resize 40 has no effect with resize_mode "pad": use "resize_crop"']


@pytest.mark.parametrize("path", [*ALL])
def test_shipped_configs_fit(path):
    assert mismatches(load_config(path)) == []


def test_list_of_fields_is_current(capsys):
    assert train.main(["--list-fields"]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "docs" / "fields.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    rows = [row for row in rows if row[0] not in ("field", "---")]
    assert [row[0] for row in rows] == [*MODEL_FIELDS, *FIELDS]
    assert all(len(row) == 4 and all(row) for row in rows)
    assert {row[0]: row[2] for row in rows}["learning_rate"] == "0.1"


def test_aliases_are_other_names_of_fields():
    fields = {*MODEL_FIELDS, *FIELDS}
    assert set(ALIASES.values()) <= fields and not fields & set(ALIASES)


@pytest.mark.parametrize("argument", ["--config.lr=0.1", "--lr=0.1", "--lr"])
def test_abbreviations_are_suggested(argument):
    with pytest.raises(InputError, match=r'did you mean "(--config\.)?learning_rate"'):
        read([f"--config={FASHION}", argument])
    with pytest.raises(InputError, match=r'did you mean "--config\.epochs"'):
        read([f"--config={FASHION}", "--epochs=3"])


def test_known_names_are_all_listed():
    with pytest.raises(InputError) as error:
        load_config(FASHION, ["qqqqqq=1"])
    assert str(error.value).endswith("the known ones are " + ", ".join(default_config().keys()))
