"""Experts of DeepSeek-V4 held against its scheme, and who says that they are FP4."""

import pytest

from checkpoints.headers import fields, hold, problem
from marlin_w4a16.checkpoints import deepseek

W1 = "layers.0.ffn.experts.0.w1"
FLASH = deepseek.scheme(fields({})), {"weight": ("I8", (4, 32)), "scale": ("F8_E8M0", (4, 2))}


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8", "F32"])
@pytest.mark.parametrize("leaf", ["scale", "weight_scale", "weight_scale_inv"])
def test_experts_of_deepseek(leaf, dtype):
    tensors = {"weight": FLASH[1]["weight"], leaf: (dtype, (4, 2))}
    fp8 = {"weight": ("F8_E4M3", (128, 128)), leaf: ("F32", (1, 1))}
    held = hold(FLASH[0], **{W1: tensors, "layers.0.attn.wq_a": fp8, "layers.0.ffn.shared_experts.w1": fp8})
    (found,) = held.layers.values()
    assert (found.path, found.n, found.k, found.group) == (W1, 4, 64, 32) and not held.problems
    assert found.entries.keys() == tensors.keys() and len(held.others) == 4


@pytest.mark.parametrize(
    "leaf, tensor, said",
    [
        ("scale", None, f"{W1}.scale: found no such tensor beside weight, expected one (DeepSeek FP4, also called "
                        "weight_scale or weight_scale_inv)"),
        ("scale", ("BF16", (4, 2)), f"{W1}.scale: found BF16 [4, 2], expected dtype F8_E8M0 or U8 or F32"),
        ("weight", ("F8_E4M3", (4, 64)), f"{W1}.weight: found F8_E4M3 [4, 64], expected dtype I8 or U8"),
        ("scale", ("F32", (4, 4)), f"{W1}.scale: found F32 [4, 4], expected [n, k / 32] for codes I8 [4, 32]"),
        ("bias_scale", ("U8", (4,)), f"{W1}.bias_scale: found U8 [4], expected no such tensor in DeepSeek FP4"),
    ],
)  # fmt: skip
def test_experts_of_deepseek_that_are_wrong(leaf, tensor, said):
    assert problem(FLASH[0], {**FLASH[1], leaf: tensor}, W1) == f"x.safetensors: {said}"


@pytest.mark.parametrize(
    "config, beside, fp4",
    [
        ({"expert_dtype": "fp4"}, {}, True), ({}, {"expert_dtype": "FP4"}, True),
        ({"expert_dtype": "fp8"}, {"expert_dtype": "fp4"}, True), ({"expert_dtype": "fp8"}, {}, False),
        ({"expert_dtype": None}, {"expert_dtype": None}, False), ({}, {}, False),
    ],
)  # fmt: skip
def test_who_says_that_experts_are_fp4(config, beside, fp4):
    assert deepseek.is_fp4(fields(config), fields(beside)) is fp4
