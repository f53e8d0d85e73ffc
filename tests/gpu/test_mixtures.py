"""Mixtures of experts through the whole backend on a GPU: found, proved, and run by the kernels."""

import importlib.util

import pytest
import torch
from torch import Tensor

from marlin_w4a16 import explain, quantize_mxfp4, quantize_nvfp4
from mixtures.written import Mixture, Parts, batched, halves, inputs, interleaved, native

pytestmark = pytest.mark.gpu

WHOLE = {
    "batched": Parts(batched, interleaved, bias=True), "grouped": Parts(native, halves),
    "relu2": Parts(native, lambda z: torch.relu(z).square(), gated=False), "on input": Parts(native, on_input=True),
}  # fmt: skip


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("parts", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_a_mixture_is_one_op_that_computes_the_same(parts, quantize, tokens):
    module = Mixture(parts, quantize, torch.bfloat16).cuda()
    args = tuple(given.cuda() for given in inputs(tokens, torch.bfloat16))
    rows = explain(module, *args).rows
    assert [row.outcome.op for row in rows] == ["marlin_w4a16::moe"] * 2, rows
    torch._dynamo.reset()
    found = torch.compile(module, backend="marlin_w4a16", fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        y = found(*args).clone()
    assert relative(y, module(*args)) < 2e-2


@pytest.mark.parametrize("form", [batched, native])
def test_the_pieces_compute_the_same(form):
    module = Mixture(Parts(form, interleaved, bias=True), dtype=torch.bfloat16).cuda()
    args = tuple(given.cuda() for given in inputs(33, torch.bfloat16))
    run = torch.compile(module, backend="marlin_w4a16", fullgraph=True, options={"moe": False, "verify": True})
    assert relative(run(*args), module(*args)) < 2e-2


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss", "Llama4"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_a_model(name, dtype, tolerance):
    """In bfloat16 a token may choose another expert, where scores are close: most of them do not."""
    from mixtures.models import FAMILIES

    family = next(family for family in FAMILIES if family.name == name)
    for how in family.implementations:
        model, ids = family.build(how, dtype).cuda(), torch.randint(3, 128, (2, 9), device="cuda")
        run = torch.compile(model, backend="marlin_w4a16", fullgraph=True, options={"strict": True})
        with torch.no_grad():
            found, expected = (f(ids, use_cache=False).logits.float().flatten(0, 1) for f in (run, model))
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert float((errors if dtype == torch.float32 else errors.sort().values[:-4]).max()) < tolerance, errors
        torch._dynamo.reset()
