"""Quickstart: FP4 models, compiled with the backend and compared with what they compute in eager mode.

    python examples/quickstart.py

One Llama is quantised to NVFP4 by NVIDIA ModelOpt, one to MXFP4 with a dequantisation written by hand, and the experts
of a Qwen3 mixture to MXFP4. On a CPU they are tiny and compared in float32; on a GPU they are larger, compared in
bfloat16, and a decode step is timed against the dense bfloat16 model.
"""

import copy
import importlib.util
import logging
import os
import textwrap
import time
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")
logging.getLogger("torchao").setLevel(logging.ERROR)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

import marlin_w4a16  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SEEDS, STEPS = 8, 32
E2M1 = torch.tensor(marlin_w4a16.E2M1_VALUES)


class MXFP4Linear(nn.Module):
    """A linear that keeps MXFP4 codes and scales and decodes them in forward, in plain PyTorch."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        weight = marlin_w4a16.quantize_mxfp4(dense.weight)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("values", E2M1.to(weight.codes.device))

    def forward(self, x: Tensor) -> Tensor:
        scales = torch.exp2(self.scales.float() - 127)
        return nn.functional.linear(x, by_table(self.values, self.codes, scales).to(x.dtype))


class NVFP4Linear(nn.Module):
    """The same for NVFP4: E4M3 scales and a global one."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        weight = marlin_w4a16.quantize_nvfp4(dense.weight)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales.view(torch.float8_e4m3fn))
        self.register_buffer("global_scale", weight.multiplier[0].clone())
        self.register_buffer("values", E2M1.to(weight.codes.device))

    def forward(self, x: Tensor) -> Tensor:
        scales = self.scales.float() * self.global_scale
        return nn.functional.linear(x, by_table(self.values, self.codes, scales).to(x.dtype))


class MXFP4Experts(Qwen3MoeExperts):
    """Experts that keep their stacked weights in MXFP4 and decode them when the forward of transformers reads one."""

    @classmethod
    def take(cls, experts: Qwen3MoeExperts) -> None:
        """Makes dense experts such ones, in place."""
        for name in ("gate_up_proj", "down_proj"):
            weights = [marlin_w4a16.quantize_mxfp4(matrix) for matrix in getattr(experts, name)]
            delattr(experts, name)
            experts.register_buffer(f"{name}_codes", torch.stack([weight.codes for weight in weights]))
            experts.register_buffer(f"{name}_scales", torch.stack([weight.scales for weight in weights]))
        experts.register_buffer("values", E2M1.to(experts.gate_up_proj_codes.device, DTYPE))
        experts.__class__ = cls

    def decoded(self, name: str) -> Tensor:
        scales = torch.exp2(getattr(self, f"{name}_scales").float() - 127)
        return by_table(self.values, getattr(self, f"{name}_codes"), scales.to(self.values.dtype))

    @property
    def gate_up_proj(self) -> Tensor:
        return self.decoded("gate_up_proj")

    @property
    def down_proj(self) -> Tensor:
        return self.decoded("down_proj")


