"""Experts of a checkpoint: one layer for each, or one for all; the tensors of an expert, and back."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints.formats import FORMATS, written
from checkpoints.headers import fields
from marlin_w4a16.checkpoints import deepseek, experts, files, gpt_oss, modelopt
from marlin_w4a16.checkpoints.experts import Stack, StoredMixture, alike, read_weights, some_at_a_time
from marlin_w4a16.checkpoints.layers import Layer, contents
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.kernels.experts import fit_each, pack_first

aten = torch.ops.aten
DEEPSEEK = "layers.1.ffn.experts"
GPT_OSS = "model.layers.1.mlp.experts"
NEMOTRON = "backbone.layers.1.mixer.experts"


def layers_of(name: str, scheme: Scheme | None = None) -> dict[str, Layer]:
    folder = written(name, FORMATS[name].family)
    made = scheme or modelopt.scheme(fields(files.quantization_of(folder)[1]))
    return dict(contents(files.entries(files.files_of(folder)), made).layers)


def stack(layers: dict[str, Layer], name: str, *paths: str) -> Stack:
    return Stack(name, tuple(layers[path] for path in paths))


def each(layers: dict[str, Layer], module: str, name: str) -> Stack:
    return stack(layers, name, *(f"{module}.{i}.{name}" for i in range(4)))


@pytest.fixture(scope="module")
def stacks() -> dict[str, Stack]:
    """One projection of four experts, by format."""
    made = {
        "gpt-oss": stack(layers_of("gpt-oss", gpt_oss.scheme(fields({}))), "gate_up_proj", f"{GPT_OSS}.gate_up_proj")
    }
    made["modelopt-nemotron"] = each(layers_of("modelopt-nemotron"), NEMOTRON, "up_proj")
    for name in ("deepseek-v4", "deepseek-v4-fp32", "deepseek-v4-inv"):
        made[name] = each(layers_of(name, deepseek.scheme(fields({}))), DEEPSEEK, "w1")
    return made


NAMES = ["gpt-oss", "modelopt-nemotron", "deepseek-v4", "deepseek-v4-fp32", "deepseek-v4-inv"]
# experts, rows and columns, leaves beside codes and scales, and the names of the first expert's tensors
LOOKS = {
    "gpt-oss": (320, 96, (), ["gate_up_proj_blocks", "gate_up_proj_scales"]),
    "modelopt-nemotron": (96, 64, ("weight_scale_2",), ["0.up_proj.weight", "0.up_proj.weight_scale",
                                                        "0.up_proj.weight_scale_2"]),
    "deepseek-v4": (96, 96, (), ["0.w1.weight", "0.w1.scale"]),
    "deepseek-v4-fp32": (96, 96, (), ["0.w1.weight", "0.w1.scale"]),
    "deepseek-v4-inv": (96, 96, (), ["0.w1.weight", "0.w1.weight_scale_inv"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_stack(name, stacks):
    one = stacks[name]
    rows, columns, small, names = LOOKS[name]
    assert (one.experts, one.like.n, one.like.k, one.like.small) == (4, rows, columns, small)
    module = one.like.path.removesuffix(f".{one.name}").removesuffix(".0")
    assert [one.like.name(leaf) for leaf in one.like.entries] == [f"{module}.{leaf}" for leaf in names]


@pytest.mark.parametrize("name", NAMES)
def test_named_is_the_inverse_of_read(name, stacks):
    one = stacks[name]
    with Reader(torch.device("cpu")) as reader:
        tensors = [one.read(expert, reader) for expert in range(one.experts)]
    found = dict(one.named(iter(tensors)))
    stored = load_file(written(name, FORMATS[name].family) / "model.safetensors")
    names = {layer.name(leaf) for layer in one.layers for leaf in layer.entries}
    assert found.keys() == names and len(names) == (2 if name == "gpt-oss" else 4 * len(one.like.entries))
    assert all(same(tensor, stored[key]) for key, tensor in found.items())


def same(found: Tensor, expected: Tensor) -> bool:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_of_each_expert_is_its_own(name, stacks):
    one = stacks[name]
    with Reader(torch.device("cpu")) as reader:
        weights = [one.weight(one.read(expert, reader)) for expert in range(one.experts)]
    decoded = [weight.decode() for weight in weights]
    assert {tuple(values.shape) for values in decoded} == {LOOKS[name][:2]}
    assert not any(torch.equal(decoded[0], other) for other in decoded[1:])


@pytest.mark.parametrize("name", NAMES)
def test_some_experts_are_read_as_each_by_itself(name, stacks):
    one = stacks[name]
    with Reader(torch.device("cpu")) as reader:
        small = one.small(reader)
        alone = [one.read(expert, reader) for expert in range(4)]
        found = [read_weights([one], some, {one.name: small}, reader) for some in (range(3), range(3, 4))]
    assert small.keys() == set(one.like.small) and all(len(tensor) == 4 for tensor in small.values())
    assert all(same(small[leaf][e], tensors[leaf]) for e, tensors in enumerate(alone) for leaf in small)
    assert [weight.codes.shape[0] for weight in found] == [3, 1]
    for field in ("codes", "scales", "multiplier"):
        expected = torch.stack([getattr(one.weight(tensors), field) for tensors in alone])
        assert torch.equal(torch.cat([getattr(weight, field) for weight in found]), expected)


def test_stacks_that_are_alike_are_read_as_one():
    """Gate and up with a global scale of their own each, one expert after the other."""
    layers = layers_of("modelopt-nemotron")
    up = each(layers, NEMOTRON, "up_proj")
    other = Stack("other", up.layers[::-1])  # any stack of the same shape
    assert alike([up, other]) and not alike([up, each(layers, NEMOTRON, "down_proj")])
    with Reader(torch.device("cpu")) as reader:
        small = {stack.name: stack.small(reader) for stack in (up, other)}
        both = read_weights([up, other], range(1, 4), small, reader)
        for at, stack in enumerate((up, other)):
            alone = read_weights([stack], range(1, 4), small, reader)
            for field in ("codes", "scales", "multiplier"):
                assert torch.equal(getattr(both, field)[at::2], getattr(alone, field))
    assert len(set(both.multiplier[:, 0].tolist())) > 1


class Asked(TorchDispatchMode):
    """How often an operator makes the host wait for what a device computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (aten._local_scalar_dense, aten.equal, aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES[1:4])
