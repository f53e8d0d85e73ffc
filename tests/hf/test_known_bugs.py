"""The wrong outputs that other engines are known for, planted one by one: each must fail the comparison in float32.

Most are planted in a copy of the files: what a correct reader loads from it is what a wrong one makes of the original.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import damage
from checkpoints.formats import write
from hf.dense import relative
from hf.loading import experts_of, load, loaded, logits, read, reference

GATE = 1e-5
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]
NEMOTRON, GPT_OSS, DEEPSEEK = (("modelopt-nemotron", "nemotronh"), ("gpt-oss", "gptoss"), ("deepseek-v4", "deepseekv4"))


of = "-".join  # a case, in the name of its test


def error(model, case: tuple[str, str]) -> float:
    """How far a model is from the exact one of a checkpoint."""
    return relative(logits(model), logits(reference(*case, torch.float32)))


def rewritten(case: tuple[str, str], folder: Path, change: Change) -> Path:
    """A copy of a checkpoint whose tensors are a function of what they were."""
    write(*case, folder)
    path = folder / "model.safetensors"
    after = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(after, path, metadata={"format": "pt"})
    return folder


def of_experts(suffix: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Changes the experts' tensors of a name."""

    def changed(tensors: Tensors) -> Tensors:
        chosen = {n for n in tensors if ".experts" in n and n.endswith(suffix)}
        assert chosen
        return {n: change(t) if n in chosen else t for n, t in tensors.items()}

    return changed


def collapsed(suffix: str, largest: Callable[[Tensor], Tensor], key: Callable[[str], str]) -> Change:
    """Global scales of one key become that of the largest weight."""

    def changed(tensors: Tensors) -> Tensors:
        groups: dict[str, list[str]] = {}
        for name in tensors:
            if ".experts." in name and name.endswith(suffix):
                groups.setdefault(key(name), []).append(name)
        assert any(len(names) > 1 for names in groups.values())
        most = {name: largest(torch.stack([tensors[n] for n in names])) for names in groups.values() for name in names}
        return {name: most.get(name, tensor).clone() for name, tensor in tensors.items()}

    return changed


def layer_of(name: str) -> str:
    return name.partition(".experts.")[0]


def swapped(first: str, second: str) -> Change:
    """Each tensor with a part of its name takes the place of that with the other."""

    def name_of(name: str) -> str:
        for one, other in ((first, second), (second, first)):
            if ".experts." in name and f".{one}." in name:
                return name.replace(f".{one}.", f".{other}.")
        return name

    return lambda tensors: {name_of(name): tensor for name, tensor in tensors.items()}


def halves(stack: Tensor) -> Tensor:
    """Rows that alternate are read as halves."""
    return torch.cat([stack[:, ::2], stack[:, 1::2]], 1)


def alternating(stack: Tensor) -> Tensor:
    """Halves are read as rows that alternate."""
    return torch.stack(stack.chunk(2, 1), 2).flatten(1, 2)


def interleave_ignored(tensors: Tensors) -> Tensors:
    leaves = ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias")
    return {name: halves(tensor) if name.endswith(leaves) else tensor for name, tensor in tensors.items()}


