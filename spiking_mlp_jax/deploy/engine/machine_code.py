"""Lists every multiplication in the machine code of the engine's kernels.

Reads the optimised LLVM code and this CPU's assembly, for the types with which the kernels were called. numba's
wrappers, which unpack a kernel's arguments once per call, are not read. Scaled addressing such as [base + 4 * index] is
a shift in hardware and does not count.

On x86-64 with AVX2 or AVX-512 there is no multiplication. Without them LLVM shifts lanes by different counts with one
(pmullw), which the report lists.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numba
import numpy as np

from spiking_mlp_jax.deploy.engine.compiled import COMPILED
from spiking_mlp_jax.deploy.engine.engine import Engine
from spiking_mlp_jax.deploy.engine.kernels import OPTIONS

# What multiplies or divides: LLVM instructions, and mnemonics of x86-64 and AArch64.
LLVM = re.compile(r"^(?:%\S+ = )?(?:tail |musttail |notail )?(f?mul|[us]div|fdiv|[us]rem|frem)\b")
CALL = re.compile(r"\bcall\b[^@\n]*@(?:\"([^\"]+)\"|([\w.$]+))\(")
# The only functions that may be called; any other is reported.
HARMLESS = re.compile(
    r"^llvm\.(experimental\.vector\.compress|ctpop|cttz|ctlz|[su]min|[su]max|abs|memset|memcpy|memmove|assume|bswap"
    r"|lifetime|experimental\.noalias|vector\.reduce\.(add|or|and|[su]min|[su]max)|[su](add|sub)\.(sat|with\.overflow)|fsh[lr]|bitreverse)\b"
)
# LLVM's form of a scaled address or a negation before it picks the instruction.
SHIFT = re.compile(r"mul (?:n[us]w )*i64 %\S+, (-?\d+)$")
ASSEMBLY = re.compile(r"^\w*(mul|madd|msub|div|mla|mls|pdp|dot|sqrt|rcp|scalef|^fma|vfm|vfnm)\w*$")


@dataclasses.dataclass(frozen=True)
class Row:
    """An instruction that multiplies, or a call of a function that was not read.

    Attributes:
        kernel: name of the kernel; code: "llvm" or "assembly"; instruction: its text.
        in_loop: whether the instruction is in a loop; None in assembly, where that is not checked.
    """

    kernel: str
    code: str
    instruction: str
    in_loop: bool | None


@dataclasses.dataclass(frozen=True)
class Report:
    """The multiplications found, and what was read.

    Attributes:
        rows: every multiplication and unread call.
        read: per kernel and signature (kernel, types, LLVM instructions, those in loops, assembly lines).
    """

    rows: list[Row]
    read: list[tuple[str, str, int, int, int]]

    @property
    def ok(self) -> bool:
        """Whether there was code to read and nothing in it multiplies."""
        return bool(self.read) and not self.rows

    def __str__(self) -> str:
        lines = [f"{'kernel':10} {'LLVM':>6} {'in loops':>8} {'assembly':>8}  multiplications"]
        for kernel, _, instructions, looped, assembly in self.read:
            found = [row for row in self.rows if row.kernel == kernel]
            lines.append(f"{kernel:10} {instructions:6} {looped:8} {assembly:8}  {len(found)}")
            lines += [f"    {row.code}{', in a loop' * bool(row.in_loop)}: {row.instruction}" for row in found]
        return "\n".join([*lines, "no multiplication" if self.ok else "NOT free of multiplications"])


def check(engine: Engine) -> Report:
    """The multiplications in the machine code of all kernels that this process has compiled. Takes seconds.

    The engine classifies a black image first, so that the kernels that it needs are among them.
    """
    c = engine.description
    engine.predict(np.zeros((1, c.image_size, c.image_size, c.in_channels), np.uint8))
    return check_kernels(COMPILED)


def check_kernels(compiled: Mapping[str, Any]) -> Report:
    """Recompile numba functions for all types that they were called with, and read the result.

    Args:
        compiled: functions by name. If none has been called there is nothing to read, and the report is not ok.
    """
    rows, read = [], []
    for name, function in compiled.items():
        for signature in function.signatures:
            # Functions from numba's cache on disk have no text.
            fresh: Any = numba.njit(**OPTIONS)(function.py_func)
            fresh.compile(signature)
            own = fresh.overloads[signature].fndesc.llvm_func_name
            functions = _functions(fresh.inspect_llvm(signature))
            # What the kernel calls is inlined, or in the same module and read too.
            instructions = looped = 0
            waiting, seen = [own], {own}
            while waiting:
                blocks = functions[waiting.pop()]
                loops = _in_loops(blocks)
                for label, lines in blocks.items():
                    instructions += len(lines)
                    looped += len(lines) * (label in loops)
                    for line in lines:
                        if LLVM.match(line) and not _is_shift(line):
                            rows.append(Row(name, "llvm", line, label in loops))
                        for callee in (a or b for a, b in CALL.findall(line)):
                            if callee in functions:
                                waiting += [callee] * (callee not in seen)
                                seen.add(callee)
                            elif not HARMLESS.match(callee):
                                rows.append(Row(name, "llvm", line, label in loops))
            assembly = [line for symbol in seen for line in _assembly(fresh.inspect_asm(signature), symbol)]
            rows += [Row(name, "assembly", x, None) for x in assembly if ASSEMBLY.match(x.split()[0])]
            if not assembly:
                rows.append(Row(name, "assembly", "not found", None))
            read.append((name, str(signature), instructions, looped, len(assembly)))
    return Report(rows, read)


def _is_shift(line: str) -> bool:
    found = SHIFT.search(line)
    return bool(found) and abs(int(found[1])).bit_count() == 1


def _functions(module: str) -> dict[str, dict[str, list[str]]]:
    """The instructions of each function by block."""
    found: dict[str, dict[str, list[str]]] = {}
    blocks: dict[str, list[str]] | None = None
    lines: list[str] = []
    for line in module.splitlines():
        if line.startswith("define "):
            quoted, plain = re.findall(r"@(?:\"([^\"]+)\"|([\w.$]+))\(", line)[0]
            lines, blocks = [], {}
            blocks[""] = lines
            found[quoted or plain] = blocks
        elif line == "}":
            blocks = None
        elif blocks is not None:
            label = re.match(r'^("[^"]+"|[\w.$-]+):', line)
            if label:
                lines = []
                # A function's first block may have a name that no branch uses.
                blocks[label[1].strip('"')] = lines
            elif line.strip() and not line.strip().startswith(";"):
                lines.append(line.strip())
    return found


def _in_loops(blocks: dict[str, list[str]]) -> set[str]:
    """Blocks that can be reached from themselves."""
    names = {label: re.findall(r'label %("[^"]+"|[\w.$-]+)', "\n".join(lines)) for label, lines in blocks.items()}
    after = {label: {x.strip('"') for x in found} for label, found in names.items()}
    looping = set()
    for label in blocks:
        reached, waiting = set(), list(after[label])
        while waiting:
            now = waiting.pop()
            if now not in reached:
                reached.add(now)
                waiting += after.get(now, ())
        if label in reached:
            looping.add(label)
    return looping


def _assembly(text: str, symbol: str) -> list[str]:
    """A function's instructions."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.rstrip().rstrip(":").strip('"') == symbol and line.rstrip().endswith(":"):
            inside = True
        elif inside and re.match(r"\s*\.(size|cfi_endproc)\b", line):
            break
        elif inside and line.startswith("\t") and not line.strip().startswith((".", "#", "//")):
            lines.append(line.strip())
    return lines
