"""Energy of operations and of the memory they need, from published constants of a 45 nm process.

Compute alone, pJ an operation (M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014):

    float32   multiplication 3.7 and addition 0.9: MAC 4.6, AC 0.9
    int8      multiplication 0.2 and addition 0.03: MAC 0.23, AC 0.03; additions of whole potentials, int32, 0.1
              a shift has no entry there and is taken as such an addition; by a constant it is wires

That is the usual convention. It flatters: sums of int8 weights need wider adders, and no operand has to be fetched.
The second estimate adds memory, under these assumptions:

    - All weights and potentials lie in SRAM of 8 KiB banks beside the arithmetic: 10 pJ for 64 bits (Horowitz), 5 pJ
      for 32. Larger banks take more (32 KiB: 20 pJ for 64 bits, 1 MiB: 100), DRAM 1,300 to 2,600.
    - Every operation fetches its weight: no weight is kept for another position, step or image.
    - Every neuron's potential is read and written once a time step. In a network that is not spiking, every
      activation is written and read once.
    - Sums are kept in registers. The inputs, the addresses of spikes, biases and constants are free, and so are clock,
      control, wires and leakage, in all networks alike.
"""

from __future__ import annotations

import dataclasses

SRAM_PJ_PER_BIT = 10 / 64


@dataclasses.dataclass(frozen=True)
class Constants:
    """Picojoules of operations, and words.

    Attributes:
        name: of the numbers' format.
        mac, ac: a multiply-accumulate, an accumulate.
        addition, shift: of a whole potential.
        activation_bits: of an activation of the network that is not spiking.
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
        stem, body, head: operations of the stem, of what lies between, and of the head.
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
