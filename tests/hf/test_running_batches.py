"""Continuous batching by transformers' own manager: each request gets the tokens it gets alone."""

import pytest
import torch
from torch import nn
from transformers import CompileConfig

from hf.running import batch, family, generate, pair

BACKEND = CompileConfig(backend="marlin_w4a16", mode="default", dynamic=True)


@pytest.fixture
def prompts() -> list[list[int]]:
    return [torch.randint(3, 128, (length,)).tolist() for length in (5, 9, 3, 12, 7)]


def alone(model: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens of each prompt by itself."""
    return [generate(model, torch.tensor([prompt]), eos_token_id=-1)[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "Glm4Moe", "GptOss"])
def test_requests_get_their_own_tokens(name, prompts):
    packed, dense = pair(name)
    assert batch(packed, prompts) == alone(dense, prompts)


@pytest.mark.wide
def test_layers_share_compiled_graphs(prompts, as_traced, caplog):
    """Paged attention breaks the graph in each layer, so a graph serves all layers: its weights are those it is
    called with."""
    packed, dense = pair("Qwen3Moe", layers=3)
    caplog.set_level("INFO", "marlin_w4a16")
    assert batch(packed, prompts, varlen_compile_config=BACKEND) == alone(dense, prompts)
    assert caplog.text.count(" packed stacks of experts") < 3


def test_packed_copies_of_a_shared_graph_are_those_of_each_layer(prompts, as_traced, caplog):
    """Here the model decodes FP4 itself, and the backend packs what it finds."""
    model = family("Qwen3Moe", 3).build()
    expected = alone(model, prompts)
    caplog.set_level("INFO", "marlin_w4a16")
    assert batch(model, prompts, varlen_compile_config=BACKEND) == expected
    assert 1 <= caplog.text.count("replaced 2 of 2 stacks of FP4 matrices") < 3


@pytest.mark.parametrize("name", ["NemotronH", "DeepseekV4"])
def test_transformers_has_no_paged_cache_for_states(name, prompts):
    packed, _ = pair(name)
    with pytest.raises(ValueError, match="Invalid layer type"):
        batch(packed, prompts)
