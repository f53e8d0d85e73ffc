"""generate(): tokens are those of the dense model, and decode is compiled by this backend where it can be."""

import json

import pytest
import torch
from torch._dynamo.backends import registry

from checkpoints.formats import written
from hf.loading import choosing, load, loaded, prompts, read, reference
from hf.matrix import GENERATE, OWN_CACHES, PARTLY, params

NAME, NEW = "ct-nvfp4a16", 6
BACKEND = "marlin_w4a16"


@torch.no_grad()
def generate(model, length: int = 8, **options):
    """Greedy tokens of two prompts; more than the first token end no prompt."""
    chosen = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(prompts()[:2, :length], **chosen)[:, length:].tolist()


def expected(length: int = 8) -> list:
    return generate(reference(NAME, "llama", torch.float32), length)


@pytest.fixture
def model():
    """Float32, and compiled on a CPU too."""
    model = load(NAME, dtype=torch.float32)
    model.generation_config.compile_config._compile_all_devices = True
    return model


@pytest.fixture
def graphs(monkeypatch) -> list:
    """Shapes of the tokens and the choices of each graph that this backend is handed; they run as traced."""
    torch._dynamo.lookup_backend(BACKEND)
    found = []

    def backend(gm, inputs, **choices):
        tokens = next(x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.ndim == 2)
        found.append((tuple(tokens.shape), choices))
        return gm.forward

    monkeypatch.setitem(registry._COMPILER_FNS, BACKEND, backend)
    return found


@pytest.mark.parametrize("name, family", params((case for case in GENERATE.cases if case[1] not in OWN_CACHES), PARTLY))
def test_tokens_with_a_static_cache(name, family):
    packed, dense = (of(name, family, torch.float32) for of in (loaded, reference))
    found = generate(packed, cache_implementation="static")
    assert found == generate(dense) and [len(row) for row in found] == [NEW, NEW]


@pytest.mark.parametrize("length", [5, 20])
@pytest.mark.parametrize("name, family", [case for case in GENERATE.cases if case[1] in OWN_CACHES])
def test_tokens_with_caches_of_its_own(name, family, length):
    """Prompts shorter and longer than the window of DeepSeek-V4; decode goes over more compressed blocks."""
    packed, dense = (of(name, family, torch.float32) for of in (loaded, reference))
    found = generate(packed, length, max_new_tokens=12, min_new_tokens=12)
    assert found == generate(dense, length, max_new_tokens=12, min_new_tokens=12)
    assert [len(set(row)) > 3 for row in found] == [True, True]


def test_decode_is_compiled_once_by_this_backend(model, graphs):
    for _ in range(2):
        assert generate(model, cache_implementation="static") == expected()
    assert graphs == [((2, 1), {"mode": "reduce-overhead"})]


def test_decode_compiled_by_inductor(model, caplog):
    caplog.set_level("INFO", "marlin_w4a16")
    assert generate(model, cache_implementation="static") == expected()
    assert [r.message.partition(" (")[0] for r in caplog.records] == ["14 packed linears"]


def test_a_cache_that_grows_is_not_compiled(model, graphs):
    assert generate(model) == expected() and graphs == []


def test_prefill_in_chunks(model, graphs):
    assert generate(model, cache_implementation="static", prefill_chunk_size=4) == expected()
    assert {shape for shape, _ in graphs} == {(2, 4), (2, 1)}


def test_prefill_of_a_compiled_model(model, graphs):
    model.compile(backend=BACKEND)
    for _ in range(2):
        assert generate(model, cache_implementation="static") == expected()
    assert [shape for shape, _ in graphs] == [(2, 8), (2, 1)]


def test_a_user_overrides_it(model, graphs):
    from transformers import CompileConfig, GenerationConfig

    other = CompileConfig(backend="eager")
    other._compile_all_devices = True
    for options in ({"disable_compile": True}, {"cache_implementation": "dynamic"}, {"compile_config": other}):
        assert generate(model, **{"cache_implementation": "static", **options}) == expected()
    assert graphs == []
    mine = GenerationConfig(max_new_tokens=NEW, cache_implementation="static")
    assert generate(model, generation_config=mine) == expected() and len(graphs) == 1


def test_what_a_user_has_set_stays():
    from transformers import CompileConfig

    from marlin_w4a16.hf.generation import compile_decode

    model = load(NAME)
    assert model.generation_config.compile_config.backend == BACKEND
    chosen = model.generation_config.compile_config = CompileConfig(backend="eager")
    compile_decode(model)
    assert model.generation_config.compile_config is chosen
    assert reference(NAME, "llama", torch.float32).generation_config.compile_config is None
    assert load(NAME, quantization_config=choosing(NAME, dequantize=True)).generation_config.compile_config is None


def test_models_that_generate_nothing_are_loaded():
    from transformers import AutoModel

    assert not AutoModel.from_pretrained(written(NAME, "llama")).can_generate()


@pytest.mark.parametrize("name, family", [(NAME, "llama"), ("modelopt-nvfp4", "gemma3-tied")])
def test_saved_generation_configs_do_not_change(name, family, tmp_path):
    load(name, family).save_pretrained(tmp_path)
    before, after = (json.loads((f / "generation_config.json").read_text()) for f in (written(name, family), tmp_path))
    assert after == before
    assert read(tmp_path).generation_config.compile_config.backend == BACKEND
