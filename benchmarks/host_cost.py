"""What calls cost the host outside CUDA graphs, beside dense bfloat16: single calls, whole models, a training step.

python benchmarks/host_cost.py                          # all parts
python benchmarks/host_cost.py linear chain moe         # some of: linear chain moe prefill decode first train
python benchmarks/host_cost.py linear --profile         # cProfile of eager calls instead

Both models of a part alternate in one process; a figure is the median of rounds. Ratios: for single calls the host's
time over that of one dense linear (less is better), for whole models how many times as fast as dense (more is better).
"""

import argparse
import copy
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import marlin_w4a16
from marlin_w4a16 import Activation, FP4Weight, PackedExperts, PackedLinear, quantize_nvfp4
from marlin_w4a16.cli.measure import Work, generate

PROFILED = 200  # calls
SIZE = 1024  # rows and columns of single linears: the GPU never limits
DTYPE = torch.bfloat16
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
Row = tuple[str, float, float, float, str]
Calls = dict[str, Callable[[], object]]


def microseconds(calls: Calls, repeats: int, rounds: int = 7, wait: bool = False) -> dict[str, float]:
    """Median microseconds of each call, taken in turn.

    ``wait``: until the GPU is done, at the end of each call; else only the host's part counts.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
                if wait:
                    torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / repeats * 1e6)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def compared(
    name: str, calls: Calls, bar: str, repeats: int, *, faster: bool, each: int = 1, wait: bool = False
) -> Row:
    """One row of the table: of calls ``packed`` and ``dense``, each of so many linears."""
    found = microseconds(calls, repeats, wait=wait)
    packed, dense = found["packed"] / each, found["dense"] / each
    return name, packed, dense, dense / packed if faster else packed / dense, bar


def packed_linear(bias: bool = False) -> tuple[PackedLinear, nn.Linear]:
    """A linear, and its dense twin."""
    weight = quantize_nvfp4(torch.randn(SIZE, SIZE, device="cuda") / 32)
    dense = nn.Linear(SIZE, SIZE, bias=bias, device="cuda", dtype=DTYPE)
    dense.weight.data.copy_(weight.decode(DTYPE))
    return PackedLinear(weight, dense.bias), dense


def linear() -> list[Row]:
    """Eager modules beside F.linear."""
    packed, dense = packed_linear()
    rows = []
    for m in (1, 16, 64, 512, 2048):
        x = torch.randn(m, SIZE, device="cuda", dtype=DTYPE)
        calls = {"packed": lambda x=x: packed(x), "dense": lambda x=x: nn.functional.linear(x, dense.weight)}
        rows.append(compared(f"eager PackedLinear, M = {m}", calls, "<= 1.8", 200, faster=False))
    return rows


def chain() -> list[Row]:
    """Linears one after the other, compiled in the default mode."""
    pairs = [packed_linear() for _ in range(16)]
    packed = torch.compile(nn.Sequential(*(p for p, _ in pairs)), backend="marlin_w4a16")
    dense = torch.compile(nn.Sequential(*(d for _, d in pairs)))
    rows = []
    for m in (1, 512):
        torch._dynamo.reset()
        x = torch.randn(m, SIZE, device="cuda", dtype=DTYPE)
        calls = {"packed": lambda x=x: packed(x), "dense": lambda x=x: dense(x)}
        rows.append(compared(f"compiled, one of a chain of 16, M = {m}", calls, "<= 1.25", 20, faster=False, each=16))
    return rows


def experts(n: int, k: int) -> FP4Weight:
    """128 matrices."""
    one = quantize_nvfp4(torch.randn(128 * n, k, device="cuda") / 32)
    return FP4Weight(*(t.unflatten(0, (128, n)) for t in (one.codes, one.scales, one.multiplier)), one.kind, one.group)


class Chain(nn.Module):
    """Mixtures one after the other, or linears, which leave ids and weights alone."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modules)

    def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *routing) if isinstance(layer, PackedExperts) else layer(x)
        return x


def moe() -> list[Row]:
    """Mixtures of which each token chooses 8 of 128 experts, in chains of eight, beside ONE dense linear each."""
    layers = [PackedExperts(experts(512, 1024), experts(1024, 256), Activation(), "gate_up") for _ in range(8)]
    packed, dense = Chain(*layers), Chain(*(packed_linear()[1] for _ in range(8)))
    rows = []
    for tokens in (1, 64):
        x = torch.randn(tokens, 1024, device="cuda", dtype=DTYPE)
        weights, ids = torch.rand(tokens, 128, device="cuda", dtype=DTYPE).topk(8)
        for name, bar, compiles in (("eager", "<= 5", lambda module: module), ("compiled", "<= 3", compiled)):
            torch._dynamo.reset()
            inputs = {"packed": compiles(packed), "dense": compiles(dense)}
            calls = {key: partial(one, x, ids, weights) for key, one in inputs.items()}
            rows.append(compared(f"{name} mixture, {tokens} tokens", calls, bar, 10, faster=False, each=8))
    return rows


def compiled(module: nn.Module) -> Callable[..., Tensor]:
    """A module compiled in the default mode, by Inductor if it is dense."""
    is_packed = any(isinstance(m, PackedLinear | PackedExperts) for m in module.modules())
    found: Callable[..., Tensor] = torch.compile(module, backend="marlin_w4a16" if is_packed else "inductor")
    return found


