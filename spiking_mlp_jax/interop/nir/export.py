"""A folded network as a graph of the Neuromorphic Intermediate Representation (NIR).

What a layer of the folded network becomes, in the form of rows (`nir_graph.RowsForm`):

    stem, downsampling, fusing, channel mixing   Conv2d
    mixing along a row                           Affine, batched over channels and rows
    mixing along a column                        Conv2d whose channels are channels and rows, a dense matrix
    sums                                         several edges into one node
    neurons                                      LIF or IF, with arrays of the neurons' full shape
    norm per token before neurons                their r and v_leak
    norm per token before a sum                  a batched Affine with diagonal weights
    head                                         Flatten and Affine

The graph gets the image at every step; the logits are the mean of its output over the steps. Potentials start at
v_reset. NIR is about continuous time: a step of the network stands for dt seconds, so tau is tau * dt seconds, and
forward Euler with that dt gives the network's equations back.

Reference: Pedersen et al., "Neuromorphic intermediate representation: a unified instruction set for interoperable
brain-inspired computing", Nature Communications 15, 2024.
"""

from __future__ import annotations

import io
import math
import numbers
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.nir.forms import FORMS
from spiking_mlp_jax.interop.nir.graph import DT, MAX_MEGABYTES, Form, Neurons, PerToken, Size, require_nir
from spiking_mlp_jax.utils.files import write_whole

if TYPE_CHECKING:
    from spiking_mlp_jax.deploy.fold import FoldedNet

# Beyond it and its reciprocal, float32 loses digits of tau * dt or of an IF neuron's 1 / dt.
MIN_DT = 1e-30


def to_nir(net: FoldedNet, *, form: str = "rows", dt: float = DT, max_dense: float = MAX_MEGABYTES) -> Any:
    """The graph of a folded network.

    Args:
        net: of LIF, PLIF or IF neurons with a hard reset, and weights that are the same at every step.
        form: "rows" or "dense", see `nir_forms`.
        dt: seconds that a time step stands for.
        max_dense: megabytes that the graph's parameters may take.

    Returns:
        a `nir.NIRGraph` that `nir` has checked. Its input is the normalised image [C, H, W] reshaped, its output the
        logits of a step; a layer of neurons has the folded network's name with underscores ("stage0_block0_token").
        Its metadata says dt, time_steps, the form, and how pixels are normalised.

    Raises:
        InputError: the nir package is missing, NIR has no node for what the network does, the graph would be larger
            than `max_dense`, or dt is not a positive number.

    Examples:
        >>> from spiking_mlp_jax import SpikingMLP
        >>> from spiking_mlp_jax.deploy.fold import fold
        >>> graph = to_nir(fold(SpikingMLP.from_pretrained("fashion_mnist")))
        >>> graph.nodes["stage0_block0_token"].v_threshold.shape
        (384, 1, 8)
    """
    from spiking_mlp_jax.deploy.fold import FoldedNet

    require_nir()
    if form not in FORMS:
        raise InputError(f'there is no form "{form}" of a NIR graph: it is {" or ".join(FORMS)}')
    if not isinstance(net, FoldedNet):
        raise InputError(f"a folded network is exported, not a {type(net).__name__}: give what `fold` makes of one")
    if not (isinstance(dt, numbers.Real) and math.isfinite(dt) and dt > 0):
        raise InputError(f"dt must be a positive number of seconds, but it is {dt!r}")
    if not MIN_DT <= dt <= 1 / MIN_DT:
        raise InputError(f"dt must be from {MIN_DT:g} to {1 / MIN_DT:g} seconds, which float32 holds, but it is {dt!r}")
    if not (isinstance(max_dense, int | float) and max_dense > 0):
        raise InputError(f"the limit must be a positive number of megabytes, but it is {max_dense!r}")
    _check(net)
    c = net.config
    made = FORMS[form](float(dt), np.dtype(net.arrays["head"]["kernel"].dtype))
    _Export(net, made).network()
    metadata = {
        "dt": float(dt),
        "time_steps": c.time_steps,
        "form": form,
        "image": np.array([c.in_channels, c.image_size, c.image_size]),
        "mean": np.array(net.mean, np.float64),
        "std": np.array(net.std, np.float64),
    }
    return made.graph(max_dense, metadata)


def write_nir(graph: Any, path: str | os.PathLike[str]) -> int:
    """Writes a graph as an HDF5 file that `nir.read` reads, whole or not at all; its bytes.

    Raises:
        InputError: the nir package is missing, or the file cannot be written.
    """
    nir = require_nir()
    file = io.BytesIO()
    nir.write(file, graph)
    written = file.getvalue()
    write_whole(path, [written])
    return len(written)


def _check(net: FoldedNet) -> None:
    if net.config.v_reset is None:
        raise InputError(
            "NIR's neurons are set to v_reset by a spike; a soft reset, which subtracts the threshold (v_reset=None), "
            "has no node: train with a hard reset"
        )
    for name, entries in net.arrays.items():
        steps = [x.shape[0] for key, x in entries.items() if key in ("kernel", "low")]
        if steps and steps[0] > 1:
            raise InputError(
                f"NIR's weights are the same at every step, but {name} has weights of its own for each of "
                f'{steps[0]} steps (norm="tebn"): train with norm="batch" or "tdbn"'
            )


