"""The bytes of block scales: from floats, to floats, and which are no numbers.

E8M0 as in the OCP Microscaling specification v1.0: byte b is ``2 ** (b - 127)``, 255 is NaN. E4M3 is
``torch.float8_e4m3fn``, in which FP8 weights are stored too: 0x7F and 0xFF are NaN, and nothing is infinite.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

ScaleKind = Literal["e4m3", "e8m0"]
SCALE_KINDS: tuple[ScaleKind, ...] = ("e4m3", "e8m0")
SCALE_DTYPES: dict[torch.dtype, ScaleKind] = {torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}

E8M0_BIAS = 127
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
_NAN: dict[ScaleKind, int] = {"e4m3": 0x7F, "e8m0": 0xFF}


def scale_bytes(scales: Tensor, kind: ScaleKind) -> Tensor:
    """The bytes of scales that are held in any float dtype; NaN for all that are no such scale."""
    if kind == "e4m3":
        near = scales.to(torch.float8_e4m3fn)
        return near.view(torch.uint8).where(near.to(scales.dtype) == scales, _NAN[kind])
    fraction, exponent = torch.frexp(scales.double())
    byte = exponent - 1 + E8M0_BIAS
    return byte.where((fraction == 0.5) & (byte >= 0) & (byte < _NAN[kind]), _NAN[kind]).to(torch.uint8)


def scale_values(scales: Tensor, kind: ScaleKind) -> Tensor:
    """The float32 values of finite bytes, exact, subnormals included; no table, so CUDA graphs can capture it."""
    if kind == "e4m3":
        return scales.view(torch.float8_e4m3fn).float()
    bits = (scales.int() << 23).clamp(min=1 << 22)  # byte 0 is 2**-127, a float32 subnormal
    return bits.view(torch.float32)


def scale_table(kind: ScaleKind, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values of the 256 bytes, ``[256]``, NaN included."""
    byte = torch.arange(256).to(torch.uint8)
    values = byte.view(torch.float8_e4m3fn).double() if kind == "e4m3" else e8m0_values(byte)
    return values.to(dtype).to(device)


def is_nan(scales: Tensor, kind: ScaleKind) -> Tensor:
    """Which bytes are NaN."""
    return (scales & 0x7F) == _NAN[kind] if kind == "e4m3" else scales == _NAN[kind]


def any_nan(scales: Tensor, kind: ScaleKind) -> bool:
    """Whether some byte is NaN: by the largest, which a CPU finds in a tenth of the time of comparing all.

    Of E4M3 0x7F is the largest if bytes are signed, and 0xFF if they are not.
    """
    if not scales.numel():
        return False
    found = scales.amax() == 0xFF
    return bool(found | (scales.view(torch.int8).amax() == 0x7F) if kind == "e4m3" else found)


def first_nan(scales: Tensor, kind: ScaleKind) -> list[int] | None:
    """Where the first byte stands that is NaN, or None: all are finite."""
    return list(map(int, is_nan(scales, kind).nonzero()[0])) if any_nan(scales, kind) else None


def e8m0_values(scales: Tensor) -> Tensor:
    """The float64 values of E8M0 bytes, NaN included."""
    return torch.exp2(e8m0_exponents(scales).double()).masked_fill(is_nan(scales, "e8m0"), torch.nan)


def e8m0_exponents(scales: Tensor) -> Tensor:
    """The powers of two that E8M0 bytes are, int32."""
    return scales.int() - E8M0_BIAS


def e8m0_of(exponents: Tensor) -> Tensor:
    """The inverse of `e8m0_exponents`; beyond the range its nearest end."""
    return (exponents + E8M0_BIAS).clamp(0, _NAN["e8m0"] - 1).to(torch.uint8)


def fp8_codes(values: Tensor, scale: Tensor, rounded: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor | None:
    """The E4M3 codes that give values again when they are multiplied by float64 scales, or None: there are none.

    Args:
        values: any float dtype; NaN becomes a NaN, maybe of the other sign.
        scale: float64, of the shape of the values or one that is broadcast to it.
        rounded: how the products became values: from float64 to a dtype.
    """
    codes = (values.double() / scale).to(torch.float8_e4m3fn)
    again = rounded(codes.double() * scale, values.dtype)
    return codes if torch.allclose(again, values, rtol=0, atol=0, equal_nan=True) else None


def swizzle(scales: Tensor, shape: torch.Size) -> Tensor:
    """Rows of scales ``[n, k / group]`` in tiles of 128 by 4, as cuBLAS wants them; padded with zeros.

    Within a tile, row ``32 a + b`` and column ``c`` lie at ``[b, a, c]``. The inverse is `unswizzle`.
    """
    rows, columns = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = padded.reshape(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)  # R a b C c
    return tiles.permute(0, 3, 2, 1, 4).reshape(shape).view(scales.dtype)


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle`."""
    tiles = scales.view(torch.uint8).reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)  # R C b a c
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(tiles.shape[0] * 128, tiles.shape[1] * 4)
    return padded[:rows, :columns].contiguous().view(scales.dtype)