def llamas(layers: int) -> tuple[nn.Module, nn.Module]:
    """Llama 3 8B's shape with random weights, NVFP4 and bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA_8B, num_hidden_layers=layers, torch_dtype=DTYPE)
    torch.set_default_dtype(DTYPE)
    with torch.device("cuda"):
        dense = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    dense.requires_grad_(False)
    packed = copy.deepcopy(dense)
    marlin_w4a16.quantize(packed, "nvfp4", progress=False)
    return packed, dense


def prefill() -> list[Row]:
    """Prompts of Llama 8B cut to 8 layers, without a cache; the logits of the last token."""
    packed, dense = llamas(8)
    rows = []
    for name, bar, compiles in (("compiled", ">= 1.0", compiled), ("eager", ">= 0.95", lambda module: module)):
        one, other = compiles(packed), compiles(dense)
        for tokens in (128, 512, 2048):
            torch._dynamo.reset()
            ids = torch.randint(1000, (1, tokens), device="cuda")
            more = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
            calls = {"packed": partial(one, **more), "dense": partial(other, **more)}
            label = f"8 layers, prefill of {tokens}, {name}"
            rows.append(compared(label, calls, bar, 5, faster=True, wait=True))
    return rows


def decode() -> list[Row]:
    """Steps of Llama 8B with a static cache, compiled in the default mode, batch 1."""
    from transformers import StaticCache

    calls = {}
    for name, model in zip(("packed", "dense"), llamas(32), strict=True):
        cache, step = StaticCache(config=model.config, max_cache_len=1024), compiled(model)
        ids = torch.randint(1000, (1, 128), device="cuda")
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        at = torch.tensor([[128]], device="cuda")
        more = {"input_ids": ids[:, :1].clone(), "past_key_values": cache, "position_ids": at, "use_cache": True}
        calls[name] = partial(step, **more)
    return [compared("32 layers, step of decode, default mode, batch 1", calls, ">= 1.0", 10, faster=True, wait=True)]


def first() -> list[Row]:
    """The first token after a prompt of 512, as ``python -m marlin_w4a16 bench`` times it."""
    work, times = Work(1, 512, 2, "bfloat16", "cuda"), {}
    ids = torch.randint(1000, (1, 512), device="cuda")
    for name, model in zip(("packed", "dense"), llamas(32), strict=True):
        runs = [generate(model, ids, work)[1] for _ in range(6)]
        times[name] = statistics.median((after[1] - after[0]) * 1e6 for after in runs[1:])
    return [
        (
            "32 layers, first token after 512",
            times["packed"],
            times["dense"],
            times["dense"] / times["packed"],
            ">= 0.95",
        )
    ]


class LoRA(nn.Module):
    """An adapter of rank 16 on a linear that is not trained."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 16, bias=False, device="cuda", dtype=DTYPE)
        self.b = nn.Linear(16, base.out_features, bias=False, device="cuda", dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def train() -> list[Row]:
    """Forward, backward and an AdamW step of adapters on all linears of 8 layers, 512 tokens."""
    calls = {}
    ids = torch.randint(1000, (1, 512), device="cuda")
    for name, model in zip(("packed", "dense"), llamas(8), strict=True):
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for leaf, child in list(parent.named_children()):
                    if leaf.endswith("_proj"):
                        setattr(parent, leaf, LoRA(child))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()

        calls[name] = step
    return [compared("8 layers, LoRA step of 512 tokens, eager", calls, ">= 0.8", 3, faster=True, wait=True)]


PARTS = (linear, chain, moe, prefill, decode, first, train)
TRAINED = ("train",)


def profile() -> None:
    """Where the host's time of an eager call goes, by cProfile, which makes calls of functions look dear."""
    packed, _ = packed_linear()
    for m in (1, 512):
        x = torch.randn(m, SIZE, device="cuda", dtype=DTYPE)
        for _ in range(5):
            packed(x)
        profiler = cProfile.Profile()
        profiler.runcall(lambda x=x: [packed(x) for _ in range(PROFILED)])
        torch.cuda.synchronize()
        stats: Any = pstats.Stats(profiler)
        found = [(own, total, name) for name, (_, _, own, total, _) in stats.stats.items()]
        print(f"M = {m}: us a call, in a function alone and with what it calls")
        for own, total, (file, _, function) in sorted(found, reverse=True)[:14]:
            print(f"{own / PROFILED * 1e6:8.1f} {total / PROFILED * 1e6:8.1f}  {function} ({Path(file).name})")


def show(rows: Sequence[Row]) -> None:
    """The table, in Markdown."""
    print("| | packed, us | dense, us | ratio | bar |\n|---|---|---|---|---|")
    for name, packed, dense, ratio, bar in rows:
        print(f"| {name} | {packed:.1f} | {dense:.1f} | {ratio:.2f} | {bar} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.profile:
        with torch.no_grad():
            profile()
        return
    for part in PARTS:
        if not args.parts or part.__name__ in args.parts:
            with torch.set_grad_enabled(part.__name__ in TRAINED):
                show(part())
            torch._dynamo.reset()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
