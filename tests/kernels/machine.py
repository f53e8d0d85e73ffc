"""Kernels compiled ahead of time, and what is read from their machine code."""

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NEWER = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
# Instructions of a lane for each weight that it decodes, in the loop of a launch for a few tokens.
_INSTRUCTIONS = {
    ("bf16", "e4m3", 16): 4.4, ("bf16", "e4m3", 32): 4.15, ("bf16", "e8m0", 16): 4.8, ("bf16", "e8m0", 32): 4.6,
    ("fp16", "e4m3", 16): 4.65, ("fp16", "e4m3", 32): 4.45, ("fp16", "e8m0", 16): 6.4, ("fp16", "e8m0", 32): 5.6,
}  # fmt: skip
INSTRUCTIONS = {form: most + (0.14 if NEWER else 0.0) for form, most in _INSTRUCTIONS.items()}


@dataclass
class Compiled:
    registers: int
    stack: int
    shared: int
    cubin: bytes
    ttgir: str

    @functools.cached_property
    def instructions(self) -> list[str]:
        """With their operands, in order."""
        return [instruction for instruction, _ in listing(self.cubin) if instruction]

    @functools.cached_property
    def loop(self) -> list[str]:
        """The instructions of the loop that multiplies."""
        return multiplying_loop(listing(self.cubin))

    def has(self, *opcodes: str) -> bool:
        return any(i.startswith(opcodes) for i in self.instructions)


def tool(name: str, *arguments: Any) -> str:
    path = TOOLS / name
    assert os.access(path, os.X_OK), f"Triton {triton.__version__} has no {path} that can be run"
    run = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, f"{path} failed: {run.stderr}"
    return run.stdout


def multiplying_loop(lines: list[tuple[str, str]]) -> list[str]:
    """Once around the loop with matrix products, of (instruction, or nothing and a label) in order."""
    starts = {label: at for at, (_, label) in enumerate(lines) if label}
    for end, (instruction, _) in enumerate(lines):
        jump = re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        body = [i for i, _ in lines[starts[jump[1]] : end + 1] if i] if jump else []
        if any(i.startswith(("HMMA", "HGMMA")) for i in body):
            return body
    return []


def compiled(
    capability: tuple[int, int],
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...] = (),
    **options: int,
) -> Compiled:
    """A kernel as the runtime compiles it for aligned pointers and integers that 16 divides where it says so."""
    names = kernel.arg_names
    signature = {n: types.get(n) or ("constexpr" if n in constants else "i32") for n in names}
    aligned = (*(n for n in names if signature[n].startswith("*")), *(n for n in divisible if n in names))
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    major, minor = capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    built = triton.compile(source(kernel, signature, constants, attributes), target, options)
    cubin = built.asm["cubin"]
    usage = read("cuobjdump", "-res-usage", cubin)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return Compiled(registers, stack, built.metadata.shared, cubin, built.asm["ttgir"])


def read(name: str, option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        return tool(name, option, path)


@functools.cache  # several tests compile to the same, and nvdisasm takes a quarter of a second to start
def listing(cubin: bytes) -> list[tuple[str, str]]:
    """Lines, each an instruction or a label."""
    line = r"^(?:\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z].*?);?|(\.L_x_\d+):)\s*$"
    return re.findall(line, read("nvdisasm", "-ndf", cubin), re.MULTILINE)


def written(instruction: str) -> range:
    """The registers that an instruction other than a product of wgmma writes."""
    found = re.match(r"([A-Z][A-Z0-9_]*)(\S*) R(\d+)", instruction)
    if not found or found[1] in ("ST", "STS", "STG", "STL", "STSM", "RED", "BAR", "SYNCS"):
        return range(0)
    wide = 4 if ".128" in found[2] or ".x4" in found[2] else 2 if re.search(r"\.64|WIDE", found[2]) else 1
    return range(int(found[3]), int(found[3]) + (2 if found[1] == "CS2R" else wide))


def overwritten_operands(loop: list[str], *, across: bool) -> list[str]:
    """Instructions that write a register which a product of wgmma still reads, as its left operand, in two turns.

    A group of products reads its operands until a wait leaves fewer groups pending. Where products are under way
    ``across`` turns, what follows the first wait for all of them, the end of a tile of the output, is left out.
    """
    stop = r"WARPGROUP.DEPBAR.LE gsb0, 0x0"
    ends = next((i for i, code in enumerate(loop) if across and re.match(stop, code)), len(loop))
    found, pending, group = [], [], set()
    for code in loop[:ends] * 2:
        product = re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", code)
        wait = re.match(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d+)", code)
        if product:
            group |= set(range(int(product[1]), int(product[1]) + 4))
            if "gsb0" in code:
                pending, group = [*pending, group], set()
        elif wait:
            pending = pending[max(0, len(pending) - int(wait[1])) :]
        elif group.union(*pending) & set(written(code)):
            found.append(code)
    return found


def assert_no_spills(code: Compiled, most: int = 0) -> None:
    """There are LDL and STL where there is a stack, and nowhere else; ``most`` bytes of it are let pass."""
    assert code.stack <= most


def assert_wgmma_is_awaited(code: Compiled) -> None:
    """No wgmma is in flight where its register operand is decoded anew, or where the loop goes round."""
    in_flight = False
    for instruction in code.instructions:
        if instruction.startswith("HGMMA"):
            in_flight = True
        elif re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", instruction):
            in_flight = False
        assert not (in_flight and instruction.startswith(("HMUL2", "HFMA2", "BRA", "EXIT"))), instruction
    steps = re.findall(r"ttng\.warp_group_dot(?:_wait .*pendings = (\d+)| )", code.ttgir)
    assert steps and steps == ["", "0"] * (len(steps) // 2)
