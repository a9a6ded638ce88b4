"""How fast ``noise`` could be if only arithmetic counted: the instructions of its machine code.

The kernel is compiled for an architecture, which needs no GPU, and disassembled with the cuobjdump
of Triton's wheel. The instructions that a thread executes are followed from the entry: conditional
jumps ahead are taken, as they lead around what the numbers of ``noise`` never need (sin and cos of
angles above 1e5, square roots of denormals). What each unit then needs, in cycles per number and
lane of an SM, by the throughput table of the CUDA C++ Programming Guide (compute capability 9.0;
8.0 differs in nothing that counts here):

    issue     every instruction                               128 lanes per cycle
    multiply  IMAD, also where it moves and shifts             64
    integer   LOP3, IADD3, SHF, ISETP, FSEL, FMNMX and others  64
    special   MUFU, conversions                                16

The slowest unit is the ceiling. FFMA, FMUL and FADD (128) are never slower than issue. Later
generations (10.0 and up) have other tables, and no ceiling here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from patchbloom.kernels.noise import GROUPS_PER_PROGRAM, noise_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import PTXASError

KNOWN = range(80, 100)
"""Compute capabilities, times 10, that the table is of."""
WARPS = 4
LANES_PER_CYCLE = {"issue": 128, "multiply": 64, "integer": 64, "special": 16}
MULTIPLY = {"IMAD"}
INTEGER = {
    "FMNMX", "FSEL", "FSETP", "I2FP", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "PLOP3", "PRMT",
    "SEL", "SHF", "VIADD",
}  # fmt: skip
SPECIAL = {"F2F", "F2I", "I2F", "MUFU"}
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z0-9]+)\S*\s*([^;]*);", re.M)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What one number of ``noise`` costs."""

    capability: int
    """Of the architecture that the kernel was compiled for: 90 is sm_90."""
    instructions_per_normal: float
    """Executed by a thread, divided by the numbers that it writes."""
    cycles_per_normal: dict[str, float]
    """Of an SM, by unit."""

    @property
    def unit(self) -> str:
        """The slowest unit."""
        return max(self.cycles_per_normal, key=self.cycles_per_normal.__getitem__)

    def gnormal_per_s(self, processors: int, clock_ghz: float) -> float:
        """10^9 numbers per second of a GPU with so many SMs at this clock."""
        return processors * clock_ghz / self.cycles_per_normal[self.unit]


def noise_ceiling(capability: int = 90) -> Ceiling:
    """Compile, disassemble, count.

    OSError where cuobjdump cannot be run; ValueError: an architecture that is not KNOWN, or that
    this Triton's tools do not make or show as straight code.
    """
    if capability not in KNOWN:
        raise ValueError(
            f"sm_{capability}: expected sm_{KNOWN[0]} to sm_{KNOWN[-1]}, of which throughputs are "
            "known"
        )
    executed = Counter(executed_opcodes(_sass(capability)))
    numbers = 4 * GROUPS_PER_PROGRAM / (32 * WARPS)
    total = sum(executed.values())
    units = {"multiply": MULTIPLY, "integer": INTEGER, "special": SPECIAL}
    lanes = {unit: sum(executed[name] for name in names) for unit, names in units.items()}
    cycles = {
        unit: count / numbers / LANES_PER_CYCLE[unit]
        for unit, count in {"issue": total, **lanes}.items()
    }
    return Ceiling(
        capability=capability,
        instructions_per_normal=total / numbers,
        cycles_per_normal=cycles,
    )


def executed_opcodes(sass: str) -> list[str]:
    """Opcodes from the entry to EXIT, without modifiers, taking every conditional jump ahead.

    ValueError for a loop or a call on that way, whose length a listing does not tell.
    """
    lines = [
        (int(address, 16), guard, opcode, rest)
        for address, guard, opcode, rest in LINE.findall(sass)
    ]
    found, next_address = [], 0
    for address, guard, opcode, rest in lines:
        if address < next_address:
            continue
        found.append(opcode)
        if opcode == "EXIT" and not guard:
            return found
        if opcode == "CALL":
            raise ValueError(f"SASS at {address:#x}: expected straight code, found a call")
        if opcode == "BRA":
            targets = re.findall(r"0x([0-9a-f]+)", rest)
            if not targets:
                raise ValueError(
                    f"SASS at {address:#x}: expected an address, found {rest.strip()!r}"
                )
            next_address = int(targets[-1], 16)
            if next_address <= address:
                raise ValueError(f"SASS at {address:#x}: expected straight code, found a loop")
    raise ValueError("SASS: expected an EXIT, found none; is it cuobjdump -sass of a kernel?")


def _sass(capability: int) -> str:
    kinds = {"out_ptr": "*fp32", "samples_ptr": "*i64"}
    kinds |= dict.fromkeys(("count", "draw", "epoch", "seed_lo", "seed_hi"), "i32")
    constants = {"NORMAL": True, "GROUPS": GROUPS_PER_PROGRAM, "ROUNDS": 10}
    names = noise_kernel.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    aligned = ("out_ptr", "samples_ptr", "count")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    try:
        kernel = triton.compile(
            ASTSource(noise_kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": False, "num_warps": WARPS},
        )
    except PTXASError as error:
        raise ValueError(f"sm_{capability}: {error}") from error
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sm_{capability}: cuobjdump: {done.stderr.strip()}")
    return done.stdout
