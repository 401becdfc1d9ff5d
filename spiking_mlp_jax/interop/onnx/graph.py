"""An ONNX graph, built node by node. Only this file imports `onnx`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils import __version__
from spiking_mlp_jax.utils.files import write_whole

if TYPE_CHECKING:
    from onnx import ModelProto

# Of 2022: runtimes from that year on read the files.
OPSET = 17
IR_VERSION = 8
# A protobuf message holds less than 2^31 bytes; nodes and names need few of them.
MAX_BYTES = (1 << 31) - (1 << 24)


def package() -> Any:
    """The `onnx` package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise InputError("ONNX files need the onnx package: pip install 'spiking-mlp-jax[export]'") from error
    return onnx


class Graph:
    """Nodes and constants. A value is a name; equal constants are stored once."""

    def __init__(self):
        self._onnx = package()
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._scopes: list[str] = []
        self._names: Counter[str] = Counter()
        self._bytes = 0

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes added inside."""
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def constant(self, values: np.ndarray | np.generic, name: str = "constant") -> str:
        """The name of a constant, `name` unless the graph has these values already.

        Raises:
            InputError: the file would be too large.
        """
        values = np.ascontiguousarray(values).reshape(np.shape(values))
        key = values.dtype.str, values.shape, hashlib.blake2b(values.data, digest_size=16).digest()
        if key not in self._known:
            self._bytes += values.nbytes
            if self._bytes > MAX_BYTES:
                raise InputError(
                    f"the weights need more than the {MAX_BYTES:,} bytes of an ONNX file: use a smaller network, or "
                    'norm="batch" instead of "tebn", which has weights for each time step'
                )
            self._known[key] = self._named(name)
            self._constants.append(self._onnx.numpy_helper.from_array(values, self._known[key]))
        return self._known[key]

    def op(self, kind: str, *inputs: str | np.ndarray | np.generic, **attributes: Any) -> str:
        """Add a node and return the name of its only output.

        Args:
            kind: an operator of ONNX.
            inputs: names of values; arrays and NumPy scalars become constants.
            attributes: of the node.
        """
        return self._node(kind, inputs, 1, attributes)[0]

    def split(self, x: str, parts: int, axis: int) -> list[str]:
        """Split a value into equal parts along an axis."""
        return self._node("Split", (x,), parts, {"axis": axis})

    def finish(
        self, inputs: dict[str, tuple[Any, tuple]], outputs: dict[str, tuple[Any, tuple]], metadata: dict[str, Any]
    ) -> ModelProto:
        """The model, checked by ONNX's checker and strict shape inference.

        Args:
            inputs: names to NumPy dtype and shape, in which a string stands for any size.
            outputs: likewise.
            metadata: stored with the model; values become JSON.
        """
        helper = self._onnx.helper

        def infos(values):
            kinds = ((name, helper.np_dtype_to_tensor_dtype(np.dtype(d)), shape) for name, (d, shape) in values.items())
            return [helper.make_tensor_value_info(*kind) for kind in kinds]

        graph = helper.make_graph(self._nodes, "spiking_mlp", infos(inputs), infos(outputs), self._constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="spiking-mlp-jax",
            producer_version=__version__,
        )
        helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
        self._onnx.checker.check_model(model, full_check=True)
        return model

    def rename(self, x: str, name: str) -> None:
        """Name a value, e.g. as an output."""
        self._nodes.append(self._onnx.helper.make_node("Identity", [x], [name], name))

    def _node(self, kind, inputs, outputs, attributes) -> list[str]:
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        name = self._named("/".join([*self._scopes, kind]))
        made = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self._nodes.append(self._onnx.helper.make_node(kind, names, made, name, **attributes))
        return made

    def _named(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"


def save(model: ModelProto, path: str | os.PathLike[str]) -> int:
    """Write a model atomically; returns its size in bytes.

    Raises:
        InputError: it cannot be written.
    """
    content = model.SerializeToString()
    write_whole(path, content)
    return len(content)


def described(data: dict[str, Any]) -> dict[str, Any]:
    """The metadata "preprocessing" and "classes", as far as the "data" of weights or a compiled network has them."""
    known = {key: data[key] for key in ("dataset", "resize_mode", "eval_resize", "mean", "std") if key in data}
    found: dict[str, Any] = {"preprocessing": known} if known else {}
    return found | ({"classes": list(data["class_names"])} if "class_names" in data else {})
