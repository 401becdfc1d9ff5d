"""Reads what the engine's kernels were compiled to, and lists every multiplication in it.

Read are the optimised LLVM code and the assembly of this machine's CPU, for the types that the kernels were called
with. What calls a kernel from Python (numba's wrappers, which unpack its arguments once) is left out. Scaled
addressing, such as [base + 4 * index], is a shift by the hardware's own encoding and counts as none.

    python -m spiking_mlp_jax.deploy.engine.machine_code NET.smlp

On x86-64 none is left where the CPU has AVX2 or AVX-512. Without them LLVM shifts lanes by different counts with a
multiplication (pmullw), which the report then lists.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from typing import Any

import numba

from spiking_mlp_jax.deploy.engine import kernels

# What multiplies or divides: instructions of LLVM, and mnemonics of x86-64 and AArch64.
LLVM = re.compile(r"^(?:%\S+ = )?(?:tail |musttail |notail )?(f?mul|[us]div|fdiv|[us]rem|frem)\b")
CALL = re.compile(r"\bcall\b[^@\n]*@(?:\"([^\"]+)\"|([\w.$]+))\(")
# The only ones that may be called: whatever is not known here is not passed.
HARMLESS = re.compile(
    r"^llvm\.(experimental\.vector\.compress|ctpop|cttz|ctlz|[su]min|[su]max|abs|memset|memcpy|memmove|assume|bswap"
    r"|lifetime|experimental\.noalias|vector\.reduce\.(add|or|and|[su]min|[su]max)|[su](add|sub)\.(sat|with\.overflow)|fsh[lr]|bitreverse)\b"
)
# How LLVM writes a scaled address or a difference before it picks the instruction: a shift, a negation.
SHIFT = re.compile(r"mul (?:n[us]w )*i64 %\S+, (-?\d+)$")
ASSEMBLY = re.compile(r"^\w*(mul|madd|msub|div|mla|mls|pdp|dot|sqrt|rcp|scalef|^fma|vfm|vfnm)\w*$")


@dataclasses.dataclass(frozen=True)
class Row:
    """An instruction that multiplies, or a call to something that was not read.

    Attributes:
        kernel: its function; code: "llvm" or "assembly"; instruction: its text.
        in_loop: whether the instruction lies in a loop; None in assembly, where that is not looked for.
    """

    kernel: str
    code: str
    instruction: str
    in_loop: bool | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        rows: everything that speaks against it.
        read: for each kernel and signature: (kernel, types, LLVM instructions, of them in loops, assembly lines).
    """

    rows: list[Row]
    read: list[tuple[str, str, int, int, int]]

    @property
    def ok(self) -> bool:
        """Whether something was read and nothing in it multiplies."""
        return bool(self.read) and not self.rows

    def __str__(self) -> str:
        lines = [f"{'kernel':10} {'LLVM':>6} {'in loops':>8} {'assembly':>8}  multiplications"]
        for kernel, _, instructions, looped, assembly in self.read:
            found = [row for row in self.rows if row.kernel == kernel]
            lines.append(f"{kernel:10} {instructions:6} {looped:8} {assembly:8}  {len(found)}")
            lines += [f"    {row.code}{', in a loop' * bool(row.in_loop)}: {row.instruction}" for row in found]
        return "\n".join([*lines, "no multiplication" if self.ok else "NOT free of multiplications"])


def check_kernels(compiled: Mapping | None = None) -> Report:
    """Compiles every kernel again for all types it has been compiled for, and reads the result.

    Args:
        compiled: numba's functions by name; None for the engine's. None of them may have been called yet: then
            there is nothing to read, and the report is not ok.
    """
    if compiled is None:
        from spiking_mlp_jax.deploy.engine.compiled import COMPILED

        compiled = COMPILED
    rows, read = [], []
    for name, function in compiled.items():
        for signature in function.signatures:
            # What comes from numba's cache on disk has no text of its own.
            fresh: Any = numba.njit(**kernels.OPTIONS)(function.py_func)
            fresh.compile(signature)
            own = fresh.overloads[signature].fndesc.llvm_func_name
            functions = _functions(fresh.inspect_llvm(signature))
            # Whatever the kernel calls is either inlined or a function of the same module, which is read too.
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
    """Each function's instructions by block."""
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


def main(arguments: list[str]) -> int:
    """Prints the report of the kernels that an artifact needs; exit status 0 if it is ok."""
    from spiking_mlp_jax.deploy.engine.engine import Engine

    if len(arguments) != 1:
        print("usage: python -m spiking_mlp_jax.deploy.engine.machine_code NET.smlp")
        return 2
    report = Engine(arguments[0]).audit()
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
