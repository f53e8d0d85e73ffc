"""Modules of other classes than nn.Linear that own matrices: taken if they compute what a packed module does."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from marlin_w4a16 import PackedExperts, PackedLinear, quantize, quantize_nvfp4
from marlin_w4a16.modules.batched_experts import BatchedExperts
from marlin_w4a16.modules.packed_groups import PackedGroups
from swaps import done, refusals

IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = dict(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, **IDS)
TOKENS = torch.arange(1, 15).view(2, 7)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32, **IDS)
    return transformers.GPT2LMHeadModel(config)


def falcon() -> nn.Module:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES))


def llama4() -> nn.Module:
    experts = dict(num_local_experts=4, intermediate_size=96, intermediate_size_mlp=96, num_experts_per_tok=2)
    heads = dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=64, attention_chunk_size=64)
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SIZES, **experts, **heads))


def jetmoe() -> nn.Module:
    sizes = {name: value for name, value in SIZES.items() if name != "num_attention_heads"}
    heads = dict(num_key_value_heads=2, kv_channels=32, intermediate_size=96, num_local_experts=4)
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**sizes, **heads, num_experts_per_tok=2))


def exact(dense: Tensor) -> Tensor:
    return quantize_nvfp4(dense.detach().contiguous()).decode(torch.float32)


@torch.no_grad()
def round_linear(module: nn.Module) -> None:
    module.weight.copy_(exact(module.weight))


@torch.no_grad()
def round_turned(module: nn.Module) -> None:
    module.weight.copy_(exact(module.weight.T).T)


@torch.no_grad()
def round_stack(module: nn.Module) -> None:
    module.weight.copy_(torch.stack([exact(matrix) for matrix in module.weight]))


@torch.no_grad()
def round_experts(module: nn.Module) -> None:
    for number in range(4):
        for part in module.gate_up_proj[number].chunk(2, -1):
            part.copy_(exact(part.T).T)
        module.down_proj[number].copy_(exact(module.down_proj[number].T).T)


MODELS = [(gpt2, Conv1D, round_turned, PackedLinear, 4), (falcon, FalconLinear, round_linear, PackedLinear, 4),
          (llama4, "Llama4TextExperts", round_experts, BatchedExperts, 1),
          (jetmoe, "JetMoeParallelExperts", round_stack, PackedGroups, 4)]  # fmt: skip


@pytest.mark.parametrize("make, cls, rounds, packed, count", MODELS, ids=lambda value: getattr(value, "__name__", None))
def test_a_model_computes_what_its_dequantised_twin_does(make, cls, rounds, packed, count):
    torch.manual_seed(0)
    model = make().eval()
    paths = [path for path, module in model.named_modules() if cls in (type(module), type(module).__name__)]
    twin = copy.deepcopy(model)
    for path in paths:
        rounds(twin.get_submodule(path))
    swaps = quantize(model, "nvfp4", include=paths)
    assert set(done(swaps)) == set(paths) and len(paths) == count
    assert all(type(model.get_submodule(path)) is packed for path in paths)
    with torch.no_grad():
        found, expected = model(TOKENS).logits, twin(TOKENS).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    other = copy.deepcopy(model)
    for path in paths:
        other.get_submodule(path).multiplier13 if packed is BatchedExperts else other.get_submodule(
            path
        ).multiplier.zero_()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, found)


@pytest.mark.parametrize("make", [gpt2, llama4, jetmoe])
def test_no_weight_of_a_product_is_without_a_row(make):
    model = make()
    told = {row.path for row in quantize(model, "nvfp4").rows}
    kept = (nn.Embedding, PackedLinear, PackedExperts, PackedGroups)
    owners = {path for path, m in model.named_modules() for p in m.parameters(recurse=False) if p.ndim > 1}
    assert not {path for path in owners - told if not isinstance(model.get_submodule(path), kept)}


class Own(nn.Linear):
    """A subclass whose forward a test sets."""


def doubled(self, x):
    return (x @ self.weight.T + self.bias) * 2


def switched(self, x):
    return x @ self.weight.T + self.bias if x.shape[0] > 1 else x


def scaled(self, x):
    return x @ self.weight.T * self.scale + self.bias


def plain(self, x):
    return torch.addmm(self.bias, x.view(-1, self.in_features), self.weight.t()).view(*x.shape[:-1], self.out_features)


@pytest.mark.parametrize("forward, taken", [(doubled, 0), (switched, 0), (scaled, 0), (plain, 1)])
def test_a_forward_of_its_own_must_be_that_of_a_linear_for_every_input(forward, taken):
    cls = type("Own", (Own,), {"forward": forward})
    model = nn.Sequential(cls(64, 96))
    model[0].scale = 1.0
    swaps = quantize(model, "nvfp4")
    assert len(swaps.done) == taken
    if not taken:
        assert refusals(swaps) == {"0": "a Own computes something else than nn.Linear"}


class Looped(nn.Module):
    """Experts with the arguments of those of transformers and a loop of their own."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 192, 64) / 8)
        self.down_proj = nn.Parameter(torch.randn(4, 64, 96) / 8)
        self.act_fn, self.factor = nn.SiLU(), factor

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(4):
            token, choice = torch.where(ids == number)
            gate, up = (x[token] @ self.gate_up_proj[number].T).chunk(2, -1)
            part = (self.act_fn(gate) * up) @ self.down_proj[number].T
            out.index_add_(0, token, self.factor * part * weights[token, choice, None])
        return out