FACTOR, DIVISOR = "weight_scale_2", "weight_global_scale"
IN_FILES: dict[str, tuple[tuple[str, str], Change]] = {
    "global scale dropped": (("modelopt-w4a16", "qwen3moe"), of_experts(FACTOR, torch.ones_like)),
    "global scale inverted": (("modelopt-w4a16", "qwen3moe"), of_experts(FACTOR, torch.reciprocal)),
    "global scales of experts collapsed": (
        ("modelopt-w4a16", "qwen3moe"), collapsed(FACTOR, lambda t: t.amax(0), layer_of),
    ),
    "divisor dropped": (("ct-nvfp4a16", "glm4moe"), of_experts(DIVISOR, torch.ones_like)),
    "divisor taken as a factor": (("ct-nvfp4a16", "glm4moe"), of_experts(DIVISOR, torch.reciprocal)),
    "divisors of gate and up collapsed": (
        ("ct-nvfp4a16", "mixtral"), collapsed(DIVISOR, lambda t: t.amin(0), lambda name: name.replace(".w1.", ".w3.")),
    ),
    "global scale rounded to bfloat16": (
        ("modelopt-w4a16", "mixtral"), of_experts(FACTOR, lambda t: t.bfloat16().float()),
    ),
    "global scales of relu2 experts collapsed": (NEMOTRON, collapsed(FACTOR, lambda t: t.amax(0), layer_of)),
    "gate and up swapped": (("ct-mxfp4a16", "deepseekv3"), swapped("gate_proj", "up_proj")),
    "w1 and w3 swapped": (("modelopt-nvfp4", "mixtral"), swapped("w1", "w3")),
    "w1 and w3 of DeepSeek swapped": (DEEPSEEK, swapped("w1", "w3")),
    "interleave ignored": (GPT_OSS, interleave_ignored),
    "interleave ignored in the bias only": (GPT_OSS, of_experts("gate_up_proj_bias", halves)),
    "bias interleaved twice": (GPT_OSS, of_experts("gate_up_proj_bias", alternating)),
    "biases of other experts": (GPT_OSS, of_experts("down_proj_bias", lambda tensor: tensor.roll(1, 0))),
    "nibbles swapped": (GPT_OSS, of_experts("down_proj_blocks", lambda t: t >> 4 | t << 4)),
    "correction bias dropped": (
        ("ct-mxfp4a16", "deepseekv3"),
        lambda tensors: {n: t * 0 if n.endswith("e_score_correction_bias") else t for n, t in tensors.items()},
    ),
    "table of experts by tokens not loaded": (
        DEEPSEEK, lambda tensors: {n: t * 0 if n.endswith("tid2eid") else t for n, t in tensors.items()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(dict.fromkeys(case for case, _ in IN_FILES.values())), ids=of)
def test_a_whole_checkpoint_passes(case):
    assert error(loaded(*case, torch.float32), case) <= GATE


@pytest.mark.parametrize(
    "case, change", IN_FILES.values(), ids=[f"{bug}, {of(case)}" for bug, (case, _) in IN_FILES.items()]
)
def test_a_bug_in_reading_fails(case, change, tmp_path):
    assert error(read(rewritten(case, tmp_path, change), dtype=torch.float32), case) > 10 * GATE


# Of the model that runs

FACTORS = [("ct-nvfp4a16", "glm4moe"), ("ct-mxfp4a16", "deepseekv3"), NEMOTRON, DEEPSEEK]


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("case", FACTORS, ids=of)
def test_a_factor_of_the_router_applied_so_often_fails(case, times):
    """The router has it in its weights already: experts must not apply it, nor drop it."""
    model = load(*case, dtype=torch.float32)
    assert error(model, case) <= GATE
    factor = model.config.routed_scaling_factor ** (times - 1)
    assert factor != 1
    for module in experts_of(model).values():
        module.register_forward_pre_hook(lambda _, args: (*args[:2], args[2] * factor))
    assert error(model, case) > 10 * GATE


@pytest.mark.parametrize("case", [GPT_OSS, DEEPSEEK], ids=of)
def test_a_dropped_clamp_fails(case, tmp_path):
    folder = write(*case, tmp_path)
    damage.configure_model(folder, swiglu_limit=1e6)
    assert error(read(folder, dtype=torch.float32), case) > 10 * GATE


def test_weights_of_experts_before_the_bias_fail():
    """Top-k weights belong after the bias of the second product."""
    model = load(*GPT_OSS, dtype=torch.float32)
    for path, module in experts_of(model).items():
        bias = reference(*GPT_OSS, torch.float32).get_parameter(f"{path}.down_proj_bias")
        module.register_forward_hook(lambda _, args, out, bias=bias: out + unweighted(bias, *args[1:]))
    assert error(model, GPT_OSS) > 10 * GATE


def unweighted(bias: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What is added where biases are not multiplied with the weights of experts."""
    return (bias[index] * (1 - weights[..., None])).sum(1)
