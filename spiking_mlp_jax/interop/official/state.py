"""The names and axes of the official `state_dict`, and those of this package's model.

A state maps official names to NumPy arrays. The mapping is a bijection: each official entry is one variable of the
model, or one block's slice of it, with its axes permuted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.folder import check_finite
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One official entry: the model's variable at `path`, or its slice `block` if blocks are stacked."""

    official: str
    path: Path
    block: int | None
    to_official: Callable[[np.ndarray], np.ndarray]
    from_official: Callable[[np.ndarray], np.ndarray]
    is_norm: bool = False


# How the axes of an array are permuted: (to official, from official).
SAME = (lambda a: a, lambda a: a)
TRANSPOSED = (lambda a: a.T, lambda a: a.T)
CONVOLUTION = (lambda a: a.transpose(3, 2, 0, 1), lambda a: a.transpose(2, 3, 1, 0))
AXIS_KERNEL = (lambda a: a[..., None, None], lambda a: a[..., 0, 0])
FUSION_KERNEL = (lambda a: a.T[..., None, None], lambda a: a[..., 0, 0].T)
COUNT = (lambda a: a.astype(np.int64), lambda a: a.astype(np.int32))


COUNTER = ".num_batches_tracked"


def load_state_dict(model: SpikingMLP, state: Mapping[str, Any]) -> None:
    """Load official weights into a model, in place.

    Args:
        model: of the configuration that the state was trained with, concrete or from `nnx.eval_shape`.
        state: official names to arrays. Prefixes of training (`plain_name`) and the ".0" that the conversion to
            synchronized BatchNorm appends to a norm's name are accepted; as in PyTorch, a missing
            `num_batches_tracked`, which changes no result, is 0. Parameters take the dtype of the state;
            float64 needs `jax_enable_x64`.

    Raises:
        InputError: an entry is missing, unexpected, of another shape or of a wrong dtype, or holds NaN, inf or negative
            variances; the message has its name, and nothing is loaded.

    Examples:
        >>> model = SpikingMLP.from_pretrained("fashion_mnist")
        >>> state = state_dict(model)
        >>> state["token_mix.0.proj_h.1.weight"].shape
        (8, 8, 1, 1)
        >>> load_state_dict(model, state)
    """
    entries = list(official_entries(model.config))
    given = _plain_names(state, entries)
    names = [entry.official for entry in entries]
    missing = [name for name in names if name not in given and not name.endswith(COUNTER)]
    extra = [given[name] for name in given if name not in set(names)]
    if missing:
        raise InputError(f'the official state has no entry "{missing[0]}"{_and_more(missing)}: wrong configuration?')
    if extra:
        hint = nearest(extra[0], names)
        hint = hint if hint.startswith("did") else "wrong configuration?"  # not the list of all tensors
        raise InputError(f'the official state has the unexpected entry "{extra[0]}"{_and_more(extra)}: {hint}')
    variables = _variables(model)
    arrays = {path: [] for path in variables}
    for entry in entries:
        variable = variables[entry.path]
        # An abstract model has only shapes and dtypes; a view of one zero suffices.
        ours = np.broadcast_to(np.zeros((), variable.dtype), variable.shape)
        expected = entry.to_official(ours if entry.block is None else ours[entry.block])
        if entry.official not in given:
            arrays[entry.path].append(entry.from_official(np.zeros_like(expected)))
            continue
        name = given[entry.official]
        arrays[entry.path].append(entry.from_official(_checked(name, state[name], expected)))
    check_finite({".".join(map(str, path)): part for path, parts in arrays.items() for part in parts}, "the state")
    for path, parts in arrays.items():
        variables[path].set_value(jnp.asarray(np.stack(parts) if "blocks" in path else parts[0]))


def state_dict(model: SpikingMLP) -> dict[str, np.ndarray]:
    """The model's weights under official names: floating parameters in their dtype, counters as int64."""
    if model.config.tau_per_channel:
        raise InputError("the official format has one time constant per layer: it cannot hold tau_per_channel=True")
    variables = {path: np.asarray(variable[...]) for path, variable in _variables(model).items()}
    state = {}
    for entry in official_entries(model.config):
        value = variables[entry.path]
        value = value if entry.block is None else value[entry.block]
        # np.ascontiguousarray would turn a scalar into a vector.
        state[entry.official] = np.require(entry.to_official(value), requirements="C")
    return state


def official_entries(config: ModelConfig) -> Iterator[Entry]:
    """All official entries of a configuration, stage by stage."""
    n = 0
    for i, depth in enumerate(config.depths):
        yield from _encode_entries(config, i)
        yield from _neuron(config, f"to_patch_embedding_lif.{i}", ("stages", i, "neuron"))
        for j in range(depth):
            yield from _block_entries(config, i, j, n)
            n += 1
    yield from _batch_norm(config, "batch_norm", ("norm",))
    yield Entry("mlp_head.1.weight", ("head", "kernel"), None, *TRANSPOSED)
    yield Entry("mlp_head.1.bias", ("head", "bias"), None, *SAME)


