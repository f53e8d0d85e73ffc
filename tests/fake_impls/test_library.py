import re
from typing import Any

import pytest
import torch

from marlin_w4a16.fake_impls.library import CONTRACT, DTYPES, packed_of, split_weight, weight_args
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.kernels.quantize import quantize_nvfp4

OPS = torch.ops.marlin_w4a16
WEIGHTS = {  # the ends of the names of the weights of each op
    "dequantize": ("",),
    "grouped_linear": ("",),
    "grouped_linear_grad_input": ("",),
    "linear": ("",),
    "linear_grad_input": ("",),
    "moe": ("13", "2"),
    "moe_grad": ("13", "2"),
}
WEIGHT = ("words", "scales", "multiplier", "n", "k", "group", "kind", "layout", "contract")
TYPES = {"Tensor", "Optional[Tensor]", "int", "float", "Optional[float]", "bool", "str"}
every_op = pytest.mark.parametrize("op", WEIGHTS)
every_weight = pytest.mark.parametrize("op, of", [(op, of) for op, ends in WEIGHTS.items() for of in ends])


def arguments(op: str) -> dict[str, Any]:
    """Those of a call that fits, by name: weights of 40 rows and 96 columns; of two experts, where there are some."""
    lead = () if op in ("dequantize", "linear", "linear_grad_input") else (2,)
    packed = {of: pack(quantize_nvfp4(torch.randn(40, 96))) for of in WEIGHTS[op]}
    if "2" in packed:
        packed["2"] = pack(quantize_nvfp4(torch.randn(96, 48)))
        packed["13"] = pack(quantize_nvfp4(torch.randn(96, 96)))
    given = {
        f"{name}{of}": torch.stack([value] * 2) if lead and isinstance(value, torch.Tensor) else value
        for of, weight in packed.items()
        for name, value in zip(WEIGHT, weight_args(weight), strict=True)
    }
    given |= {
        "x": torch.ones(3, 96), "grad": torch.ones(3, 96 if lead and "2" in packed else 40), "dtype": "float32",
        "offsets": torch.tensor([1, 3]), "topk_weights": torch.ones(3, 1), "topk_ids": torch.tensor([[0], [1], [0]]),
        "function": "silu", "gated": True, "alpha": 1.0, "up_offset": 0.0, "weight_on_input": False,
    }  # fmt: skip
    return {a.name: given.get(a.name) for a in getattr(OPS, op).default._schema.arguments}


def call(op: str, changes: dict[str, Any] | None = None) -> torch.Tensor:
    result = getattr(OPS, op)(*(arguments(op) | (changes or {})).values())
    return result[0] if isinstance(result, tuple) else result


def test_these_are_all_the_ops():
    prefix = "marlin_w4a16::"
    found = [n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)]
    assert sorted(found) == sorted(WEIGHTS)


@every_op
def test_a_schema_holds_tensors_numbers_and_strings(op):
    assert {str(a.type) for a in getattr(OPS, op).default._schema.arguments} <= TYPES


@every_op
def test_an_op_neither_writes_to_nor_returns_its_inputs(op):
    schema = getattr(OPS, op).default._schema
    assert not schema.is_mutable
    assert all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


@every_weight
def test_a_weight_is_told_in_full_and_last_the_contract(op, of):
    schema = getattr(OPS, op).default._schema.arguments
    names = [a.name for a in schema]
    start = names.index(f"words{of}")
    assert names[start : start + len(WEIGHT)] == [f"{name}{of}" for name in WEIGHT]
    assert not any(a.has_default_value() for a in schema) and arguments(op)[f"contract{of}"] == CONTRACT
    assert call(op).dtype in DTYPES


def test_a_weight_is_the_inverse_of_its_arguments():
    packed = pack(quantize_nvfp4(torch.randn(40, 96)))
    args = weight_args(packed)
    assert weight_args(packed_of(args)) == args and packed_of(args).layout == packed.layout
    named = packed_of(WEIGHT)
    assert all(getattr(named, name) == name for name in WEIGHT[:-1])
    assert split_weight((*args, "behind", None)) == (args, ("behind", None)) and split_weight(args) == (args, ())


def wrong(t: torch.Tensor, **changes: Any) -> torch.Tensor:
    """An empty tensor like another but for what is changed."""
    return torch.empty(**{"size": t.shape, "dtype": t.dtype, "device": t.device} | changes)


WRONG = {
    "words' shape": ("words", lambda t: wrong(t, size=(*t.shape[:-1], 511)), "511), expected"),
    "words' dtype": ("words", lambda t: wrong(t, dtype=torch.float32), "torch.float32, expected torch.int32"),
    "words on meta": ("words", lambda t: wrong(t, device="meta"), "device meta, expected"),
    "scales' shape": ("scales", lambda t: wrong(t, size=(*t.shape[:-1], 128)), "128), expected"),
    "scales' dtype": ("scales", lambda t: wrong(t, dtype=torch.float32), "torch.float32, expected torch.uint8"),
    "multiplier's dtype": ("multiplier", lambda t: wrong(t, dtype=torch.float16), "torch.float16, expected torch.f"),
    "multiplier's shape": ("multiplier", lambda t: wrong(t, size=(1,)), "shape (1,), expected"),
    "n": ("n", lambda n: n + 64, "shape"),
    "k": ("k", lambda k: k + 64, "shape"),
    "group": ("group", lambda _: 8, "8, expected one of (16, 32)"),
    "kind": ("kind", lambda _: "e5m2", "'e5m2', expected one of ('e4m3', 'e8m0')"),
    "layout": ("layout", lambda _: "tile65", "'tile65', expected one of ('tile64',)"),
    "contract": ("contract", lambda c: c + 1, f"{CONTRACT + 1}, expected {CONTRACT}"),
}


@every_weight
@pytest.mark.parametrize("argument, change, message", WRONG.values(), ids=WRONG)
def test_a_weight_that_does_not_fit_is_named(op, of, argument, change, message):
    value = change(arguments(op)[f"{argument}{of}"])
    named = f"{argument if argument not in 'nk' else 'words'}{of}"
    with pytest.raises(ValueError, match=re.escape(f"marlin_w4a16::{op}: {named}: found ")) as caught:
        call(op, {f"{argument}{of}": value})
    assert message in str(caught.value)
