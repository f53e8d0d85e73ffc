import re

import pytest
import torch

from marlin_w4a16.fake_impls.library import CONTRACT, DTYPES, weight_args

OPS = torch.ops.marlin_w4a16
NAMES = ("dequantize", "linear", "linear_grad_input")
WEIGHT = ("words", "scales", "multiplier", "n", "k", "group", "kind", "layout", "contract")


def call(op: str, weight: tuple) -> torch.Tensor:
    if op == "dequantize":
        return OPS.dequantize(*weight, "float32")
    if op == "linear":
        return OPS.linear(torch.ones(3, 96), *weight, None)
    return OPS.linear_grad_input(torch.ones(3, 40), *weight)


def test_these_are_all_the_ops():
    prefix = "marlin_w4a16::"
    found = [n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)]
    assert sorted(found) == sorted(NAMES)


@pytest.mark.parametrize("op", NAMES)
def test_a_schema_holds_tensors_numbers_and_strings_and_the_contract(op):
    arguments = getattr(OPS, op).default._schema.arguments
    assert {str(a.type) for a in arguments} <= {"Tensor", "Optional[Tensor]", "int", "float", "str"}
    contract = next(a for a in arguments if a.name == "contract")
    assert not contract.has_default_value()


@pytest.mark.parametrize("op", NAMES)
def test_an_op_neither_writes_to_nor_returns_its_inputs(op):
    schema = getattr(OPS, op).default._schema
    assert not schema.is_mutable
    assert all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


@pytest.mark.parametrize("op", NAMES)
def test_the_contract_is_the_last_thing_a_packed_weight_says(packed, op):
    assert weight_args(packed)[-1] == CONTRACT
    assert dict(zip(WEIGHT, weight_args(packed), strict=True))["contract"] == CONTRACT
    assert call(op, weight_args(packed)).dtype in DTYPES


WRONG = {
    "words' shape": ("words", torch.zeros(2, 2, 512).int(), "words: found shape (2, 2, 512), expected (1, 2, 512)"),
    "words' dtype": ("words", torch.zeros(1, 2, 512), "words: found torch.float32, expected torch.int32"),
    "words on meta": ("words", torch.zeros(1, 2, 512, device="meta").int(), "words: found device meta, expected"),
    "scales' shape": ("scales", torch.zeros(1, 2, 128).byte(), "scales: found shape (1, 2, 128), expected (1, 2, 256)"),
    "scales' dtype": ("scales", torch.zeros(1, 2, 256), "scales: found torch.float32, expected torch.uint8"),
    "multiplier's dtype": ("multiplier", torch.ones(40).half(), "multiplier: found torch.float16, expected torch.f"),
    "multiplier's shape": ("multiplier", torch.ones(1), "multiplier: found shape (1,), expected (40,)"),
    "n": ("n", 65, "words: found shape (1, 2, 512), expected (2, 2, 512)"),
    "k": ("k", 160, "words: found shape (1, 2, 512), expected (1, 3, 512)"),
    "group": ("group", 8, "group: found 8, expected one of (16, 32)"),
    "kind": ("kind", "e5m2", "kind: found 'e5m2', expected one of ('e4m3', 'e8m0')"),
    "layout": ("layout", "tile65", "layout: found 'tile65', expected one of ('tile64',)"),
    "contract": ("contract", CONTRACT + 1, f"contract: found {CONTRACT + 1}, expected {CONTRACT}"),
}


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("argument, value, message", WRONG.values(), ids=WRONG)
def test_a_weight_that_does_not_fit_is_named(packed, op, argument, value, message):
    weight = dict(zip(WEIGHT, weight_args(packed), strict=True)) | {argument: value}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(op, tuple(weight.values()))
    assert str(caught.value).startswith(f"marlin_w4a16::{op}: {argument if argument not in 'nk' else 'words'}")
