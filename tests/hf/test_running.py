"""generate() of mixtures of experts and of hybrids: greedy tokens are those of the dense model."""

import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hf.running import generate, pair
from marlin_w4a16.hf.generation import compile_blocks, compile_decode

STATIC = ["Qwen3Moe", "Mixtral", "DeepseekV3", "Glm4Moe", "GptOss", "NemotronH"]
STATEFUL = ["NemotronH", "DeepseekV4"]

models = functools.cache(pair)


def padded(rows: int, length: int) -> dict[str, Tensor]:
    """Prompts of different lengths: ``length``, then one token less in each row, padded on the left."""
    ids = torch.randint(3, 128, (rows, length))
    mask = torch.arange(length) >= torch.arange(rows)[:, None]
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
