"""Decoding packed weights in blocks: the oracle's bits, and never the whole weight at once."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from marlin_w4a16.kernels.blocks.dequantize import (
    decode_columns,
    decode_rows,
    dequantize,
    linear_by_blocks,
    linear_grad_input,
)
from marlin_w4a16.kernels.fp4 import BLOCK_ELEMENTS, FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.scale_bytes import scale_values

EDGES = [(1, 16), (64, 64), (65, 80), (63, 32), (200, 1120), (96, 2880), (1000, 2880)]
FORMATS = [(kind, group, n, k) for kind in ("e4m3", "e8m0") for group in (16, 32) for n, k in EDGES if not k % group]
every_format_and_edge = pytest.mark.parametrize("kind, group, n, k", FORMATS)
# Relative L2 of an output that is rounded once; in float32 of sums that are.
GATES = {torch.float32: 1e-6, torch.bfloat16: 1.75e-3, torch.float16: 2.3e-4}
# Scales whose products are exact in float32: what `FP4Weight.fit` leaves.
FULL_RANGE = (0, 252)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def relative_error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm())


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operator returned."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.bytes[storage.data_ptr()] = max(self.bytes.get(storage.data_ptr(), 0), storage.nbytes())
        return result


def tensors(value: Tensor | FP4Weight | PackedFP4) -> list[Tensor]:
    held = [value] if isinstance(value, Tensor) else [getattr(value, f.name) for f in fields(value)]
    return [t for t in held if isinstance(t, Tensor)]


def largest_temporary(call: Callable[[], Tensor | FP4Weight | PackedFP4], given: FP4Weight | PackedFP4) -> int:
    """Bytes of the largest tensor that ``call`` makes beside those of its weight and its result."""
    with Allocations() as seen:
        result = call()
    known = {t.untyped_storage().data_ptr() for t in tensors(given) + tensors(result)}
    return max(size for pointer, size in seen.bytes.items() if pointer not in known)


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_scale_values_are_exact_for_every_finite_byte(kind):
    byte = torch.tensor([b for b in range(255) if kind == "e8m0" or b != 0x7F], dtype=torch.uint8)
    exact = byte.view(torch.float8_e4m3fn).double() if kind == "e4m3" else 2.0 ** (byte.double() - 127)
    assert torch.equal(scale_values(byte, kind).double(), exact)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_every_code_times_every_scale_byte_is_the_oracles_bits(kind, group, every_product):
    weight = every_product(kind, group)
    packed, exact = pack(weight), weight.unscaled(torch.float64)
    (rows,), (columns,) = ([block for _, block in walk(packed)] for walk in (decode_rows, decode_columns))
    assert same_bits(rows, exact.float()) and same_bits(columns, exact.float())
    assert kind == "e8m0" or torch.equal(rows.double(), exact)
    assert same_bits(dequantize(packed, torch.float32), weight.decode(torch.float32))


@every_format_and_edge
def test_decoded_blocks_are_the_oracles_bits(kind, group, n, k, random_weight):
    weight = random_weight(n, k, kind, group, e8m0=FULL_RANGE)
    packed, exact = pack(weight), weight.unscaled(torch.float64)
    for walk, axis in ((decode_rows, 0), (decode_columns, 1)):
        at, blocks = zip(*walk(packed), strict=True)
        assert [i for part in at for i in range(part.start, part.stop)] == list(range((n, k)[axis]))
        decoded = torch.cat(blocks, axis)
        assert torch.equal(decoded.double(), exact) and same_bits(decoded, exact.float())


@pytest.mark.parametrize("dtype", list(GATES))
@every_format_and_edge
def test_dequantize_is_the_oracle_rounded_once(kind, group, n, k, dtype, random_weight):
    weight = random_weight(n, k, kind, group, e8m0=FULL_RANGE)
    assert same_bits(dequantize(pack(weight), dtype), weight.decode(dtype))


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_a_cpu_that_flushes_subnormals_flushes_no_code(kind, random_weight):
    weight = random_weight(64, 128, kind)
    packed, x = pack(weight), torch.randn(3, 128)
    values, sums = dequantize(packed, torch.float32), linear_by_blocks(x, packed, None)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        assert torch.equal(dequantize(packed, torch.float32), values) and bool((values.abs() > 0).any())
        assert torch.equal(linear_by_blocks(x, packed, None), sums)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_does_not_round_twice(dtype, random_weight):
    weight = random_weight(60000, 16)
    assert same_bits(dequantize(pack(weight), dtype), weight.decode(dtype))
    assert not torch.equal(weight.decode(torch.float32).to(dtype), weight.decode(dtype)), "twice would pass"


every_multiplier = pytest.mark.parametrize("factor", [2.0**-140, 1e-30, 1e-6, 1.0, 1e30])


def _constant(multiplier):
    """A weight of 64 columns, all of them the largest that codes and scales give."""
    codes, scales = torch.full((len(multiplier), 32), 0x77).byte(), torch.full((len(multiplier), 4), 0x7E).byte()
    return FP4Weight(codes, scales, multiplier, "e4m3", 16)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", list(GATES))
@every_format_and_edge
def test_linear_by_blocks_rounds_its_output_only(kind, group, n, k, dtype, with_bias, random_weight):
    weight, x = random_weight(n, k, kind, group), torch.randn(1 + 8000 // n, k).to(dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    exact = x.double() @ weight.decode().T + (bias.double() if with_bias else 0)
    out = linear_by_blocks(x, pack(weight), bias)
    assert out.dtype == dtype and relative_error(out, exact) <= GATES[dtype]


@pytest.mark.parametrize("dtype", list(GATES))
@every_format_and_edge
def test_linear_grad_input_rounds_its_output_only(kind, group, n, k, dtype, random_weight):
    weight, grad = random_weight(n, k, kind, group), torch.randn(1 + 8000 // k, n).to(dtype)
    result = linear_grad_input(grad, pack(weight))
    assert result.dtype == dtype
    assert relative_error(result, grad.double() @ weight.decode()) <= GATES[dtype]


def test_the_bias_is_added_before_the_only_rounding(random_weight):
    weight = random_weight(200, 1120)
    x, bias = torch.randn(64, 1120).bfloat16(), 100 * torch.randn(200)
    exact = x.double() @ weight.decode().T + bias.double()
    assert relative_error(linear_by_blocks(x, pack(weight), bias), exact) <= GATES[torch.bfloat16]


@every_multiplier
def test_powers_and_what_is_left_are_the_multiplier(factor):
    multiplier = factor * torch.cat([1 + torch.rand(500), -1 - torch.rand(500), torch.zeros(3)])
    powers, weight = pack(_constant(multiplier)).without_powers()
    assert same_bits(powers * weight.multiplier, multiplier)
    left = weight.multiplier[multiplier != 0].abs()
    assert ((left >= 1) & (left < 2)).all() and (powers[multiplier == 0] == 0).all()


@every_multiplier
@pytest.mark.parametrize("product", [linear_by_blocks, lambda x, packed, _: linear_grad_input(x, packed)])
def test_sums_have_the_range_of_the_dense_weight(factor, product):
    weight = _constant(torch.full((64,), factor))  # codes of 6, scales of 448
    x = torch.full((3, 64), min(1e33 / factor, 1.6e38))
    out = product(x, pack(weight), None)
    assert relative_error(out, x.double() @ weight.decode().T) <= GATES[torch.float32]


@pytest.mark.parametrize("m", [0, 1, 7])
def test_any_number_of_rows_and_any_strides(m, random_weight):
    packed = pack(random_weight(70, 160))
    x, grad = torch.randn(160, 2 * m)[:, ::2].t(), torch.randn(70, 2 * m)[:, ::2].t()
    assert torch.equal(linear_by_blocks(x, packed, None), linear_by_blocks(x.contiguous(), packed, None))
    assert torch.equal(linear_grad_input(grad, packed), linear_grad_input(grad.contiguous(), packed))
    assert linear_by_blocks(x, packed, None).shape == (m, 70)
    assert linear_grad_input(grad, packed).shape == (m, 160)


@pytest.mark.parametrize("n, k", [(0, 32), (0, 0), (3, 0)])
def test_an_empty_weight_gives_sums_of_nothing(n, k):
    empty = FP4Weight(torch.zeros(n, k // 2).byte(), torch.zeros(n, k // 16).byte(), torch.ones(n), "e4m3", 16)
    bias = torch.randn(n)
    assert torch.equal(linear_by_blocks(torch.ones(2, k), pack(empty), bias), bias.expand(2, n))
    assert torch.equal(linear_grad_input(torch.ones(2, n), pack(empty)), torch.zeros(2, k))
    assert dequantize(pack(empty), torch.float16).shape == (n, k)


@pytest.mark.parametrize(
    "call, of_packed",
    [
        (lambda packed: linear_by_blocks(torch.ones(3, packed.k), packed, None), True),
        (lambda packed: linear_grad_input(torch.ones(3, packed.n), packed), True),
        (lambda packed: dequantize(packed, torch.bfloat16), True), (PackedFP4.unpack, True), (pack, False),
        (lambda weight: weight.fit(torch.float16), False),
    ],
    ids=["linear", "linear_grad_input", "dequantize", "unpack", "pack", "fit"],
)  # fmt: skip
def test_the_whole_weight_is_never_decoded(call, of_packed, random_weight):
    weight = random_weight(2048, 4096, "e8m0", e8m0=(90, 126))  # these scales have to move to fit float16
    given, a_block_in_float64 = pack(weight) if of_packed else weight, 8 * BLOCK_ELEMENTS
    assert a_block_in_float64 == given.n * given.k, "half of the weight in 16 bits"
    assert largest_temporary(lambda: call(given), given) <= a_block_in_float64
