"""The experiment's configuration: every field with its default, and the checks before compilation."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any, Protocol

from ml_collections import config_dict

from spiking_mlp_jax.data.randaugment import parse_rand_augment
from spiking_mlp_jax.data.transforms import Augment
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import ADDED, ModelConfig
from spiking_mlp_jax.models.pixels import RESIZE_MODES, check_resize, check_statistics
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
    "norm_statistics": ("global", "device"),
    "on_nonfinite": ("stop", "skip"),
}
# Smallest value of each field, and whether that value itself is allowed.
MINIMA = {
    "batch_size": (1, True),
    "accumulate": (1, True),
    "fsdp": (1, True),
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
    "crop_min_area": (0.0, False),
    "color_jitter": (0.0, True),
    "random_erasing": (0.0, True),
    "mixup": (0.0, True),
    "cutmix": (0.0, True),
    "mix_probability": (0.0, True),
    "mix_switch": (0.0, True),
    "repeats": (1, True),
    "max_bad_images": (0.0, True),
    "eval_resize": (0, True),
    "workers": (0, True),
    "log_every": (1, True),
    "checkpoint_every": (0, True),
    "keep": (1, True),
    "max_steps": (0, True),
}
# Fields of training that came after the first runs: a run saved without them had their defaults.
ADDED_TO_TRAINING = (
    *("activity_weight", "activity_measure", "init_weights", "weight_bits", "on_nonfinite"),
    *("crop_min_area", "rand_augment", "color_jitter", "random_erasing"),
    *("mixup", "cutmix", "mix_probability", "mix_switch", "repeats", "max_bad_images"),
    *("accumulate", "norm_statistics", "fsdp"),
    *("ema_decay", "eval_only", "profile_steps"),
)
# Largest value of each field that has one, and whether that value itself is allowed.
MAXIMA = {
    "momentum": (1.0, False),
    "gamma": (1.0, True),
    "warmup_factor": (1.0, True),
    "tet_lambda": (1.0, True),
    "label_smoothing": (1.0, False),
    "crop_min_area": (1.0, True),
    "random_erasing": (1.0, True),
    "mix_probability": (1.0, True),
    "mix_switch": (1.0, True),
    "max_bad_images": (1.0, True),
    "weight_bits": (8, True),
    "ema_decay": (1.0, False),
    "seed": (2**31 - 1, True),
}


class Config(Protocol):
    """What a type checker sees of an ml_collections.ConfigDict: fields that can be anything."""

    def __getattr__(self, name: str) -> Any: ...
    def __getitem__(self, name: str) -> Any: ...
    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        ...


def default_config() -> config_dict.ConfigDict:
    """Every field of an experiment, with its type and default.

    Returns:
        a flat ConfigDict. Its first fields are ModelConfig's, under the same names; `v_reset` and `data_dir`
        may be None.

    Examples:
        >>> config = default_config()
        >>> config.time_steps, config.optimizer
        (4, 'sgd')
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
    config.crop_min_area = 0.08  # smallest share of the image that such a crop covers
    config.rand_augment = ""  # random operations in timm's notation, such as "rand-m9-mstd0.5-inc1"; "": none
    config.color_jitter = 0.0  # largest change of brightness, contrast and saturation; 0: none
    config.random_erasing = 0.0  # probability that a rectangle becomes noise
    config.mixup = 0.0  # alpha of mixup: blends neighbours in the batch and their labels; 0: no mixup
    config.cutmix = 0.0  # alpha of cutmix: puts a rectangle of the neighbour in; 0: no cutmix
    config.mix_probability = 1.0  # that a batch is mixed
    config.mix_switch = 0.5  # probability of cutmix instead of mixup, where both are on
    config.repeats = 1  # differently augmented copies of each image in a batch; epochs keep their number of steps
    config.max_bad_images = 0.001  # largest share of damaged images, which are left out; beyond it the run stops
    config.mean = (0.485, 0.456, 0.406)  # of each channel, of pixels in [0, 1]
    config.std = (0.229, 0.224, 0.225)
    config.workers = 0  # processes that read images; 0: threads of this one

    # Optimisation
    config.batch_size = 128  # images a step, over all devices
    config.accumulate = 1  # micro-batches in which a device computes its images, one after the other: less memory
    # Whose images a batch norm's statistics are of: "global", those of all devices; "device", each device's own
    config.norm_statistics = "global"
    config.fsdp = 1  # devices that share out the memory of parameters and optimiser; 1: all is on every device
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
    config.on_nonfinite = "stop"  # what a NaN or infinite loss or gradient does; "skip": that step changes nothing
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


def augmentation(config: Config) -> Augment:
    """What an experiment does to each training image.

    Raises:
        InputError: a value no augmentation can have.
    """
    return Augment(
        config.resize_mode,
        config.eval_resize,
        config.random_resized_crop,
        config.crop_min_area,
        config.crop_padding,
        config.flip,
        parse_rand_augment(config.rand_augment),
        config.color_jitter,
        config.random_erasing,
        tuple(config.mean),
        tuple(config.std),
    )


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
            raise InputError(f'{name} cannot be "{one_line(values[name])}": {nearest(values[name], known)}')
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
    if config.repeats > config.batch_size:
        raise InputError(f"repeats {config.repeats} must be at most batch_size, which is {config.batch_size}")
    augmentation(config)
    if (config.mixup or config.cutmix) and config.batch_size // device_count % 2:
        raise InputError(
            f"mixup and cutmix pair the images on a device, but batch_size {config.batch_size} on {device_count} "
            f"device(s) leaves one without a partner: take a multiple of {2 * device_count}"
        )
    if device_count % config.fsdp:
        raise InputError(
            f"fsdp {config.fsdp} does not divide the {device_count} devices: take 1 or another divisor of that number"
        )
    if config.batch_size % (device_count * config.accumulate):
        near = -(-config.batch_size // (device_count * config.accumulate)) * device_count * config.accumulate
        raise InputError(
            f"accumulate {config.accumulate} does not divide the {config.batch_size // device_count} images that each "
            f"of the {device_count} devices has of batch_size {config.batch_size}: take a divisor, or batch_size {near}"
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


def one_line(error: object) -> str:
    """Something as words that fit into one sentence."""
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
