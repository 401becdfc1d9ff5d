"""The configuration of an experiment: every field declared once, checks before compilation, and config files."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import runpy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import flags
from ml_collections import config_dict, config_flags

from spiking_mlp_jax.data.randaugment import parse_rand_augment
from spiking_mlp_jax.data.transforms import Augment
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import ADDED, ModelConfig
from spiking_mlp_jax.models.pixels import RESIZE_MODES, check_resize, check_statistics
from spiking_mlp_jax.utils.paths import user_path
from spiking_mlp_jax.utils.watchdog import parse_deadlines


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of an experiment.

    Attributes:
        default: also says the type. None is a path that may be missing.
        help: one line; a word at its end in parentheses says what 0 or "" means.
        choices: all values allowed.
        least, above, most, below: bounds; `least` and `most` are allowed themselves.
        added: came after the first runs were saved; a run without it had the default.
        free: changes what is shown and kept, not what is computed: a run may resume with another value.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    added: bool = False
    free: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises InputError unless a value has the field's type, is one of its choices and within its bounds."""
        _check_type(name, value, self.default)
        if self.choices and value not in self.choices:
            raise InputError(f'{name} cannot be "{one_line(value)}": {nearest(value, self.choices)}')
        for bound, fits, words in (
            (self.least, lambda bound: value >= bound, "at least"),
            (self.above, lambda bound: value > bound, "above"),
            (self.most, lambda bound: value <= bound, "at most"),
            (self.below, lambda bound: value < bound, "below"),
        ):
            if bound is not None and not fits(bound):
                raise InputError(f"{name} must be {words} {bound}, got {value}")