def test_experts_are_asked_about_once_for_all(name, stacks):
    """Whether scales are NaN, and whether multipliers are finite; the ends of the range of E8M0 are a tensor."""
    one = stacks[name]
    with Reader(torch.device("cpu")) as reader:
        small = one.small(reader)
        for some in (range(1), range(4)):
            with Asked() as asked:
                weight = fit_each(read_weights([one], some, {one.name: small}, reader), torch.float16, torch.bfloat16)
                pack_first([weight], len(some), one.like.n // 2, "gate_up")
            assert asked.count == 2


def test_as_many_experts_are_read_at_a_time_as_are_held(stacks, monkeypatch):
    one, nbytes = stacks["deepseek-v4"], 96 * (48 + 3)
    assert list(some_at_a_time(one)) == [range(4)]
    for held, ranges in ((3 * nbytes, [range(3), range(3, 4)]), (1, [range(e, e + 1) for e in range(4)])):
        monkeypatch.setattr(experts, "_AT_A_TIME", held)
        assert list(some_at_a_time(one)) == ranges
    monkeypatch.setattr(experts, "_AT_A_TIME", 4 * nbytes)
    assert list(some_at_a_time(one, one)) == [range(2), range(2, 4)]


def test_too_few_experts_are_no_stack(stacks):
    one = stacks["deepseek-v4"]
    with Reader(torch.device("cpu")) as reader:
        tensors = [one.read(expert, reader) for expert in range(3)]
    with pytest.raises(ValueError, match="zip"):
        dict(one.named(iter(tensors)))


def test_a_mixture():
    layers = layers_of("deepseek-v4", deepseek.scheme(fields({})))
    gate, up, down = (each(layers, DEEPSEEK, name) for name in ("w1", "w3", "w2"))
    mixture = StoredMixture("model.layers.1.mlp.experts", (gate, up), down)
    assert mixture.stacks == (gate, up, down) and mixture.rows == 2 * 96
    assert [layer.path for layer in mixture.layers] == [
        f"{DEEPSEEK}.{i}.{name}" for name in ("w1", "w3", "w2") for i in range(4)
    ]
    assert (mixture.format, mixture.nbytes) == ("MXFP4 group 32", 12 * 96 * (48 + 3))


def test_the_formats_of_a_mixture_are_told_once(stacks):
    mixture = StoredMixture("x", (stacks["modelopt-nemotron"], stacks["deepseek-v4"]), stacks["gpt-oss"])
    assert mixture.format == "NVFP4 group 16 and MXFP4 group 32" and mixture.rows == 96 + 96


def test_experts_in_fp8_are_no_stack():
    layers = layers_of("modelopt-nemotron")
    with pytest.raises(TypeError, match=r"^backbone\.layers\.0\.mixer\.in_proj: found FP8 E4M3, expected FP4$"):
        _ = stack(layers, "in_proj", "backbone.layers.0.mixer.in_proj").storage


def test_a_stack_over_shards(tmp_path):
    """Codes and scales in different files are read together."""
    tensors = load_file(written("gpt-oss", "gptoss") / "model.safetensors")
    path = f"{GPT_OSS}.down_proj"
    for leaf in ("blocks", "scales"):
        save_file({f"{path}_{leaf}": tensors[f"{path}_{leaf}"]}, tmp_path / f"{leaf}.safetensors")
    entries = files.entries(sorted(tmp_path.glob("*")))
    one = stack(dict(contents(entries, gpt_oss.scheme(fields({}))).layers), "down_proj", path)
    with Reader(torch.device("cpu")) as reader:
        found = one.read(3, reader)
    assert all(same(found[leaf], tensors[f"{path}_{leaf}"][3]) for leaf in ("blocks", "scales"))
