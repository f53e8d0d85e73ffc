"""Damaged experts raise before any weight is read, and it is said what is wrong."""

from pathlib import Path

import pytest

from checkpoints import damage
from hf.damaged import SINGLE, Damage, of_model

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
STACK = "model.layers.1.mlp.experts.down_proj"
OF_DEEPSEEK = "layers.1.ffn.experts.2.w3"


def of_expert(leaf: str) -> str:
    return f"{EXPERT}.{leaf}"


def without(path: str) -> Damage:
    """All tensors whose names begin so are missing."""

    def change(folder: Path) -> None:
        names = [name for name in damage.load_file(folder / SINGLE) if name.startswith(path)]
        assert names
        for name in names:
            damage.drop(folder, name)

    return change


def regrouped(folder: Path) -> None:
    """One expert has scales of groups of 32 (of which the other half is lost)."""
    damage.alter(folder, of_expert("weight_scale"), lambda t: t[:, ::2])


EXPERTS: list[tuple[str, str, Damage, str]] = [
    ("modelopt-w4a16", "qwen3moe", lambda f: damage.drop(f, of_expert("weight_scale")),
     f"{SINGLE}: {of_expert('weight_scale')}: found no such tensor beside weight, weight_scale_2, expected one ("),
    ("modelopt-w4a16", "qwen3moe", lambda f: damage.drop(f, of_expert("weight_scale_2")),
     f"{SINGLE}: {of_expert('weight_scale_2')}: found no such tensor beside weight, weight_scale, expected one ("),
    ("ct-nvfp4a16", "qwen3moe", lambda f: damage.drop(f, of_expert("weight_global_scale")),
     f"{SINGLE}: {of_expert('weight_global_scale')}: found no such tensor beside "),
    ("gpt-oss", "gptoss", lambda f: damage.drop(f, f"{STACK}_scales"),
     f"{SINGLE}: {STACK}_scales: found no such tensor beside blocks, expected one ("),
    ("deepseek-v4", "deepseekv4", lambda f: damage.drop(f, f"{OF_DEEPSEEK}.scale"),
     f"{SINGLE}: {OF_DEEPSEEK}.scale: found no such tensor beside weight, expected one ("),
    ("modelopt-w4a16", "qwen3moe", without("model.layers.1.mlp.experts.2."), "found no FP4 tensors of expert 2"),
    ("ct-mxfp4a16", "deepseekv3", without(EXPERT), "found no FP4 tensors of expert 2"),
    ("gpt-oss", "gptoss", without(STACK + "_"), f"{STACK}: found no such tensor in any file"),
    ("gpt-oss", "gptoss", lambda f: damage.drop(f, f"{STACK}_bias"), f"{STACK}_bias: found no such tensor"),
    ("gpt-oss", "gptoss", lambda f: damage.cut_columns(f, f"{STACK}_bias"),
     f"{SINGLE}: {STACK}_bias: found BF16 [4, 95], expected shape [4, 96]"),
    ("ct-nvfp4a16", "qwen3moe", regrouped, f"{of_expert('weight_scale')}: found F8_E4M3 [96, 3], expected "),
    ("modelopt-w4a16", "qwen3moe", lambda f: [damage.alter(f, of_expert(leaf), lambda t: t[32:])
                                              for leaf in ("weight", "weight_scale")],
     f"{EXPERT}: found NVFP4 group 16 of 64 x 96"),
    ("gpt-oss", "gptoss", lambda f: [damage.alter(f, f"{STACK}_{leaf}", lambda t: t[:3])
                                     for leaf in ("blocks", "scales")],
     f"{STACK}: found 3 experts of 96 x 160, expected 4 of 96 x 160, as the model has"),
    ("deepseek-v4", "deepseekv4", lambda f: damage.alter(f, f"{OF_DEEPSEEK}.scale", lambda t: t.float()),
     f"{SINGLE}: {OF_DEEPSEEK}"),
    ("modelopt-w4a16", "qwen3moe", lambda f: damage.not_a_number(f, of_expert("weight_scale")),
     f"{SINGLE}: {of_expert('weight_scale')}: found NaN (byte 0x7f) at [95, 5], expected finite e4m3 scales"),
    ("modelopt-w4a16", "qwen3moe", lambda f: damage.not_a_number(f, of_expert("weight_scale_2")),
     f"{SINGLE}: {of_expert('weight_scale_2')}: found nan, expected finite numbers"),
    ("gpt-oss", "gptoss", lambda f: damage.not_a_number(f, f"{STACK}_scales"),
     f"{SINGLE}: {STACK}_scales: found NaN (byte 0xff) at [3, 95, 4], expected finite e8m0 scales"),
    ("deepseek-v4-fp32", "deepseekv4", lambda f: damage.not_a_number(f, f"{OF_DEEPSEEK}.scale"),
     f"{SINGLE}: {OF_DEEPSEEK}.scale: found "),
    ("modelopt-w4a16", "qwen3moe", of_model(num_local_experts=5), "expected those of 5 experts, as the model has"),
    ("modelopt-w4a16", "qwen3moe", of_model(num_local_experts=3), "expected 3 experts, as the model has"),
    ("modelopt-w4a16", "qwen3moe", of_model(hidden_act="mish"),
     f"{SINGLE}: model.layers.{{0..1}}.mlp.experts: found experts that do not run as one op: what stands between the "
     "two products is no activation of the op: the nearest is silu(gate) * up: at gate "),
]  # fmt: skip


@pytest.mark.parametrize("name, family, change, problem", EXPERTS, ids=lambda v: v if isinstance(v, str) else "")
def test_experts_that_are_wrong(name, family, change, problem, damaged):
    assert problem in damaged(name, change, family=family)
