"""LoRA by peft on loaded models: what it computes, trains, saves and refuses."""

import copy

import peft
import pytest
import torch
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

from checkpoints.formats import written
from hf.dense import dense, relative, tensors_of
from hf.loading import kinds, load, loaded, logits, prompts, same, stored
from hf.matrix import ADAPTERS, MIXTURES, PARTLY, params
from marlin_w4a16.hf import report

NAME = "ct-nvfp4a16"
SOME = ["q_proj", "o_proj", "down_proj"]
TOKENS = prompts()[:2, :12]


def adapted(model, targets=SOME):
    """With an adapter of random numbers, the same in every model."""
    chosen = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in sorted(chosen.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return chosen


def gradients(model):
    """The loss, and the gradients of the embedded inputs and of all that has one: an indexer only chooses."""
    inputs = []

    def keep(_, __, embedded):
        inputs.append(embedded.detach().requires_grad_())
        return inputs[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    loss = torch.nn.functional.cross_entropy(model(TOKENS).logits.flatten(0, 1), TOKENS.flatten())
    hook.remove()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {"inputs": inputs[0].grad, **found}


def base(model) -> dict:
    """All tensors that no adapter trains."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "lora_" not in name}


# PEFT takes the first three for parameters of dense experts in some models, and refuses the last in Mamba.
NOT_BESIDE_EXPERTS = ("gate_proj", "up_proj", "down_proj", "lm_head", "out_proj")


def beside_experts(model) -> list[str]:
    """Paths of linears that have an adapter in a dense mixture of experts and in a packed one."""
    plain = [path for path, module in model.named_modules() if type(module) is torch.nn.Linear]
    return [path for path in plain if not path.endswith(NOT_BESIDE_EXPERTS)]


@pytest.mark.parametrize("name, family", params(ADAPTERS.cases, PARTLY))
def test_gradients_are_those_of_the_dense_model(name, family):
    plain = dense(written(name, family), torch.float32)
    targets = "all-linear" if "lm_head" not in kinds(name, family) else [*SOME, "lm_head"]
    if (name, family) in MIXTURES:
        targets = beside_experts(plain)
    packed = load(name, family, dtype=torch.float32)
    expected_loss, expected = gradients(adapted(plain, targets))
    loss, found = gradients(adapted(packed, targets))
    assert relative(loss, expected_loss) <= 1e-5
    assert found.keys() == expected.keys() and len(found) >= 13
    assert all("lora_" in key or key == "inputs" for key in found)
    for key, gradient in found.items():
        assert relative(gradient, expected[key]) <= 1e-5, key


@pytest.mark.parametrize("name", [NAME, "modelopt-mixed", "modelopt-awq"])
def test_training_changes_the_adapters_only(name, tmp_path):
    model = adapted(load(name, dtype=torch.float32).train(), "all-linear")
    before = base(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(gradients(model)[0])
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(same(t, before[key]) for key, t in base(model).items())
    model.unload().save_pretrained(tmp_path)
    quantised, found = kinds(name, "llama"), tensors_of(tmp_path)
    assert all(same(found[key], t) for key, t in stored(name).items() if key.rpartition(".")[0] in quantised)


def test_training_under_checkpointing():
    model = adapted(load(NAME, dtype=torch.float32).train())
    expected = gradients(model)[1]
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for parameter in model.parameters():
        parameter.grad = None
    found = gradients(model)[1]
    assert all(relative(found[key], gradient) <= 1e-5 for key, gradient in expected.items())


def test_in_bfloat16():
    """Adapters are float32 beside it, as beside a dense model."""
    packed, plain = (adapted(m) for m in (load(NAME), dense(written(NAME, "llama"), torch.bfloat16)))
    found, expected = gradients(packed)[1], gradients(plain)[1]
    assert {g.dtype for key, g in found.items() if key != "inputs"} == {torch.float32}
    assert all(relative(found[key], gradient) <= 5e-2 for key, gradient in expected.items())


def test_adapters_are_saved_alone_and_load_again(tmp_path):
    model = adapted(load(NAME, dtype=torch.float32))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    found = tensors_of(tmp_path)
    assert len(found) == 12 and all("lora_" in key for key in found)
    again = PeftModel.from_pretrained(load(NAME, dtype=torch.float32), tmp_path)
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(loaded(NAME, "llama", torch.float32)))


@pytest.mark.skipif(Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="transformers wants a newer peft")
def test_adapters_that_transformers_adds(tmp_path):
    model = load(NAME, dtype=torch.float32)
    model.add_adapter(LoraConfig(r=4, target_modules=SOME, init_lora_weights=False))
    expected = logits(model)
    assert relative(expected, logits(loaded(NAME, "llama", torch.float32))) > 1e-3
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists() and all("lora_" in key for key in tensors_of(tmp_path))
    again = load(NAME, dtype=torch.float32)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), expected)
    again.delete_adapter("default")
    assert torch.equal(logits(again), logits(loaded(NAME, "llama", torch.float32)))


def test_a_second_adapter():
    model = adapted(load(NAME, dtype=torch.float32))
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert relative(logits(model), first) > 1e-3


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_merging_is_refused(targets):
    models = [adapted(load(NAME, dtype=torch.float32), targets)]
    models.append(
        get_peft_model(load(NAME, dtype=torch.float32), IA3Config(target_modules=targets, feedforward_modules=[]))
    )
    for model in models:
        expected = logits(model)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"found a packed weight, expected .* by model.dequantize\(\)"):
                merge()
        assert torch.equal(logits(model), expected)


def test_a_dequantized_model_can_be_merged():
    model = adapted(load(NAME, dtype=torch.float32).dequantize())
    expected = logits(model)
    assert relative(logits(model.merge_and_unload()), expected) <= 1e-5


def test_a_compiled_model_with_adapters():
    layer = adapted(load(NAME, dtype=torch.float32)).base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 160)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.lora_A.parameters()))[0]
    run = torch.compile(layer, backend="marlin_w4a16", fullgraph=True)
    found = torch.autograd.grad(run(x).square().sum(), list(layer.lora_A.parameters()))[0]
    assert relative(run(x).detach(), layer(x).detach()) <= 1e-5 and relative(found, expected) <= 1e-5


def test_the_base_of_an_adapted_model_stays_loaded_from_its_checkpoint():
    model = load(NAME)
    adapted(model)
    assert len(report(model).layers) == 14 and str(report(copy.deepcopy(model))) == str(report(model))


def test_trainers_may_train_it():
    from transformers.trainer_utils import validate_quantization_for_training

    model = load("modelopt-w4a16")
    with pytest.raises(ValueError, match="adapters"):
        validate_quantization_for_training(model)
    validate_quantization_for_training(adapted(model))
