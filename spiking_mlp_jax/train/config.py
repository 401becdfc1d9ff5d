"""The experiment's configuration: every field with its default, and the checks before compilation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import runpy
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ml_collections import config_dict

from spiking_mlp_jax.config import ADDED, ModelConfig, nearest
from spiking_mlp_jax.data.augment import RESIZE_MODES, check_resize
from spiking_mlp_jax.data.normalize import check_statistics
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.train.profile import parse_window

MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
CHOICES = {
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("cosine", "step", "exponential", "constant"),
    "warmup_method": ("linear", "constant"),
    "loss": ("cross_entropy", "tet", "mse"),
    "activity_measure": ("rates", "synops"),
    "resize_mode": RESIZE_MODES,
    "host_memory": ("auto", "default", "keep"),
}
# Smallest value of each field, and whether that value itself is allowed.
MINIMA = {
    "batch_size": (1, True),
    "eval_batch_size": (1, True),
    "epochs": (1, True),
    "seed": (0, True),
    "learning_rate": (0.0, True),
    "momentum": (0.0, True),
    "weight_decay": (0.0, True),
    "step_epochs": (0.0, False),
    "gamma": (0.0, False),
    "warmup_epochs": (0.0, True),
    "warmup_factor": (0.0, True),
    "tet_lambda": (0.0, True),
    "label_smoothing": (0.0, True),
    "activity_weight": (0.0, True),
    "weight_bits": (0, True),
    "ema_decay": (0.0, True),
    "clip_norm": (0.0, True),
    "crop_padding": (0, True),
    "eval_resize": (0, True),
    "workers": (0, True),
    "log_every": (1, True),
    "checkpoint_every": (0, True),
    "keep": (1, True),
    "max_steps": (0, True),
}
# Fields of training that came after the first runs: a run saved without them had their defaults.
ADDED_TO_TRAINING = (
    "activity_weight",
    "activity_measure",
    "init_weights",
    "weight_bits",
    "ema_decay",
    "eval_only",
    "profile_steps",
)
# Largest value of each field that has one, and whether that value itself is allowed.
MAXIMA = {
    "momentum": (1.0, False),
    "gamma": (1.0, True),
    "warmup_factor": (1.0, True),
    "tet_lambda": (1.0, True),
    "label_smoothing": (1.0, False),
    "weight_bits": (8, True),
    "ema_decay": (1.0, False),
    "seed": (2**31 - 1, True),
}


class Config(Protocol):
    """What a type checker sees of an ml_collections.ConfigDict: fields that can be anything."""

    def __getattr__(self, name: str) -> Any: ...
    def __getitem__(self, name: str) -> Any: ...
    def to_dict(self) -> dict[str, Any]: ...


def default_config() -> config_dict.ConfigDict:
    """Every field of an experiment, with its type and default.

    Returns:
        a flat ConfigDict. Its first fields are ModelConfig's, under the same names; `v_reset` and `data_dir`
        may be None.
    """
    config = config_dict.ConfigDict(dataclasses.asdict(ModelConfig()))
    # A field of type object accepts --config.v_reset=None (soft reset) besides numbers.
    config.v_reset = config_dict.FieldReference(0.0, field_type=object)

    # Data
    config.dataset = "fashion_mnist"  # or "idx", "folder", "tfds:NAME"
    config.data_dir = config_dict.placeholder(str)  # where the files are; None: the images inside the package
    config.resize_mode = "pad"  # how images reach image_size: "pad", "resize" or "resize_crop"
    config.eval_resize = 0  # shorter side before the centre crop of "resize_crop"; 0: 8/7 of image_size
    config.crop_padding = 0  # pixels of padding before a random crop while training; 0: no crop
    config.flip = False  # mirror half of the training images
    config.random_resized_crop = False  # crop a random area and resize it
    config.mean = (0.485, 0.456, 0.406)  # of each channel, of pixels in [0, 1]
    config.std = (0.229, 0.224, 0.225)
    config.workers = 0  # processes that read images; 0: threads of this one

    # Optimisation
    config.batch_size = 128  # images a step, over all devices
    config.eval_batch_size = 256
    config.epochs = 10
    config.seed = 0  # of the initial weights, the order of the images and their augmentation
    config.init_weights = ""  # where the initial weights come from: workdir, weights folder or shipped name; "": seed
    config.loss = "cross_entropy"  # or "tet", "mse"
    config.tet_lambda = 0.05
    config.label_smoothing = 0.0
    config.activity_weight = 0.0  # adds this times the measure of all layers' firing to the loss; 0: measures nothing
    config.activity_measure = "rates"  # mean of the layers' rates; or "synops", share of dense synaptic operations
    config.weight_bits = 0  # train with weights rounded as an integer network's of 2 to 8 bits; 0: not rounded
    config.optimizer = "sgd"  # or "adam", "adamw"
    config.learning_rate = 0.1
    config.momentum = 0.9
    config.weight_decay = 0.0
    config.clip_norm = 0.0  # largest global norm of the gradient; 0: not clipped
    config.ema_decay = 0.0  # of a moving average of the weights, which is evaluated and kept; 0: none
    config.schedule = "cosine"  # or "step", "exponential", "constant"
    config.step_epochs = 30.0  # "step" multiplies by gamma every so many epochs
    config.gamma = 0.1  # factor of "step", and of "exponential" per epoch
    config.warmup_epochs = 0.0
    config.warmup_method = "linear"  # or "constant"
    config.warmup_factor = 0.01  # of the learning rate, where the warm-up starts

    # Running
    config.log_every = 50  # steps
    config.checkpoint_every = 0  # steps; 0: once an epoch
    config.keep = 2  # newest checkpoints that are kept besides the best
    config.max_steps = 0  # stop after this step; 0: train all epochs
    config.dry_run = False  # print sizes and costs, then stop
    config.eval_only = False  # evaluate the workdir's newest checkpoint, or else init_weights, and stop
    config.profile_steps = ""  # "10:15" traces the five steps after the tenth into WORKDIR/profile; "": none
    # "keep": freed memory stays with the process (faster steps on CPUs); "auto": "keep" on CPUs, else "default"
    config.host_memory = "auto"
    config.compilation_cache = "auto"  # folder of compiled programs; "auto": in the user's cache, "off": none
    return config


def model_config(config: Config) -> ModelConfig:
    """The network an experiment trains.

    Raises:
        InputError: a value no network can have.
    """
    return ModelConfig(**{name: config[name] for name in MODEL_FIELDS})


def to_dict(config: Config) -> dict:
    """The configuration as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def in_todays_words(saved: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an older version may have saved, as `to_dict` would give it today.

    Fields that have come since take their defaults, and `remat` is "none" or "block" where it was False or True.
    """
    defaults = json.loads(default_config().to_json())
    found = {**{name: defaults[name] for name in (*ADDED, *ADDED_TO_TRAINING)}, **saved}
    if isinstance(found.get("remat"), bool):
        found["remat"] = "block" if found["remat"] else "none"
    return found


def validate(config: Config, device_count: int) -> None:
    """Refuses what cannot be trained, before anything is compiled.

    Args:
        config: the experiment.
        device_count: devices that share a batch.

    Raises:
        InputError: an unknown or missing field, a value of the wrong type or an impossible value.
    """
    values, defaults = config.to_dict(), default_config().to_dict()
    check_names(values, defaults)
    for name in defaults:
        if name not in values:
            raise InputError(f'the config lacks "{name}": start it from spiking_mlp_jax.train.config.default_config()')
    for name in (name for name in defaults if name not in MODEL_FIELDS):
        _check_type(name, values[name], defaults[name])
    for name, known in CHOICES.items():
        if values[name] not in known:
            raise InputError(f"{name} cannot be {json.dumps(str(values[name]))}: {nearest(values[name], known)}")
    for name, (least, inclusive) in MINIMA.items():
        if values[name] < least or (values[name] == least and not inclusive):
            raise InputError(f"{name} must be {'at least' if inclusive else 'above'} {least}, but it is {values[name]}")
    for name, (most, inclusive) in MAXIMA.items():
        if values[name] > most or (values[name] == most and not inclusive):
            raise InputError(f"{name} must be {'at most' if inclusive else 'below'} {most}, but it is {values[name]}")
    model = model_config(config)
    if model.in_channels not in (1, 3):
        raise InputError(f"in_channels must be 1 (grey) or 3 (colour), as images are, but it is {model.in_channels}")
    check_statistics(config.mean, config.std, config.in_channels)
    check_resize(config.resize_mode, config.eval_resize, config.image_size)
    for name in ("batch_size", "eval_batch_size"):
        if values[name] % device_count:
            near = -(-values[name] // device_count) * device_count
            raise InputError(
                f"{name} {values[name]} is not divisible by the {device_count} devices that share it: take {near}"
            )
    if config.weight_bits == 1:
        raise InputError("weight_bits must be 0 (not rounded) or 2 to 8, but it is 1")
    if config.weight_bits and config.norm == "layer":
        raise InputError(
            'weight_bits rounds as an integer network does, but norm="layer" cannot become one: take "batch"'
        )
    parse_window(config.profile_steps)
    if config.warmup_epochs >= config.epochs:
        raise InputError(f"warmup_epochs {config.warmup_epochs} must be below epochs, which is {config.epochs}")
    if config.crop_padding >= model.image_size:
        raise InputError(f"crop_padding {config.crop_padding} must be below image_size, which is {model.image_size}")
    if config.crop_padding and config.random_resized_crop:
        raise InputError("crop_padding and random_resized_crop exclude each other: set one of them to 0 or False")


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuses names of fields that do not exist, with the nearest that does."""
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(f'there is no config field "{name}": {nearest(name, known)}')


def load_config(path: str) -> config_dict.ConfigDict:
    """What a config file's get_config returns.

    Args:
        path: "FILE.py" or "FILE.py:ARGUMENT".

    Raises:
        InputError: no such file, or one that fails or does not define a configuration.
    """
    file, colon, argument = path.partition(":")
    if not os.path.isfile(file):
        # Only folders of configs: elsewhere are other programs, such as train.py.
        folder = os.path.dirname(file)
        folder = folder if os.path.basename(folder) == "configs" else "configs"
        files = [os.path.join(folder, name) for name in _python_files(folder)]
        raise InputError(f'there is no config file "{file}"' + (f": {nearest(file, files)}" if files else ""))
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise InputError(f'the config file "{file}" defines no function get_config')
        config = get_config(argument) if colon else get_config()
    except InputError:
        raise
    except Exception as error:
        # Whatever the user's own code raises is a mistake in that file, not in this package.
        message = f"{type(error).__name__}: {_one_line(error)}"
        raise InputError(f'the config file "{file}" fails{_line_of(error, file)}: {message}') from error
    if not isinstance(config, config_dict.ConfigDict):
        raise InputError(f'get_config of "{file}" must return a ConfigDict, but returned {type(config).__name__}')
    return config


def read_arguments(arguments: Sequence[str]) -> tuple[config_dict.ConfigDict, list[str]]:
    """Finds the experiment that a command line names, and checks the overrides of its fields.

    ml_collections would find most of these mistakes too, but answers with a traceback.

    Args:
        arguments: the command line without the program's name.

    Returns:
        the experiment without the overrides, and the arguments without `--config FILE`.

    Raises:
        InputError: the first mistake.
    """
    path, overrides, rest = "", {}, []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == "config":
            path = value if equals else next(remaining, "")
            continue
        rest.append(argument)
        if argument.startswith("-") and flag.startswith(("config.", "noconfig.")):
            overrides[flag.partition(".")[2]] = value if equals else None
    if not path:
        raise InputError("say what to train with --config FILE, such as --config configs/fashion_mnist.py")
    config = load_config(path)
    check_names(overrides, config.keys())
    for name, value in overrides.items():
        _check_override(name, value, config.get_type(name))
    return config, rest


def _check_override(name, value, kind):
    wanted = {int: "a whole number", float: "a number", bool: "True or False"}.get(kind)
    if value is None or wanted is None:
        return
    try:
        fits = value.lower() in ("true", "t", "1", "false", "f", "0") if kind is bool else kind(value) is not None
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f'{name} must be {wanted}, but --config.{name} is "{value}"')


def _python_files(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".py")) if os.path.isdir(folder) else []


def _line_of(error, file):
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    return f" in line {lines[-1]}" if lines else ""


def _one_line(error):
    return " ".join(str(error).split())[:300]


def _check_type(name, value, default):
    if name == "data_dir":
        if value is not None and not isinstance(value, str):
            raise InputError(f"data_dir must be a path or None, but it is {value!r}")
        return
    if isinstance(default, tuple):
        _check_tuple(name, value)
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, but it is {value!r}")
    elif isinstance(default, float):
        if not _is_number(value):
            raise InputError(f"{name} must be a finite number, but it is {value!r}")
    elif isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name} must be a whole number, but it is {value!r}")
    elif not isinstance(value, str):
        raise InputError(f"{name} must be a word, but it is {value!r}")


def _check_tuple(name, value):
    if not isinstance(value, tuple | list) or not value or not all(_is_number(item) for item in value):
        raise InputError(f"{name} must list finite numbers, one per channel, but it is {value!r}")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
