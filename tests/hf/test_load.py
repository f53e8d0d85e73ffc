"""from_pretrained: which linears are packed, and that everything else is what the files hold."""

import pytest
import torch
import transformers
from torch import nn

from checkpoints.formats import written
from checkpoints.names import renamed
from hf.by_hand import SMALL, Written
from hf.dense import relative, split, tensors_of
from hf.dense_experts import is_expert, unstacked
from hf.loading import (
    DTYPES,
    choosing,
    experts_of,
    kinds,
    linears,
    load,
    loaded,
    logits,
    model_type,
    reference,
    same,
    stored,
    upstream_keeps,
)
from hf.matrix import LEFT, LOAD, MIXTURES, OWN_HEADS, REFUSED, params
from marlin_w4a16 import PackedExperts, PackedLinear
from marlin_w4a16.hf import CheckpointError, report
from marlin_w4a16.hf.linear import DecodedLinear
from marlin_w4a16.modules.state import PackedState
from marlin_w4a16.tensors import held_tensors

CODES_AND_SCALES = ("weight", "weight_packed", "weight_scale", "weight_scale_inv", "scale")
BIASES = {"bias", "bias13", "bias2", "gate_up_proj_bias", "down_proj_bias"}


@pytest.mark.parametrize("name, family", params(LOAD.cases))
def test_layers_are_what_the_files_hold(name, family):
    model, info = load(name, family, output_loading_info=True)
    assert not any(info.values())
    expected = kinds(name, family)
    modules = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    dense = {path: type(m).__name__ for path, m in reference(name, family, torch.bfloat16).named_modules()}
    modules |= experts_of(model)
    kind_of = {path: type(m).__name__ for path, m in modules.items()}
    assert kind_of == {path: dense[path] for path in modules} | not_linear(expected, dense)
    assert model.dtype == torch.bfloat16 and not any(module.training for module in model.modules())
    for path, kind in expected.items():
        assert isinstance(modules[path], PackedLinear) == (kind == "CheckpointLinear")
        assert isinstance(modules[path], PackedExperts) == (kind == "CheckpointExperts")
    mine = {path for path in expected if kind_of[path] not in ("Linear", "DeepseekV4GroupedLinear")}
    for path in mine:
        assert {leaf for leaf, p in modules[path].named_parameters() if p.requires_grad} <= BIASES
    assert {layer.path for layer in report(model).layers} == mine
    packed = {layer.path for layer in report(model).layers if layer.outcome == "packed"}
    assert packed == {path for path, kind in expected.items() if kind.startswith("Checkpoint")}
    assert (name, family) != ("modelopt-nvfp4", "llama") or "model.layers.{0..1}.mlp.up_proj" in str(report(model))


def not_linear(expected, dense) -> dict:
    """Those that are no longer what the dense model has; a grouped linear that is dense stays what it is."""
    return {path: kind if kind != "Linear" else dense[path] for path, kind in expected.items()}


@pytest.mark.parametrize(
    "name, family, dtype",
    params((*case, dtype) for case in LOAD.cases for dtype in DTYPES if dtype != torch.float16 or case[1] == "llama"),
)
def test_small_tensors_are_kept_and_dense_ones_are_the_models(name, family, dtype):
    model, plain = loaded(name, family, dtype), reference(name, family, dtype).state_dict()
    held, modules = model.state_dict(), dict(model.named_modules())
    quantised = linears(name, family)
    for key, tensor in unstacked(stored(name, family)).items():
        key = renamed(key, model_type(name, family))
        path, leaf = split(key)
        if is_expert(path) or (quantised.get(path) == "Linear" and leaf in CODES_AND_SCALES):
            continue
        if path.endswith(".experts"):
            assert same(modules[path].biases()[leaf].detach(), tensor.to(plain[key].dtype))
        elif path not in quantised:
            if leaf not in ("k_scale", "v_scale"):  # of a cache: kept to be saved
                kept = tensor.dtype if upstream_keeps(name, dtype) else plain[key].dtype
                assert same(held[key], tensor.to(kept)), key
        elif leaf == "bias":
            assert same(modules[path].bias.detach(), tensor.to(dtype))
        elif leaf not in CODES_AND_SCALES and not leaf.startswith(("k_", "v_")):
            kept = getattr(modules[path], leaf.replace(".", "_")).detach()
            assert same(kept if quantised[path] == "CheckpointLinear" else kept.view(tensor.dtype).reshape(()), tensor)
    tied = model.config.tie_word_embeddings and "lm_head" not in quantised
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name, family", REFUSED)
def test_what_cannot_be_loaded_is_refused(name, family):
    with pytest.raises(CheckpointError) as raised:
        load(name, family)
    assert REFUSED[name, family] in str(raised.value) and str(written(name, family)) in str(raised.value)


class Reading(transformers.LlamaForCausalLM):
    """A model whose code reads the weight of its head."""

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return self.model(input_ids).last_hidden_state @ self.lm_head.weight.T


