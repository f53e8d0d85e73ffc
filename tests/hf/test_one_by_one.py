"""Experts that files hold one by one, and linears that they hold in parts, where transformers has one parameter."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from hf.by_hand import SMALL, Written, fp8, nvfp4
from hf.dense import relative
from hf.loading import same
from marlin_w4a16 import PackedExperts, PackedLinear
from marlin_w4a16.hf import CheckpointError, report
from marlin_w4a16.hf.joined import FP8Parts

FILE = "model.safetensors"
PROJECTIONS, SHORT = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
TOKENS = torch.arange(3, 19).view(2, 8)


def granite() -> Written:
    config = transformers.GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    made = Written(transformers.GraniteMoeForCausalLM, config)
    for i in range(2):
        path = f"model.layers.{i}.block_sparse_moe.experts"
        made.experts(path, path, SHORT)
    return made


def gemma4(below: str = "") -> Written:
    of_experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    sizes = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    config = transformers.Gemma4TextConfig(**SMALL, **of_experts, **sizes, **layers)
    made = Written(transformers.Gemma4ForCausalLM, config)
    for i in range(2):
        made.experts(f"model.layers.{i}.experts", f"model.layers.{i}.{below}experts", PROJECTIONS)
    return made


def qwen3_vl_moe() -> Written:
    text = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
              "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    config = transformers.Qwen3VLMoeConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    made = Written(transformers.Qwen3VLMoeForConditionalGeneration, config)
    for i in range(2):
        path = f"model.language_model.layers.{i}.mlp.experts"
        made.experts(path, path, PROJECTIONS)
    return made


def minimax_m3() -> Written:
    """Its linears of gate and up are one in transformers, in a dense layer and in shared experts."""
    of_experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}
    sizes = {"dense_intermediate_size": 96, "shared_intermediate_size": 32, "rotary_dim": 8, "index_head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MiniMaxM3VLConfig(text_config={**SMALL, **of_experts, **sizes}, vision_config=vision)
    made = Written(transformers.MiniMaxM3SparseForConditionalGeneration, config)
    for path in ("layers.0.mlp", "layers.1.mlp.shared_experts"):
        published = path.replace("1.mlp", "1.block_sparse_moe")
        names = (f"language_model.model.{published}.{part}_proj" for part in ("gate", "up"))
        made.linear(f"model.language_model.{path}.gate_up_proj", *names)
    stored = "language_model.model.layers.1.block_sparse_moe.experts"
    made.experts("model.language_model.layers.1.mlp.experts", stored, SHORT)
    return made


MADE = {"granite": granite, "gemma4": gemma4, "gemma4-moe": partial(gemma4, "moe."), "qwen3-vl-moe": qwen3_vl_moe}


def load(folder: Path, made: Written, **options: Any) -> nn.Module:
    model, info = type(made.model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", MADE)
def test_experts_of_classes_with_stacks(name, tmp_path):
    made = MADE[name]()
    made.save(tmp_path / "before")
    model = load(tmp_path / "before", made)
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2 and not report(model).notes
    assert relative(logits(model), logits(made.model)) <= 1e-5
    model.save_pretrained(tmp_path / "after")
    found, before = (load_file(tmp_path / folder / FILE) for folder in ("after", "before"))
    packed = {key for key in before if key.rpartition(".")[0] in made.packed}
    assert packed <= found.keys() and all(same(found[key], before[key]) for key in packed)
    assert torch.equal(logits(load(tmp_path / "after", made)), logits(model))
    assert relative(logits(model.dequantize()), logits(made.model)) <= 1e-5
    assert not any(isinstance(module, PackedExperts) for module in model.modules())


@pytest.mark.parametrize(
    "lost, problem",
    [
        ("1.w3", "experts.gate_up_proj: found no FP4 tensors of expert 1 in any file, expected those of 4 experts"),
        ("3.w2", "experts.down_proj: found no FP4 tensors of expert 3 in any file, expected those of 4 experts"),
    ],
)
def test_an_expert_that_is_missing(lost, problem, tmp_path):
    made = granite()
    gone = f"model.layers.1.block_sparse_moe.experts.{lost}."
    made.tensors = {name: tensor for name, tensor in made.tensors.items() if not name.startswith(gone)}
    made.save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        load(tmp_path, made)
    (said,) = str(caught.value).split("\n")[1:]
    assert problem in said


@pytest.mark.parametrize(
    "change, found, expected",
    [
        (lambda made, path: made.drop(path), "NVFP4 group 16 of 96 x 64", "2 of one format, 192 x 64 in all"),
        (lambda made, path: made.store(path, "FP8_PB_WO", fp8(96, 64, (128, 128))[0]),
         "NVFP4 group 16 of 96 x 64 and FP8 E4M3 in blocks of 128 x 128 of 96 x 64", "2 of one format"),
        (lambda made, path: made.store(path, "W4A16_NVFP4", nvfp4(64, 64)),
         "NVFP4 group 16 of 96 x 64 and NVFP4 group 16 of 64 x 64", "192 x 64 in all, as model."),
    ],
)  # fmt: skip
def test_parts_that_make_no_linear(change, found, expected, tmp_path):
    made = minimax_m3()
    change(made, "language_model.model.layers.0.mlp.up_proj")
    made.save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        load(tmp_path, made)
    (said,) = str(caught.value).split("\n")[1:]
    assert f"found {found}, expected" in said and expected in said


def test_parts_in_fp8_are_dense_and_come_back(tmp_path):
    made = minimax_m3()
    weight = made.model.model.language_model.layers[0].mlp.gate_up_proj.weight
    for name, rows in (("gate", slice(96)), ("up", slice(96, None))):
        tensors, value = fp8(96, 64, (128, 128))
        weight.data[rows] = value.float()
        made.store(f"language_model.model.layers.0.mlp.{name}_proj", "FP8_PB_WO", tensors)
    made.save(tmp_path / "before")
    model = load(tmp_path / "before", made)
    module = model.model.language_model.layers[0].mlp.gate_up_proj
    assert isinstance(module, FP8Parts) and torch.equal(module.weight, weight)
    assert relative(logits(model), logits(made.model)) <= 1e-5
    model.save_pretrained(tmp_path / "after")
    found, before = (load_file(tmp_path / folder / FILE) for folder in ("after", "before"))
    packed = {key for key in before if key.rpartition(".")[0] in made.packed}
    assert packed <= found.keys() and all(same(found[key], before[key]) for key in packed)
    module.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight: found values that are no FP8 codes"):
        model.save_pretrained(tmp_path / "after")


def test_linears_that_files_hold_in_parts(tmp_path):
    made = minimax_m3()
    made.save(tmp_path / "before")
    model = load(tmp_path / "before", made)
    paths = ["layers.0.mlp.gate_up_proj", "layers.1.mlp.shared_experts.gate_up_proj"]
    assert [path for path, m in model.model.language_model.named_modules() if isinstance(m, PackedLinear)] == paths
    assert relative(logits(model), logits(made.model)) <= 1e-5 and not report(model).notes
    model.save_pretrained(tmp_path / "after")
    found, before = (load_file(tmp_path / folder / FILE) for folder in ("after", "before"))
    packed = {key for key in before if key.rpartition(".")[0] in made.packed}
    assert packed <= found.keys() and all(same(found[key], before[key]) for key in packed)
    assert torch.equal(logits(load(tmp_path / "after", made)), logits(model))
    linear = model.dequantize().model.language_model.get_submodule(paths[0])
    assert type(linear) is nn.Linear and torch.equal(
        linear.weight, made.model.get_submodule(f"model.language_model.{paths[0]}").weight
    )
