"""Checkpoints on a GPU: memory of loading, CUDA graphs in generate(), offloading, LoRA."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

transformers = pytest.importorskip("transformers")
import marlin_w4a16.hf  # noqa: E402
from marlin_w4a16.hf.linear import CheckpointLinear, StoredLinear  # noqa: E402
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4  # noqa: E402
from marlin_w4a16.tensors import held_tensors  # noqa: E402

pytestmark = pytest.mark.gpu
SLACK = 64 << 20


def write(folder, form, hidden=256, inner=512, layers=2, vocab=512):
    """A Llama as ModelOpt would write it; one shard a layer."""
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=2, max_position_embeddings=512, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).bfloat16()
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            weight = (quantize_nvfp4 if form == "nvfp4" else quantize_mxfp4)(module.weight.data)
            state[f"{path}.weight"] = weight.codes
            scale = torch.float8_e4m3fn if form == "nvfp4" else torch.uint8
            state[f"{path}.weight_scale"] = weight.scales.view(scale)
            if form == "nvfp4":
                state[f"{path}.weight_scale_2"] = weight.multiplier[0].clone()
    index = {name: f"{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors" for name in state}
    for file in set(index.values()):
        save_file({name: t for name, t in state.items() if index[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    values = {"quant_method": "modelopt", "quant_algo": form.upper(), "ignore": ["lm_head"]}
    values |= {"architectures": ["LlamaForCausalLM"], "quantization_config": values.copy()}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **values}))
    return folder


def load(folder, **choices):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"device_map": "cuda", **choices})


def held(model):
    return sum(tensor.nbytes for tensor in held_tensors(model))


def difference(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module", params=["nvfp4", "mxfp4"])
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def tokens():
    return torch.randint(0, 512, (2, 24), device="cuda", generator=torch.Generator("cuda").manual_seed(1))


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_loading_takes_the_packed_model_one_tensor_and_64_mb(form, tmp_path):
    write(tmp_path, form, hidden=4096, inner=14336, layers=3, vocab=1024)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    model, largest = load(tmp_path), 14336 * 4096 // 2
    assert torch.cuda.max_memory_allocated() - start <= held(model) + largest + SLACK
    dense = sum(p.numel() for n, p in load(tmp_path, quantization_config=dense_config()).named_parameters()) * 2
    assert held(model) < 0.35 * dense


def dense_config():
    return marlin_w4a16.hf.ModelOptConfig(dequantize=True)


@torch.no_grad()
def test_logits_are_those_of_the_decoded_model(folder, tokens):
    packed, dense = load(folder), load(folder, dtype=torch.float32, quantization_config=dense_config())
    assert sum(isinstance(m, CheckpointLinear) for m in packed.modules()) == 14
    reference = dense(tokens).logits
    rounded = load(folder, quantization_config=dense_config())(tokens).logits
    assert difference(packed(tokens).logits, reference) <= 1.1 * difference(rounded, reference) + 1e-3
    assert difference(load(folder, dtype=torch.float32)(tokens).logits, reference) <= 1e-5


@torch.no_grad()
def test_generate_decodes_in_cuda_graphs(folder, tokens):
    model = load(folder)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    choices = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    out = model.generate(tokens, cache_implementation="static", **choices)
    assert torch.equal(out, model.generate(tokens, cache_implementation="static", **choices))
    assert counters["stats"]["unique_graphs"] == 1 and counters["inductor"]["cudagraph_skips"] == 0
    logits = model(out).logits[:, tokens.shape[1] - 1 : -1].float()
    top = logits.topk(2).values
    sure = top[..., 0] - top[..., 1] > 0.05 * logits.abs().amax()
    assert sure.any() and torch.equal(logits.argmax(-1)[sure], out[:, tokens.shape[1] :][sure])


@torch.no_grad()
def test_offloaded_layers_are_packed_in_each_call(folder, tokens, tmp_path):
    everything = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], 0)
    model = load(folder, device_map={**everything, "model.layers.1": "cpu"})
    kinds = [type(m) for m in model.modules() if isinstance(m, CheckpointLinear | StoredLinear)]
    assert kinds.count(CheckpointLinear) == kinds.count(StoredLinear) == 7
    assert torch.equal(model(tokens).logits, load(folder)(tokens).logits)


def test_adapters_train_as_on_the_decoded_model(folder, tokens):
    peft = pytest.importorskip("peft")
    found = []
    for choices in ({}, {"quantization_config": dense_config()}):
        torch.manual_seed(0)
        model = load(folder, dtype=torch.float32, **choices)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
        adapted(tokens, labels=tokens).loss.backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 28
    for name, gradient in found[1].items():
        assert difference(found[0][name], gradient) <= 1e-4, name
