"""generate() of mixtures of experts and of hybrids: greedy tokens are those of the dense model; continuous batching by
transformers' own manager gives each request the tokens it gets alone."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf.running import batch, family, generate, pair
from marlin_w4a16.hf.generation import compile_blocks, compile_decode

STATIC = ["Qwen3Moe", "Mixtral", "DeepseekV3", "Glm4Moe", "GptOss", "NemotronH"]
STATEFUL = ["NemotronH", "DeepseekV4"]
BACKEND = CompileConfig(backend="marlin_w4a16", mode="default", dynamic=True)

models = functools.cache(pair)


def padded(rows: int, length: int) -> dict[str, Tensor]:
    """Prompts of different lengths: ``length``, then one token less in each row, padded on the left."""
    ids, mask = torch.randint(3, 128, (rows, length)), torch.arange(length) >= torch.arange(rows)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


@pytest.mark.parametrize("name", [*STATIC, "DeepseekV4"])
@pytest.mark.parametrize("rows", [1, 4])
def test_tokens_of_padded_prompts(name, rows):
    packed, dense = models(name)
    inputs = padded(rows, 9)
    expected = generate(dense, **inputs)
    assert generate(packed, **inputs) == expected and len({*map(tuple, expected)}) == rows
    if name in STATIC:
        assert generate(packed, cache_implementation="static", **inputs) == expected


@pytest.mark.parametrize("name", STATIC)
def test_decode_with_a_static_cache_is_compiled(name, as_traced, caplog):
    packed, dense = pair(name)
    compile_decode(packed)
    packed.generation_config.compile_config._compile_all_devices = True
    caplog.set_level("INFO", "marlin_w4a16")
    for inputs in (padded(3, 7), padded(3, 7)):
        assert generate(packed, cache_implementation="static", **inputs) == generate(dense, **inputs)
    assert "packed stacks of experts" in caplog.text and "in whole mixtures" in caplog.text
    assert not counters["graph_break"]


@pytest.mark.wide
def test_a_hybrid_compiled_by_inductor():
    """The states of its Mamba layers are written in the same graph that runs the experts."""
    packed, dense = pair("NemotronH", blocks=("mamba", "moe", "full_attention"))
    compile_decode(packed)
    packed.generation_config.compile_config._compile_all_devices = True
    inputs = padded(2, 6)
    assert generate(packed, cache_implementation="static", **inputs) == generate(dense, **inputs)


def test_blocks_of_layers_are_compiled_where_decode_cannot_be(as_traced, caplog):
    packed, dense = pair("DeepseekV4")
    caplog.set_level("INFO", "marlin_w4a16")
    assert compile_blocks(packed) == [
        f"model.layers.{layer}.{block}" for layer in range(3) for block in ("mlp", "attn_hc", "ffn_hc")
    ]
    for inputs in (padded(3, 7), padded(3, 7), padded(2, 5)):
        assert generate(packed, **inputs) == generate(dense, **inputs)
    assert "packed stacks of experts" in caplog.text
    assert "nothing to replace" not in caplog.text and not counters["graph_break"]


def test_blocks_of_other_families():
    packed, _ = pair("NemotronH")
    assert compile_blocks(packed) == ["model.layers.1.mixer", "model.layers.4.mixer"]
    packed, _ = pair("GptOss")
    assert compile_blocks(packed) == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("assistant", ["packed", "dense", "itself", "lookup"])
def test_assisted_decoding_gives_the_tokens_of_greedy(name, assistant):
    packed, dense = models(name)
    prompt = torch.randint(3, 128, (1, 5)).repeat(1, 2)  # which makes lookup find something
    small = {"packed": pair(name, 1, seed=3)[0], "dense": pair(name, 1, seed=3)[1], "itself": packed}
    options = {"prompt_lookup_num_tokens": 3} if assistant == "lookup" else {"assistant_model": small[assistant]}
    lengths = []
    handle = packed.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    found = generate(packed, input_ids=prompt, **options)
    handle.remove()
    assert found == generate(dense, input_ids=prompt)
    assert max(lengths[1:]) > 1  # drafts were verified


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_transformers_assists_no_model_with_a_state(name, options):
    packed, _ = models(name)
    options = {key: packed if value is True else value for key, value in options.items()}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(packed, input_ids=torch.ones(1, 4, dtype=torch.long), **options)


# Continuous batching


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


@pytest.mark.wide
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
