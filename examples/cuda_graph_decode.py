"""A decode step with a static cache, captured in a CUDA graph by hand and replayed at several batch sizes.

    python examples/cuda_graph_decode.py

A Llama whose linears own packed NVFP4 weights. The graph also chooses the next token and moves the cache on.
"""

import copy
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from marlin_w4a16 import PackedLinear, quantize_nvfp4

BATCHES, PROMPT, STEPS = (1, 4, 16), 16, 48


def packed_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=8192, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for layer in model.model.layers:
        for name, child in list(layer.named_modules()):
            if isinstance(child, nn.Linear):
                layer.set_submodule(name, PackedLinear(quantize_nvfp4(child.weight)))
    return model


class Decoder:
    """The captured step of one batch size: it reads ``token`` and leaves the next one there."""

    def __init__(self, model: nn.Module, compiled: nn.Module, batch: int) -> None:
        self.model, self.compiled = model, compiled
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
        self.token = torch.zeros((batch, 1), dtype=torch.long)
        model(self.token.expand(batch, PROMPT), past_key_values=self.cache)  # the cache allocates
        for _ in range(2):
            self.step()  # compiles and warms up: none of that may happen during capture
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step()

    def step(self) -> Tensor:
        logits = self.compiled(self.token, past_key_values=self.cache).logits
        self.token.copy_(logits.argmax(-1))
        return logits

    def run(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt with the tokens after it, and the logits of each step."""
        self.cache.reset()
        self.token.copy_(self.model(prompt, past_key_values=self.cache).logits[:, -1:].argmax(-1))
        tokens, logits = [prompt, self.token.clone()], []
        for _ in range(STEPS):
            self.graph.replay()
            tokens.append(self.token.clone())
            logits.append(self.logits.clone())
        return torch.cat(tokens, 1), torch.cat(logits, 1)


@torch.no_grad()
def main() -> None:
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    model = packed_llama()
    reference = copy.deepcopy(model).float()
    compiled = torch.compile(model, backend="marlin_w4a16", fullgraph=True, dynamic=False)
    for batch, decoder in {batch: Decoder(model, compiled, batch) for batch in BATCHES}.items():
        begin = time.perf_counter()
        tokens, logits = decoder.run(torch.randint(0, 8192, (batch, PROMPT)))
        torch.cuda.synchronize()
        ms = (time.perf_counter() - begin) * 1e3
        eager, exact = (m(tokens[:, :-1]).logits[:, PROMPT:].double() for m in (model, reference))
        ours, theirs = (((found - exact).norm() / exact.norm()).item() for found in (logits, eager))
        print(f"batch {batch:2}: {STEPS} tokens in {ms:3.0f} ms; relative error {ours:.1e}, eager mode {theirs:.1e}")


if __name__ == "__main__":
    main()
