"""How x and a weight are multiplied."""

from functools import partial

import torch
from torch import Tensor
from torch.compiler import nested_compile_region
from torch.nn.functional import conv1d, conv2d, linear
from torch.utils.checkpoint import checkpoint as recomputed

from programs.layout import decode_transposed, transposed
from programs.program import Program
from programs.sharing import Several
from programs.written import K, N, Written, checkpoint, written

B, H, D = 2, 4, 16  # batch or experts, heads, their size


def einsum(equation: str, arrange=lambda w: w):
    return lambda m, w, x: torch.einsum(equation, x, arrange(w))


def conv1d_of_gpt2(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    """transformers' Conv1D: the weight is ``[k, n]``."""
    return torch.addmm(m.bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], -1)


def experts(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (B, -1))


def heads(weight: Tensor) -> Tensor:
    """``[heads, k, size]``, each head's outputs together."""
    return weight.unflatten(0, (H, -1)).transpose(1, 2)


def inputs_of_heads(weight: Tensor) -> Tensor:
    """``[heads, size, n]``, each head's inputs together."""
    return weight.unflatten(1, (H, -1)).permute(1, 2, 0)


@nested_compile_region
def region(m: Written, x: Tensor) -> Tensor:
    return linear(x, m.weight())


@nested_compile_region
def region_of_a_weight(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


def several(call) -> tuple[Several, tuple[Tensor, ...]]:
    return Several([Written(checkpoint()) for _ in range(3)], call), (torch.randn(3, K),)


def in_checkpoint(m: Written, x: Tensor) -> Tensor:
    return recomputed(lambda x: linear(x, m.weight()), x, use_reentrant=False)


def in_autocast(m: Written, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.product(m.weight(), x)


form = partial(written, section="products")
FORMS = [
    form("F.linear"),
    form("F.linear with a bias", bias=True),
    form("F.linear by keywords", bias=True, multiply=lambda m, w, x: linear(bias=m.bias, weight=w, input=x)),
    *(form(f"F.linear of {len(x)} dimensions", x=x) for x in ((K,), (2, 3, K), (2, 1, 3, K))),
    form("@", multiply=lambda m, w, x: x @ w.T),
    form("@ and a bias added", bias=True, multiply=lambda m, w, x: x @ w.T + m.bias),
    *(form(f"@ of {len(x)} dimensions", x=x, multiply=lambda m, w, x: x @ w.T)
      for x in ((K,), (2, 3, K), (2, 1, 3, K))),
    form("matmul", multiply=lambda m, w, x: torch.matmul(x, w.t())),
    form("matmul method", multiply=lambda m, w, x: x.matmul(w.transpose(0, 1))),
    form("mm", multiply=lambda m, w, x: torch.mm(x, w.mT)),
    form("mm method, contiguous", multiply=lambda m, w, x: x.mm(w.permute(1, 0).contiguous())),
    form("@ with the weight on the left of a vector", x=(K,), multiply=lambda m, w, x: w @ x),
    form("@ with the weight on the left of a matrix", x=(K, 3), multiply=lambda m, w, x: w @ x),
    form("@ with the weight on the left of a batch", x=(2, K, 3), multiply=lambda m, w, x: w @ x),
    form("mv", x=(K,), multiply=lambda m, w, x: torch.mv(w, x)),
    form("inner", multiply=lambda m, w, x: torch.inner(x, w)),
    form("tensordot", x=(2, 3, K), multiply=lambda m, w, x: torch.tensordot(x, w, dims=([-1], [1]))),
    form("addmm, weight [k, n] (Conv1D of GPT-2)", x=(2, 3, K), bias=True, multiply=conv1d_of_gpt2,
         store=transposed, decode=decode_transposed, arrange=Tensor.t),
    form("addmm method", bias=True, multiply=lambda m, w, x: m.bias.addmm(x, w.T)),
    form("addmm with alpha and beta", bias=True,
         multiply=lambda m, w, x: torch.addmm(m.bias, x, w.T, beta=0.5, alpha=2.0)),
    form("addmm to a matrix", also=((3, N),), multiply=lambda m, w, x, y: torch.addmm(y, x, w.T)),
    form("addmv", x=(K,), bias=True, multiply=lambda m, w, x: torch.addmv(m.bias, w, x)),
    form("bmm, one weight expanded", x=(B, 3, K), multiply=lambda m, w, x: torch.bmm(x, w.T.expand(B, -1, -1))),
    form("bmm, a weight per batch element", x=(B, 3, K), multiply=lambda m, w, x: torch.bmm(x, experts(w).mT)),
    form("@ of a batch, a weight per batch element", x=(B, 3, K), multiply=lambda m, w, x: x @ experts(w).mT),
    form("baddbmm, one weight expanded", x=(B, 3, K), bias=True,
         multiply=lambda m, w, x: torch.baddbmm(m.bias, x, w.T.expand(B, -1, -1))),
    form("baddbmm, a weight per batch element", x=(B, 3, K), also=((B, 1, N // B),),
         multiply=lambda m, w, x, y: torch.baddbmm(y, x, experts(w).mT)),
    form("einsum bk,nk->bn", multiply=einsum("bk,nk->bn")),
    form("einsum nk,bk->nb", multiply=lambda m, w, x: torch.einsum("nk,bk->nb", w, x)),
    form("einsum bsd,kd->bsk", x=(2, 3, K), multiply=einsum("bsd,kd->bsk")),
    form("einsum bsk,kn->bsn", x=(2, 3, K), multiply=einsum("bsk,kn->bsn", Tensor.t)),
    form("einsum ...k,nk->...n", x=(2, 3, K), multiply=einsum("...k,nk->...n")),
    form("einsum bk,nk, no output", multiply=einsum("bk,nk")),
    form("einsum bsk,nk->bns", x=(2, 3, K), multiply=einsum("bsk,nk->bns")),
    form("einsum bsd,hde->bshe, heads of outputs", x=(2, 3, K), multiply=einsum("bsd,hde->bshe", heads)),
    form("einsum bsd,hed->bhse, heads of outputs", x=(2, 3, K),
         multiply=einsum("bsd,hed->bhse", lambda w: w.unflatten(0, (H, -1)))),
    form("einsum bhsd,hdn->bsn, heads of inputs", x=(2, H, 3, D), multiply=einsum("bhsd,hdn->bsn", inputs_of_heads)),
    form("einsum ebk,enk->ebn, experts", x=(B, 3, K), multiply=einsum("ebk,enk->ebn", experts)),
    form("einsum bk,enk->ben, all experts", multiply=einsum("bk,enk->ben", experts)),
    form("conv1d of kernel 1", x=(2, K, 5), bias=True, multiply=lambda m, w, x: conv1d(x, w.unsqueeze(-1), m.bias)),
    form("conv2d of kernel 1", x=(2, K, 3, 2), multiply=lambda m, w, x: conv2d(x, w[:, :, None, None])),
    form("checkpoint", call=in_checkpoint),
    form("checkpoint of the product", call=lambda m, x: recomputed(linear, x, m.weight(), use_reentrant=False)),
    Program("checkpoint of several layers", "products", partial(several, in_checkpoint), weights=3),
    form("nested_compile_region", call=region),
    Program("nested_compile_region of several layers", "products", partial(several, region), weights=3),
    form("nested_compile_region of the product", call=lambda m, x: region_of_a_weight(m.weight(), x)),
    form("autocast", bias=True, call=in_autocast),
    form("autocast, @", call=in_autocast, multiply=lambda m, w, x: x @ w.T),
    form("no_grad", call=torch.no_grad()(lambda m, x: linear(x, m.weight()))),
]  # fmt: skip
