"""Tensors held against a scheme: what is a layer, what is not its, what is wrong."""

import math
from collections import Counter
from pathlib import Path

import pytest

from checkpoints.formats import FORMATS, written
from checkpoints.headers import UP, Tensor, fields, hold, problem
from marlin_w4a16.checkpoints import compressed_tensors, deepseek, files, gpt_oss, modelopt
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Problem, contents
from marlin_w4a16.checkpoints.scheme import Scheme

NAMES = ", ".join([*modelopt.FP4_ALGORITHMS, *modelopt.FP8_ALGORITHMS])


def of_modelopt(algorithm: str, **more) -> Scheme:
    return modelopt.scheme(fields({"quant_algo": algorithm, "ignore": ["lm_head"], **more}))


def of_compressed(*groups: tuple[str, str]) -> Scheme:
    made = {f"group_{i}": {"format": name, "targets": [target]} for i, (name, target) in enumerate(groups)}
    return compressed_tensors.scheme(fields({"config_groups": made, "ignore": ["lm_head"]}))


SCALES, CODES, ONE = ("F8_E4M3", (4, 4)), ("U8", (4, 32)), ("F32", ())
DENSE: dict[str, Tensor] = {"weight": ("BF16", (4, 64))}
NVFP4 = of_modelopt("NVFP4"), {"weight": CODES, "weight_scale": SCALES, "weight_scale_2": ONE}
MXFP4 = of_modelopt("mxfp4"), {"weight": CODES, "weight_scale": ("U8", (4, 2))}
SVD = of_modelopt("NVFP4_SVD")
FP8 = of_modelopt("FP8"), {"weight": ("F8_E4M3", (4, 64)), "weight_scale": ONE}
CT_NVFP4 = (
    of_compressed(("nvfp4-pack-quantized", "Linear")),
    {"weight_packed": CODES, "weight_scale": SCALES, "weight_global_scale": ("F32", (1,))},
)
CT_MXFP4 = (of_compressed(("mxfp4-pack-quantized", "Linear")), {"weight_packed": CODES, "weight_scale": ("U8", (4, 2))})
ALL = {"nvfp4": NVFP4, "mxfp4": MXFP4, "fp8": FP8, "ct-nvfp4": CT_NVFP4, "ct-mxfp4": CT_MXFP4}


def layer(scheme: Scheme, tensors: dict[str, Tensor | None]):
    held = hold(scheme, **{UP: tensors})
    assert not held.problems
    (found,) = held.layers.values()
    return found, held.others


@pytest.mark.parametrize("name", ALL)
def test_a_layer(name):
    scheme, tensors = ALL[name]
    found, others = layer(scheme, {**tensors, "bias": ("BF16", (4,)), "k_scale": ONE})
    size = {"nvfp4": 16, "ct-nvfp4": 16, "fp8": 0}.get(name, 32)
    assert (found.path, found.n, found.k, found.group) == (UP, 4, 64, size)
    assert found.storage is scheme.storage(UP) and found.entries.keys() == tensors.keys()
    assert found.format == {16: "NVFP4 group 16", 32: "MXFP4 group 32", 0: "FP8 E4M3"}[size]
    sizes = {"U8": 1, "F8_E4M3": 1, "F32": 4}
    assert found.nbytes == sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors.values())
    assert others.keys() == {f"{UP}.bias", f"{UP}.k_scale"}


@pytest.mark.parametrize(
    "made, changes, kept",
    [
        (NVFP4, {"input_scale": ONE, "pre_quant_scale": ("BF16", (64,))}, True),
        (NVFP4, {"weight_scale_2": ("F32", (1,)), "input_scale": ("F32", (1,))}, True),
        (NVFP4, {"weight_scale": ("F8_E4M3", (4, 2))}, True),  # the config does not say its group size
        (MXFP4, {"weight_scale": ("F8_E8M0", (4, 2)), "input_scale": ONE}, True),
        (FP8, {"weight_scale": ("BF16", (4, 1)), "input_scale": ONE}, True),
        (FP8, {"weight_scale": ("F16", (4,))}, True),
        (CT_NVFP4, {"input_global_scale": ("F32", (1,)), "weight_global_scale": ONE}, True),
        (NVFP4, {"v_scale": ONE, "q_scale": ONE, "bias": ("F32", (4,))}, False),
    ],
)
def test_tensors_that_may_differ_or_be_there(made, changes, kept):
    found, others = layer(made[0], {**made[1], **changes})
    assert all((leaf in found.entries) == kept and (f"{UP}.{leaf}" in others) != kept for leaf in changes)