# Besides these an experiment has the fields of ModelConfig.
FIELDS = {
    # Data
    "dataset": Field("fashion_mnist", '"fashion_mnist", "idx", "folder", "npz:FILE" or "tfds:NAME"'),
    "data_dir": Field(
        None, "folder of the files, from the working folder (None: the images in the package)", free=True
    ),
    "resize_mode": Field(
        "auto",
        'how images reach image_size ("auto": "resize_crop" with random_resized_crop, else "pad")',
        ("auto", *RESIZE_MODES),
    ),
    "eval_resize": Field(0, 'shorter side before the centre crop of "resize_crop" (0: 8/7 of image_size)', least=0),
    "crop_padding": Field(0, "pixels of padding before a random crop while training (0: no crop)", least=0),
    "flip": Field(False, "mirror half of the training images"),
    "random_resized_crop": Field(False, "crop a random area and resize it"),
    "crop_min_area": Field(
        0.08, "smallest share of the image that such a crop covers", above=0.0, most=1.0, added=True
    ),
    "rand_augment": Field(
        "", 'random operations in timm\'s notation, e.g. "rand-m9-mstd0.5-inc1" ("": off)', added=True
    ),
    "color_jitter": Field(0.0, "largest change of brightness, contrast and saturation (0: off)", least=0.0, added=True),
    "random_erasing": Field(0.0, "probability that a rectangle becomes noise", least=0.0, most=1.0, added=True),
    "mixup": Field(0.0, "alpha of mixup, which blends neighbours in the batch (0: off)", least=0.0, added=True),
    "cutmix": Field(0.0, "alpha of cutmix, which pastes a rectangle of the neighbour (0: off)", least=0.0, added=True),
    "mix_probability": Field(1.0, "that a batch is mixed", least=0.0, most=1.0, added=True),
    "mix_switch": Field(
        0.5, "probability of cutmix instead of mixup, where both are on", least=0.0, most=1.0, added=True
    ),
    "repeats": Field(1, "differently augmented copies of each image in a batch", least=1, added=True),
    "max_bad_images": Field(
        0.001, "largest share of corrupt images, which are skipped", least=0.0, most=1.0, added=True, free=True
    ),
    "allow_other_data": Field(False, "resume or evaluate on data that differ from the run's", added=True, free=True),
    "mean": Field((0.485, 0.456, 0.406), "of each channel, of pixels in [0, 1]"),
    "std": Field((0.229, 0.224, 0.225), "of each channel, of pixels in [0, 1]"),
    "workers": Field(0, "processes that read images (0: threads of this one)", least=0, free=True),
    # Optimisation
    "batch_size": Field(128, "images a step, over all devices", least=1),
    "accumulate": Field(1, "micro-batches of a device's images, one after the other, for memory", least=1, added=True),
    "norm_statistics": Field("global", "images a norm sees: all, or a device's", ("global", "device"), added=True),
    "fsdp": Field(1, "devices that shard parameters and optimiser (1: replicated)", least=1, added=True, free=True),
    "eval_batch_size": Field(256, "images an evaluation step, over all devices", least=1, free=True),
    "epochs": Field(10, "passes over the training images", least=1),
    "seed": Field(0, "of initial weights, order of the images and augmentation", least=0, most=2**31 - 1),
    "init_weights": Field("", 'initial weights: workdir, folder or shipped name ("": from the seed)', added=True),
    "loss": Field("cross_entropy", "of the time-mean logits, or TET", ("cross_entropy", "tet", "mse")),
    "tet_lambda": Field(0.05, "share of TET's regulariser", least=0.0, most=1.0),
    "label_smoothing": Field(0.0, "share of the label spread over all classes", least=0.0, below=1.0),
    "activity_weight": Field(0.0, "of the firing-rate penalty in the loss (0: off)", least=0.0, added=True),
    "activity_measure": Field(
        "rates", "mean firing rate, or share of dense synaptic operations", ("rates", "synops"), added=True
    ),
    "weight_bits": Field(0, "round weights as an integer network of 2 to 8 bits (0: off)", least=0, most=8, added=True),
    "optimizer": Field("sgd", "the optimiser", ("sgd", "adam", "adamw")),
    "learning_rate": Field(0.1, "after the warm-up", least=0.0),
    "momentum": Field(0.9, 'of "sgd"', least=0.0, below=1.0),
    "weight_decay": Field(0.0, "of every parameter", least=0.0),
    "clip_norm": Field(0.0, "largest global norm of the gradient (0: not clipped)", least=0.0),
    "ema_decay": Field(
        0.0,
        "of averaged weights, which are evaluated and saved (0: off)",
        least=0.0,
        below=1.0,
        added=True,
    ),
    "schedule": Field("cosine", "of the learning rate", ("cosine", "step", "exponential", "constant")),
    "step_epochs": Field(30.0, '"step" multiplies by gamma every this many epochs', above=0.0),
    "gamma": Field(0.1, 'factor of "step", and of "exponential" per epoch', above=0.0, most=1.0),
    "warmup_epochs": Field(0.0, "epochs of warm-up", least=0.0),
    "warmup_method": Field("linear", "how the learning rate rises", ("linear", "constant")),
    "warmup_factor": Field(0.01, "of the learning rate, where the warm-up starts", least=0.0, most=1.0),
    # Running
    "log_every": Field(50, "steps between lines of metrics", least=1, free=True),
    "checkpoint_every": Field(0, "steps between checkpoints (0: one each epoch)", least=0, free=True),
    "keep": Field(2, "newest checkpoints that stay besides the best", least=1, free=True),
    "on_nonfinite": Field(
        "stop", "what a NaN or infinite loss or gradient does to the run", ("stop", "skip"), added=True, free=True
    ),
    "max_steps": Field(0, "stop after this step (0: train all epochs)", least=0, free=True),
    "dry_run": Field(False, "print sizes and costs, then stop", free=True),
    "eval_only": Field(False, "evaluate the newest checkpoint, or else init_weights, then stop", added=True, free=True),
    "profile_steps": Field("", '"10:15": trace the five steps after the tenth ("": none)', added=True, free=True),
    "host_memory": Field(
        "auto", '"keep" freed memory for faster steps ("auto": on CPUs)', ("auto", "default", "keep"), free=True
    ),
    "deadlines": Field(
        "", 'seconds a phase may last, e.g. "reading=60,restoring=300" ("off": no limits)', added=True, free=True
    ),
    "compilation_cache": Field("auto", 'folder of compiled programs ("auto": user cache, "off": none)', free=True),
}
# Groups of fields, with the first one of each, for `fields_page`.
GROUPS = {"image_size": "Network", "dataset": "Data", "batch_size": "Optimization", "log_every": "Running"}
MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
FREE_FIELDS = tuple(name for name, field in FIELDS.items() if field.free)


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
    fields = dataclasses.asdict(ModelConfig())
    # A field of type object accepts --config.v_reset=None (soft reset) besides numbers.
    fields["v_reset"] = config_dict.FieldReference(0.0, field_type=object)
    fields |= {name: field.default for name, field in FIELDS.items()}
    fields["data_dir"] = config_dict.placeholder(str)
    return config_dict.ConfigDict(fields)


