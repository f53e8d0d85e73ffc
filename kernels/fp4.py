"""FP4 numerics: the canonical weight and its exact decode, the oracle of every test.

Formats: E2M1 elements and E8M0 scales as in the OCP Microscaling specification v1.0 (MXFP4); E4M3 scales are
``torch.float8_e4m3fn`` bytes (NVFP4, as NVIDIA ModelOpt and compressed-tensors write them).
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from marlin_w4a16.kernels.scale_bytes import (
    E8M0_BIAS,
    SCALE_DTYPES,
    SCALE_KINDS,
    ScaleKind,
    e8m0_exponents,
    e8m0_of,
    first_nan,
    scale_table,
)

GROUP_SIZES = (16, 32)

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0
# Exponents e for which every E2M1 code times 2**e is exact in the dtype, its subnormals included.
EXACT_EXPONENTS = {torch.float16: (-23, 13), torch.bfloat16: (-127, 125), torch.float32: (-127, 125)}

# Elements per block of rows when a whole weight is walked: bounds temporaries to a few tens of megabytes.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class FP4Weight:
    """A linear weight of ``n`` rows (outputs) by ``k`` columns (inputs) in its canonical four-bit form.

    Attributes:
        codes: uint8 ``[..., n, k / 2]``, two E2M1 codes a byte, the low nibble is the even column.
        scales: uint8 ``[..., n, k / group]``, the bytes of the block scales.
        multiplier: float32 ``[..., n]``, one factor per output row (a global scale is a constant one).
        kind: ``"e4m3"`` or ``"e8m0"``, how a scale byte is read.
        group: 16 or 32 columns that share a scale.
        name: what error messages call the weight.

    Raises:
        ValueError: a wrong dtype, shape, device, group or kind, a NaN scale, a multiplier that is not finite;
            the message names the parameter, what was found and what was expected.
    """

    codes: Tensor
    scales: Tensor
    multiplier: Tensor
    kind: ScaleKind
    group: int
    name: str = "weight"

    def __post_init__(self) -> None:
        _check_structure(self)
        _check_values(self)

    @property
    def n(self) -> int:
        """Output rows."""
        return self.codes.shape[-2]

    @property
    def k(self) -> int:
        """Input columns."""
        return self.codes.shape[-1] * 2

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and multiplier."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.multiplier))

    def decode(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The exact value ``code * scale * multiplier`` as ``[..., n, k]``, rounded once to ``dtype``.

        Exact in float64: a code has 2 significant bits, a scale at most 4, the multiplier 24.
        """
        exact = self.unscaled(torch.float64) * self.multiplier.double().unsqueeze(-1)
        return round_once(exact, dtype)

    def unscaled(self, dtype: torch.dtype) -> Tensor:
        """``code * scale`` without the multiplier as ``[..., n, k]``: exact wherever ``dtype`` can hold it."""
        codes, scales = self.factors(dtype)
        return (codes * scales.unsqueeze(-1)).reshape(*self.codes.shape[:-1], self.k)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The values of the codes ``[..., n, k / group, group]`` and of the scales ``[..., n, k / group]``."""
        pairs = _pair_table(self.codes.device, dtype)[self.codes.int()]
        scales = scale_table(self.kind, self.codes.device, dtype)[self.scales.int()]
        return pairs.reshape(*self.scales.shape, self.group), scales

    def row_blocks(self, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[slice, "FP4Weight"]]:
        """Walks the rows of a 2-D weight in blocks of about ``elements`` values, as views."""
        for at in row_slices(self.n, self.k, elements):
            yield at, self.derived(self.codes[at], self.scales[at], self.multiplier[at])

    def derived(self, codes: Tensor, scales: Tensor, multiplier: Tensor) -> "FP4Weight":
        """A weight of this format and name from rows that were checked once: values are not looked at again."""
        return FP4Weight.unchecked(codes, scales, multiplier, self.kind, self.group, self.name)

    @classmethod
    def unchecked(
        cls, codes: Tensor, scales: Tensor, multiplier: Tensor, kind: ScaleKind, group: int, name: str = "weight"
    ) -> "FP4Weight":
        """A weight of which nothing is looked at: its parts are known to fit, or it is only tried."""
        weight = object.__new__(cls)
        for field, value in zip(fields(cls), (codes, scales, multiplier, kind, group, name), strict=True):
            object.__setattr__(weight, field.name, value)
        return weight

    def fit(self, dtype: torch.dtype) -> "FP4Weight":
        """The same values, with ``code * scale`` exact in ``dtype`` for every element.

        E4M3 products fit every dtype. For E8M0 each row whose exponents leave the dtype's range moves a power of two
        into its multiplier; the scale of a group of zeros is free and is clamped. The matrices of a stack are taken as
        one below the other.

        Raises:
            ValueError: a row spans more binades than ``dtype`` holds, or its multiplier under- or overflows.
        """
        if self.kind == "e4m3" or not self.scales.numel():
            return self
        limits = EXACT_EXPONENTS[dtype]
        least, most = (byte - E8M0_BIAS for byte in torch.stack(torch.aminmax(self.scales)).tolist())
        if limits[0] <= least and most <= limits[1]:
            return self
        if self.codes.ndim > 2:
            flat = self._reshaped(self.multiplier.numel())
            fitted = flat.fit(dtype)
            return self if fitted is flat else fitted._reshaped(*self.multiplier.shape)
        scales, shift = torch.empty_like(self.scales), torch.empty_like(self.multiplier, dtype=torch.int32)
        for rows, part in self.row_blocks(16 * BLOCK_ELEMENTS):  # half a byte each
            scales[rows], shift[rows], span = _moved(part, *limits)
            _check_fits(part, rows.start, span > limits[1] - limits[0], dtype, *limits)
        if torch.equal(scales, self.scales):
            return self
        multiplier = torch.ldexp(self.multiplier.double(), shift).float()
        if not torch.equal(torch.ldexp(multiplier.double(), -shift), self.multiplier.double()):
            raise ValueError(
                f"{self.name}: multiplier leaves the range of float32 when the rows' powers of two move into it"
            )
        return self.derived(self.codes, scales, multiplier)

    def _reshaped(self, *lead: int) -> "FP4Weight":
        codes, scales = (t.reshape(*lead, t.shape[-1]) for t in (self.codes, self.scales))
        return self.derived(codes, scales, self.multiplier.reshape(lead))

    def fit_first(self, *dtypes: torch.dtype) -> "FP4Weight":
        """`fit` for the first of some dtypes that can hold the weight.

        Raises:
            ValueError: none can; says why the last cannot.
        """
        for dtype in dtypes[:-1]:
            with suppress(ValueError):
                return self.fit(dtype)
        return self.fit(dtypes[-1])


def format_name(kind: ScaleKind, group: int) -> str:
    """The name of a format for people, such as ``"NVFP4 group 16"``."""
    name = {("e4m3", 16): "NVFP4", ("e8m0", 32): "MXFP4"}.get((kind, group), f"FP4 {kind}")
    return f"{name} group {group}"


def fp4_weight(
    codes: Tensor,
    scales: Tensor,
    multiplier: Tensor | float = 1.0,
    *,
    kind: ScaleKind | None = None,
    name: str = "weight",
) -> FP4Weight:
    """Builds an `FP4Weight` from the tensors of a checkpoint.

    Args:
        codes: uint8 or int8 ``[n, k / 2]``, low nibble first.
        scales: ``float8_e4m3fn``, ``float8_e8m0fnu`` or uint8 ``[n, k / group]``; bytes need ``kind``.
        multiplier: a number, a tensor of one element, or one value per row.
        kind: how scale bytes are read; taken from the dtype of ``scales`` when it is a float8.
        name: what error messages call the weight.
    """
    read_as = SCALE_DTYPES.get(scales.dtype, kind if scales.dtype == torch.uint8 else None)
    if read_as is None:
        raise ValueError(
            f"{name}: scales: found dtype {scales.dtype} and kind {kind}, expected float8_e4m3fn, float8_e8m0fnu, "
            "or uint8 with a kind"
        )
    if codes.ndim < 2 or scales.ndim != codes.ndim or not scales.shape[-1] or codes.shape[-1] * 2 % scales.shape[-1]:
        raise ValueError(
            f"{name}: scales: found shape {tuple(scales.shape)}, expected [n, k / group] with group in "
            f"{GROUP_SIZES} for codes {tuple(codes.shape)}"
        )
    if not isinstance(multiplier, Tensor):
        multiplier = torch.tensor(multiplier, dtype=torch.float32, device=codes.device)
    rows = codes.shape[:-1]
    if multiplier.numel() == 1:
        multiplier = multiplier.reshape(()).expand(rows)
    group = codes.shape[-1] * 2 // scales.shape[-1]
    codes = codes.view(torch.uint8) if codes.dtype == torch.int8 else codes
    return FP4Weight(codes, as_bytes(scales), multiplier.float().contiguous(), read_as, group, name)


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor of one-byte elements seen as uint8; others are returned as they are."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float64 to ``dtype`` once, to nearest even.

    torch rounds float64 to float16 and bfloat16 by way of float32, twice; going through a float32 that was rounded
    to odd makes the second rounding right (Boldo and Melquiond, 2005).
    """
    if dtype in (torch.float64, torch.float32):
        return exact.to(dtype)
    near = exact.float()
    bits = near.view(torch.int32) - (near.double().abs() > exact.abs()).int()
    odd = torch.where((near.double() == exact) | ~near.isfinite(), near.view(torch.int32), bits | 1)
    return odd.view(torch.float32).to(dtype)


