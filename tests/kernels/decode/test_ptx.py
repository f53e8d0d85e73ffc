"""The PTX of the decode step without a GPU: a few lines of Python run its programs, for every scale byte."""

import re

import pytest
import torch
from torch import Tensor

from marlin_w4a16.kernels.decode.unpack import CODES_PTX, SCALES_PTX, UNPACK_GAIN
from marlin_w4a16.kernels.layout import tile_pairs
from marlin_w4a16.kernels.scale_bytes import scale_values

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def halves(register: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in the low and high half of 32-bit registers, which int64 holds, as ``[..., 2]``."""
    return torch.stack((register & 0xFFFF, register >> 16), -1).to(torch.int16).view(dtype).double()


def register(values: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = values.to(dtype).view(torch.int16).long().unbind(-1)
    return low & 0xFFFF | (high & 0xFFFF) << 16


def on_halves(dtype: torch.dtype, function):
    return lambda *operands: register(function(*(halves(operand, dtype) for operand in operands)), dtype)


OPERATIONS = {
    "mov.b32": lambda a: a, "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF, "shr.b32": lambda a, b: a >> b,
    "bfe.u32": lambda a, at, length: a >> at & (1 << length) - 1, "sub.u32": lambda a, b: a - b & 0xFFFFFFFF,
    "setp.gt.u32": lambda a, b: a > b, "setp.ne.and.u32": lambda a, b, p: (a != b) & p,
    "selp.b32": lambda a, b, p: torch.where(p, a, b), "mul.rn.f16x2": on_halves(torch.float16, lambda a, b: a * b),
    "fma.rn.bf16x2": on_halves(torch.bfloat16, lambda a, b, c: a * b + c),
    "max.bf16x2": on_halves(torch.bfloat16, torch.maximum),
    "cvt.rn.f16x2.f32": lambda a, b: register(torch.stack((b, a), -1).int().view(torch.float32), torch.float16),
}  # fmt: skip


def run(program: str, **registers: Tensor) -> dict[str, Tensor]:
    """What every register holds in the end; ``{a, b}`` are the halves of one."""
    found = {f"${name[1:]}": value.long() & 0xFFFFFFFF for name, value in registers.items()}

    def read(operand: str) -> Tensor:
        if "{" in operand:
            low, high = (read(half) for half in operand.strip("{}").split(", "))
            return low | high << 16
        return found[operand] if operand in found else torch.tensor(int(operand, 0))

    for statement in re.findall(r"[a-z][^;]*(?=;)", re.sub(r"\.reg [^;]*;", "", program)):
        operation, operands = statement.split(" ", 1)
        target, *sources = re.findall(r"{.*?}|[^, ]+", operands)
        value = OPERATIONS[operation](*map(read, sources))
        if "{" in target:
            low, high = target.strip("{}").split(", ")
            found |= {low: value & 0xFFFF, high: value >> 16}
        else:
            found[target] = value
    return found


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_the_programs_are_exact_for_every_byte_in_every_place_of_a_scale_word(kind, name):
    dtype = DTYPES[name]
    rows = torch.stack((torch.arange(1 << 16), torch.randperm(1 << 16)), -1)  # every pair of rows, in both groups
    byte = torch.stack((rows & 255, rows >> 8), -2).to(torch.uint8)  # word, r, group
    words = torch.randint(-(1 << 31), 1 << 31, (1 << 16, 2)).int()  # word, group
    scales = run(SCALES_PTX[kind, name], _2=byte.flatten(1).view(torch.int32).flatten())
    values = run(CODES_PTX[kind, name], _8=words, _9=torch.stack((scales["$0"], scales["$1"]), -1))
    found = torch.stack([values[f"${at}"] for at in range(8)], -1).to(torch.int16)  # word, group, h r p

    codes = torch.stack(tile_pairs(words), -1).view(torch.bfloat16).double() * 2.0**126
    factors = scale_values(byte, kind).double().abs() / UNPACK_GAIN[kind]  # signs are in the codes
    if (kind, name) == ("e8m0", "fp16"):
        factors[(byte < 104) | (byte > 140)] = torch.nan
        factors[byte == 0] = 0
    factors = factors.mT[:, :, None, :, None].expand(-1, -1, 2, 2, 2).flatten(2)
    expected, finite = codes * factors, factors.isfinite()
    assert torch.equal(found[finite], expected.to(dtype).view(torch.int16)[finite])
    held = expected.abs() <= torch.finfo(dtype).max
    assert torch.equal(expected[held], expected.to(dtype).double()[held])
    assert held[finite].all() or (kind, name) == ("e8m0", "bf16"), "6 * 2**126 is infinite"
    if (kind, name) == ("e8m0", "fp16"):
        assert found.view(torch.float16)[~finite].isnan().all()
