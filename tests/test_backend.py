import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import marlin_w4a16.backend
from marlin_w4a16 import quantize_mxfp4
from scripts import LAYER

OP = torch.ops.marlin_w4a16.linear.default
X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


def compiled(model, **choices):
    return torch.compile(model, backend="marlin_w4a16", fullgraph=True, **choices)


CHOICES = {
    "default": {},
    "mode default": {"mode": "default"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    "options mode": {"options": {"mode": "max-autotune-no-cudagraphs"}},
    "options inductor": {"options": {"inductor": {"max_autotune": True, "epilogue_fusion": False}}},
    "options both": {"options": {"linear": True, "mode": "reduce-overhead", "inductor": {"triton.cudagraphs": False}}},
    "dynamic": {"dynamic": True},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_modes_and_options(fp4_linear, assert_near, said, choices):
    model = nn.Sequential(fp4_linear(64, 64), fp4_linear(32, 64, quantize_mxfp4))
    assert_near(compiled(model, **choices)(X), model(X))
    ((level, message),) = said()
    assert level == "INFO" and message.startswith(
        "replaced 2 of 2 FP4 linears (1 NVFP4 group 16, 1 MXFP4 group 32; 2 CPU blocks), packed copies of "
    )


def test_settings_for_inductor_reach_it(fp4_linear):
    graphs = []
    compiled(fp4_linear(), options={"inductor": {"post_grad_custom_post_pass": graphs.append}})(X)
    (graph,) = graphs
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [OP]


def test_linear_off_leaves_linears_to_inductor(fp4_linear, said):
    graphs = []
    options = {"linear": False, "inductor": {"post_grad_custom_post_pass": graphs.append}}
    model = fp4_linear()
    torch.testing.assert_close(compiled(model, options=options)(X), model(X))
    assert said() == [("INFO", "excluded 1")] and OP not in [n.target for n in graphs[0].nodes]


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"options": {"linaer": True}},
         "unknown option 'linaer'. Did you mean 'linear'? Known: activation_quant, exclude, grouped, include, "),
        ({"mode": "max-autotun"}, "unknown mode 'max-autotun'. Did you mean 'max-autotune'? Known: default, "),
    ],
)  # fmt: skip
def test_a_mistyped_choice_raises_with_the_nearest_name(fp4_linear, choices, message):
    with pytest.raises(Exception, match="ValueError") as caught:
        compiled(fp4_linear(), **choices)(X)
    assert message in str(caught.value)


def test_any_number_of_tokens_runs_one_compiled_graph(fp4_linear, assert_near, said):
    model = fp4_linear()
    run = compiled(model)
    for tokens in (7, 2, 33, 64):
        x = torch.randn(tokens, 64)
        torch._dynamo.mark_dynamic(x, 0)
        assert_near(run(x), model(x))
    assert len(said()) == 1


def test_a_model_without_fp4_is_warned_about_and_runs_as_with_inductor(said):
    model = nn.Linear(64, 64)
    torch.testing.assert_close(compiled(model)(X), model(X))
    ((level, message),) = said()
    assert level == "WARNING" and message.startswith("nothing to replace, so the graph runs as with Inductor")


def test_what_is_left_is_counted_beside_what_is_replaced(fp4_linear, assert_near, said):
    model = nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))
    model[1].table[3] = 1.4
    assert_near(compiled(model)(X), model(X))
    ((level, message),) = said()
    assert level == "INFO" and message.startswith("replaced 1 of 2 FP4 linears (1 NVFP4 group 16; 1 CPU blocks), ")
    assert "; left 1: 1 it is not NVFP4 group 16, low nibble first: row 0, column 63: expected " in message


def test_no_global_setting_is_touched(fp4_linear):
    def settings() -> tuple:
        configs = (torch._dynamo.config, torch._inductor.config, torch._functorch.config)
        return (
            *(config.get_config_copy() for config in configs),
            logging.getLogger("marlin_w4a16").handlers + logging.getLogger("marlin_w4a16").filters,
            logging.getLogger("marlin_w4a16").level, torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), dict(os.environ),
        )  # fmt: skip

    torch.compile(nn.Identity())(X)
    before = settings()
    compiled(fp4_linear(), mode="max-autotune")(X)
    assert settings() == before


def test_packed_tensors_are_static_inputs_of_the_compiled_graph(fp4_linear, monkeypatch, assert_near):
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    static: list[list[torch.dtype]] = []

    def inner(gm, example_inputs, **kwargs):
        static.append([example_inputs[i].dtype for i in kwargs["static_input_idxs"]])
        return compile_fx_inner(gm, example_inputs, **kwargs)

    monkeypatch.setattr(
        marlin_w4a16.backend,
        "compile_graph",
        lambda gm, inputs, patches: compile_fx(gm, inputs, inner_compile=inner, config_patches=patches),
    )
    model = fp4_linear()
    with torch.no_grad():
        found = compiled(model, options={"inductor": {"force_disable_caches": True}})(X)
    assert_near(found, model(X))
    assert static == [[torch.int32, torch.uint8, torch.float32]]


def test_a_deep_copy_of_a_compiled_model_has_its_own_weights(fp4_linear, assert_near):
    model = nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))
    run = compiled(model)
    run(X)
    other = copy.deepcopy(model)
    other.load_state_dict(nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64)).state_dict())
    run_other, run_copy = compiled(other), copy.deepcopy(run)
    for _ in range(2):
        assert_near(run(X), model(X))
        assert_near(run_other(X), other(X))
        assert_near(run_copy(X), model(X))


class Adapted(nn.Module):
    """A norm before an FP4 linear and a LoRA beside it: what is trained around a frozen weight."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64), linear
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.linear(h) + self.up(self.down(h))


def test_a_training_step_has_the_gradients_of_eager(fp4_linear, said, assert_near):
    eager = Adapted(fp4_linear())
    model = copy.deepcopy(eager)
    eager(X).pow(2).sum().backward()
    compiled(model)(X).pow(2).sum().backward()
    trained = [(p.grad, q.grad) for p, q in zip(eager.parameters(), model.parameters(), strict=True) if p.requires_grad]
    assert len(trained) == 3
    for expected, found in trained:
        assert expected.abs().sum() > 0
        assert_near(found, expected)
    assert said()[0][1].startswith("replaced 1 of 1 FP4 linears")


SCRIPT = f"""
import json, sys
import torch
from torch._dynamo.utils import counters
{LAYER}
torch.manual_seed(int(sys.argv[1]))
model, x = Layer(), torch.randn(3, 64)
imported = "marlin_w4a16" in sys.modules
error = float((torch.compile(model, backend="marlin_w4a16")(x) - model(x)).norm() / model(x).norm())
ran = "marlin_w4a16.passes.live.call" in sys.modules
print(json.dumps([imported, ran, error, counters["aot_autograd"], counters["inductor"]]))
"""


def test_it_is_found_by_name_and_a_second_process_finds_both_caches(tmp_path: Path):
    """The second process has other weights: what is cached is the program, not their values."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    found = []
    for seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, seed], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        imported, ran, error, autograd, inductor = json.loads(run.stdout)
        assert not imported and ran and error < 1e-5
        found.append((autograd, inductor))
    (first, _), (second, inductor) = found
    assert first["autograd_cache_miss"] == 1 and "autograd_cache_bypass" not in first
    assert second["autograd_cache_hit"] == 1 and "autograd_cache_miss" not in second
    assert inductor["fxgraph_cache_hit"] == 1 and "fxgraph_cache_bypass" not in inductor
