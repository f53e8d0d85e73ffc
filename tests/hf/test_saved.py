"""Models that quantize() packed: saved as checkpoints of ModelOpt, or refused before anything is written."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import marlin_w4a16.hf
from marlin_w4a16 import PackedExperts, PackedLinear, quantize
from mixtures.models import COMMON, FAMILIES

IDS = torch.arange(1, 19).view(2, 9)
SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
BY_NAME = {family.name: family for family in FAMILIES}


def built(name: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    known = COMMON | BY_NAME[name].settings if name in BY_NAME and name != "Llama4" else SIZES | SPECIAL
    config = getattr(transformers, f"{name}{'Text' if name in ('Gemma3', 'Llama4') else ''}Config")(**known | settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def gpt2() -> nn.Module:
    sizes = dict(vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **SPECIAL)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def config_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    "name, format",
    [("Llama", "nvfp4"), ("Llama", "mxfp4"), ("Qwen3Moe", "nvfp4"), ("Mixtral", "mxfp4"), ("DeepseekV3", "nvfp4"),
     ("NemotronH", "nvfp4")],
)  # fmt: skip
def test_what_is_saved_is_loaded_again_with_equal_logits(name, format, tmp_path):
    model = built(name)
    count = len(quantize(model, format).done)
    model.save_pretrained(tmp_path)
    values = config_in(tmp_path)
    assert (values["quant_method"], values["quant_algo"]) == (
        "modelopt",
        "W4A16_NVFP4" if format == "nvfp4" else "MXFP4",
    )
    assert "lm_head" in values["ignore"]
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert sum(isinstance(module, PackedLinear | PackedExperts) for module in again.modules()) == count


def test_several_formats_are_a_mixed_one(tmp_path):
    model = built("Llama")
    quantize(model, "nvfp4", include="*mlp*"), quantize(model, "mxfp4", include="*attn*")
    model.save_pretrained(tmp_path)
    layers = config_in(tmp_path)["quantized_layers"]
    assert {layer["quant_algo"] for layer in layers.values()} == {"W4A16_NVFP4", "MXFP4"} and len(layers) == 7
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_a_head_that_was_untied_and_a_part_of_the_model_are_saved(tmp_path):
    model = built("Gemma3", num_key_value_heads=2, head_dim=16)
    quantize(model, "nvfp4", include=("*", "lm_head"))
    model.save_pretrained(tmp_path / "whole"), model.model.save_pretrained(tmp_path / "part")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "whole")), logits(model))
    part = transformers.AutoModel.from_pretrained(tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(part(IDS)[0], model.model(IDS)[0])


@pytest.mark.parametrize(
    "make, told",
    [
        (gpt2, "found NVFP4 group 16 of 192 x 64, expected a linear in the model, not Conv1D"),
        (lambda: built("Falcon"), "expected a linear in the model, not FalconLinear"),
        (lambda: built("GptOss"), "a gate and an up for each expert, expected one tensor of both"),
        (lambda: built("Llama4", num_local_experts=4, intermediate_size_mlp=96, num_key_value_heads=2, head_dim=16),
         "found BatchedExperts, expected a linear or an Experts module"),
    ],
    ids=["Conv1D", "FalconLinear", "GptOss", "Llama4"],
)  # fmt: skip
def test_what_no_checkpoint_holds_is_refused_before_anything_is_written(make, told, tmp_path):
    model = make()
    quantize(model, "nvfp4")
    expected = logits(model)
    with pytest.raises(marlin_w4a16.hf.CheckpointError, match="cannot be saved as a checkpoint of ModelOpt") as error:
        model.save_pretrained(tmp_path)
    assert told in str(error.value) and "model.dequantize() makes it dense" in str(error.value)
    assert not list(tmp_path.iterdir())
    dense = model.dequantize()
    assert not any(isinstance(module, PackedLinear | PackedExperts) for module in dense.modules())
    assert (logits(dense) - expected).norm() <= 1e-5 * expected.norm()
    dense.save_pretrained(tmp_path)
    assert torch.equal(logits(type(dense).from_pretrained(tmp_path)), logits(dense))


def test_a_model_that_was_loaded_quantised_and_quantised_further_is_refused(tmp_path):
    model = built("Llama")
    quantize(model, "nvfp4")
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    quantize(loaded, "mxfp4", include="lm_head")
    with pytest.raises(marlin_w4a16.hf.CheckpointError, match="in a model that was loaded quantised"):
        loaded.save_pretrained(tmp_path / "second")
    assert not list((tmp_path / "second").iterdir()) and marlin_w4a16.hf.report(loaded) is not None
    expected = logits(loaded)
    assert (logits(loaded.dequantize()) - expected).norm() <= 1e-5 * expected.norm()


def test_a_model_of_others_that_asks_for_its_quantiser_is_told():
    class Saves(nn.Sequential):
        """As diffusers does it."""

        def save_pretrained(self, folder: Path) -> None:
            quantizer = getattr(self, "hf_quantizer", None)
            if quantizer is not None:
                raise ValueError(f"is quantized with {quantizer.quantization_config.quant_method}")

    model, dense = Saves(nn.Linear(64, 64)), Saves(nn.ReLU())
    quantize(model, "nvfp4"), quantize(dense, "nvfp4")
    dense.save_pretrained(Path())
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="in place"):
            one.save_pretrained(Path())
        with pytest.raises(NotImplementedError, match="load it again"):
            one.hf_quantizer.dequantize(one)


def test_adapters_of_a_quantised_model_are_saved_alone(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(built("Llama"), peft.LoraConfig(target_modules=["q_proj"], r=4))
    quantize(model, "nvfp4", include="*mlp*")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


def test_a_state_dict_is_what_it_was(tmp_path):
    model = built("Llama")
    quantize(model, "nvfp4")
    torch.save(model.state_dict(), tmp_path / "state")
    other = built("Llama")
    quantize(other, "nvfp4")
    assert not other.load_state_dict(torch.load(tmp_path / "state")).missing_keys
    torch.save(model, tmp_path / "model")
    again = torch.load(tmp_path / "model", weights_only=False)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved")), logits(other))
