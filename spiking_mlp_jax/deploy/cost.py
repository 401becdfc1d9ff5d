"""NeuroBench's metrics and energy of a network on given images, layer by layer and in total.

Names and definitions are those of NeuroBench (Yik et al., "The NeuroBench framework for benchmarking neuromorphic
computing algorithms and systems", Nature Communications 2025, arXiv 2304.04640; read off its package, version 2.3.0):

    Footprint             bytes of parameters and buffers
    ConnectionSparsity    share of weights that are zero; biases are no weights
    ActivationSparsity    share of the neurons' outputs that are zero, over all time steps and images
    SynapticOperations    per image, summed over the time steps: Effective_MACs and Effective_ACs are pairs of a
                          non-zero input and a non-zero weight, Dense all pairs. They are ACs where every input of the
                          layer was -1, 0 or 1, else MACs. Zeros that pad a border make no pair; biases make none.

NeuroBench decides between MACs and ACs batch by batch; here all images decide. A layer's ActivationSparsity is that of
the neurons that its sum goes to. Special cases:

    stem    in floating point pixels by weights, once an image and not once a time step, because it is the same at
            each (with TEBN, the folded stem has weights of each step and runs at each); in integers eight bit planes
    head    in floating point it reads each channel once a step: in the trained network means over the tokens, in the
            folded one sums of spikes; in integers it accumulates a row for every spike of every token
    norms   not counted by NeuroBench. The scale per token that remains in the folded network multiplies each value of
            the project layer: `scale_MACs`, counted apart. In integers it is k signed powers of two; each that is not
            zero is one addition, and one shift unless the power is 1.
    planes  7 shifts and 7 additions join the integer stem's eight sums for each output

Biases, neurons, the skip connection and the shift of an integer sum to its format's unit are not counted.

Energy of operations and memory follows from published constants of a 45 nm process.

Compute alone, pJ an operation (M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014):

    float32   multiplication 3.7 and addition 0.9: MAC 4.6, AC 0.9
    int8      multiplication 0.2 and addition 0.03: MAC 0.23, AC 0.03; additions of potentials, int32, 0.1
              shifts are not listed there and count as such additions; shifts by a constant are wires

That is the usual convention, and optimistic: sums of int8 weights need wider adders, and operands have to be fetched.
The second estimate adds memory, under these assumptions:

    - All weights and potentials lie in SRAM of 8 KiB banks beside the arithmetic: 10 pJ for 64 bits (Horowitz), 5 pJ
      for 32. Larger banks take more (32 KiB: 20 pJ for 64 bits, 1 MiB: 100), DRAM 1,300 to 2,600.
    - Every operation fetches its weight: no reuse for another position, step or image.
    - Every neuron's potential is read and written once per time step. In a non-spiking network, every activation is
      written and read once.
    - Sums stay in registers. The inputs, the addresses of spikes, biases and constants are free, and so are clock,
      control, wires and leakage, in all networks alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from spiking_mlp_jax.deploy.fold import FoldedNet
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.reads import Network, Reads, footprints, kernels, observe
from spiking_mlp_jax.models.topology import Layer, layers

SRAM_PJ_PER_BIT = 10 / 64


@dataclasses.dataclass(frozen=True)
class Constants:
    """Energy of operations in picojoules, and word sizes.

    Attributes:
        name: of the numbers' format.
        mac, ac: a multiply-accumulate, an accumulate.
        addition, shift: of a potential.
        activation_bits: of an activation of the non-spiking network.
        memory_per_bit: to read or write a bit.
    """

    name: str
    mac: float
    ac: float
    addition: float
    shift: float
    activation_bits: int
    memory_per_bit: float = SRAM_PJ_PER_BIT


FLOAT32 = Constants("float32", mac=4.6, ac=0.9, addition=0.9, shift=0.9, activation_bits=32)
INT8 = Constants("int8", mac=0.23, ac=0.03, addition=0.1, shift=0.1, activation_bits=8)


@dataclasses.dataclass(frozen=True)
class Energy:
    """Picojoules per image.

    Attributes:
        stem, body, head: operations of the stem, of all layers between, and of the head.
        weights: fetching weights.
        potentials: reading and writing potentials, or activations.
    """

    stem: float
    body: float
    head: float
    weights: float
    potentials: float

    @property
    def compute(self) -> float:
        """Operations alone."""
        return self.stem + self.body + self.head

    @property
    def with_memory(self) -> float:
        """Operations and memory."""
        return self.compute + self.weights + self.potentials


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """A layer, or all of them. Operations are those of a mean image, over all its time steps.

    Attributes:
        footprint: bytes.
        weights, zero_weights: how many; of the kernel.
        neurons, potential_bits: that its sum goes to, and the bits that hold all their potentials.
        activations, spikes: outputs of these neurons over all steps, and those that are not zero.
        Effective_MACs, Effective_ACs, Dense: see the module.
        scale_MACs, additions, shifts: of the norm that cannot fold and of bit planes, see the module.
        ann_MACs: of one dense pass of a non-spiking network of the same size, its norms folded.
        dense_MACs: the same at every time step, but the stem once.
    """

    footprint: int
    weights: int
    zero_weights: int
    neurons: int
    potential_bits: int
    activations: int
    spikes: float
    Effective_MACs: float
    Effective_ACs: float
    Dense: float
    scale_MACs: float
    additions: float
    shifts: float
    ann_MACs: int
    dense_MACs: int

    @property
    def connection_sparsity(self) -> float:
        """Share of zero weights; 0 where there are none."""
        return self.zero_weights / self.weights if self.weights else 0.0

    @property
    def activation_sparsity(self) -> float | None:
        """Share of zero outputs of the neurons; None for the head, which has none."""
        return 1 - self.spikes / self.activations if self.activations else None

    @property
    def effective(self) -> float:
        """Effective_MACs + Effective_ACs."""
        return self.Effective_MACs + self.Effective_ACs

    def to_dict(self) -> dict[str, Any]:
        """NeuroBench's metrics under its names, then the rest; JSON values."""
        return {
            "Footprint": self.footprint,
            "ConnectionSparsity": self.connection_sparsity,
            "ActivationSparsity": self.activation_sparsity,
            "SynapticOperations": {key: getattr(self, key) for key in ("Effective_MACs", "Effective_ACs", "Dense")},
            **{
                key: getattr(self, key)
                for key in ("weights", "neurons", "spikes", "scale_MACs", "additions", "shifts", "ann_MACs")
            },
        }


