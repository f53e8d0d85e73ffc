"""What `inspect` tells of experts."""

import pytest

from checkpoints import damage
from checkpoints.formats import write, written
from marlin_w4a16.cli.inspection import Inspection, Line, inspect


def outcomes(found: Inspection) -> set[str]:
    return {one.outcome for one in found.lines}


def experts(found: Inspection) -> dict[str, Line]:
    return {one.path: one for one in found.lines if ".experts." in one.path}


def test_projections_of_experts_are_packed_and_told_as_one():
    found = inspect(written("ct-nvfp4", "qwen3moe"))
    told = experts(found)
    assert list(told) == [f"model.layers.{{0..1}}.mlp.experts.{{0..3}}.{part}_proj" for part in ("down", "gate", "up")]
    stored, packed = 8 * (96 * 48 + 96 * 6 + 4 + 4), 8 * (2 * 2 * (2048 + 256) + 4 * 96 + 4 + 4)
    for path, one in told.items():
        assert one == Line(path, 8, (96, 96), "NVFP4 group 16", "packed", None, stored, packed, 8 * 96 * 96 * 2)
    assert found.formats == {"NVFP4 group 16": 8 + 24} and not found.problems


def test_stacks_of_gpt_oss_are_their_experts():
    found = inspect(written("gpt-oss", "gptoss"), values=True)
    up, up_bias = (f"model.layers.{{0..1}}.mlp.experts.gate_up_proj{end}" for end in ("", "_bias"))
    stored, packed = 2 * 4 * 320 * (48 + 3), 2 * 4 * (5 * 2 * (2048 + 128) + 4 * 320)
    told = experts(found)
    assert told[up] == Line(up, 2, (4, 320, 96), "MXFP4 group 32", "packed", None, stored, packed, 2 * 4 * 320 * 96 * 2)
    assert told[up_bias] == Line(up_bias, 2, (4, 320), "BF16", "dense", None, *[2 * 4 * 320 * 2] * 3)
    assert found.formats == {"MXFP4 group 32": 16} and found.totals["fp4_linears"] == 16
    assert (found.producer, found.algorithm, found.notes, found.problems) == ("OpenAI", "MXFP4", (), ())


@pytest.mark.parametrize("name, scale", [("deepseek-v4", 1), ("deepseek-v4.1", 1), ("deepseek-v4-inv", 4)])
def test_fp8_of_deepseek_is_left_to_transformers(name, scale):
    found, w1 = inspect(written(name, "deepseekv4"), values=True), "layers.{0..1}.ffn.experts.{0..3}.w1"
    stored, packed = 8 * 96 * (48 + 3 * scale), 8 * (2 * 2 * (2048 + 128) + 4 * 96)
    assert experts(found)[w1] == Line(
        w1, 8, (96, 96), "MXFP4 group 32", "packed", None, stored, packed, 8 * 96 * 96 * 2
    )
    (q,) = [one for one in found.lines if one.path == "layers.{0..1}.attn.wq_b"]
    held = 2 * (256 * 64 + 2 * scale)
    assert q == Line(q.path, 2, (256, 64), "F8_E4M3", "left", None, held, held, 2 * 256 * 64 * 2)
    assert outcomes(found) == {"packed", "left", "dense"} and found.formats == {"MXFP4 group 32": 24}
    assert (found.producer, found.notes, found.problems) == ("DeepSeek", (), ())


def test_fp8_without_fp4_experts_is_left_to_transformers(tmp_path):
    folder = write("deepseek-v4", "deepseekv4", tmp_path / "model")
    damage.configure_model(folder, expert_dtype="fp8")
    found = inspect(folder)
    assert (found.producer, found.layers) == ("fp8", ()) and outcomes(found) == {"left", "dense"}


def test_a_stack_that_is_wrong_is_refused(tmp_path):
    folder, name = write("gpt-oss", "gptoss", tmp_path / "model"), "model.layers.1.mlp.experts.down_proj_scales"
    damage.cut_columns(folder, name)
    found = inspect(folder)
    (problem,) = found.problems
    assert str(problem).startswith(f"model.safetensors: {name}: found U8 [4, 96, 4], expected [experts, n, k / 32]")
    assert (
        "refused" in outcomes(found)
        and found.totals["bytes"] == inspect(written("gpt-oss", "gptoss")).totals["bytes"] - 4 * 96
    )
