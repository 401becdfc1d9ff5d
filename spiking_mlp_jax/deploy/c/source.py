"""What all parts of an exported C file need: the network, its constants, loops, and wrapping of long lines."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from spiking_mlp_jax.deploy.artifact import pack
from spiking_mlp_jax.deploy.network import Description, Format, IntegerNet

LINE = 120
# Variables that advance with the time step: name, start, step.
Counters = list[tuple[str, str, int]]


class Layer(NamedTuple):
    """A linear layer in the C file: its name, and the sizes of its rows and time steps."""

    name: str
    rows: int
    out: int
    width: int
    kernel_step: int  # bytes from one time step's kernel to the next's; 0 if all share one
    out_step: int  # likewise numbers of shifts and biases

    def kernel(self, row: int = 0) -> str:
        """Where a row of the kernel begins."""
        at = [f"{self.name}_k"] * bool(self.kernel_step) + [str(row * self.width)] * bool(row)
        return " + ".join([f"{self.name}_kernel", *at])

    def scale(self) -> str:
        """Where shifts and biases begin."""
        at = f" + {self.name}_o" * bool(self.out_step)
        return f"{self.name}_shift{at}, {self.name}_bias{at}"

    def counters(self) -> Counters:
        """The offsets that advance with the time step if each has its own weights."""
        return [(f"{self.name}_{key}", "0", n) for key, n in (("k", self.kernel_step), ("o", self.out_step)) if n]


@dataclasses.dataclass
class Source:
    """A network and the constants that the parts written so far need.

    Attributes:
        net: the network.
        constants: the C text of each constant array.
        constant_bytes: their total size.
    """

    net: IntegerNet
    constants: list[str] = dataclasses.field(default_factory=list)
    constant_bytes: int = 0

    @property
    def c(self) -> Description:
        """Of the network."""
        return self.net.description

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Of the network."""
        return self.net.arrays

    @property
    def nodes(self) -> bool:
        """Whether stages begin with the three nodes of spiking patch encoding."""
        return self.c.encoding == "spe" and self.c.stages > 1

    @property
    def potential(self) -> str:
        """The C type of the potentials that are stored between layers."""
        return f"int{max(self.c.formats[f'stage{i}'].word for i in range(self.c.stages))}_t"

    def grid(self, stage: int) -> int:
        """Neurons of a stage's encoding."""
        return self.c.stage_side(stage) ** 2 * self.c.stage_dim(stage)

    def held_step(self, stage: int) -> int:
        """Numbers from one time step's stored potentials to the next's; 0 if all share them."""
        shared = stage == 0 and len(self.arrays["stage0.encode.kernel"]) == 1
        return 0 if shared else self.grid(stage)

    def neurons(self, place: Format) -> str:
        """Level (the threshold times 2^leak) and reset of a place's neurons."""
        return f"{place.threshold << self.c.leak}, {place.reset}" + ", 0" * self.c.per_token

    def constant(self, ctype: str, name: str, values: np.ndarray, comment: str = "") -> None:
        """Write a constant array."""
        numbers = values.reshape(-1).tolist()
        self.constant_bytes += values.size * itemsize(ctype)
        words = [str(number) for number in numbers]
        count = (LINE - 4) // (max(map(len, words)) + 2)
        lines = [", ".join(words[i : i + count]) for i in range(0, len(words), count)]
        self.constants.append(
            f"{f'// {comment}' + chr(10) if comment else ''}static const {ctype} {name}[{len(words)}] = {{\n    "
            + ",\n    ".join(lines)
            + "\n};\n"
        )

    def layer(self, key: str) -> Layer:
        """Write a layer's constants."""
        kernel, by, bias = (self.arrays[f"{key}.{entry}"] for entry in ("kernel", "shift", "bias"))
        name = key.replace(".", "_")
        steps, rows, out = kernel.shape
        width = out
        note = f"{key}: {rows} rows of {out}"
        if self.c.bits <= 4:
            # Two weights a byte, the first in the low half; each row begins with a byte of its own.
            width = (out + 1) // 2
            even = np.zeros((steps, rows, 2 * width), np.int8)
            even[..., :out] = kernel
            kernel = pack(even)
            note += ", two weights a byte, low half first"
        note += f", for each of {steps} steps" * (steps > 1)
        self.constant("uint8_t" if self.c.bits <= 4 else "int8_t", f"{name}_kernel", kernel, note)
        self.constant("int8_t", f"{name}_shift", by)
        self.constant("int32_t", f"{name}_bias", bias)
        several = steps > 1
        return Layer(name, rows, out, width, several * rows * width, several * out)


def itemsize(ctype: str) -> int:
    """Bytes of a number of a C type such as int32_t."""
    return np.dtype(ctype.removesuffix("_t")).itemsize


def loop(variable: str, start: str, end: str, counters: Counters) -> str:
    """The head of a loop that also advances the counters."""
    begin = ", ".join([f"{variable} = {start}", *(f"{name} = {first}" for name, first, _ in counters)])
    grow = ", ".join([f"{variable}++", *(f"{name} += {step}" for name, _, step in counters)])
    return f"for ({begin}; {variable} < {end}; {grow})"


def declared(counters: Counters, *more: str) -> str:
    """The counters, appended to a declaration."""
    return "".join(f", {name}" for name in (*filter(None, more), *(name for name, _, _ in counters)))


def wrapped(code: str) -> str:
    """Code with long lines wrapped and indented by four; comments are left alone."""
    found = []
    for line in code.split("\n"):
        deep = len(line) - len(line.lstrip()) + 4
        while len(line) > LINE and "//" not in line:
            cut = line.rfind(" ", deep, LINE)
            found.append(line[:cut])
            line = " " * deep + line[cut + 1 :]
        found.append(line)
    return "\n".join(found)