def _encode_entries(config, i):
    name, path = f"to_patch_embedding.{i}", ("stages", i, "encode")
    if i == 0 or config.encoding == "plain":
        yield Entry(f"{name}.0.weight", (*path, "conv", "kernel"), None, *CONVOLUTION)
        yield from _batch_norm(config, f"{name}.1", (*path, "norm"))
        return
    cells = [f"{name}.cell2node.{node}" for node in range(3)]
    for kind, names in (("cell", cells), ("edge", [f"{name}.node1_node2", f"{name}.node2_node3"])):
        for k, part in enumerate(names):
            yield Entry(f"{part}.0.weight", (*path, f"{kind}s", k, "kernel"), None, *CONVOLUTION)
            yield from _batch_norm(config, f"{part}.1", (*path, f"{kind}_norms", k))
    for k in (0, 1):
        yield from _neuron(config, f"{name}.lif.{k}", (*path, "neurons", k))


def _block_entries(config, i, j, n):
    path = ("stages", i, "blocks")
    token, channel = f"token_mix.{n}", f"channel_mix.{n}.1.net"
    norm = _layer_norm if config.norm == "layer" else _batch_norm
    if config.encoding == "plain":
        yield from _batch_norm(config, f"{token}.BN", (*path, "token", "identity_norm"), j)
        yield from _neuron(config, f"{token}.activation", (*path, "token", "identity_neuron"), j)
    for official, ours in (("proj_h", "height"), ("proj_w", "width")):
        mixing = (*path, "token", ours)
        yield Entry(f"{token}.{official}.1.weight", (*mixing, "kernel"), j, *AXIS_KERNEL)
        yield Entry(f"{token}.{official}.1.bias", (*mixing, "bias"), j, *SAME)
        yield from norm(config, f"{token}.{official}.2", (*mixing, "norm"), j)
        yield from _neuron(config, f"{token}.{official}.3", (*mixing, "neuron"), j)
    yield Entry(f"{token}.fuse.0.weight", (*path, "token", "fuse", "kernel"), j, *FUSION_KERNEL)
    yield from _batch_norm(config, f"{token}.fuse.1", (*path, "token", "norm"), j)
    yield from _neuron(config, f"token_mix_lif.{n}", (*path, "token_neuron"), j)
    for k, ours, ours_norm in ((0, "expand", "hidden_norm"), (3, "project", "norm")):
        yield Entry(f"{channel}.{k}.weight", (*path, "channel", ours, "kernel"), j, *TRANSPOSED)
        yield Entry(f"{channel}.{k}.bias", (*path, "channel", ours, "bias"), j, *SAME)
        yield from norm(config, f"{channel}.{k + 1}", (*path, "channel", ours_norm), j)
    yield from _neuron(config, f"{channel}.2", (*path, "channel", "neuron"), j)
    yield from _neuron(config, f"channel_mix_lif.{n}", (*path, "channel_neuron"), j)


def _batch_norm(config, name, path, block=None):
    pairs = [("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var")]
    if config.norm == "tebn":
        pairs.append(("scale", "step_scale"))
    for official, ours in pairs:
        yield Entry(f"{name}.{official}", (*path, ours), block, *SAME, is_norm=True)
    yield Entry(f"{name}.num_batches_tracked", (*path, "num_batches"), block, *COUNT, is_norm=True)


def _layer_norm(config, name, path, block=None):
    # Official arrays are [channels, rows or columns], ours [rows or columns, channels]; vectors stay as they are.
    yield Entry(f"{name}.weight", (*path, "scale"), block, *TRANSPOSED)
    yield Entry(f"{name}.bias", (*path, "bias"), block, *TRANSPOSED)


def _neuron(config, name, path, block=None):
    if config.neuron == "plif":
        yield Entry(f"{name}.w", (*path, "w"), block, *SAME)


def _checked(name, value, expected):
    try:
        value = np.asarray(value)
    except ValueError as error:
        raise InputError(f'the official entry "{name}" is not an array: {error}') from error
    if value.shape != expected.shape:
        raise InputError(f'the official entry "{name}" must have shape {expected.shape}, got {value.shape}')
    kinds = "f" if expected.dtype.kind == "f" else "iu"
    if value.dtype.kind not in kinds:
        raise InputError(f'the official entry "{name}" must be {expected.dtype}, got {value.dtype}')
    if expected.dtype.kind == "i" and not 0 <= value <= np.iinfo(np.int32).max:
        raise InputError(f'the official entry "{name}" counts {value} batches, which does not fit into int32')
    return value


def plain_name(name: str) -> str:
    """A name without the prefixes of DistributedDataParallel, AveragedModel, torch.compile and Lightning.

    Examples:
        >>> plain_name("module._orig_mod.mlp_head.1.weight")
        'mlp_head.1.weight'
    """
    return re.sub(r"^(?:(?:module|_orig_mod|model|net)\.)+", "", name)


def _plain_names(state, entries):
    """Names without additions of distributed training, to the given names."""
    # "X.0.weight" for a norm "X.weight": the conversion to SyncBN wraps each norm in a container.
    wrapped = {}
    for entry in entries:
        if entry.is_norm:
            module, leaf = entry.official.rsplit(".", 1)
            wrapped[f"{module}.0.{leaf}"] = entry.official
    plain = {}
    for name in state:
        short = plain_name(str(name))
        short = wrapped.get(short, short)
        if short in plain:
            raise InputError(f'the official state has the entry "{short}" twice, the second time as "{name}"')
        plain[short] = name
    return plain


def _variables(model) -> dict[Path, nnx.Variable]:
    return dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
