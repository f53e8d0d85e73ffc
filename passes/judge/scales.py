"""Block scales that are held as floats, perhaps with a global scale folded in: back to bytes, where that is exact."""

import torch
from torch import Tensor

from marlin_w4a16.kernels.scale_bytes import first_nan, scale_bytes

# The largest E4M3 value of each of the eight significands.
_TOPS = (256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0, 240.0)
_NONE = "not E4M3 values times one factor a row"
_NEIGHBOURS = 2  # a quotient of rounded numbers is so many units in the last place from the factor


def to_e8m0(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bytes of E8M0 scales ``[rows, columns]``, any float dtype, and a float32 factor for each row or None.

    Raises:
        ValueError: they are no such scales.
    """
    significand, _ = torch.frexp(scales[:, :1].double())
    factor = 2 * significand
    byte = scale_bytes(scales.double() / factor, "e8m0")
    if bool((factor <= 0).any()) or first_nan(byte, "e8m0") is not None:
        raise ValueError("not powers of two times one factor a row")
    return byte, None if bool((factor == 1).all()) else factor[:, 0].float()


def to_e4m3(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bytes of E4M3 scales ``[rows, columns]``, any float dtype, and a float32 factor for each row or None.

    A factor is taken if it gives every scale again: a float32 one as the rounded product of byte and factor, a 16-bit
    one exactly. One for all rows is sought first.

    Raises:
        ValueError: there is no such factor.
    """
    exact = scale_bytes(scales.float(), "e4m3")
    if first_nan(exact, "e4m3") is None:
        return exact, None
    if bool((scales < 0).any()) or not bool(scales.isfinite().all()):
        raise ValueError("negative or not finite")
    if not _has_factor(scales[:1]):
        raise ValueError(_NONE)
    for rows in (scales.reshape(1, -1), scales):
        factor = _factors(rows)
        if bool(factor.isfinite().all()):
            byte = _quotient(rows, factor).reshape(scales.shape)
            return byte.view(torch.uint8), factor[:, 0].expand(scales.shape[0]).contiguous()
    raise ValueError(_NONE)


def _has_factor(row: Tensor) -> bool:
    """Whether there is a factor for one row ``[1, columns]``: all of `_factors` at once, which is quick for a few."""
    top = row.double().amax()
    factors = _neighbours((top / torch.tensor(_TOPS, dtype=torch.float64, device=row.device)).float())
    return bool((top == 0) | _gives(torch.stack(factors).reshape(-1, 1), row).any())


def _factors(scales: Tensor) -> Tensor:
    """For each row ``[rows, 1]`` a factor that gives it, or NaN."""
    top = scales.double().amax(1, keepdim=True)
    found = torch.where(top == 0, 1.0, torch.nan).float()
    for value in _TOPS:
        for factor in _neighbours((top / value).float()):
            found = torch.where(found.isnan() & _gives(factor, scales), factor, found)
        if not bool(found.isnan().any()):
            break
    return found


def _neighbours(factor: Tensor) -> list[Tensor]:
    """Some float32 values on both sides of a factor, in their order."""
    for _ in range(_NEIGHBOURS):
        factor = torch.nextafter(factor, torch.zeros_like(factor))
    found = [factor]
    for _ in range(2 * _NEIGHBOURS):
        found.append(torch.nextafter(found[-1], torch.full_like(factor, torch.inf)))
    return found


def _gives(factor: Tensor, scales: Tensor) -> Tensor:
    """Whether factors ``[rows, 1]`` give each of the scales again, ``[rows, 1]``."""
    again = _quotient(scales, factor).double() * factor.double()
    if scales.dtype not in (torch.float16, torch.bfloat16):
        again = again.to(scales.dtype)
    return (again == scales).all(1, keepdim=True) & (factor > 0)


def _quotient(scales: Tensor, factor: Tensor) -> Tensor:
    return (scales.double() / factor.double()).float().to(torch.float8_e4m3fn)