@dataclasses.dataclass(frozen=True)
class Cost:
    """What `cost` found.

    Attributes:
        network: "trained", "folded" or "integer".
        images, time_steps: over how many images the counts are means; T.
        weight_bits: of a weight.
        constants: of the format that the network computes in.
        layers: by the names of `fold`, in the network's order; "identity" of plain encoding has neurons alone.
        total: their sum.
    """

    network: str
    images: int
    time_steps: int
    weight_bits: int
    constants: Constants
    layers: dict[str, LayerCost]
    total: LayerCost

    def energy(self, constants: Constants | None = None) -> dict[str, Energy]:
        """Energy of an image, in pJ, see the module; other constants can be tried.

        Returns:
            "this network": its effective operations, with the norm's scales and the bit planes.

            "dense, T steps": the same network if every input counted, by multiplying (`dense_MACs`).

            "ANN, one pass": a network of the same size that is not spiking (`ann_MACs`).
        """
        k = constants or self.constants
        total, bits = self.total, self.weight_bits * k.memory_per_bit

        def parts(of):
            stem, head = of(self.layers["stage0.encode"]), of(self.layers["head"])
            return {"stem": stem, "body": of(total) - stem - head, "head": head}

        def spent(x):
            operations = k.mac * (x.Effective_MACs + x.scale_MACs) + k.ac * x.Effective_ACs
            return operations + k.addition * x.additions + k.shift * x.shifts

        traffic = 2 * self.time_steps * total.potential_bits * k.memory_per_bit
        activations = 2 * total.neurons * k.activation_bits * k.memory_per_bit
        steps = self.time_steps
        return {
            "this network": Energy(**parts(spent), weights=bits * total.effective, potentials=traffic),
            f"dense, {steps} step{'s' * (steps > 1)}": Energy(
                **parts(lambda x: k.mac * x.dense_MACs),
                weights=bits * total.dense_MACs,
                potentials=steps * activations,
            ),
            "ANN, one pass": Energy(
                **parts(lambda x: k.mac * x.ann_MACs), weights=bits * total.ann_MACs, potentials=activations
            ),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        energy = {
            name: {**dataclasses.asdict(e), "compute": e.compute, "with_memory": e.with_memory}
            for name, e in self.energy().items()
        }
        return {
            "network": self.network,
            "images": self.images,
            "time_steps": self.time_steps,
            "weight_bits": self.weight_bits,
            "total": self.total.to_dict(),
            "energy_pJ": {"constants": dataclasses.asdict(self.constants), **energy},
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    def table(self) -> str:
        """One line per layer, then the total."""
        width = max(map(len, self.layers))
        head = ("bytes", "zero w. %", "silent %", "MACs", "ACs", "dense", "of dense %")
        lines = [_line("layer", width, head, 14)]
        for name, x in {**self.layers, "total": self.total}.items():
            silent = "-" if x.activation_sparsity is None else f"{100 * x.activation_sparsity:.1f}"
            share = f"{100 * x.effective / x.Dense:.1f}" if x.Dense else "-"
            cells = (
                f"{x.footprint:,}",
                f"{100 * x.connection_sparsity:.1f}",
                silent,
                *(f"{n:,.0f}" for n in (x.Effective_MACs, x.Effective_ACs, x.Dense)),
                share,
            )
            lines.append(_line(name, width, cells, 14))
        return "\n".join(lines)

    def __str__(self) -> str:
        total = self.total
        lines = [
            f"{self.network} network, {self.images:,} images, {self.time_steps} time steps; operations of a mean image",
            "",
            self.table(),
        ]
        extra = {"multiplications by a token's scale": total.scale_MACs}
        extra |= {"additions": total.additions, "shifts": total.shifts}
        if any(extra.values()):
            found = ", ".join(f"{n:,.0f} {what}" for what, n in extra.items() if n)
            lines.append(f"beside synapses: {found}")
        lines += ["", f"energy of an image in µJ, 45 nm, {self.constants.name} (assumptions: deploy/cost.py)"]
        titles = ("compute", "stem", "head", "weights", "potentials", "with memory")
        lines.append(_line("", 18, titles, 13))
        for name, e in self.energy().items():
            values = (e.compute, e.stem, e.head, e.weights, e.potentials, e.with_memory)
            lines.append(_line(name, 18, [f"{value / 1e6:.4g}" for value in values], 13))
        return "\n".join(lines)


def _line(name: str, name_width: int, cells: Iterable[str], width: int) -> str:
    """A row of a text table: a name, then right-aligned cells."""
    return f"{name:{name_width}}" + "".join(f"{cell:>{width}}" for cell in cells)


def cost(net: Network, batches: Iterable[np.ndarray]) -> Cost:
    """Count what a network costs on given images.

    Args:
        net: a trained network, counted in evaluation mode, with its norms; `fold`'s; or `quantize`'s, whose spikes
            are its own: they are taken from the integer program, which is bit-exact with the reference.
        batches: images [B, H, W, C], uint8, or normalized floating ones for networks of floating point. uint8 are
            normalized with the network's `pixels`, as `fold` does it.

    Returns:
        means over the images, from exact counts.

    Raises:
        InputError: there are no images, or they do not fit the network.
    """
    images, reads, spikes = observe(net, batches)
    c: Any
    if isinstance(net, IntegerNet):
        c, kind, bits, constants = net.description, "integer", net.description.bits, INT8
    else:
        c, kind, bits, constants = net.config, "folded" if isinstance(net, FoldedNet) else "trained", 32, FLOAT32
    weights, sizes = kernels(net), footprints(net)
    found = {}
    for layer in layers(c):
        n = layer.neurons
        own = n.count if n else 0
        word = net.description.formats[n.place].word if n and isinstance(net, IntegerNet) else 32
        macs = int(layer.inputs().sum()) * layer.out
        found[layer.name] = LayerCost(
            footprint=sizes.get(layer.name, 0),
            neurons=own,
            potential_bits=own * word,
            activations=own * c.time_steps,
            spikes=spikes[f"{n.name}.spikes"] / images if n else 0.0,
            **_operations(net, layer, macs, weights.get(layer.name), reads.get(layer.name), images),
            **_beside(net, layer),
            ann_MACs=macs,
            dense_MACs=macs * (1 if layer.kind == "stem" else c.time_steps),
        )
    fields = [field.name for field in dataclasses.fields(LayerCost)]
    sums: dict[str, Any] = {name: sum(getattr(x, name) for x in found.values()) for name in fields}
    return Cost(kind, images, c.time_steps, bits, constants, found, LayerCost(**sums))


def _operations(
    net: Network, layer: Layer, macs: int, kernel: np.ndarray | None, reads: Reads | None, images: int
) -> dict[str, Any]:
    if kernel is None or reads is None:
        return dict(weights=0, zero_weights=0, Effective_MACs=0.0, Effective_ACs=0.0, Dense=0.0)
    targets = np.count_nonzero(kernel, -1)
    # Weights of each time step read an input that all steps share at each of them.
    nonzero = np.broadcast_to(reads.nonzero, np.broadcast_shapes(reads.nonzero.shape, targets.shape))
    effective = int((nonzero * targets).sum()) / images
    # The integer network reads bit planes, and every token, where others read a value once.
    times = 1
    if isinstance(net, IntegerNet):
        c = net.description
        times = {"stem": 8, "head": c.stage_side(c.stages - 1) ** 2}.get(layer.kind, 1)
    return dict(
        weights=kernel.size,
        zero_weights=kernel.size - int(targets.sum()),
        Effective_MACs=0.0 if reads.binary else effective,
        Effective_ACs=effective if reads.binary else 0.0,
        Dense=float(macs * len(nonzero) * times),
    )


def _beside(net: Network, layer: Layer) -> dict[str, Any]:
    """Operations of norms per token and of bit planes."""
    found = dict(scale_MACs=0.0, additions=0.0, shifts=0.0)
    if isinstance(net, FoldedNet) and "scale" in net.arrays[layer.name]:
        scaled = np.count_nonzero(np.asarray(net.arrays[layer.name]["scale"]))
        found["scale_MACs"] = float(net.config.time_steps * layer.out * scaled)
    if isinstance(net, IntegerNet):
        arrays, values = net.arrays, net.description.time_steps * layer.out
        if f"{layer.name}.signs" in arrays:
            digits = arrays[f"{layer.name}.signs"] != 0
            found["additions"] = float(values * digits.sum())
            found["shifts"] = float(values * (digits & (arrays[f"{layer.name}.exponents"] != 0)).sum())
        if layer.kind == "stem":
            joined = 7.0 * len(arrays[f"{layer.name}.kernel"]) * layer.positions * layer.out
            found["additions"] = found["shifts"] = joined
    return found
