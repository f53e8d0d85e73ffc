"""Stacks of gpt-oss held against its scheme."""

from pathlib import Path

import pytest

from checkpoints.headers import Tensor, fields
from marlin_w4a16.checkpoints import gpt_oss
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Contents, contents

STACK = "model.layers.0.mlp.experts.gate_up_proj"
BLOCKS: Tensor = ("U8", (8, 4, 2, 16))


def hold_stack(path: str = STACK, **leaves: Tensor | None) -> Contents:
    """Tensors of gpt-oss, joined to their path by ``_``; and a router."""
    made = {"blocks": BLOCKS, "scales": ("U8", (8, 4, 2)), "bias": ("BF16", (8, 4)), **leaves}
    named = {f"{path}_{leaf}": tensor for leaf, tensor in made.items() if tensor is not None}
    named |= {"model.layers.0.mlp.router.weight": ("BF16", (8, 64))}
    entries = {name: Entry(Path("folder/x.safetensors"), *tensor) for name, tensor in named.items()}
    return contents(entries, gpt_oss.scheme(fields({})))


def test_a_stack_is_one_layer_of_all_experts():
    held = hold_stack()
    (found,) = held.layers.values()
    assert (found.path, found.n, found.k, found.group, found.experts) == (STACK, 4, 64, 32, 8)
    assert (found.format, found.nbytes) == ("MXFP4 group 32", 8 * 4 * (32 + 2))
    assert [found.name(leaf) for leaf in found.entries] == [f"{STACK}_blocks", f"{STACK}_scales"]
    assert held.others.keys() == {f"{STACK}_bias", "model.layers.0.mlp.router.weight"} and not held.problems


@pytest.mark.parametrize(
    "leaf, tensor, found, expected",
    [
        ("scales", None, "no such tensor beside blocks", "one (gpt-oss MXFP4)"),
        ("blocks", None, "no such tensor beside scales", "one (gpt-oss MXFP4)"),
        ("blocks", ("I8", (8, 4, 2, 16)), "I8 [8, 4, 2, 16]", "dtype U8"),
        ("scales", ("F8_E8M0", (8, 4, 2)), "F8_E8M0 [8, 4, 2]", "dtype U8"),
        ("scales", ("U8", (8, 4, 3)), "U8 [8, 4, 3]", "[experts, n, k / 32] for codes U8 [8, 4, 2, 16]"),
        ("scales", ("U8", (7, 4, 2)), "U8 [7, 4, 2]", "shape [8, 4, 2]"),
        ("scales", ("U8", (8, 3, 2)), "U8 [8, 3, 2]", "shape [8, 4, 2]"),
        ("blocks", ("U8", (8, 4, 32)), "U8 [8, 4, 32]", "shape [8, 4, 2, 16]"),
    ],
)
def test_a_stack_that_is_wrong(leaf, tensor, found, expected):
    held = hold_stack(**{leaf: tensor})
    assert [str(p) for p in held.problems] == [f"x.safetensors: {STACK}_{leaf}: found {found}, expected {expected}"]
    assert not held.layers and f"{STACK}_bias" in held.others


def test_a_stack_that_is_of_no_experts():
    (found,) = hold_stack("model.layers.0.mlp.up_proj", bias=None).problems
    expected = "a dense weight: the config says it is not among the quantised layers"
    assert (found.found, found.expected) == ("U8 [8, 4, 2, 16]", expected)
