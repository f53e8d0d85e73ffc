"""torch.compile(model, backend="marlin_w4a16") of loaded models."""

import re

import pytest
import torch
from torch._dynamo.utils import counters

from hf.dense import relative
from hf.loading import choosing, kinds, load, loaded, logits, reference
from hf.matrix import COMPILE, FEW_ON_LLAMA, MIXTURES, TRACE, params

BY_INDUCTOR = [("ct-nvfp4a16", "llama"), ("gpt-oss", "gptoss")]
BY_THE_BACKEND = [
    ("ct-nvfp4a16", "gemma3-tied"), ("modelopt-awq", "llama"), ("modelopt-w4a16", "qwen3moe"),
    ("modelopt-nemotron", "nemotronh"),
]  # fmt: skip
# those that the backend compiles are one graph already
TRACED_ALONE = {*FEW_ON_LLAMA, *MIXTURES, ("modelopt-head", "llama")} - {*BY_INDUCTOR, *BY_THE_BACKEND}


def told(linears: int, experts: int) -> list[str]:
    """What is logged of one graph with so many packed linears and modules of experts, each of two stacks."""
    parts = ((linears, "packed linears"), (2 * experts, "packed stacks of experts"))
    return [f"{count} {what}" for count, what in parts if count]


def compiled_once(model, expected: list[str], caplog) -> torch.Tensor:
    """The logits of one graph of which this is logged."""
    counters.clear()
    caplog.set_level("INFO", "marlin_w4a16")
    caplog.clear()
    found = logits(torch.compile(model, backend="marlin_w4a16", fullgraph=True))
    assert counters["stats"]["unique_graphs"] == 1
    (record,) = caplog.records
    assert re.findall(r"\d+ packed [a-z ]+(?= \()", record.message) == expected
    return found


@pytest.mark.parametrize("name, family", params(TRACE.cases, TRACED_ALONE))
def test_one_graph(name, family):
    model = loaded(name, family, torch.float32)
    expected = logits(model)
    counters.clear()
    torch._dynamo.reset()
    found = logits(torch.compile(model, backend="eager", fullgraph=True))
    assert counters["stats"]["unique_graphs"] == 1 and relative(found, expected) <= 1e-6


def assert_logits_of_eager(name, family, caplog) -> None:
    model, kind = loaded(name, family, torch.float32), list(kinds(name, family).values())
    found = compiled_once(model, told(kind.count("CheckpointLinear"), kind.count("CheckpointExperts")), caplog)
    assert relative(found, logits(model)) <= 1e-5
    assert relative(found, logits(reference(name, family, torch.float32))) <= 1e-5
    assert torch.equal(found.argmax(-1), logits(model).argmax(-1))


@pytest.mark.parametrize("name, family", params(COMPILE.cases, BY_INDUCTOR))
def test_one_graph_gives_the_logits_of_eager(name, family, caplog):
    assert_logits_of_eager(name, family, caplog)


@pytest.mark.parametrize("name, family", BY_THE_BACKEND)
def test_what_the_backend_hands_to_inductor_gives_the_logits_of_eager(name, family, as_traced, caplog):
    assert_logits_of_eager(name, family, caplog)


@pytest.mark.parametrize("name", ["ct-mxfp4", "modelopt-nvfp4"])
def test_kept_inputs_are_in_the_graph(name):
    kept = load(name, dtype=torch.float32, quantization_config=choosing(name, activation_quant="keep"))
    one, plain = (m.model.layers[1].mlp.up_proj for m in (kept, loaded(name, "llama", torch.float32)))
    x = torch.randn(5, 96)
    found = torch.compile(one, backend="marlin_w4a16", fullgraph=True)(x)
    assert relative(found, one(x)) <= 1e-5 < relative(found, plain(x))
