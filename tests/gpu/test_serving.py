"""generate() and continuous batching of mixtures of experts on a GPU, in bfloat16 and in CUDA graphs."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

transformers = pytest.importorskip("transformers")

from hf.running import NEW, batch, generate, pair  # noqa: E402
from marlin_w4a16.hf.generation import compile_blocks, compile_decode  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = "cuda"  # with "cpu" the tests run there, without CUDA graphs
STATIC = ["Qwen3Moe", "Mixtral", "Glm4Moe", "GptOss", "NemotronH"]


@pytest.fixture(autouse=True)
def fresh_graphs():
    counters.clear()
    if DEVICE == "cuda":
        cudagraph_trees.reset_cudagraph_trees()
    torch.manual_seed(0)


@pytest.fixture
def replays(monkeypatch) -> list:
    """One entry for each CUDA graph that is replayed."""
    found, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: found.append(graph) or replay(graph))
    return found


def packed(name: str, layers: int = 2) -> nn.Module:
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    return pair(name, layers)[0].to(DEVICE, torch.bfloat16)


def padded(rows: int, length: int) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids, mask = torch.randint(3, 128, (rows, length)), torch.arange(length) >= torch.arange(rows)[:, None]
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.long().to(DEVICE)}


@torch.no_grad()
def gaps(model: nn.Module, tokens: list[list[int]], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """By how much the logit of each token is below the best one, where the model is given all that came before."""
    new = torch.tensor(tokens, device=DEVICE)
    mask = torch.cat((attention_mask, torch.ones_like(new)), 1)
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    logits = model(torch.cat((input_ids, new), 1), **options).logits[:, -NEW - 1 : -1].float()
    return (logits.amax(-1) - logits.gather(-1, new[..., None])[..., 0]).flatten()


def assert_best(found: Tensor) -> None:
    """Most tokens are the best, or as good; logits have a deviation of 0.6. A token may choose another expert."""
    assert float(found.sort().values[: found.numel() * 9 // 10].max()) <= 0.06, found


def recorded() -> int:
    """CUDA graphs recorded by Inductor so far."""
    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return int(repr(manager.graph_counter).strip("count()")) if manager else 0


def assert_recorded(at_least: int, at_most: int = 1000) -> None:
    """Graphs were recorded, and none was skipped."""
    if DEVICE == "cuda":
        assert counters["inductor"]["cudagraph_skips"] == 0 and at_least <= recorded() <= at_most


@pytest.mark.parametrize("name", STATIC)
def test_decode_with_a_static_cache_in_cuda_graphs(name):
    model = packed(name)
    compile_decode(model)
    model.generation_config.compile_config._compile_all_devices = True
    for rows in (4, 4, 1):
        inputs = padded(rows, 9)
        assert_best(gaps(model, generate(model, cache_implementation="static", **inputs), **inputs))
    assert_recorded(2, 6)  # one for each batch size; up to three where sliding windows fill; not one for each token


@pytest.mark.parametrize("name", ["DeepseekV4", "GptOss"])
def test_blocks_of_layers_in_cuda_graphs(name):
    model, reference = packed(name), packed(name)
    compile_blocks(model, mode="reduce-overhead")
    for rows in (4, 4, 1):
        inputs = padded(rows, 9)
        assert_best(gaps(reference, generate(model, **inputs), **inputs))
    assert_recorded(2 * len(model.model.layers))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name, compiled", [("Qwen3Moe", False), ("Qwen3Moe", True), ("GptOss", False)])
def test_continuous_batching(name, compiled, captured, replays):
    """Compiled graphs are shared between layers, whose weights differ."""
    model = packed(name, layers=3)
    how = transformers.CompileConfig(backend="marlin_w4a16", mode="default", dynamic=True) if compiled else None
    prompts = [torch.randint(3, 128, (length,)).tolist() for length in (5, 9, 3, 12, 7)]
    answers = batch(model, prompts, varlen_compile_config=how, use_cuda_graph=captured)
    found = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        found.append(gaps(model, [tokens], ids, torch.ones_like(ids)))
    assert_best(torch.cat(found))
    assert bool(replays) == (captured and DEVICE == "cuda")


def test_assisted_decoding():
    model, assistant = packed("Qwen3Moe"), packed("Qwen3Moe", layers=1)
    inputs = padded(1, 9)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert_best(gaps(model, generate(model, **inputs, **options), **inputs))