def model_config(config: Config) -> ModelConfig:
    """The network an experiment trains.

    Raises:
        InputError: a value no network can have.
    """
    return ModelConfig(**{name: config[name] for name in MODEL_FIELDS})


def resize_mode(config: Config) -> str:
    """How evaluated images reach image_size, with "auto" resolved: as the training images do."""
    if config.resize_mode != "auto":
        return config.resize_mode
    return "resize_crop" if config.random_resized_crop else "pad"


def mismatches(config: Config) -> list[str]:
    """Messages about fields that do not fit each other, though the experiment can be trained."""
    found = []
    mode = resize_mode(config)
    if config.random_resized_crop and mode == "pad":
        found.append(
            'random_resized_crop trains on crops that fill the image, but resize_mode "pad" evaluates images with '
            'black borders, which costs accuracy: use "auto"'
        )
    if config.eval_resize and mode != "resize_crop":
        found.append(f'eval_resize {config.eval_resize} has no effect with resize_mode "{mode}": use "resize_crop"')
    return found


def augmentation(config: Config) -> Augment:
    """What an experiment does to each training image.

    Raises:
        InputError: a value no augmentation can have.
    """
    return Augment(
        resize_mode(config),
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
    """The configuration as plain JSON types (tuples become lists), with `resize_mode` resolved."""
    return json.loads(json.dumps(config.to_dict() | {"resize_mode": resize_mode(config)}))


def migrate_config(saved: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an older version may have saved, as `to_dict` would give it today.

    Newer fields take their defaults, and `remat` is "none" or "block" where it was False or True.
    """
    defaults = json.loads(default_config().to_json())
    added = (*ADDED, *(name for name, field in FIELDS.items() if field.added))
    found = {**{name: defaults[name] for name in added}, **saved}
    if isinstance(found.get("remat"), bool):
        found["remat"] = "block" if found["remat"] else "none"
    return found


def fields_page() -> str:
    """All fields of an experiment, as Markdown tables that are readable in a terminal, too; docs/fields.md."""
    rows = [
        (field.name, _kind(str(field.type), field.metadata), str(field.default), _described(ModelConfig, field.name))
        for field in dataclasses.fields(ModelConfig)
    ]
    for name, field in FIELDS.items():
        kind = "path or None" if field.default is None else type(field.default).__name__
        rows.append((name, _kind(kind, vars(field)), str(field.default) or '""', field.help))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "# Fields",
        "",
        "`--config.NAME=VALUE` sets a field; in Python, `config.NAME = value`. This page is the output of",
    ]
    lines += ["`spiking-mlp train --list-fields`."]
    for row in rows:
        if row[0] in GROUPS:
            heads = ["field", "type", "default"]
            head = " | ".join(text.ljust(width) for text, width in zip(heads, widths, strict=True))
            lines += ["", f"## {GROUPS[row[0]]}", "", f"| {head} | effect |", "|---|---|---|---|"]
        lines.append("| " + " | ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)) + " |")
    return "\n".join(lines) + "\n"


def _kind(name: str, limits: Mapping[str, Any]) -> str:
    if limits.get("choices"):
        return ", ".join(f'"{choice}"' for choice in limits["choices"])
    signs = {"least": ">=", "above": ">", "most": "<=", "below": "<"}
    bounds = [f"{sign} {limits[bound]:g}" for bound, sign in signs.items() if limits.get(bound) is not None]
    return ", ".join([name.replace(" | ", " or "), *bounds])


def _described(described: type, name: str) -> str:
    """What a docstring's "Args:" say about a name, on one line."""
    found = re.search(rf"^    {name}: (.*(?:\n {{8,}}.*)*)", inspect.getdoc(described) or "", re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def validate(config: Config, device_count: int) -> None:
    """Refuses what cannot be trained, before anything is compiled.

    Args:
        config: the experiment.
        device_count: devices that share a batch.

    Raises:
        InputError: an unknown or missing field, a value of the wrong type or an impossible value.
    """
    values = config.to_dict()
    known = (*MODEL_FIELDS, *FIELDS)
    check_names(values, known)
    for name in known:
        if name not in values:
            raise InputError(f'the config lacks "{name}": start it from spiking_mlp_jax.train.config.default_config()')
    for name, field in FIELDS.items():
        field.check(name, values[name])
    model = model_config(config)
    if model.in_channels not in (1, 3):
        raise InputError(f"in_channels must be 1 (grey) or 3 (colour), got {model.in_channels}")
    check_statistics(config.mean, config.std, config.in_channels)
    check_resize(resize_mode(config), config.eval_resize, config.image_size)
    augmentation(config)
    parse_window(config.profile_steps)
    parse_deadlines(config.deadlines)
    _check_batches(config, device_count)
    if config.weight_bits == 1:
        raise InputError("weight_bits must be 0 (not rounded) or 2 to 8, got 1")
    if config.weight_bits and config.norm == "layer":
        raise InputError(
            'weight_bits rounds as an integer network does, but norm="layer" cannot become one: take "batch"'
        )
    if config.warmup_epochs >= config.epochs:
        raise InputError(f"warmup_epochs {config.warmup_epochs} must be below epochs, which is {config.epochs}")
    if config.crop_padding >= model.image_size:
        raise InputError(f"crop_padding {config.crop_padding} must be below image_size, which is {model.image_size}")
    if config.crop_padding and config.random_resized_crop:
        raise InputError("crop_padding and random_resized_crop exclude each other: set one of them to 0 or False")


def _check_batches(config, devices):
    for name in ("batch_size", "eval_batch_size"):
        if config[name] % devices:
            raise InputError(
                f"{name} {config[name]} is not divisible by the {devices} devices that share it: take "
                f"{-(-config[name] // devices) * devices}"
            )
    if config.repeats > config.batch_size:
        raise InputError(f"repeats {config.repeats} must be at most batch_size, which is {config.batch_size}")
    if (config.mixup or config.cutmix) and config.batch_size // devices % 2:
        raise InputError(
            f"mixup and cutmix pair the images on a device, but batch_size {config.batch_size} on {devices} "
            f"device(s) leaves one without a partner: take a multiple of {2 * devices}"
        )
    if devices % config.fsdp:
        raise InputError(
            f"fsdp {config.fsdp} does not divide the {devices} devices: take 1 or another divisor of that number"
        )
    parts = devices * config.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"accumulate {config.accumulate} does not divide the {config.batch_size // devices} images that each of "
            f"the {devices} devices has of batch_size {config.batch_size}: take a divisor, or batch_size "
            f"{-(-config.batch_size // parts) * parts}"
        )


def parse_window(text: str, last: int | None = None) -> tuple[int, int] | None:
    """First and last of profile_steps "A:B", as the steps taken when the trace starts and when it ends; None for "".

    Args:
        text: the field.
        last: the run's last step, None where it is not known.

    Raises:
        InputError: it is neither, or begins after the last step.
    """
    if not text:
        return None
    start, _, end = text.partition(":")
    if not (start.isdecimal() and end.isdecimal() and int(start) < int(end)):
        raise InputError(
            f'profile_steps must be "A:B" with A below B, e.g. "10:15" for the five steps after the tenth, got {text!r}'
        )
    if last is not None and int(start) >= last:
        raise InputError(f'profile_steps "{text}" begins after the run\'s last step, {last}: name earlier steps')
    return int(start), int(end)


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuses names of fields that do not exist, with the nearest that does."""
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(f'there is no config field "{name}": {nearest(name, known)}')


def one_line(error: object) -> str:
    """Text that fits into a one-line message."""
    return " ".join(str(error).split())[:300]


def load_config(text: str, overrides: Sequence[str] = ()) -> config_dict.ConfigDict:
    """The experiment that a config file describes.

    Args:
        text: "FILE.py", "FILE.py:ARGUMENT", or the name of a shipped config with or without an argument, e.g.
            "fashion_mnist:demo".
        overrides: fields with other values, "NAME=VALUE" or as on the command line, "--config.NAME=VALUE". Keyword-only
            parameters of the file's `get_config` receive theirs as text, e.g. `def get_config(*, data_dir=None)`.

    Raises:
        InputError: no such file, one that fails or does not define a configuration, an unknown field or a value of the
            wrong type. `validate` checks the values.

    Examples:
        >>> load_config("fashion_mnist:demo", ["time_steps=2"]).time_steps
        2
    """
    name, colon, argument = text.partition(":")
    file = find_config(name)
    words = [word if word.startswith("-") or "=" not in word else f"--config.{word}" for word in overrides]
    values = {}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        field, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and field.startswith("config."):
            values[field.removeprefix("config.")] = value if equals else following
    config = call_function(file, "get_config", "config file", *([argument] if colon else []), keywords=values)
    if not isinstance(config, config_dict.ConfigDict):
        raise InputError(f'get_config of "{file}" must return a ConfigDict, but returned {type(config).__name__}')
    _override(config, words)
    return config


def find_config(name: str) -> str:
    """The path of a config file.

    Args:
        name: a path, or the name of a shipped config, e.g. "fashion_mnist".

    Raises:
        InputError: there is no such file; the message names the nearest.
    """
    path = str(user_path(name))
    if file := path if os.path.isfile(path) else shipped_config(name):
        return file
    # Suggestions come only from folders of configs: elsewhere are other programs, e.g. train.py.
    folder = os.path.dirname(name)
    files = sorted(Path(folder if os.path.basename(folder) == "configs" else "configs").glob("*.py"))
    known = [str(file) for file in files] if name.endswith(".py") else []
    known = known or sorted(path.stem for path in _shipped_configs().glob("*.py"))
    raise InputError(f'there is no config file "{name}": {nearest(name, known)}')


def shipped_config(name: str) -> str | None:
    """The path of a file that the package ships, e.g. "fashion_mnist", "sweeps/norm" or "configs/imagenet.py"."""
    folder = _shipped_configs().resolve()
    file = (folder / f"{name.removeprefix('configs/').removesuffix('.py')}.py").resolve()
    return str(file) if file.is_file() and file.is_relative_to(folder) else None


def _shipped_configs() -> Path:
    package = Path(__file__).parents[1]
    wheel, checkout = package / "configs", package.parent / "configs"
    return wheel if wheel.is_dir() else checkout


def call_function(file: str, name: str, what: str, *arguments: Any, keywords: Mapping[str, Any] | None = None) -> Any:
    """What a function that a Python file defines returns.

    Args:
        file: its path; it exists.
        name: of the function.
        what: the file is, for messages, e.g. "config file".
        arguments: of the function.
        keywords: values for those of its keyword-only parameters that are named here.

    Raises:
        InputError: the file fails or does not define the function.
    """
    try:
        function = runpy.run_path(file).get(name)
        if function is None:
            hint = "; it is a sweep: run it with spiking-mlp sweep" if f"{os.sep}sweeps{os.sep}" in str(file) else ""
            raise InputError(f'the {what} "{file}" defines no function {name}{hint}')
        parameters = inspect.signature(function).parameters.values()
        wanted = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        return function(*arguments, **{key: value for key, value in (keywords or {}).items() if key in wanted})
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        # Whatever the user's own code raises is a mistake in that file, not in this package.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
        place = f" in line {lines[-1]}" if lines else ""
        raise InputError(f'the {what} "{file}" fails{place}: {type(error).__name__}: {one_line(error)}') from error


def _override(config, words):
    # ml_collections finds most of these mistakes, too, but answers with a traceback.
    for word in words:
        flag, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and flag.startswith(("config.", "noconfig.")):
            name = flag.partition(".")[2]
            check_names([name], config.keys())
            if equals:
                _check_override(name, value, config.get_type(name))
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *words])
        rest = values(["", *words])[1:]
    except flags.Error as error:
        raise InputError(one_line(error)) from error
    if rest:
        raise InputError(f'unexpected argument "{rest[0]}": write overrides as --config.NAME=VALUE')


def _check_override(name, value, kind):
    wanted = {int: "a whole number", float: "a number", bool: "True or False"}.get(kind)
    if wanted is None:
        return
    try:
        fits = value.lower() in ("true", "t", "1", "false", "f", "0") if kind is bool else kind(value) is not None
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f'{name} must be {wanted}, but --config.{name} is "{value}"')


def _check_type(name, value, default):
    if default is None:
        if value is not None and not isinstance(value, str):
            raise InputError(f"{name} must be a path or None, got {value!r}")
    elif isinstance(default, tuple):
        if not isinstance(value, tuple | list) or not value or not all(map(_is_number, value)):
            raise InputError(f"{name} must list finite numbers, one per channel, got {value!r}")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, got {value!r}")
    elif isinstance(default, float):
        if not _is_number(value):
            raise InputError(f"{name} must be a finite number, got {value!r}")
    elif isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name} must be a whole number, got {value!r}")
    elif not isinstance(value, str):
        raise InputError(f"{name} must be a word, got {value!r}")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