def test_a_weight_that_code_of_the_model_reads_is_decoded(tmp_path):
    made = Written(Reading, transformers.LlamaConfig(**SMALL))
    for path in ("lm_head", "model.layers.0.mlp.up_proj"):
        made.linear(path, path)
    made.save(tmp_path / "before")
    model, tokens = Reading.from_pretrained(tmp_path / "before").eval(), torch.arange(3, 19).view(2, 8)
    assert isinstance(model.lm_head, DecodedLinear) and isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert same(model.lm_head.weight.detach(), made.model.lm_head.weight.detach())
    with torch.no_grad():
        assert relative(model(tokens), made.model(tokens)) <= 1e-5
    (note,) = report(model).notes
    assert note == "lm_head: dense, since Reading.forward reads its weight, which is empty in a packed linear"
    assert {layer.path: layer.outcome for layer in report(model).layers}["lm_head"] == "dense, its weight is read"
    model.save_pretrained(tmp_path / "after")
    before, after = (tensors_of(tmp_path / name) for name in ("before", "after"))
    assert before.keys() == after.keys() and all(same(after[key], tensor) for key, tensor in before.items())
    model.lm_head.weight.data[0] += 1
    with pytest.raises(CheckpointError, match=r"^lm_head\.weight: found values that were changed"):
        model.save_pretrained(tmp_path / "after")
    assert type(model.dequantize().lm_head) is nn.Linear


@pytest.mark.parametrize("name, family", MIXTURES)
def test_shards_of_mixtures_load_the_same(name, family):
    assert torch.equal(logits(load(name, family, shards=True)), logits(loaded(name, family, torch.bfloat16)))