def test_experts_with_a_loop_of_their_own_are_told_by_running_them():
    model = nn.ModuleList([Looped(), Looped(2.0)])
    x, ids, weights = torch.randn(5, 64), torch.randint(4, (5, 2)).sort().values, torch.rand(5, 2)
    expected = model[0](x, ids, weights)
    why = "a Looped has a forward of its own, which is not that of experts in two stacks"
    assert refusals(quantize(model, "nvfp4")) == {"1": why} and isinstance(model[0], PackedExperts)
    assert (model[0](x, ids, weights) - expected).norm() < 0.2 * expected.norm()


def test_rows_of_zeros_are_left_out_of_batched_experts():
    model = llama4().model.layers[0].feed_forward
    x = torch.randn(4, 3, 64) * (torch.rand(4, 3, 1) > 0.5)
    quantize(model, "nvfp4", include="experts")
    found = model.experts(x.flatten(0, 1)).view(4, 3, 64)
    assert not found[(x == 0).all(-1)].any() and found[(x != 0).any(-1)].any(-1).all()


def test_modules_that_no_packed_one_stands_for_have_a_row():
    model = nn.ModuleDict({"rnn": nn.LSTM(64, 64), "conv": nn.Conv1d(64, 64, 3), "norm": nn.LayerNorm((8, 64)),
                           "table": nn.Embedding(8, 64), "bilinear": nn.Bilinear(64, 64, 64)})  # fmt: skip
    model.position_embeddings, model.cls = nn.Parameter(torch.randn(8, 64)), nn.Parameter(torch.randn(1, 1, 64))
    swaps = quantize(model, "nvfp4")
    assert list(refusals(swaps)) == ["rnn", "bilinear"]
    assert swaps.summary() == "swapped 0 of 0 linears: 0.0 KiB -> 0.0 KiB; 2 others left"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_of_torch_run_in_eval_mode_too():
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, dropout=0)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(64, 64)}).eval()
    x, mask = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model["encoder"](x, src_key_padding_mask=mask)
        assert done(quantize(model, "nvfp4")) == ["head"]
        assert torch.equal(model["encoder"](x, src_key_padding_mask=mask), expected)


def test_decoders_of_torch_are_packed_but_for_their_attention():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 96, batch_first=True), 1).eval()
    assert done(quantize(model, "nvfp4")) == ["layers.0.linear1", "layers.0.linear2"]
    assert model(torch.randn(2, 5, 64), torch.randn(2, 4, 64)).isfinite().all()
