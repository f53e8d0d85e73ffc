"""Experts held against a scheme, one by one and as stacks."""

import pytest

from checkpoints.headers import (
    ALL,
    DENSE,
    MXFP4,
    NVFP4,
    ONE,
    UP,
    hold,
    problem,
)

EXPERTS = ["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.block_sparse_moe.experts.3.w1", "experts.1"]


@pytest.mark.parametrize("path", [*EXPERTS, "model.layers.0.mlp.shared_experts.up_proj"])
@pytest.mark.parametrize("name", ALL)
def test_a_projection_of_an_expert_is_a_layer(name, path):
    scheme, tensors = ALL[name]
    held = hold(scheme, **{path: tensors, "model.norm": DENSE})
    (found,) = held.layers.values()
    assert (found.path, found.n, found.k, found.experts) == (path, 4, 64, 0) and not held.problems
    assert held.others.keys() == {"model.norm.weight"}
    assert [found.name(leaf) for leaf in found.entries] == [f"{path}.{leaf}" for leaf in tensors]


STACK = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("factor", [(), (1,), (4,)], ids=str)
@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_a_stack_of_modelopt_is_one_layer(projection, factor):
    """Its exports of gpt-oss and Llama-4 hold all experts in one transposed tensor."""
    tensors = {projection: ("U8", (4, 32, 96)), f"{projection}_weight_scale": ("F8_E4M3", (4, 4, 96)),
               f"{projection}_weight_scale_2": ("F32", factor), f"{projection}_input_scale": ONE}  # fmt: skip
    held = hold(NVFP4[0], **{STACK: {**tensors, f"{projection}_bias": ("BF16", (4, 96))}})
    (found,) = held.layers.values()
    assert (found.path, found.experts, found.n, found.k, found.group) == (f"{STACK}.{projection}", 4, 96, 64, 16)
    assert [found.name(leaf) for leaf in found.entries] == [f"{STACK}.{name}" for name in tensors]
    assert held.others.keys() == {f"{STACK}.{projection}_bias"} and not held.problems
    dense = hold(NVFP4[0], **{STACK: {projection: ("BF16", (4, 64, 96))}})
    assert not dense.problems and not dense.layers


@pytest.mark.parametrize(
    "leaf, tensor, said",
    [
        ("up", ("I8", (4, 32, 96)), ".up: found I8 [4, 32, 96], expected dtype U8"),
        ("up", ("U8", (4, 32, 95)), ".up_weight_scale: found F8_E4M3 [4, 4, 96], expected shape [4, 4, 95]"),
        ("up_weight_scale", ("F8_E4M3", (3, 4, 96)),
         ".up_weight_scale: found F8_E4M3 [3, 4, 96], expected shape [4, 4, 96]"),
        ("up_weight_scale", ("F8_E4M3", (4, 96, 4)), ".up_weight_scale: found F8_E4M3 [4, 96, 4], expected [experts, "
                                                     "k / 16 or 32, n] for codes U8 [4, 32, 96]"),
        ("up_weight_scale", None, ".up_weight_scale: found no such tensor beside up, weight_scale_2, expected one "
                                  "(ModelOpt NVFP4)"),
        ("up_weight_scale_2", ("F32", (3,)), ".up_weight_scale_2: found F32 [3], expected one element"),
    ],
)  # fmt: skip
def test_a_stack_of_modelopt_that_is_wrong(leaf, tensor, said):
    tensors = {"up": ("U8", (4, 32, 96)), "up_weight_scale": ("F8_E4M3", (4, 4, 96)), "up_weight_scale_2": ONE}
    assert problem(NVFP4[0], {**tensors, leaf: tensor}, STACK) == f"x.safetensors: {STACK}{said}"


def test_a_stack_of_modelopt_in_groups_of_rows():
    """Its MXFP4 packs the stacks of gpt-oss along their last axis, which the product does not sum over."""
    tensors = {"down_proj": ("U8", (4, 160, 48)), "down_proj_weight_scale": ("U8", (4, 160, 3))}
    expected = "found U8 [4, 160, 3], expected [experts, k / 32, n] for codes U8 [4, 160, 48]"
    assert problem(MXFP4[0], tensors, STACK) == f"x.safetensors: {STACK}.down_proj_weight_scale: {expected}"


def test_a_stack_of_matrices_is_no_linear():
    tensors = {"weight": ("U8", (8, 4, 32)), "weight_scale": ("F8_E4M3", (8, 4, 4)), "weight_scale_2": ("F32", (1,))}
    found = "found F8_E4M3 [8, 4, 4], expected [n, k / 16 or 32] for codes U8 [8, 4, 32]"
    assert problem(NVFP4[0], tensors) == f"x.safetensors: {UP}.weight_scale: {found}"
