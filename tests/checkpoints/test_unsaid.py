"""Tensors that are stored otherwise than their config says: whole weights are layers, with a note."""

import pytest

from checkpoints.headers import (
    CT_MXFP4,
    CT_NVFP4,
    FP8,
    MXFP4,
    NVFP4,
    UP,
    fields,
    hold,
    layer,
    of_compressed,
    of_modelopt,
    problem,
)
from marlin_w4a16.checkpoints import compressed_tensors

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
