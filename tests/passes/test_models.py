"""The experts of real models, as transformers traces them: each block becomes one op that computes the same."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from marlin_w4a16 import explain
from marlin_w4a16.passes.outcome import Replaced
from marlin_w4a16.report.data import Report
from mixtures.models import FAMILIES, Family
from narrow import case, wide
from programs.backend import reported

# One implementation is enough where the other families show what is between the products by both.
ONE = ("DeepseekV3", "DeepseekV4", "Glm4Moe", "Mixtral")
# Those whose single products are found in ways of their own.
PIECES = ("Qwen3Moe", "GptOss", "NemotronH", "Llama4")


def each(narrow: Callable[[Family, bool], bool]) -> pytest.MarkDecorator:
    """Every family by every implementation; ``narrow`` is asked with the family and whether this is the first."""
    return pytest.mark.parametrize(
        "family, how",
        [
            case(family, how, id=f"{family}-{how or 'bmm'}", narrow=narrow(family, number == 0))
            for family in FAMILIES
            for number, how in enumerate(family.implementations)
        ],
    )


def tokens(shape: tuple[int, int] = (2, 9)) -> torch.Tensor:
    return torch.randint(3, 128, shape)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def through_backend(model: nn.Module, ids: torch.Tensor, **options: object) -> tuple[torch.Tensor, Report]:
    with torch.no_grad():
        return reported(lambda ids: model(ids, use_cache=False).logits, (ids,), strict=True, **options)


@each(lambda family, first: first or family.name not in ONE)
def test_each_block_is_one_op_that_computes_the_same(family: Family, how: str | None):
    model, ids = family.build(how), tokens()
    found, report = through_backend(model, ids)
    assert_same(found, logits(model, ids))
    assert len(report.rows) == 2 * family.mixtures
    assert {row.outcome.op for row in report.rows if isinstance(row.outcome, Replaced)} == {"marlin_w4a16::moe"}
    told = {(row.experts.count, row.experts.chosen, row.experts.activation) for row in report.rows}
    config = model.config
    count = getattr(config, "num_experts", None) or config.num_local_experts
    assert told == {(count, config.num_experts_per_tok, family.activation)}


@each(lambda family, first: first and family.name in PIECES)
def test_the_pieces_alone_compute_the_same(family: Family, how: str | None):
    model, ids = family.build(how), tokens((1, 5))
    found, report = through_backend(model, ids, moe=False)
    assert_same(found, logits(model, ids))
    assert {row.outcome.op for row in report.rows} == {"marlin_w4a16::grouped_linear"}


@pytest.mark.parametrize("name", ["GptOss", wide("DeepseekV4"), "Llama4"])
def test_in_bfloat16(name: str):
    family = next(family for family in FAMILIES if family.name == name)
    model, ids = family.build(family.implementations[0], torch.bfloat16), tokens()
    found, expected = through_backend(model, ids)[0].float(), logits(model, ids).float()
    assert float((found - expected).norm() / expected.norm()) < 3e-2


@pytest.mark.parametrize("name", ["Qwen3Moe", wide("Llama4")])
def test_through_inductor(name: str):
    family = next(family for family in FAMILIES if family.name == name)
    model, ids = family.build(family.implementations[0]), tokens()
    assert_same(logits(torch.compile(model, backend="marlin_w4a16", fullgraph=True), ids), logits(model, ids))


def test_explain_says_so():
    model, ids = FAMILIES[0].build(), tokens()
    with torch.no_grad():
        assert explain(model, ids, use_cache=False).rows == through_backend(model, ids)[1].rows
