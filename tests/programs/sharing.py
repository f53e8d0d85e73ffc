"""Weights of several uses, and several weights in one tensor."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from marlin_w4a16 import FP4Weight
from programs.program import Program
from programs.written import TABLE, K, N, Written, by_groups, checkpoint, written

LAYERS = 3


def dequantise(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    """The helper that the modules of a model share."""
    values = TABLE[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
    return by_groups(values, scales.view(torch.float8_e4m3fn).float() * factor)


class Several(nn.Module):
    """Linears that call one helper, side by side; ``call`` is what a layer runs."""

    def __init__(self, layers: list[Written], call: Callable[[Written, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layers, self.call = nn.ModuleList(layers), call

    def weight(self) -> tuple[Tensor, ...]:
        return tuple(dequantise(layer.codes, layer.scales, layer.factor) for layer in self.layers)

    def exact(self) -> tuple[Tensor, ...]:
        return tuple(layer.exact() for layer in self.layers)

    def product(self, weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return torch.cat([linear(x, weight) for weight in weights], -1)

    def forward(self, x: Tensor) -> Tensor:
        if self.call is None:
            return self.product(self.weight(), x)
        return torch.cat([self.call(layer, x) for layer in self.layers], -1)


def helper() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Several([Written(checkpoint()) for _ in range(LAYERS)]), (torch.randn(3, K),)


def one_weight_in_two_modules() -> tuple[nn.Module, tuple[Tensor, ...]]:
    first, second = Written(checkpoint()), Written(checkpoint())
    for name in ("codes", "scales", "factor"):
        setattr(second, name, getattr(first, name))
    second.fp4 = first.fp4
    return Several([first, second]), (torch.randn(3, K),)


def one_module_twice() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = Written(checkpoint())
    return Several([layer, layer]), (torch.randn(3, K),)


def token_ids() -> tuple[Tensor, ...]:
    return (torch.randint(N, (2, 3)),)


def tied() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Written(checkpoint(), multiply=lambda m, w, ids: linear(embedding(ids, w), w)), token_ids()


def tied_by_rows() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The embedding decodes the rows of its tokens alone."""

    def call(m: Written, ids: Tensor) -> Tensor:
        return linear(dequantise(m.codes[ids], m.scales[ids], m.factor), m.weight())

    return Written(checkpoint(), call=call, multiply=lambda m, w, ids: linear(embedding(ids, w), w)), token_ids()


def multiply_chunks(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    query, key, value = weight.chunk(3)
    return torch.cat((linear(x, query).sigmoid(), linear(x, key), linear(x, value)), -1)


def multiply_split(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    query, key, value = weight.split([24, 16, 8])
    return torch.cat((linear(x, query).sigmoid(), linear(x, key), linear(x, value)), -1)


def multiply_interleaved(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    """gpt-oss: rows of gate and up take turns."""
    return linear(x, weight[0::2]).sigmoid() * linear(x, weight[1::2])


def multiply_layers(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    for i in range(LAYERS):
        x = linear(x, weight[i]).relu()
    return x


def multiply_unbound(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    for layer in weight.unbind():
        x = linear(x, layer).relu()
    return x


def in_layers(weight: FP4Weight) -> dict:
    return {
        "codes": weight.codes.unflatten(0, (LAYERS, -1)),
        "scales": weight.scales.unflatten(0, (LAYERS, -1)),
        "factor": weight.multiplier.view(LAYERS, -1, 1),
    }


def twice(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight) + linear(x * 2, weight)


def two_factors(m: Written, x: Tensor) -> Tensor:
    weight = m.weight()
    return torch.cat((linear(x, weight), linear(x, weight * m.second)), -1)


def rows_of_a_bigger(weight: FP4Weight) -> dict:
    """Rows 16 to 64 of a tensor of 80."""

    def within(part: Tensor) -> Tensor:
        bigger = torch.randint(100, (80, part.shape[1])).to(torch.uint8)
        bigger[16 : 16 + weight.n] = part
        return bigger

    return {"codes": within(weight.codes), "scales": within(weight.scales)}


def view_of_columns(weight: FP4Weight) -> dict:
    """Buffers that are views: columns of wider tensors, so not contiguous."""

    def within(part: Tensor) -> Tensor:
        wider = torch.randint(100, (part.shape[0], part.shape[1] + 5)).to(torch.uint8)
        wider[:, 2:-3] = part
        return wider[:, 2:-3]

    return {"codes": within(weight.codes), "scales": within(weight.scales)}


def one_tensor_of_bytes(weight: FP4Weight) -> dict:
    """Codes and scales in one checkpoint tensor, one after the other."""
    return {"codes": torch.cat((weight.codes.flatten(), weight.scales.flatten())), "scales": None}


def parts_of_bytes(m: Written) -> Tensor:
    codes, scales = m.codes[: N * K // 2].view(N, -1), m.codes[N * K // 2 :].view(N, -1)
    return dequantise(codes, scales, m.factor)


form = partial(written, section="sharing")
FORMS = [
    Program("a helper that several modules call", "sharing", helper, weights=LAYERS),
    Program("one weight in two modules", "sharing", one_weight_in_two_modules),
    Program("one module called twice", "sharing", one_module_twice),
    Program("tied embedding and head", "sharing", tied),
    Program("tied embedding and head, rows decoded by token", "sharing", tied_by_rows),
    form("fused qkv decoded once, chunk", multiply=multiply_chunks, expect={"weights": 3}),
    form("fused qkv decoded once, split", multiply=multiply_split, expect={"weights": 3}),
    form("interleaved gate and up decoded once", multiply=multiply_interleaved, expect={"weights": 2}),
    form("stacked layers decoded once, indexed", store=in_layers, multiply=multiply_layers,
         arrange=lambda w: w.unflatten(0, (LAYERS, -1)), saved={"n": LAYERS * K, "factor": "per row"},
         expect={"weights": LAYERS}),
    form("stacked layers decoded once, unbind", store=in_layers, multiply=multiply_unbound,
         arrange=lambda w: w.unflatten(0, (LAYERS, -1)), saved={"n": LAYERS * K, "factor": "per row"},
         expect={"weights": LAYERS}),
    form("in two products", multiply=twice),
    form("in two products, decoded twice",
         call=lambda m, x: linear(x, m.weight()) + linear(x * 2, m.weight()), multiply=twice),
    form("in a product and elsewhere", multiply=lambda m, weight, x: linear(x, weight) + weight.sum()),
    form("codes with two global scales", store=lambda w: {"second": torch.tensor(0.37)}, call=two_factors,
         multiply=lambda m, w, x: torch.cat((linear(x, w), linear(x, w * m.second.double())), -1),
         expect={"weights": 2}),
    form("slice of a bigger packed tensor", store=rows_of_a_bigger,
         decode=lambda m: dequantise(m.codes[16:64], m.scales[16:64], m.factor)),
    form("slice of a bigger weight", store=rows_of_a_bigger,
         decode=lambda m: dequantise(m.codes, m.scales, m.factor)[16:64]),
    form("buffers that are rows of bigger tensors",
         store=lambda weight: {name: t[16:64] for name, t in rows_of_a_bigger(weight).items()}),
    form("buffers that are columns of wider tensors", store=view_of_columns),
    form("codes and scales in one tensor of bytes", store=one_tensor_of_bytes, decode=parts_of_bytes),
]  # fmt: skip
