"""A Llama from transformers with FP4 linears, compared with eager as the acceptance gates say for float32 on a CPU."""

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import quantize_mxfp4, quantize_nvfp4
from narrow import wide

SEEDS, STEPS, VOCABULARY = 8, 32, 128


@pytest.fixture(params=[quantize_mxfp4, quantize_nvfp4])
def llama(request, fp4_linear) -> nn.Module:
    """Two tiny layers, all of whose linears were swapped."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, fp4_linear(child.out_features, child.in_features, request.param))
    return model


@pytest.mark.parametrize("inductor", [False, wide(True)])
@torch.no_grad()
def test_teacher_forced_logits_and_tokens_equal_eager(llama, inductor, caplog, monkeypatch):
    if not inductor:
        monkeypatch.setattr("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward)
    caplog.set_level("INFO", "marlin_w4a16")
    run = torch.compile(llama, backend="marlin_w4a16", fullgraph=True)

    def logits(model, tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).logits

    for seed in range(SEEDS):
        tokens = torch.randint(0, VOCABULARY, (1, STEPS), generator=torch.Generator().manual_seed(seed))
        expected, found = logits(llama, tokens), logits(run, tokens)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert [r.message.partition(" (")[0] for r in caplog.records if r.name == "marlin_w4a16"] == [
        "replaced 14 of 14 FP4 linears"
    ]