def by_table(values: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Looks the codes up and multiplies each group by its scale."""
    blocks = values[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
    return (blocks.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def dense_llama() -> LlamaForCausalLM:
    hidden, inner, layers = (4096, 14336, 4) if GPU else (256, 512, 2)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(DTYPE).eval()


def fp4_mixture() -> Qwen3MoeForCausalLM:
    """A mixture of experts, 8 of which every token chooses 2 (on a GPU, 64 and 8)."""
    hidden, inner, experts, chosen, layers = (2048, 768, 64, 8, 4) if GPU else (128, 96, 8, 2, 2)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen3MoeForCausalLM(config).to(DTYPE).eval()
    model.set_experts_implementation("grouped_mm")
    for module in list(model.modules()):
        if type(module) is Qwen3MoeExperts:
            MXFP4Experts.take(module)
    return model


def by_modelopt(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """ModelOpt: quantise the linears to NVFP4, weights only, and keep them packed."""
    import modelopt.torch.quantization as mtq

    model = mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    mtq.compress(model)
    return model


def by_hand(model: LlamaForCausalLM, linear: type[nn.Module]) -> LlamaForCausalLM:
    """Swap the linears of the decoder layers."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, linear(child))
    return model


def compare(exact: Tensor, eager: Tensor, compiled: Tensor, slack: float = 1.25) -> None:
    """Teacher-forced logits ``[seeds, steps, vocabulary]``: right, and the same token wherever the choice is clear.

    In float32 nothing is excused. In bfloat16 two right programs round differently, so the compiled model may be no
    further from the float32 one than eager mode is (by a quarter), and a token may differ only where the two best
    logits are nearer than four times the measured error. A mixture gets more ``slack``: where two experts are nearly as
    likely, the rounding chooses.
    """
    exact, eager, compiled = exact.double(), eager.double(), compiled.double()
    size = exact.norm()
    ours, theirs = (((logits - exact).norm() / size).item() for logits in (compiled, eager))
    error = (compiled - eager).abs().max().item()
    best = eager.topk(2, -1).values
    clear = best[..., 0] - best[..., 1] > (4 * error if GPU else -1)
    same = eager.argmax(-1) == compiled.argmax(-1)
    print(
        f"   logits against the float32 model: relative error {ours:.1e}, eager mode {theirs:.1e}; "
        f"tokens: {int(same.sum())} of {same.numel()} as in eager mode, {int((~clear).sum())} too close to call"
    )
    limit = slack * theirs if GPU else 1e-5
    if ours > limit or not bool(same[clear].all()):
        raise SystemExit(f"the compiled model differs: relative error {ours:.1e} (limit {limit:.1e}), or another token")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the decoder layers, dense weights counted as bfloat16."""
    tensors = [*model.model.layers.parameters(), *model.model.layers.buffers()]
    return sum(t.numel() * min(t.element_size(), 2) for t in tensors)


def decode_time(model: nn.Module, backend: str) -> float:
    """Microseconds of one forward of one token, as a CUDA graph."""
    step = torch.compile(model, backend=backend, mode="reduce-overhead")
    token = torch.zeros((1, 1), dtype=torch.long, device=DEVICE)
    for _ in range(5):
        step(token, use_cache=False)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(100):
        step(token, use_cache=False)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e4


def variants() -> list[tuple[str, LlamaForCausalLM, type[nn.Module]]]:
    """The models of this machine, and the linear that computes the same in float32.

    The Dynamo of torch 2.11 and 2.12 cannot trace ModelOpt's modules, for any backend; one can do without ModelOpt.
    """
    nvfp4 = (
        ("NVFP4 by hand", by_hand(dense_llama(), NVFP4Linear), NVFP4Linear)
        if torch.__version__ < "2.13" or importlib.util.find_spec("modelopt") is None
        else ("NVFP4 by ModelOpt", by_modelopt(dense_llama()), NVFP4Linear)
    )
    return [nvfp4, ("MXFP4 by hand", by_hand(dense_llama(), MXFP4Linear), MXFP4Linear)]


@torch.no_grad()
def main() -> None:
    logging.basicConfig(format="   %(name)s: %(message)s")
    logging.getLogger("marlin_w4a16").setLevel(logging.INFO)
    dense = dense_llama()
    before = weight_bytes(dense)
    tokens = torch.stack(
        [torch.randint(0, 4096, (STEPS,), generator=torch.Generator().manual_seed(seed)) for seed in range(SEEDS)]
    ).to(DEVICE)
    print(f"A Llama of {len(dense.model.layers)} layers on {DEVICE} in {DTYPE}: {before / 2**20:.1f} MiB in bfloat16")
    dense_us = decode_time(dense, "inductor") if GPU else 0.0
    for title, model, linear in variants():
        print(f"\n{title}")
        torch.compiler.reset()
        exact = by_hand(dense_llama(), linear).float()(tokens, use_cache=False).logits
        eager = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, backend="marlin_w4a16")
        compare(exact, eager, compiled(tokens, use_cache=False).logits)
        report = marlin_w4a16.explain(model, tokens, use_cache=False)
        print(textwrap.indent(str(report), "   "))
        after = weight_bytes(model)
        print(f"   layers: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB ({before / after:.1f} times smaller)")
        if (swaps := marlin_w4a16.prepare(model)).done:
            print(f"   prepare() frees the originals: {swaps.summary()}")
            torch.compiler.reset()
            compare(exact, eager, compiled(tokens, use_cache=False).logits)
        if GPU:
            us = decode_time(model, "marlin_w4a16")
            print(f"   one token: {us:.0f} us, dense bfloat16 {dense_us:.0f} us ({dense_us / us:.2f} times as fast)")
    mixture(tokens)


@torch.no_grad()
def mixture(tokens: Tensor) -> None:
    """The Qwen3 mixture: each block of experts, from sorting tokens to adding up, becomes one op."""
    print("\nA mixture of experts in MXFP4, by hand")
    torch.compiler.reset()
    model = fp4_mixture()
    exact = copy.deepcopy(model).float()(tokens, use_cache=False).logits
    eager = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, backend="marlin_w4a16")
    compare(exact, eager, compiled(tokens, use_cache=False).logits, slack=2)
    report = marlin_w4a16.explain(model, tokens, use_cache=False)
    print(textwrap.indent(str(report), "   "))
    if len(report.replaced) != len(report.rows) or not report.rows:
        raise SystemExit("an FP4 weight of the mixture was not replaced")


if __name__ == "__main__":
    main()
