"""The experiment that a command line names: a config file and overrides of its fields."""

from __future__ import annotations

import os
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

from ml_collections import config_dict

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.train.config import check_names, one_line


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
    config = call_function(file, "get_config", "config file", *([argument] if colon else []))
    if not isinstance(config, config_dict.ConfigDict):
        raise InputError(f'get_config of "{file}" must return a ConfigDict, but returned {type(config).__name__}')
    return config


def call_function(file: str, name: str, what: str, *arguments: Any) -> Any:
    """What a function that a Python file defines returns.

    Args:
        file: its path; it exists.
        name: of the function.
        what: the file is, for sentences, such as "config file".
        arguments: of the function.

    Raises:
        InputError: the file fails or does not define the function.
    """
    try:
        function = runpy.run_path(file).get(name)
        if function is None:
            raise InputError(f'the {what} "{file}" defines no function {name}')
        return function(*arguments)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        # Whatever the user's own code raises is a mistake in that file, not in this package.
        message = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f'the {what} "{file}" fails{_line_of(error, file)}: {message}') from error


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