def block_rows(k: int, elements: int = BLOCK_ELEMENTS) -> int:
    """How many rows of ``k`` values make a block of about ``elements``."""
    return max(1, elements // max(1, k))


def row_slices(n: int, k: int, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """The rows of ``[n, k]`` in blocks of about ``elements`` values."""
    rows = block_rows(k, elements)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _pair_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    byte = torch.arange(256)
    return torch.tensor(E2M1_VALUES, dtype=dtype)[torch.stack((byte & 15, byte >> 4), -1)].to(device)


def _nonzero_groups(part: FP4Weight) -> Tensor:
    return (part.codes.reshape(*part.scales.shape, part.group // 2) & 0x77 != 0).any(-1)


def _expect(condition: bool, name: str, parameter: str, found: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {parameter}: found {found}, expected {expected}")


def _check_structure(w: FP4Weight) -> None:
    _expect(w.kind in SCALE_KINDS, w.name, "kind", repr(w.kind), f"one of {SCALE_KINDS}")
    _expect(w.group in GROUP_SIZES, w.name, "group", w.group, f"one of {GROUP_SIZES}")
    device = w.codes.device
    for parameter, dtype in (("codes", torch.uint8), ("scales", torch.uint8), ("multiplier", torch.float32)):
        tensor = getattr(w, parameter)
        _expect(tensor.dtype == dtype, w.name, parameter, f"dtype {tensor.dtype}", str(dtype))
        _expect(tensor.device == device, w.name, parameter, f"device {tensor.device}", f"codes' {device}")
    _expect(w.codes.ndim >= 2, w.name, "codes", f"shape {tuple(w.codes.shape)}", "[..., n, k / 2]")
    _expect(w.k % w.group == 0, w.name, "codes", f"k = {w.k}", f"a multiple of the group {w.group}")
    lead = tuple(w.codes.shape[:-1])
    for parameter, shape in (("scales", (*lead, w.k // w.group)), ("multiplier", lead)):
        found = tuple(getattr(w, parameter).shape)
        _expect(found == shape, w.name, parameter, f"shape {found}", str(shape))


def _check_values(w: FP4Weight) -> None:
    nan = first_nan(w.scales, w.kind)
    if nan is not None:
        byte = int(w.scales[tuple(nan)])
        raise ValueError(f"{w.name}: scales: found NaN (byte {byte:#x}) at {nan}, expected finite {w.kind} codes")
    bad = ~w.multiplier.isfinite()
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        found = f"{float(w.multiplier[at])} at {list(at)}"
        raise ValueError(f"{w.name}: multiplier: found {found}, expected finite values")


def _moved(part: FP4Weight, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """E8M0 scales between two exponents, the power of two that each row gives away for it, and the span of each row."""
    used, exponent = _nonzero_groups(part), e8m0_exponents(part.scales)
    top = exponent.masked_fill(~used, -1000).amax(-1, keepdim=True)
    bottom = exponent.masked_fill(~used, 1000).amin(-1, keepdim=True)
    shift = (top - high).clamp(min=0) + (bottom - low).clamp(max=0)  # one of them is 0, or the span too wide
    return e8m0_of((exponent - shift).clamp(low, high)), shift[:, 0], (top - bottom)[:, 0]


def _check_fits(part: FP4Weight, first: int, bad: Tensor, dtype: torch.dtype, low: int, high: int) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        used = e8m0_exponents(part.scales[row][_nonzero_groups(part)[row]])
        raise ValueError(
            f"{part.name}: scales: row {first + row} holds powers of two from {int(used.min())} to {int(used.max())}, "
            f"expected a span of at most {high - low} for {dtype}"
        )