MISSING = [(name, leaf) for name, (_, tensors) in ALL.items() for leaf in tensors]
LABELS = {
    "nvfp4": "ModelOpt NVFP4", "mxfp4": "ModelOpt MXFP4", "fp8": "ModelOpt FP8",
    "ct-nvfp4": "compressed-tensors nvfp4-pack-quantized", "ct-mxfp4": "compressed-tensors mxfp4-pack-quantized",
}  # fmt: skip


@pytest.mark.parametrize("name, leaf", MISSING)
def test_a_missing_tensor(name, leaf):
    scheme, tensors = ALL[name]
    beside = ", ".join(sorted({*tensors, "bias"} - {leaf}))
    also = ", also called weight_scale_inv" if (name, leaf) == ("fp8", "weight_scale") else ""
    assert problem(scheme, {**tensors, "bias": ("BF16", (4,)), leaf: None}) == (
        f"x.safetensors: {UP}.{leaf}: found no such tensor beside {beside}, expected one ({LABELS[name]}{also})"
    )


@pytest.mark.parametrize("dtype", ["U8", "I8", "F4", "F8_E4M3"])
def test_packed_bytes_without_a_scale(dtype):
    leaf = "weight_scale" if dtype == "U8" else "weight"
    assert problem(NVFP4[0], {"weight": (dtype, (4, 32))}).startswith(f"x.safetensors: {UP}.{leaf}: found ")


def test_the_file_of_a_problem_is_that_of_the_tensor_or_of_one_beside_it():
    entries = {f"{UP}.{leaf}": Entry(Path(f"{leaf}.x"), *tensor) for leaf, tensor in NVFP4[1].items()}
    entries[f"{UP}.weight_scale"] = Entry(Path("other.x"), "U8", (4, 4))
    (found,) = contents(entries, NVFP4[0]).problems
    assert (found.file, found.tensor) == ("other.x", f"{UP}.weight_scale")
    del entries[f"{UP}.weight_scale"]
    (found,) = contents(entries, NVFP4[0]).problems
    assert (found.file, found.tensor) == ("weight.x", f"{UP}.weight_scale")


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale"])
@pytest.mark.parametrize("name", ALL)
def test_a_dense_weight_beside_what_is_left_of_a_packed_one(name, leaf):
    assert problem(ALL[name][0], {**DENSE, leaf: SCALES}).startswith(f"x.safetensors: {UP}.weight")