@pytest.mark.parametrize("name", ["modelopt-awq", "modelopt-svdquant"])
def test_layers_on_disk_run_and_are_saved(name, tmp_path):
    """As they are stored, packed in each call."""
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = load(name, device_map={**places, "model.layers.0": "disk"}, offload_folder=tmp_path / "offloaded")
    assert all(parameter.is_meta for parameter in model.model.layers[0].mlp.parameters())
    assert torch.equal(logits(model), logits(loaded(name, "llama", torch.bfloat16)))
    model.save_pretrained(tmp_path / "saved")
    found, before = tensors_of(tmp_path / "saved"), stored(name)
    assert found.keys() == before.keys() and all(same(found[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name, family", MIXTURES)
def test_experts_take_no_more_bytes_than_their_files(name, family):
    """But for a multiplier of each row and the rows that fill a tile."""
    model, tensors = loaded(name, family, torch.bfloat16), unstacked(stored(name, family))
    in_files = sum(t.nbytes for key, t in tensors.items() if ".experts." in key)
    held = sum(tensor.nbytes for module in experts_of(model).values() for tensor in held_tensors(module))
    assert held <= 1.6 * in_files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, family", [("modelopt-awq", "llama"), ("ct-nvfp4", "qwen3moe"), ("gpt-oss", "gptoss")])
def test_packed_modules_have_parameters_of_the_models_dtype_only_and_no_buffers(name, family, dtype):
    model = loaded(name, family, dtype)
    packed = [module for module in model.modules() if isinstance(module, PackedState)]
    assert packed and model.dtype == dtype
    for module in packed:
        assert {p.dtype for p in module.parameters()} == {dtype} and not list(module.buffers())


def test_experts_on_the_cpu_come_over_for_the_call_only():
    experts = next(iter(experts_of(loaded("gpt-oss", "gptoss", torch.bfloat16)).values()))
    before = list(held_tensors(experts))
    with torch.device("meta"):
        x, ids = torch.empty(3, experts.w13.k, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.long)
        out = experts(x, ids, torch.ones(3, 2))
    assert out.is_meta and out.shape == x.shape
    assert all(now is then for now, then in zip(held_tensors(experts), before, strict=True))


def test_a_checkpoint_without_fp4_is_left_to_transformers(monkeypatch):
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    model = load(LEFT)
    assert report(model) is None
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors", CompressedTensorsHfQuantizer)
    assert torch.equal(logits(model), logits(load(LEFT)))
    with pytest.raises(NotImplementedError):
        model.dequantize()


@pytest.mark.parametrize("name", ["modelopt-mixed", "modelopt-awq", "ct-nvfp4"])
def test_a_class_that_keeps_modules_in_float32(name, tmp_path, monkeypatch):
    """Their small tensors come widened from the loader."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"self_attn", "mlp"})
    load(name).save_pretrained(tmp_path)
    found, quantised = tensors_of(tmp_path), kinds(name, "llama")
    assert all(same(found[key], t) for key, t in stored(name).items() if key.rpartition(".")[0] in quantised)


@pytest.mark.parametrize("name", ["modelopt-mixed", "modelopt-awq", "ct-nvfp4", "ct-nvfp4-fp8"])
def test_shards_load_the_same(name):
    assert torch.equal(logits(load(name, shards=True)), logits(loaded(name, "llama", torch.bfloat16)))


@pytest.mark.parametrize("name, family", OWN_HEADS)
def test_a_head_of_its_own_stays_its_own_when_weights_are_tied_again(name, family):
    model = load(name, family, dtype=torch.float32)
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert model.lm_head.weight.shape == (0, 0)


TOLD = {
    "modelopt-kv-fp8": ("ModelOpt NVFP4: 14 linears (14 NVFP4 group 16)", ["this is left out", "key/value cache"]),
    "modelopt-mixed": ("ModelOpt MIXED_PRECISION: 13 linears (5 NVFP4 group 16, 8 FP8 E4M3)",
                       ["(W4A4); this is left out (activation_quant='drop') (5 linears)", "decoded", "(8 linears)"]),
    "ct-kv": ("compressed-tensors nvfp4-pack-quantized: 14 linears (14 NVFP4 group 16)", ["key/value cache"]),
    "ct-nvfp4-fp8": ("compressed-tensors float-quantized + nvfp4-pack-quantized: 6 linears (6 NVFP4 group 16)", []),
    "modelopt-w4a16": ("ModelOpt W4A16_NVFP4: 14 linears (14 NVFP4 group 16)", []),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_loading_is_told_once(name, said):
    load(name)
    ((level, line), *others), (summary, notes) = said(), TOLD[name]
    assert level == "INFO" and line.startswith(f"loaded {summary}, ")
    assert {level for level, _ in others} <= {"WARNING"}
    warnings = " ".join(message for _, message in others)
    assert bool(warnings) == bool(notes) and all(note in warnings for note in notes)


def test_experts_alone_are_told_alone():
    told = report(load("gpt-oss", "gptoss")).summary()
    assert told.startswith("OpenAI MXFP4: 2 mixtures of experts (2 MXFP4 group 32), ")


def test_loading_tells_of_inputs_that_are_kept(caplog):
    model = load("ct-nvfp4", quantization_config=choosing("ct-nvfp4", activation_quant="keep"))
    told = "quantises the inputs to 4 bit float (W4A4); this is run (activation_quant='keep') (14 linears)"
    assert told in caplog.text and told in str(report(model))


@pytest.mark.parametrize("name, family", [("ct-nvfp4a16", "mixtral"), ("gpt-oss", "gptoss")])
def test_device_maps_count_the_bytes_of_experts(name, family, monkeypatch):
    """They are no parameters of the model yet; the whole model takes what its files do."""
    from marlin_w4a16.hf import quantizer

    counted, whole = [], quantizer.FP4Loading._process_model_after_weight_loading

    def count(self, model, **kwargs):
        sizes = (p.numel() * self.param_element_size(model, path, p) for path, p in model.named_parameters())
        counted.append(sum(sizes))
        return whole(self, model, **kwargs)

    monkeypatch.setattr(quantizer.FP4Loading, "_process_model_after_weight_loading", count)
    load(name, family, device_map="auto")
    assert counted == [pytest.approx(sum(tensor.nbytes for tensor in stored(name, family).values()), rel=1e-3)]


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    "name, family", [("modelopt-mixed", "llama"), ("ct-nvfp4a16", "llama-bias"), ("ct-kv", "llama")]
)
def test_device_maps_count_the_bytes_that_layers_will_take(name, family, dequantize, monkeypatch):
    """Of each linear as it is put on the meta device."""
    from marlin_w4a16.hf import quantizer

    counted, whole = {}, quantizer.FP4Loading._process_model_after_weight_loading

    def count(self, model, **kwargs):
        for path in kinds(name, family):
            sizes = [
                p.numel() * self.param_element_size(model, f"{path}.{leaf}", p)
                for leaf, p in model.get_submodule(path).named_parameters()
            ]
            counted[path] = sum(sizes)
        return whole(self, model, **kwargs)

    monkeypatch.setattr(quantizer.FP4Loading, "_process_model_after_weight_loading", count)
    load(name, family, quantization_config=choosing(name, dequantize=dequantize), device_map="auto")
    monkeypatch.undo()
    held = {path: 0 for path in counted}
    for key, tensor in stored(name, family).items():
        path, _, leaf = key.rpartition(".")
        if path in held and not leaf.startswith(("k_", "v_")):
            held[path] += tensor.nbytes
    if dequantize:
        shapes = {path: m.weight.shape for path, m in loaded_dense(name, family).items()}
        held = {path: 2 * n * k + (2 * n if family == "llama-bias" else 0) for path, (n, k) in shapes.items()}
    assert counted == pytest.approx(held)


def loaded_dense(name, family) -> dict:
    model = load(name, family, quantization_config=choosing(name, dequantize=True))
    return {path: model.get_submodule(path) for path in kinds(name, family)}