class _Export:
    """One walk through the network; its methods are those of `folded._Forward`."""

    def __init__(self, net: FoldedNet, form: Form):
        self.net, self.config, self.form = net, net.config, form

    def network(self):
        c, form = self.config, self.form
        size = Size(c.in_channels, c.image_size)
        x = form.input(size)
        for i in range(c.stages):
            h = self.encode(i, x, size)
            size = Size(c.stage_dim(i), c.stage_side(i))
            x = self.fire(f"stage{i}.encode", h, size)
            for j in range(c.depths[i]):
                x = self.block(f"stage{i}.block{j}", x, h, size)
        kernel, bias = self.map("head")
        form.output(form.head("head", x, kernel, bias, size), c.num_classes)

    def encode(self, i, x, size) -> list[str]:
        """Names of the nodes whose sum the stage's potential is."""
        name, c = f"stage{i}.encode", self.config
        if i == 0 or c.encoding == "plain":
            step = c.patch_size if i == 0 else 2
            return [self.conv(f"{name}_map", x, *self.window(name, step), size, step, 0)]
        kernel, bias = self.window(f"{name}.cells", 3)
        third = kernel.shape[-1] // 3
        half = Size(third, size.side // 2)
        # The third node's potential has the first node's in it.
        whole, whole_bias = kernel.copy(), bias.copy()
        whole[..., 2 * third :] += kernel[..., :third]
        whole_bias[2 * third :] += bias[:third]
        h = [self.conv(f"{name}.cells", x, whole, whole_bias, size, 2, 1)]
        potentials = []
        for k in range(2):
            part = slice(k * third, (k + 1) * third)
            cell = self.conv(f"{name}.cell{k + 1}", x, kernel[..., part], bias[part], size, 2, 1)
            node = self.fire(f"{name}.node{k + 1}", [cell, *potentials], half)
            edge, edge_bias = self.window(f"{name}.edge{k + 1}", 3)
            if k == 0:
                potentials = [self.conv(f"{name}.edge1_node", node, edge, edge_bias, half, 1, 1)]
            before, behind = (k + 1) * third, (1 - k) * third
            wide = np.pad(edge, ((0, 0), (0, 0), (0, 0), (before, behind)))
            h.append(self.conv(f"{name}.edge{k + 1}", node, wide, np.pad(edge_bias, (before, behind)), half, 1, 1))
        return h

    def block(self, name, x, h, size):
        potential = h + self.token(name, x, size)
        x = self.fire(f"{name}.token", potential, size)
        return self.fire(f"{name}.channel", [*potential, self.channel(name, x, size)], size)

    def token(self, name, x, size) -> list[str]:
        parts = [x]
        if self.config.encoding == "plain":
            low, high = (np.asarray(self.net.arrays[f"{name}.identity"][key][0], np.float64) for key in ("low", "high"))
            values = self.conv(f"{name}.identity_map", x, np.diag(high - low)[None, None], low, size)
            parts = [self.fire(f"{name}.identity", [values], size)]
        for axis in ("height", "width"):
            kernel, bias = self.map(f"{name}.{axis}")
            mixed = self.form.along(_node(f"{name}.{axis}_map"), x, kernel, bias, size, axis)
            parts.append(self.fire(f"{name}.{axis}", [mixed], size))
        kernel, bias = self.map(f"{name}.fuse")
        # The bias is added once, with the first of the three.
        return [
            self.conv(f"{name}.fuse_{part}", source, matrix[None, None], bias * (part == "identity"), size)
            for part, source, matrix in zip(("identity", "height", "width"), parts, np.split(kernel, 3), strict=True)
        ]

    def channel(self, name, x, size):
        hidden = Size(size.channels * self.config.expansion, size.side)
        norm = self.hidden_norm(f"{name}.expand")
        in_neurons = self.form.per_neuron and self.config.neuron != "if"
        before, within = (None, norm) if in_neurons else (norm, None)
        kernel, bias = self.map(f"{name}.expand")
        z = self.conv(f"{name}.expand", x, kernel[None, None], bias, size, per_token=before)
        x = self.fire(f"{name}.hidden", [z], hidden, within)
        entries = self.net.arrays[f"{name}.project"]
        kernel, bias = self.map(f"{name}.project")
        norm = None
        if "scale" in entries:
            norm = PerToken(np.asarray(entries["scale"], np.float64), np.asarray(entries["offset"][0], np.float64))
        return self.conv(f"{name}.project", x, kernel[None, None], bias, hidden, per_token=norm)

    def hidden_norm(self, name) -> PerToken | None:
        """What was divided out of the thresholds: a z + c of each token."""
        entries = {key: np.asarray(x, np.float64) for key, x in self.net.arrays[name].items()}
        if "threshold" not in entries:
            return None
        c = self.config
        constant = entries["constant"] > 0
        scale = (c.v_threshold - (c.v_reset or 0.0)) / (entries["threshold"] - entries["reset"])
        offset = entries["offset"][0]
        return PerToken(np.where(constant, 0.0, scale), np.where(constant, offset, scale * offset))

    def conv(self, name, source, kernel, bias, size, stride=1, padding=0, per_token=None):
        return self.form.conv(_node(name), source, kernel, bias, size, stride, padding, per_token)

    def fire(self, name, sources, size, per_token=None):
        c = self.config
        tau = float(self.net.arrays[f"{name}.neurons"]["tau"]) if c.neuron == "plif" else c.tau
        constants = Neurons(c.neuron != "if", tau, c.v_threshold, c.v_reset or 0.0, c.decay_input)
        return self.form.neurons(_node(name), sources, size, constants, per_token)

    def map(self, name):
        """Kernel [fan_in, out] and bias [out]."""
        return tuple(np.asarray(self.net.arrays[name][key][0], np.float64) for key in ("kernel", "bias"))

    def window(self, name, side):
        """Kernel [side, side, in, out] and bias [out]."""
        kernel, bias = self.map(name)
        return kernel.reshape(side, side, -1, kernel.shape[-1]), bias


def _node(name: str) -> str:
    return name.replace(".", "_")
