"""Tensors held against a scheme: what is a layer, what is not its, what is wrong."""

import math
from collections import Counter
from pathlib import Path

import pytest

from checkpoints.formats import FORMATS, written
from checkpoints.headers import (
    ALL,
    CT_MXFP4,
    CT_NVFP4,
    DENSE,
    FP8,
    MXFP4,
    NVFP4,
    ONE,
    SCALES,
    SVD,
    UP,
    fields,
    hold,
    layer,
    of_modelopt,
    problem,
)
from marlin_w4a16.checkpoints import compressed_tensors, deepseek, files, gpt_oss, modelopt
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Problem, contents

NAMES = ", ".join([*modelopt.FP4_ALGORITHMS, *modelopt.FP8_ALGORITHMS])


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
        (NVFP4, {"v_bias": ("BF16", (1, 2, 1, 24)), "k_bias": ("BF16", (1, 2, 1, 24))}, False),
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


# What several layers share


def test_a_reason_that_many_layers_share_is_told_once():
    paths = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    held = hold(of_modelopt("NVFP4_NEW"), **dict.fromkeys(paths, NVFP4[1]), **{"model.norm": DENSE})
    where, what = "config.json: quantization_config", f"{paths[0]} and 2 more"
    assert held.problems == (Problem(where, what, "ModelOpt's NVFP4_NEW", f"one of {NAMES}"),)
    assert str(held.problems[0]) == f"{where}: {what}: found ModelOpt's NVFP4_NEW, expected one of {NAMES}"
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