@pytest.mark.parametrize(
    "made, leaf, tensor, expected",
    [
        (NVFP4, "weight", ("I8", (4, 32)), "dtype U8"), (NVFP4, "weight_scale", ("U8", (4, 4)), "dtype F8_E4M3"),
        (NVFP4, "weight_scale", ("BF16", (4, 4)), "dtype F8_E4M3"),
        (NVFP4, "weight_scale_2", ("F64", ()), "dtype F32 or BF16 or F16"),
        (NVFP4, "input_scale", ("U8", ()), "dtype F32 or BF16 or F16"),
        (NVFP4, "pre_quant_scale", ("F8_E4M3", (64,)), "dtype F32 or BF16 or F16"),
        (MXFP4, "weight_scale", ("F8_E4M3", (4, 2)), "dtype U8 or F8_E8M0"),
        (FP8, "weight", ("U8", (4, 64)), "dtype F8_E4M3"),
        (FP8, "weight_scale", ("F8_E4M3", (4,)), "dtype F32 or BF16 or F16"),
        (CT_NVFP4, "weight_packed", ("I32", (4, 8)), "dtype U8"),
        (CT_NVFP4, "weight_global_scale", ("I32", (1,)), "dtype F32 or BF16 or F16"),
        (NVFP4, "weight_scale_2", ("F32", (4,)), "one element"), (NVFP4, "input_scale", ("F32", (0,)), "one element"),
        (NVFP4, "pre_quant_scale", ("BF16", (4,)), "shape [64]"),
        (NVFP4, "weight_scale", ("F8_E4M3", (3, 4)), "shape [4, 4]"),
        (NVFP4, "weight_scale", ("F8_E4M3", (4, 3)), "[n, k / 16 or 32] for codes U8 [4, 32]"),
        (NVFP4, "weight_scale", ("F8_E4M3", (16,)), "[n, k / 16 or 32] for codes U8 [4, 32]"),
        (MXFP4, "weight_scale", ("U8", (4, 4)), "[n, k / 32] for codes U8 [4, 32]"),
        (FP8, "weight_scale", ("F32", (64,)), "shape [4]"), (FP8, "input_scale", ("F32", (4,)), "one element"),
        (CT_NVFP4, "weight_scale", ("F8_E4M3", (4, 2)), "[n, k / 16] for codes U8 [4, 32]"),
        (NVFP4, "weight_global_scale", ONE, "no such tensor in ModelOpt NVFP4"),
        (NVFP4, "weight_zero_point", ("U8", (4, 4)), "no such tensor in ModelOpt NVFP4"),
        (MXFP4, "weight_scale_2", ONE, "no such tensor in ModelOpt MXFP4"),
        (FP8, "weight_scale_2", ONE, "no such tensor in ModelOpt FP8"),
        (CT_NVFP4, "weight", ("BF16", (4, 64)), "no such tensor in compressed-tensors nvfp4-pack-quantized"),
        (CT_NVFP4, "pre_quant_scale", ("BF16", (64,)), "no such tensor in compressed-tensors nvfp4-pack-quantized"),
        (CT_MXFP4, "weight_global_scale", ONE, "no such tensor in compressed-tensors mxfp4-pack-quantized"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_belong(made, leaf, tensor, expected):
    found = f"{tensor[0]} {list(tensor[1])}"
    assert problem(made[0], {**made[1], leaf: tensor}) == (
        f"x.safetensors: {UP}.{leaf}: found {found}, expected {expected}"
    )


def test_codes_that_are_no_matrix():
    tensors = {**FP8[1], "weight": ("F8_E4M3", (64,))}
    assert problem(FP8[0], tensors) == (
        f"x.safetensors: {UP}.weight_scale: found F32 [], expected a scale for the weight or for each row for codes "
        "F8_E4M3 [64]"
    )


def test_dense_layers_are_others():
    tensors = {UP: DENSE, "model.norm": {"weight": ("BF16", (64,))}, "lm_head": DENSE}
    for scheme, _ in ALL.values():
        held = hold(scheme, **tensors)
        assert not held.layers and not held.problems and held.others.keys() == {f"{path}.weight" for path in tensors}


def test_a_name_without_a_path():
    entry = Entry(Path("x.safetensors"), "F32", ())
    assert contents({"scale": entry, "weight_scale": entry}, CT_NVFP4[0]).others["scale"] is entry


# FP4 tensors where the config says that there are none

MIXED = of_modelopt("MIXED_PRECISION", quantized_layers={"other": {"quant_algo": "NVFP4"}})
SHARED = of_compressed(("nvfp4-pack-quantized", "re:.*down"), ("float-quantized", "re:.*attn"))


@pytest.mark.parametrize(
    "scheme, tensors, path, leaf, why",
    [
        (NVFP4[0], NVFP4[1], "lm_head", "weight", "ignored by 'lm_head'"),
        (FP8[0], FP8[1], "lm_head", "weight", "ignored by 'lm_head'"),
        (NVFP4[0], FP8[1], "lm_head", "weight", "ignored by 'lm_head'"),
        (CT_NVFP4[0], CT_NVFP4[1], "lm_head", "weight_packed", "ignored by 'lm_head'"),
        (SHARED, CT_NVFP4[1], "lm_head", "weight_packed", "ignored by 'lm_head'"),
        (MIXED, NVFP4[1], UP, "weight", "not among the quantised layers"),
        (MIXED, FP8[1], UP, "weight", "not among the quantised layers"),
        (of_compressed(("mxfp4-pack-quantized", "x")), CT_MXFP4[1], UP, "weight_packed",
         "not among the quantised layers"),
    ],
)  # fmt: skip
def test_packed_tensors_that_the_config_does_not_know(scheme, tensors, path, leaf, why):
    """A whole weight is loaded as it is stored; what is left of one is not."""
    held = hold(scheme, **{path: {**tensors, "bias": ("BF16", (4,))}})
    (found,) = held.layers.values()
    assert (found.path, found.n, found.k) == (path, 4, 64) and found.entries.keys() == tensors.keys()
    assert not held.problems and held.others.keys() == {f"{path}.bias"}
    assert held.notes == (f"{path}: {found.format} as stored, though the config says it is {why}",)
    shown = f"{tensors[leaf][0]} {list(tensors[leaf][1])}"
    for lost in tensors.keys() - {leaf}:
        expected = f"expected a dense weight: the config says it is {why}"
        assert problem(scheme, {**tensors, lost: None}, path) == (
            f"x.safetensors: {path}.{leaf}: found {shown}, {expected}"
        )


@pytest.mark.parametrize(
    "scheme, tensors, stored, said",
    [
        (NVFP4[0], MXFP4[1], "MXFP4 group 32", "ModelOpt NVFP4"),
        (MXFP4[0], NVFP4[1], "NVFP4 group 16", "ModelOpt MXFP4"),
        (NVFP4[0], FP8[1], "FP8 E4M3", "ModelOpt NVFP4"), (FP8[0], NVFP4[1], "NVFP4 group 16", "ModelOpt FP8"),
        (of_modelopt("NVFP4", group_size=16), {**NVFP4[1], "weight_scale": ("F8_E4M3", (4, 2))}, "FP4 e4m3 group 32",
         "ModelOpt NVFP4"),
        (FP8[0], {"weight": ("F8_E4M3", (4, 64)), "weight_scale": ("U8", (4, 2))}, "MXFP8", "ModelOpt FP8"),
        (NVFP4[0], {"weight": ("F8_E4M3", (4, 256)), "weight_scale_inv": ("F32", (1, 2))},
         "FP8 E4M3 in blocks of 128 x 128", "ModelOpt NVFP4"),
        (of_compressed(("nvfp4-pack-quantized", "re:.*mlp"), ("mxfp4-pack-quantized", "x")), CT_MXFP4[1],
         "MXFP4 group 32", "compressed-tensors nvfp4-pack-quantized"),
    ],
)  # fmt: skip
def test_another_format_than_the_config_says_is_loaded_with_a_note(scheme, tensors, stored, said):
    held = hold(scheme, **{UP: tensors, f"{UP}2": tensors})
    assert [one.format for one in held.layers.values()] == [stored] * 2 and not held.problems
    assert held.notes == (f"{UP} and 1 more: {stored} as stored, though the config says it is {said}",)


A, B = "svdquant_lora_a", "svdquant_lora_b"
IN_QUANTIZER = {leaf: f"weight_quantizer._{leaf}" for leaf in (A, B)}  # as ModelOpt exports models of transformers
PAIR = {A: ("BF16", (8, 64)), B: ("BF16", (4, 8))}


@pytest.mark.parametrize("names", [{A: A, B: B}, IN_QUANTIZER], ids=["diffusers", "transformers"])
def test_a_low_rank_part(names):
    pair = {names[leaf]: tensor for leaf, tensor in PAIR.items()}
    found, others = layer(SVD, {**NVFP4[1], **pair, "pre_quant_scale": ("BF16", (64,))})
    assert set(pair) < set(found.entries) and not others and found.has("low rank a") and found.has("low rank b")
    assert {found.name(leaf) for leaf in pair} == {f"{UP}.{leaf}" for leaf in pair}
    for one in pair:  # nothing else knows of it
        assert problem(NVFP4[0], {**NVFP4[1], one: pair[one]}).endswith("expected no such tensor in ModelOpt NVFP4")


@pytest.mark.parametrize(
    "changes, leaf, said",
    [
        ({A: None}, A, f"found no such tensor beside {B}, expected one (ModelOpt NVFP4_SVD)"),
        ({B: None}, B, f"found no such tensor beside {A}, expected one (ModelOpt NVFP4_SVD)"),
        ({B: ("BF16", (4, 7))}, B, "found BF16 [4, 7], expected shape [4, 8]"),
        ({A: ("BF16", (8, 32))}, A, "found BF16 [8, 32], expected shape [8, 64]"),
        ({A: ("BF16", (64,))}, A, "found BF16 [64], expected shape [64, 64]"),
        ({A: ("BF16", ())}, A, "found BF16 [], expected shape [any, 64]"),
        ({B: ("U8", (4, 8))}, B, "found U8 [4, 8], expected dtype F32 or BF16 or F16"),
    ],
)
def test_a_low_rank_part_that_is_wrong(changes, leaf, said):
    assert problem(SVD, {**NVFP4[1], **PAIR, **changes}) == f"x.safetensors: {UP}.{leaf}: {said}"


def test_a_path_that_is_named_goes_before_what_is_ignored():
    named = {UP: {"quant_algo": "NVFP4", "group_size": 16}}
    scheme = of_modelopt("MIXED_PRECISION", quantized_layers=named, ignore=[UP, "*.mlp*", "lm_head"])
    assert layer(scheme, NVFP4[1])[0].storage is scheme.targets[UP]
    assert hold(scheme, **{UP: NVFP4[1]}).notes == ()
    groups = {"g": {"format": "nvfp4-pack-quantized", "targets": [UP]}}
    scheme = compressed_tensors.scheme(fields({"config_groups": groups, "ignore": ["re:.*mlp", UP]}))
    assert layer(scheme, CT_NVFP4[1])[0].format == "NVFP4 group 16" and hold(scheme, **{UP: CT_NVFP4[1]}).notes == ()


@pytest.mark.parametrize("dtype", ["I32", "U8", "F8_E4M3"])
def test_what_compressed_tensors_loads_itself_is_left(dtype):
    of_its = {"weight_packed": (dtype, (4, 8)), "weight_scale": ("BF16", (4, 1))}
    held = hold(SHARED, **{"model.layers.0.self_attn.q_proj": of_its})
    assert not held.layers and not held.problems and len(held.others) == 2
    expected = "expected a dense weight: the config says it is not among the quantised layers"
    for path in (UP, "lm_head") if dtype != "I32" else ():  # in no group of its
        assert expected.replace("not among", "ignored by 'lm_head'" if path == "lm_head" else "not among")[:60] in (
            problem(SHARED, of_its, path)
        )


# Experts

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


# What several layers share


def test_a_reason_that_many_layers_share_is_told_once():
    paths = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    held = hold(of_modelopt("NVFP4_NEW"), **dict.fromkeys(paths, NVFP4[1]), **{"model.norm": DENSE})
    assert held.problems == (Problem(None, f"{paths[0]} and 2 more", "ModelOpt's NVFP4_NEW", f"one of {NAMES}"),)
    assert str(held.problems[0]) == f"{paths[0]} and 2 more: found ModelOpt's NVFP4_NEW, expected one of {NAMES}"
    assert not held.layers and len(held.others) == 10
    two = hold(of_modelopt("NVFP4_NEW"), a=NVFP4[1], b=NVFP4[1])
    assert [problem.tensor for problem in two.problems] == ["a and 1 more"]


def test_right_layers_stand_beside_wrong_ones():
    wrong = {**NVFP4[1], "weight_scale": None}
    held = hold(NVFP4[0], a=wrong, b=NVFP4[1], c=wrong)
    assert held.layers.keys() == {"b"} and [p.tensor for p in held.problems] == ["a.weight_scale", "c.weight_scale"]
    assert {name[0] for name in held.others} == {"a", "c"}


# What the producers write

GROUP16, GROUP32, MX, E4M3 = "NVFP4 group 16", "FP4 e4m3 group 32", "MXFP4 group 32", "FP8 E4M3"
HELD = {
    "modelopt-group32": {GROUP32: 14}, "modelopt-head": {GROUP16: 15}, "modelopt-mlp": {GROUP16: 6},
    "modelopt-mixed": {GROUP16: 5, E4M3: 8}, "modelopt-mixed-fp4": {GROUP16: 9, GROUP32: 1},
    "modelopt-mxfp4": {MX: 14}, "modelopt-w4a8-nvfp4": {GROUP32: 14},
    "modelopt-w4a8-mxfp4": {MX: 14}, "modelopt-fp8": {E4M3: 14}, "ct-mxfp4a16": {MX: 14}, "ct-mxfp4": {MX: 14},
    "ct-mxfp4-fp8": {MX: 14}, "ct-head": {GROUP16: 15}, "ct-embedding": {GROUP16: 15}, "ct-ignore-names": {GROUP16: 5},
    "ct-ignore-patterns": {GROUP16: 5}, "ct-target-names": {GROUP16: 2}, "ct-nvfp4-mxfp4": {GROUP16: 6, MX: 8},
    "ct-nvfp4-fp8": {GROUP16: 6}, "ct-fp8": {}, "modelopt-nemotron": {GROUP16: 20, E4M3: 2},
    "modelopt-nemotron-0.47": {GROUP16: 20, E4M3: 2}, "gpt-oss": {MX: 4},
    **{name: {MX: 24} for name in FORMATS if name.startswith("deepseek")},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_of_a_producer(name):
    folder = written(name, FORMATS[name].family)
    _, config = files.quantization_of(folder)
    readers = {
        "modelopt": modelopt.scheme, "compressed-tensors": compressed_tensors.scheme, "mxfp4": gpt_oss.scheme,
        "fp8": deepseek.scheme,
    }  # fmt: skip
    scheme = readers[config["quant_method"]](fields(config))
    held = contents(files.entries(files.files_of(folder)), scheme)
    assert Counter(layer.format for layer in held.layers.values()) == HELD.get(name, {GROUP16: 14})
    assert not held.problems and not held.notes
    assert bool(scheme.notes) == ("kv" in name)
    if name.startswith("deepseek"):
        assert deepseek.is_fp4(fields(config), fields(files.model_config_of(folder)))
    if (folder / files.HF_QUANT_CONFIG).exists():  # both of its configs say the same
        other = modelopt.scheme(fields(files.read_json(folder / files.HF_QUANT_CONFIG)))
        assert (other.algorithm, other.ignore, other.notes) == (scheme.algorithm, scheme.ignore, scheme.notes)
        assert contents(files.entries(files.files_of(folder)), other).layers.keys() == held.layers.keys()
