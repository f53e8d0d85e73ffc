"""What a model needs and no file holds is a problem, whatever it is; what it does not need is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from hf.by_hand import SMALL, Written
from hf.loading import read
from marlin_w4a16.hf import CheckpointError, report

UP = "model.layers.0.mlp.up_proj"
GATE = "model.layers.0.mlp.gate_proj.weight"
FLOATS = "dtype F64 or F32 or BF16 or F16"
UNSAID = "a dense weight: the config says it is not among the quantised layers"
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


def llama(**choices: object) -> Written:
    made = Written(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SMALL, **choices}))
    made.linear(UP, UP)
    return made


def mixture() -> Written:
    """Dense experts one by one, beside a linear in FP4."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    made = Written(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**SMALL, **sizes))
    made.linear("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj")
    for i in range(2):
        path = f"model.layers.{i}.mlp.experts"
        both, down = (made.tensors.pop(f"{path}.{leaf}") for leaf in ("gate_up_proj", "down_proj"))
        for number in range(4):
            parts = (*both[number].chunk(2), down[number])
            for name, part in zip(("gate", "up", "down"), parts, strict=True):
                made.tensors[f"{path}.{number}.{name}_proj.weight"] = part.contiguous()
    return made


def problems(made: Written, folder: Path) -> list[str]:
    made.save(folder)
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        read(folder)
    return [line.strip() for line in str(caught.value).split("\n")[1:]]


def none(shape: list[int]) -> str:
    return f"found no such tensor in any file, expected one of shape {shape}"


@pytest.mark.parametrize("make", [llama, mixture])
def test_a_whole_checkpoint(make, tmp_path):
    made = make()
    made.save(tmp_path)
    model = read(tmp_path)
    with torch.no_grad():
        tokens = torch.arange(3, 19).view(2, 8)
        assert torch.allclose(model(tokens).logits, made.model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not report(model).notes


@pytest.mark.parametrize("name, shape", [(NORM, [64]), (EMBEDDING, [64, 64]), (HEAD, [64, 64])])
def test_a_dense_tensor(name, shape, tmp_path):
    made = llama()
    del made.tensors[name]
    assert problems(made, tmp_path) == [f"{name}: {none(shape)}"]


def test_many_are_one_line(tmp_path):
    made = llama()
    for i in range(2):
        del (
            made.tensors[f"model.layers.{i}.input_layernorm.weight"],
            made.tensors[f"model.layers.{i}.mlp.gate_proj.weight"],
        )
    assert problems(made, tmp_path) == [
        f"model.layers.{{0..1}}.mlp.gate_proj.weight: {none([64, 64])} (2 times)",
        f"model.layers.{{0..1}}.input_layernorm.weight: {none([64])} (2 times)",
    ]


def test_one_of_two_that_are_tied_is_enough(tmp_path):
    for lost in (EMBEDDING, HEAD):
        made = llama(tie_word_embeddings=True)
        del made.tensors[lost]
        made.save(tmp_path)
        model = read(tmp_path)
        assert torch.equal(model.get_input_embeddings().weight, model.lm_head.weight)
    del made.tensors[EMBEDDING]
    assert f"{EMBEDDING}: {none([64, 64])}" in problems(made, tmp_path)


@pytest.mark.parametrize(
    "name, tensor, problem",
    [
        (NORM, torch.ones(63), "found shape [63], expected [64], as the model has"),
        (EMBEDDING, torch.ones(65, 64), "found shape [65, 64], expected [64, 64], as the model has"),
        (GATE, torch.ones(64, 32), "found shape [64, 32], expected [64, 64], as the model has"),
        (NORM, torch.ones(64, dtype=torch.int32), f"found I32 [64], expected {FLOATS}"),
        (EMBEDDING, torch.ones(64, 64, dtype=torch.int64), f"found I64 [64, 64], expected {FLOATS}"),
        (NORM, torch.ones(64).to(torch.float8_e5m2), f"found F8_E5M2 [64], expected {FLOATS}"),
        (NORM, torch.ones(64, dtype=torch.uint8), f"found U8 [64], expected {UNSAID}"),
        (GATE, torch.ones(64, 64).to(torch.float8_e4m3fn), f"found F8_E4M3 [64, 64], expected {UNSAID}"),
    ],
)  # fmt: skip
def test_a_dense_tensor_of_another_look(name, tensor, problem, tmp_path):
    made = llama()
    made.tensors[name] = tensor
    assert problems(made, tmp_path) == [f"model.safetensors: {name}: {problem}"]


EXPERT = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda t: t.pop(f"{EXPERT}.up_proj.weight"), "model.layers.1.mlp.experts.gate_up_proj: found "),
        (lambda t: t.update({f"{EXPERT}.down_proj.weight": torch.ones(64, 31)}),
         "model.layers.1.mlp.experts.down_proj: found "),
        (lambda t: [t.pop(name) for name in [*t] if "layers.1.mlp.experts" in name and "down_proj" in name],
         f"model.layers.1.mlp.experts.down_proj: {none([4, 64, 32])}"),
        (lambda t: [t.pop(name) for name in [*t] if "layers.1.mlp.experts.3" in name],
         "shape [3, 64, 64], expected [4, 64, 64], as the model has"),
    ],
)  # fmt: skip
def test_dense_experts_one_by_one(change: Callable[[dict], object], problem, tmp_path):
    made = mixture()
    change(made.tensors)
    assert any(problem in line for line in problems(made, tmp_path))


def test_a_linear_that_is_dense_though_the_config_says_it_is_fp4(tmp_path):
    made = llama()
    made.packed["model.layers.1.mlp.up_proj"] = "W4A16_NVFP4"
    made.save(tmp_path)
    (note,) = report(read(tmp_path)).notes
    assert (
        note
        == "model.layers.1.mlp.up_proj: dense in the files, though the config says they are FP4; loaded as they are"
    )
