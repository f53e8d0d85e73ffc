"""Which linears of a model quantize() takes, and what it says of the others."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from marlin_w4a16 import PackedLinear, prepare, quantize, quantize_mxfp4, quantize_nvfp4
from swaps import MLP, done, refusals

REGISTERED = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
HOOKS = "it has hooks, which a PackedLinear would lose"


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(96, 64), nn.Linear(64, 64), nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


# What is left as it is


def hooked(register: str) -> nn.Module:
    linear = nn.Linear(64, 64)
    getattr(linear, register)(lambda *args: None)
    return linear


def with_(module: nn.Module, **attributes) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def filled(value: float) -> nn.Linear:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight[5, 7] = value
    return linear


def empty() -> nn.Parameter:
    return nn.Parameter(torch.empty(0, 64))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


NOT_FINITE = "its weight: found NaN or Inf, expected finite values"
COMPUTED = "its weight is computed, by a parametrisation or a hook"
SMALL = "its weight is 4 x 64, 1.0 KiB; packed, in whole tiles, it would be 2.3 KiB"
LEFT = [
    (lambda: nn.Linear(72, 64), "its weight is 64 x 72, expected columns in groups of 16"),
    (lambda: with_(nn.Linear(64, 64), weight=nn.Parameter(torch.empty(0, 64))),
     "its weight is 0 x 64, expected columns in groups of 16"),
    (lambda: nn.Linear(64, 4), SMALL),
    (lambda: nn.Linear(64, 64, device="meta"), "its weight holds no values: it is on the meta device"),
    (lambda: nn.Linear(64, 64).double(), "its weight is torch.float64, expected one of"),
    (lambda: Scaled(64, 64), "a Scaled computes something else than nn.Linear"),
    (lambda: nn.LazyLinear(64), "it has hooks"),
    (lambda: with_(nn.Linear(64, 64), forward=lambda x: x), "its forward has been replaced"),
    (lambda: with_(nn.Linear(64, 64), weight=None), "it has no weight"),
    (lambda: with_(nn.Linear(64, 64), scale=nn.Parameter(torch.ones(1))), "it also holds scale"),
    (lambda: with_(nn.Linear(64, 64), adapter=nn.ReLU()), "it also holds adapter"),
    (lambda: parametrizations.weight_norm(nn.Linear(64, 64)), COMPUTED),
    (lambda: parametrizations.orthogonal(nn.Linear(64, 64), "weight"), COMPUTED),
    pytest.param(lambda: weight_norm(nn.Linear(64, 64)), COMPUTED, marks=pytest.mark.filterwarnings("ignore")),
    (lambda: filled(torch.nan), NOT_FINITE), (lambda: filled(-torch.inf), NOT_FINITE),
    *((lambda name=name: hooked(f"register_{name}"), HOOKS) for name in REGISTERED),
    (lambda: with_(nn.Linear(64, 64), _hf_hook=object()), HOOKS),
]  # fmt: skip


@pytest.mark.parametrize("make, reason", LEFT)
def test_a_linear_that_cannot_be_swapped_is_left_with_the_reason(make, reason):
    left = make()
    model = nn.Sequential(left, nn.Linear(64, 64))
    swaps = quantize(model, "nvfp4")
    assert refusals(swaps)["0"].startswith(reason) and done(swaps) == ["1"]
    assert model[0] is left


def test_groups_of_32_are_asked_for_by_mxfp4_alone():
    model = nn.Sequential(nn.Linear(48, 64))
    assert refusals(quantize(model, "mxfp4")) == {"0": "its weight is 64 x 48, expected columns in groups of 32"}
    assert done(quantize(model, "nvfp4")) == ["0"]


def test_typed_weights_are_left():
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = MLP()
    quantize_(model, NVFP4WeightOnlyConfig())
    assert refusals(quantize(model, "nvfp4"))["up"] == "its weight is of NVFP4Tensor, no plain parameter"
    assert len(prepare(model).done) == 2


def test_a_subclass_that_computes_what_nn_linear_does_is_swapped():
    assert done(quantize(nn.Sequential(type("Renamed", (nn.Linear,), {})(64, 64)), "nvfp4")) == ["0"]


def test_the_model_itself_is_left():
    module = nn.Linear(64, 64)
    assert refusals(quantize(module, "nvfp4")) == {
        "": "it is the model itself: quantize() swaps the modules in a model"
    }
    assert quantize(nn.ReLU(), "nvfp4").rows == ()


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        self.weight = nn.Parameter(self.a.weight[0].detach().clone())
        self.init(), self.reset()

    def init(self) -> None:
        nn.init.normal_(self.a.weight)

    def reset(self) -> None:
        self.a.weight.data.zero_()

    @property
    def dtype(self) -> torch.dtype:
        return self.c.weight.new_empty(0).dtype

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x * self.weight).to(self.b.weight.dtype).clamp(max=self.b.weight.max())
        return self.d(self.c(self.b(x).to(self.dtype)).to(self.d.weight.device, self.d.weight.dtype))


def test_a_linear_whose_weight_the_code_around_it_reads_is_left():
    model, reads = Reads(), "reads its weight, which is empty in a PackedLinear"
    assert refusals(quantize(model, "nvfp4")) == {"b": f"Reads.forward {reads}", "c": f"Reads.dtype {reads}"}
    assert model(torch.randn(2, 64)).shape == (2, 64)


def test_an_encoder_layer_of_torch_still_runs():
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    with torch.no_grad():
        swaps = quantize(model, "nvfp4")
        reads = "forward reads its weight, which is empty in a PackedLinear"
        assert refusals(swaps) == {
            "self_attn": "a MultiheadAttention computes with its in_proj_weight by itself: no packed module does that",
            "self_attn.out_proj": f"MultiheadAttention.{reads}",
            "linear1": f"TransformerEncoderLayer.{reads}",
            "linear2": f"TransformerEncoderLayer.{reads}",
        }
        assert model(torch.randn(2, 5, 64)).shape == (2, 5, 64)


def test_a_weight_that_is_read_only_if_it_is_a_tensor_does_not_count():
    from transformers.models.t5 import modeling_t5 as t5

    model = t5.T5DenseActDense(t5.T5Config(d_model=64, d_ff=96, dropout_rate=0))
    assert done(quantize(model, "nvfp4")) == ["wi", "wo"] and model(torch.randn(2, 64)).shape == (2, 64)


# Weights that something else holds too


def test_a_tied_head_is_left():
    model = Tied()
    before = model.head.weight
    assert refusals(quantize(model, "nvfp4")) == {
        "head": "its weight is embed.weight too: packed, it would be held beside that; 'head' in include unties it"
    }
    assert model.head.weight is before is model.embed.weight


@pytest.mark.parametrize("include", ["head", "head.weight", ("*", "head")])
@pytest.mark.parametrize("format, quantise", [("nvfp4", quantize_nvfp4), ("mxfp4", quantize_mxfp4)])
def test_a_tied_head_that_is_named_is_untied(include, format, quantise):
    model = Tied()
    dense = model.embed.weight.detach().clone()
    swaps = quantize(model, format, include=include)
    row = swaps.rows[-1]
    assert str(swaps).splitlines()[2].endswith("swapped; untied from embed.weight")
    assert (row.path, row.refusal, row.note, row.before) == ("head", None, "untied from embed.weight", 0)
    assert isinstance(model.head, PackedLinear)
    assert torch.equal(model.head.to_fp4().decode(), quantise(dense).decode())
    assert torch.equal(model.embed.weight, dense) and model(torch.tensor([3])).shape == (1, 96)


@pytest.mark.parametrize("include", ["*", "*head", "[h]ead"])
def test_a_glob_names_nothing(include):
    assert "head" in refusals(quantize(Tied(), "nvfp4", include=include))


def test_a_head_tied_by_its_memory_alone_is_left():
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    assert list(refusals(quantize(model, "nvfp4"))) == ["head"]


def sharing(*biases: bool) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(64, 64, bias) for bias in biases))
    for linear in model:
        linear.weight = model[0].weight
    return model


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False, True)])
def test_linears_that_share_a_weight_share_the_packed_one(biases):
    model, x = sharing(*biases), torch.randn(2, 64)
    exact = quantize_nvfp4(model[0].weight.detach()).decode(torch.float32)
    expected = [nn.functional.linear(x, exact, linear.bias) for linear in model]
    swaps = quantize(model, "nvfp4")
    notes = [None, *["shares the packed weight of 0"] * (len(biases) - 1)]
    assert [row.note for row in swaps.done] == notes and [row.before for row in swaps.rows[1:]] == [0] * len(notes[1:])
    assert len({linear.words.data_ptr() for linear in model}) == 1
    for linear, wanted in zip(model, expected, strict=True):
        torch.testing.assert_close(linear(x), wanted)
    model.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    assert len({linear.words.data_ptr() for linear in twin}) == 1


def test_a_weight_that_a_dense_linear_needs_too_is_left_and_untied_by_name():
    model = sharing(False, False, False)
    left = refusals(quantize(model, "nvfp4", exclude="2"))
    assert {path: reason.split(" too")[0] for path, reason in left.items()} == {
        "0": "its weight is 2.weight",
        "1": "its weight is 2.weight",
        "2": "it matches exclude='2'",
    }
    assert done(quantize(model, "nvfp4", include=("*", "1"), exclude="2")) == ["1"]


def test_a_buffer_in_the_memory_of_a_weight_counts_and_parts_side_by_side_do_not():
    fused, model = torch.randn(192, 64), nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    for linear, part in zip(model, fused.split(64), strict=True):
        linear.weight = nn.Parameter(part)
    model.register_buffer("kept", fused[60:64].t())
    assert refusals(quantize(model, "nvfp4")) == {
        "0": "its weight is kept too: packed, it would be held beside that; '0' in include unties it"
    }


# Chosen by their paths


@pytest.mark.parametrize(
    "include, exclude, expected",
    [
        (None, (), ["up", "down", "lm_head", "x.router"]), (None, None, ["up", "down"]), ("*p", None, ["up"]),
        (("up", "d*"), None, ["up", "down"]), ("*.weight", None, ["up", "down"]),
        ("*", "up", ["down", "lm_head", "x.router"]), (None, ["up.weight", "l*"], ["down", "x.router"]),
        ("up", "u*", []), ("lm_head", None, ["lm_head"]), (("*", "x.router"), None, ["up", "down", "x.router"]),
        ("lm_head", "lm_head", []), ("UP", None, []), ((), None, []),
    ],
)  # fmt: skip
def test_globs_choose(include, exclude, expected):
    model = MLP()
    model.lm_head, model.x = nn.Linear(64, 64), nn.ModuleDict({"router": nn.Linear(64, 64)})
    swaps = quantize(model, "nvfp4", include, exclude)
    assert done(swaps) == expected and len(swaps.rows) == 4
    assert [path for path, m in model.named_modules() if isinstance(m, PackedLinear)] == expected


def test_what_the_paths_leave_says_why():
    reasons = refusals(quantize(MLP(), "nvfp4", include=("up", "x"), exclude="u?"))
    assert reasons == {"up": "it matches exclude='u?'", "down": "it matches none of include='up', 'x'"}


@pytest.mark.parametrize("path", ["lm_head", "a.proj_out", "m.0.mlp.gate", "m.mlp.shared_expert_gate", "visual.fc"])
def test_usually_dense_are_heads_routers_and_vision(path):
    model = nn.Linear(64, 64)
    for name in reversed(path.split(".")):
        model = nn.ModuleDict({name: model, "gate_proj": nn.Linear(64, 64)})
    left = refusals(quantize(model, "nvfp4"))
    assert path in left and "gate_proj" not in left
    assert done(quantize(model, "nvfp4", include=("*", path))) == [path]


@pytest.mark.parametrize(
    "choice, expected", [({"exclude": "b"}, []), ({"include": "b"}, ["a"]), ({"include": "c"}, [])]
)
def test_every_path_of_a_linear_counts(choice, expected):
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    model["b"] = model["a"]
    assert done(quantize(model, "nvfp4", **choice)) == expected


def test_one_that_is_named_may_grow():
    assert done(quantize(nn.Sequential(nn.Linear(64, 4)), "nvfp4", include="0")) == ["0"]


@pytest.mark.parametrize("choice", [{"include": 3}, {"exclude": 3}, {"include": [3]}, {"exclude": [None]}])
def test_a_choice_of_another_type_raises(choice):
    with pytest.raises(TypeError, match=r"include|exclude"):
        quantize(MLP(), "nvfp4", **choice)
