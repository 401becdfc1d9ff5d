"""What a network costs on given images: NeuroBench's metrics, layer by layer and in total, and energy.

Names and definitions are those of NeuroBench (Yik et al., "The NeuroBench framework for benchmarking neuromorphic
computing algorithms and systems", Nature Communications 2025, arXiv 2304.04640; read off its package, version 2.3.0):

    Footprint             bytes of parameters and buffers
    ConnectionSparsity    share of weights that are zero; biases are no weights
    ActivationSparsity    share of the neurons' outputs that are zero, over all time steps and images
    SynapticOperations    per image, summed over the time steps: Effective_MACs and Effective_ACs are pairs of a
                          non-zero input and a non-zero weight, Dense all pairs. They are ACs where every input of the
                          layer was -1, 0 or 1, else MACs. Zeros that pad a border make no pair; biases make none.

NeuroBench decides between MACs and ACs batch by batch, here all images decide. A layer's ActivationSparsity is that of
the neurons its sum goes to. What is counted where:

    stem    in floating point pixels by weights, once an image and not once a time step, because it is the same at
            each (with TEBN, the folded stem has weights of each step and runs at each); in integers eight bit planes
    head    in floating point it reads each channel once a step: in the trained network means over the tokens, in the
            folded one sums of spikes; in integers it accumulates a row for every spike of every token
    norms   none of NeuroBench's operations. Where one stays in the folded network, the scale per token, it multiplies
            each value of the project layer: `scale_MACs`, apart from the others. In integers it is k signed powers of
            two, and each that is not zero is one addition, and one shift unless the power is 1.
    planes  the integer stem's eight sums are joined by 7 shifts and 7 additions for each output

Neither biases, neurons, the skip connection nor the shift that brings an integer sum to its format's unit are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from spiking_mlp_jax.deploy.energy import FLOAT32, INT8, Constants, Energy
from spiking_mlp_jax.deploy.fold import FoldedNet
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.reads import Map, Network, Reads, maps, observe
from spiking_mlp_jax.deploy.storage import footprints, kernels
from spiking_mlp_jax.models.topology import neuron_counts


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
        ann_MACs: of one pass of the network of the same size that is not spiking, dense, its norms folded away.
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
        """Energy of an image, in pJ, see `infer.energy`; other constants can be tried.

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
        """A line a layer, and the total."""
        width = max(map(len, self.layers))
        head = ("bytes", "zero w. %", "silent %", "MACs", "ACs", "dense", "of dense %")
        lines = [f"{'layer':{width}}" + "".join(f"{title:>14}" for title in head)]
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
            lines.append(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))
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
        lines += ["", f"energy of an image in µJ, 45 nm, {self.constants.name} (assumptions: deploy/energy.py)"]
        titles = ("compute", "stem", "head", "weights", "potentials", "with memory")
        lines.append(f"{'':18}" + "".join(f"{title:>13}" for title in titles))
        for name, e in self.energy().items():
            values = (e.compute, e.stem, e.head, e.weights, e.potentials, e.with_memory)
            lines.append(f"{name:18}" + "".join(f"{value / 1e6:13.4g}" for value in values))
        return "\n".join(lines)


def cost(net: Network, batches: Iterable[np.ndarray]) -> Cost:
    """Counts what a network costs on given images.

    Args:
        net: a trained network, counted in evaluation mode, with its norms; `fold`'s; or `quantize`'s, whose spikes
            are its own: they are taken from the integer program, which is bit-exact with the reference.
        batches: images [B, H, W, C], uint8, or normalised floating ones for networks of floating point. uint8 are
            normalised with the network's `pixels`, as `fold` does it.

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
    counts = neuron_counts(c)
    weights, sizes = kernels(net), footprints(net)
    layers = {}
    for m in maps(c):
        own = counts[m.spikes] if m.spikes else 0
        layers[m.name] = LayerCost(
            footprint=sizes.get(m.name, 0),
            neurons=own,
            potential_bits=own * (net.description.formats[_place(m)].word if isinstance(net, IntegerNet) else 32),
            activations=own * c.time_steps,
            spikes=spikes[m.spikes] / images if m.spikes else 0.0,
            **_operations(m, weights.get(m.name), reads.get(m.name), images, _times(net, m)),
            **_beside(net, m),
            ann_MACs=m.pairs,
            dense_MACs=m.pairs * (1 if m.name == "stage0.encode" else c.time_steps),
        )
    fields = [field.name for field in dataclasses.fields(LayerCost)]
    sums: dict[str, Any] = {name: sum(getattr(x, name) for x in layers.values()) for name in fields}
    return Cost(kind, images, c.time_steps, bits, constants, layers, LayerCost(**sums))


def _operations(m: Map, kernel: np.ndarray | None, reads: Reads | None, images: int, times: int) -> dict[str, Any]:
    if kernel is None or reads is None:
        return dict(weights=0, zero_weights=0, Effective_MACs=0.0, Effective_ACs=0.0, Dense=0.0)
    targets = np.count_nonzero(kernel, -1)
    # Weights of each time step read an input that all steps share at each of them.
    nonzero = np.broadcast_to(reads.nonzero, np.broadcast_shapes(reads.nonzero.shape, targets.shape))
    effective = int((nonzero * targets).sum()) / images
    return dict(
        weights=kernel.size,
        zero_weights=kernel.size - int(targets.sum()),
        Effective_MACs=0.0 if reads.binary else effective,
        Effective_ACs=effective if reads.binary else 0.0,
        Dense=float(m.pairs * len(nonzero) * times),
    )


def _times(net: Network, m: Map) -> int:
    """How often the integer network reads an input, a time step, that others read once."""
    if not isinstance(net, IntegerNet):
        return 1
    c = net.description
    return {"stage0.encode": 8, "head": c.stage_side(c.stages - 1) ** 2}.get(m.name, 1)


def _beside(net: Network, m: Map) -> dict[str, Any]:
    found = dict(scale_MACs=0.0, additions=0.0, shifts=0.0)
    if isinstance(net, FoldedNet) and m.name.endswith(".project") and "scale" in net.arrays[m.name]:
        scaled = np.count_nonzero(np.asarray(net.arrays[m.name]["scale"]))
        found["scale_MACs"] = float(net.config.time_steps * m.out * scaled)
    if isinstance(net, IntegerNet):
        layer = net.layer(m.name) if m.out else {}
        if "signs" in layer:
            digits = layer["signs"] != 0
            found["additions"] = float(net.description.time_steps * m.out * digits.sum())
            found["shifts"] = float(net.description.time_steps * m.out * (digits & (layer["exponents"] != 0)).sum())
        if m.name == "stage0.encode":
            found["additions"] = found["shifts"] = (
                7.0 * len(layer["kernel"]) * net.description.stage_side(0) ** 2 * m.out
            )
    return found


def _place(m: Map) -> str:
    """The format that holds the potentials of a layer's neurons, see `Description.formats`."""
    name = m.name.replace(".expand", ".hidden")
    own = name.rsplit(".", 1)[-1] in ("identity", "height", "width", "hidden")
    return name if own or name == "head" else name.split(".")[0]
