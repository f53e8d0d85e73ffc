"""Ties by the config of transformers models, undone where a packed module took the place of a tied one."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from marlin_w4a16 import PackedLinear, prepare, quantize, restore
from marlin_w4a16.modules.swaps import untie

IDS = torch.arange(6)[None]
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**options: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=96, tie_word_embeddings=True, **options)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


class Composed(PreTrainedModel):
    """A model that holds one which ties."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.inner = llama()
        self.post_init()

    def forward(self, *given: Tensor) -> object:
        return self.inner(*given)


@pytest.mark.parametrize("make, head", [(llama, "lm_head"), (Composed, "inner.lm_head")])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_head_that_was_quantised_stays_its_own(make, head, copied):
    model = make()
    quantize(model, "nvfp4", include=head, progress=False)
    before, model = logits(model), copied(model)
    for again in (model.tie_weights, lambda: model.tie_weights(recompute_mapping=False), model.init_weights):
        again()
        packed = model.get_submodule(head)
        assert isinstance(packed, PackedLinear) and packed.weight.shape == (0, 0)
        assert torch.equal(logits(model), before) and not model.all_tied_weights_keys


def test_a_head_that_was_prepared_stays_its_own_and_restored():
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = llama()
    quantize_(model, NVFP4WeightOnlyConfig(), filter_fn=lambda module, path: path == "lm_head")
    rows = {row.path: row.refusal for row in prepare(model, progress=False).rows}
    assert rows["lm_head"] is None
    before = logits(model)
    model.tie_weights()
    assert isinstance(model.lm_head, PackedLinear) and torch.equal(logits(model), before)
    restore(model)
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_other_models_of_the_class_and_the_config_stay_tied():
    config = LlamaConfig(**SIZES, vocab_size=96, tie_word_embeddings=True)
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    quantize(model, "nvfp4", include="lm_head", progress=False)
    other.tie_weights()
    assert config.tie_word_embeddings and other.lm_head.weight is other.model.embed_tokens.weight
    later = LlamaForCausalLM(config)
    assert later.lm_head.weight is later.model.embed_tokens.weight


def test_a_head_that_is_left_stays_tied():
    model = llama()
    quantize(model, "nvfp4", progress=False)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.all_tied_weights_keys


def test_a_bias_stays_tied_and_whole(tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, vocab_size=96, max_position_embeddings=16)).eval()
    head = "cls.predictions.decoder"
    quantize(model, "nvfp4", include=head, progress=False)
    before, bias = logits(model), model.cls.predictions.bias
    for _ in range(2):  # what is tied to a packed bias is found in it
        model.tie_weights()
        quantize(model, "nvfp4", include=head, progress=False)
    assert model.all_tied_weights_keys == {"cls.predictions.bias": f"{head}.bias"}
    model.save_pretrained(tmp_path)
    assert model.get_submodule(head).bias is bias and bias.shape == (96,) and torch.equal(logits(model), before)


def test_a_head_under_a_config_that_ties_but_with_a_weight_of_its_own():
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.randn(96, 64))
    quantize(model, "nvfp4", include="*lm_head*", exclude=(), progress=False)
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("gone, expected", [
    ("a", {"b.weight": "s.weight", "c.weight": "s.weight"}),
    ("s", {"b.weight": "a.weight", "c.weight": "a.weight"}),
    ("d", {name: "s.weight" for name in ("a.weight", "b.weight", "c.weight")}),
])  # fmt: skip
def test_what_was_tied_through_one_stays_tied(gone, expected):
    class Several(Composed):
        _tied_weights_keys: ClassVar = {"[abc]": "s"}

        def __init__(self) -> None:
            PreTrainedModel.__init__(self, PreTrainedConfig(tie_word_embeddings=True))
            for name in "abcds":
                setattr(self, name, nn.Linear(2, 2, bias=False))
            self.post_init()

    model = Several()
    untie(model, {gone})
    assert model.all_tied_weights_keys == expected == model.get_expanded_tied_weights_keys()
    model.tie_weights()
    shared = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert all(shared[target] == shared[source] for target, source in expected.items())


def test_a_tie_that_comes_later_is_refused():
    model = llama()
    quantize(model, "nvfp4", include="lm_head", progress=False)
    before = logits(model)
    model._tied_weights_keys = LlamaForCausalLM._tied_weights_keys
    with pytest.raises(ValueError, match=r"weight: found a parameter of shape \[96, 64\].*untie it"):
        model.tie_weights()
    assert torch.equal(logits(model), before)
