"""Experts of DeepSeek-V4 held against its scheme, and who says that they are FP4."""

import pytest

from checkpoints.headers import fields, hold, problem
from marlin_w4a16.checkpoints import deepseek
from marlin_w4a16.checkpoints.files import CheckpointError

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


# NVIDIA's NVFP4 of such models

W2, FP8_BLOCKS = "layers.0.ffn.experts.1.w2", {"weight": ("F8_E4M3", (128, 128)), "weight_scale_inv": ("F32", (1, 1))}
NVFP4 = {"weight": ("U8", (4, 32)), "weight_scale": ("F8_E4M3", (4, 4)), "weight_scale_2": ("F32", ())}


@pytest.mark.parametrize(
    "config, algorithm",
    [
        ({"moe_quant_algo": "nvfp4"}, "FP8 with NVFP4 experts"),
        ({"quantized_layers": {path: {"quant_algo": "NVFP4"} for path in (W1, W2)}}, "FP8 with NVFP4 experts"),
        ({"quantized_layers": {"layers.0.ffn.experts*": {"quant_algo": "W4A16_NVFP4"}}}, "FP8 with NVFP4 experts"),
        ({"expert_dtype": "fp4"}, "FP8 with FP4 experts"),  # though its experts are stored as NVFP4
    ],
)
def test_experts_of_nvidia(config, algorithm):
    assert deepseek.is_fp4(fields(config), fields({"expert_dtype": "fp4"}))
    scheme = deepseek.scheme(fields(config))
    held = hold(scheme, **{W1: NVFP4, W2: NVFP4, "layers.0.attn.wq_a": FP8_BLOCKS})
    assert (scheme.algorithm, scheme.shares) == (algorithm, True)
    assert [(path, one.format) for path, one in held.layers.items()] == [(W1, "NVFP4 group 16"), (W2, "NVFP4 group 16")]
    assert len(held.others) == 2 and not held.problems
    said = f"{W1} and 1 more: NVFP4 group 16 as stored, though the config says it is DeepSeek FP4"
    assert held.notes == ((said,) if "expert_dtype" in config else ())


@pytest.mark.parametrize(
    "config, said",
    [
        ({"quantized_layers": ["x"]}, ".quantized_layers: found a list, expected an object"),
        (
            {"quantized_layers": {W1: {"quant_algo": 4}}},
            f".quantized_layers.{W1}.quant_algo: found 4, expected a string",
        ),
        ({"moe_quant_algo": {"w1": "NVFP4"}}, ".moe_quant_algo: found an object, expected a string"),
    ],
)
def test_an_entry_of_another_type_is_named(config, said):
    with pytest.raises(CheckpointError) as caught:
        deepseek.scheme(fields(config))
    assert str(caught.value) == f"config.json: quantization_config{said}"


def test_an_algorithm_of_experts_that_is_not_known():
    scheme = deepseek.scheme(fields({"moe_quant_algo": "INT4"}))
    found = hold(scheme, **{W1: {"weight": ("U8", (4, 32)), "scale": ("BF16", (4, 2))}}).problems
    assert [one.found for one in found] == ["ModelOpt's INT4"]
