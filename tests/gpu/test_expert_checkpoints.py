"""Checkpoints of mixtures of experts on a GPU: values, memory of loading, offloading, saving."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

from checkpoints.formats import written  # noqa: E402
from hf.dense import dense, relative, tensors_of  # noqa: E402
from hf.loading import logits, prompts, read, routed, routing, same  # noqa: E402
from marlin_w4a16.hf.experts.modules import CheckpointExperts  # noqa: E402
from marlin_w4a16.tensors import held_tensors  # noqa: E402

pytestmark = pytest.mark.gpu
SLACK = 64 << 20
CASES = [
    ("gpt-oss", "gptoss"), ("deepseek-v4", "deepseekv4"), ("ct-nvfp4a16", "qwen3moe"), ("ct-mxfp4a16", "mixtral"),
    ("modelopt-nemotron", "nemotronh"),
]  # fmt: skip
every_case = pytest.mark.parametrize("name, family", CASES)


def load(folder, **choices):
    return read(folder, **{"device_map": "cuda", **choices})


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, CheckpointExperts)]


@every_case
def test_logits_are_those_of_the_decoded_model(name, family):
    folder, tokens = written(name, family), prompts().cuda()
    truth, model = logits(dense(folder, torch.float32).cuda(), tokens), load(folder, dtype=torch.float32)
    assert len(experts_of(model)) == 2 and all(e.w13.words.is_cuda for e in experts_of(model))
    assert relative(logits(model, tokens), truth) <= 1e-5
    plain, found = dense(folder, torch.bfloat16).cuda(), load(folder, dtype=torch.bfloat16)
    dtypes = {path: parameter.dtype for path, parameter in found.named_parameters()}
    for path, parameter in plain.named_parameters():  # what transformers keeps in float32 depends on its version
        parameter.data = parameter.data.to(dtypes.get(path, parameter.dtype))
    choices = {path: tuple(t.cuda() for t in pair) for path, pair in routing(name, family).items()}
    with routed(plain, choices), routed(found, choices):
        plain, found = logits(plain, tokens), logits(found, tokens)
    assert relative(found, truth) <= 1.1 * relative(plain, truth) + 1e-3


@every_case
def test_a_loaded_model_is_saved_as_it_was_stored(name, family, tmp_path):
    folder = written(name, family)
    load(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    before, after = tensors_of(folder), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert [n for n in before if n.endswith(("_blocks", "_scales", "scale", "scale_2", "weight_packed"))]
    assert [n for n, tensor in before.items() if tensor.dtype == after[n].dtype and not same(after[n], tensor)] == []


def test_experts_that_a_device_map_puts_on_the_cpu_come_over(tmp_path):
    folder, tokens = written("gpt-oss", "gptoss"), prompts().cuda()
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    model = load(folder, dtype=torch.bfloat16, device_map={**dict.fromkeys(parts, 0), "model.layers.1": "cpu"})
    assert [e.w13.words.device.type for e in experts_of(model)] == ["cuda", "cpu"]
    found = logits(model, tokens)
    assert found.is_cuda and torch.equal(found, logits(load(folder, dtype=torch.bfloat16), tokens))
    model.save_pretrained(tmp_path)
    before, after = tensors_of(folder), tensors_of(tmp_path)
    assert [n for n in before if "experts" in n and "bias" not in n and not same(after[n], before[n])] == []


def test_loading_takes_the_packed_model_one_stack_and_64_mb(tmp_path):
    """Experts of gpt-oss-20b, in two layers."""
    config = transformers.GptOssConfig(
        vocab_size=512, hidden_size=2880, intermediate_size=2880, num_hidden_layers=2, num_local_experts=32,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    state = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, k, n = parameter.shape
            state[f"{name}_blocks"] = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
            state[f"{name}_scales"] = torch.full((experts, n, k // 32), 119, dtype=torch.uint8)
        else:
            state[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config.quantization_config = {"quant_method": "mxfp4"}
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(tmp_path)
    largest = max(tensor.nbytes for tensor in state.values())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    model = load(tmp_path)
    held = sum(tensor.nbytes for tensor in held_tensors(model))
    assert torch.cuda.max_memory_allocated() - start <= held + largest + SLACK
    assert held <= 1.2 * sum(tensor.nbytes for tensor in state.values())
