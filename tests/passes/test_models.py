"""The experts of real models, as transformers traces them: each block becomes one op that computes the same."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

from marlin_w4a16 import explain
from marlin_w4a16.passes.outcome import Replaced
from mixtures.models import FAMILIES, Family

CASES = [(family, how) for family in FAMILIES for how in family.implementations]
IDS = [f"{family}-{how or 'bmm'}" for family, how in CASES]


def tokens(shape: tuple[int, int] = (2, 9)) -> torch.Tensor:
    return torch.randint(3, 128, shape)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def through_backend(model: nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    with patch("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward):
        return logits(torch.compile(model, backend="marlin_w4a16", fullgraph=True, options=options or None), ids)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family, how", CASES, ids=IDS)
def test_each_block_is_one_op_that_computes_the_same(family: Family, how: str | None):
    model, ids = family.build(how), tokens()
    expected = logits(model, ids)
    assert_same(through_backend(model, ids, strict=True), expected)
    torch._dynamo.reset()
    with torch.no_grad():
        rows = explain(model, ids, use_cache=False).rows
    assert len(rows) == 2 * family.mixtures
    assert {row.outcome.op for row in rows if isinstance(row.outcome, Replaced)} == {"marlin_w4a16::moe"}
    told = {(row.experts.count, row.experts.chosen, row.experts.activation) for row in rows}
    config = model.config
    count = getattr(config, "num_experts", None) or config.num_local_experts
    assert told == {(count, config.num_experts_per_tok, family.activation)}


@pytest.mark.parametrize("family, how", CASES, ids=IDS)
def test_the_pieces_alone_compute_the_same(family: Family, how: str | None):
    model, ids = family.build(how), tokens((1, 5))
    assert_same(through_backend(model, ids, moe=False, strict=True), logits(model, ids))


@pytest.mark.parametrize("name", ["GptOss", "DeepseekV4", "Llama4"])
def test_in_bfloat16(name: str):
    family = next(family for family in FAMILIES if family.name == name)
    model, ids = family.build(family.implementations[0], torch.bfloat16), tokens()
    found, expected = through_backend(model, ids, strict=True).float(), logits(model, ids).float()
    assert float((found - expected).norm() / expected.norm()) < 3e-2


@pytest.mark.parametrize("name", ["Qwen3Moe", "Llama4"])
def test_through_inductor(name: str):
    family = next(family for family in FAMILIES if family.name == name)
    model, ids = family.build(family.implementations[0]), tokens()
    compiled = torch.compile(model, backend="marlin_w4a16", fullgraph=True)
    assert_same(logits(compiled, ids), logits(model, ids))
