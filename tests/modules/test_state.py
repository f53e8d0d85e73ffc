"""What packed modules hold: tensors that nothing changes but what loads, moves and saves them."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from marlin_w4a16 import PackedExperts, PackedLinear, prepare, quantize, quantize_nvfp4
from marlin_w4a16.modules.state import PackedState
from marlin_w4a16.tensors import held_tensors
from mixtures.oracle import Mixture, draw_mixture, draw_routing
from modules.state import addresses, assert_same, bits

N, K, EXPERTS = 64, 96, 4
X = torch.linspace(-1, 1, 5 * K).view(5, K)


def linear(dtype: torch.dtype, bias: bool) -> PackedLinear:
    return PackedLinear(quantize_nvfp4(torch.randn(N, K)), torch.randn(N, dtype=dtype) if bias else None, dtype)


def experts(dtype: torch.dtype, bias: bool) -> PackedExperts:
    m: Mixture = draw_mixture(biases=bias)
    biases = (m.bias13.to(dtype), m.bias2.to(dtype)) if bias else (None, None)
    return PackedExperts(m.w13, m.w2, m.activation, m.order, *biases, dtype)


# What makes a module, its parameters, and the keys of its state dict; older files have no empty parameter among them.
ONE, TWO = (
    ["multiplier", "words", "scales"],
    ["multiplier13", "multiplier2", "words13", "scales13", "words2", "scales2"],
)
EMPTIES, BIASES = ["gate_up_proj", "down_proj"], ["bias13", "bias2"]
FORMS = {
    "linear": (linear, False, ["weight"], ["weight", *ONE, "_extra_state"]),
    "linear with a bias": (linear, True, ["bias", "weight"], ["bias", "weight", *ONE, "_extra_state"]),
    "experts": (experts, False, EMPTIES, [*EMPTIES, *TWO, "_extra_state"]),
    "experts with biases": (experts, True, [*BIASES, *EMPTIES], [*BIASES, *EMPTIES, *TWO, "_extra_state"]),
}


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


@pytest.fixture
def make(form) -> Callable[..., PackedState]:
    maker, bias, *_ = FORMS[form]
    return lambda dtype=torch.float32: maker(dtype, bias)


@pytest.fixture
def module(make) -> PackedState:
    return make()


def inputs(module: PackedState, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    if isinstance(module, PackedLinear):
        return (X.to(dtype, copy=True),)
    weights, ids = draw_routing(5, 2, EXPERTS)
    return torch.linspace(-1, 1, 5 * 64).view(5, 64).to(dtype), ids, weights


def test_its_packed_tensors_are_neither_parameters_nor_buffers(form, module):
    _, _, parameters, keys = FORMS[form]
    assert [name for name, _ in module.named_parameters()] == parameters
    assert not list(module.buffers()) and not any(p.requires_grad for p in module.parameters())
    packed = [key for key in keys if key not in (*parameters, "_extra_state")]
    assert list(module.bits()) == packed and all(type(getattr(module, name)) is Tensor for name in packed)


# The dtype of the activations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_its_first_parameter_has_the_dtype_of_its_activations(make, dtype):
    module = make(dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    for cast in (torch.float16, torch.float32, torch.bfloat16):
        first = next(module.to(cast).parameters())
        assert first.dtype == cast and module(*inputs(module, first.dtype)).dtype == cast
    assert next(module.to("meta").parameters()).is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantised_model_has_the_dtype_it_had(dtype, bias):
    model = nn.Sequential(nn.Linear(K, N, bias), nn.SiLU(), nn.Linear(N, K, bias)).to(dtype)
    quantize(model, "nvfp4", include=["0", "2"], progress=False)
    assert isinstance(model[0], PackedLinear) and {p.dtype for p in model.parameters()} == {dtype}
    assert model[0].weight.dtype == dtype and model[0].weight.device == model[0].words.device
    assert model(X.to(next(model.parameters()).dtype)).dtype == dtype


def test_the_bias_tells_the_dtype():
    assert PackedLinear(quantize_nvfp4(torch.randn(N, K)), torch.randn(N).half()).weight.dtype == torch.float16


def test_it_is_taken_for_no_dense_linear(module):
    model = nn.Sequential(module)
    for swaps in (quantize(model, "nvfp4", progress=False), prepare(model, progress=False)):
        assert [row.refusal for row in swaps.rows] == ["it is packed already"]


# What averages, sends or initialises everything

AVERAGES = {
    "equal": {}, "by hand": {"avg_fn": lambda averaged, new, n: averaged + (new - averaged) / (n + 1)},
    "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}  # fmt: skip


@pytest.mark.parametrize("how", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_average_of_a_packed_weight_is_that_weight(make, how, use_buffers):
    model = nn.Sequential(make(torch.bfloat16))
    average = AveragedModel(model, use_buffers=use_buffers, **how)
    for _ in range(3):
        average.update_parameters(model)
    packed = model[0].bits()
    assert_same(average.module[0].bits(), packed)
    assert all(
        found is not mine for found, mine in zip(average.module[0].bits().values(), packed.values(), strict=True)
    )


def test_nothing_initialises_it_or_asks_it_for_gradients(module):
    before = {name: tensor.clone() for name, tensor in module.bits().items()}
    for parameter in module.requires_grad_().parameters():
        nn.init.normal_(parameter)
    x, *routing = inputs(module)
    module(x.requires_grad_(), *routing).sum().backward()
    assert_same(module.bits(), before)
    assert not any(tensor.requires_grad for tensor in module.bits().values())


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("everything", [False, True], ids=["adapters", "everything"])
def test_distributed_training_sends_nothing_of_it(group, module, everything):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            width = inputs(module)[0].shape[-1]
            self.packed, self.down, self.up = module, nn.Linear(width, 4), nn.Linear(4, N)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
            return self.packed(x, *routing) + self.up(self.down(x))

    model = Adapted().requires_grad_() if everything else Adapted()
    before, ddp = {name: bit.clone() for name, bit in module.bits().items()}, DistributedDataParallel(model)
    assert [tensor is model.seen for tensor in ddp.modules_buffers] == [True]
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2, weight_decay=0.1)
    losses, given = [], inputs(module)
    for _ in range(3):
        losses.append(ddp(*given).square().mean())
        losses[-1].backward()
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert_same(module.bits(), before)


def test_several_modules_at_once_are_refused_or_right(make, module):
    if "bias13" in module._parameters and module._parameters["bias13"] is not None:
        pytest.skip("what is stacked are its biases alone")
    modules, given = [module, make()], inputs(module)
    stacked = torch.func.stack_module_state(modules)
    call = lambda state: torch.func.functional_call(module, state, given)  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"stack those of bits\(\) beside them"):
        torch.vmap(call)(stacked)
    if isinstance(module, PackedLinear):
        own = [dict(m.named_parameters()) | m.bits() for m in modules]
        both = {name: torch.stack([state[name].detach() for state in own]) for name in own[0] if name != "weight"}
        assert torch.allclose(torch.vmap(call)(both), torch.stack([m(*given) for m in modules]))


def test_a_bias_that_is_no_parameter_of_its_own():
    module = linear(torch.float32, True)
    expected = module(X) - module.bias
    prune.l1_unstructured(module, "bias", 0.5)
    assert (module.bias == 0).sum() == N // 2
    assert torch.allclose(module(X), expected + module.bias)


# State dicts


def test_the_keys_of_its_state_of_which_older_ones_lack_the_empty_parameter(form, module):
    *_, parameters, keys = FORMS[form]
    state = module.state_dict()
    assert list(state) == keys and not any(isinstance(tensor, nn.Parameter) for tensor in state.values())
    kept = module.state_dict(keep_vars=True)
    assert list(kept) == keys and all(kept[name] is tensor for name, tensor in module.bits().items())
    older = {name: tensor for name, tensor in state.items() if name not in ("weight", *EMPTIES)}
    for loaded in (state, older, {**older, "input_like": torch.empty(0, 0)}):
        assert str(module.load_state_dict(loaded)) == "<All keys matched successfully>"
    assert [name for name, _ in module.named_parameters()] == parameters


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_missing_or_unexpected_is_told(module, assign):
    state = module.state_dict()
    words = next(name for name in state if name.startswith("words"))
    other = {"gate" if key == words else key: tensor for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) .*"{words}"(.|\n)*Unexpected key\(s\) .*"gate"'):
        module.load_state_dict(other, assign=assign)
    found = module.load_state_dict(other, strict=False, assign=assign)
    assert (found.missing_keys, found.unexpected_keys) == ([words], ["gate"])
    assert_same(module.state_dict(), state)


def test_a_module_on_the_meta_device_is_where_its_state_is_assigned_from(form, module):
    module.to("meta").load_state_dict(FORMS[form][0](torch.float16, FORMS[form][1]).state_dict(), assign=True)
    assert {tensor.device.type for tensor in held_tensors(module)} == {"cpu"}
    dtype = torch.float16 if FORMS[form][1] else torch.float32  # a bias tells the dtype
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(*inputs(module, dtype)).dtype == dtype


@pytest.mark.parametrize("how", ["memory", "disk", "map"])
def test_accelerate_offloads_what_is_beside_it(make, how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.ModuleDict({"first": make(), "second": nn.Linear(K, K)})
    given, device = inputs(model["first"]), torch.device("cpu")
    expected = model["first"](*given)
    if how == "map":
        places = {"first": "disk", "second": "cpu"}
        accelerate.dispatch_model(model, places, main_device=device, offload_dir=tmp_path, force_hooks=True)
    elif how == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=device)
    else:
        accelerate.cpu_offload(model, execution_device=device)
    assert torch.equal(model["first"](*given), expected)


def test_a_call_on_another_device_than_its_packed_tensors_is_refused(module):
    module(*inputs(module))  # a call that is known
    with pytest.raises(ValueError, match=r"(words|multiplier)\w*: found device cpu, expected that of the input, meta"):
        module(*(tensor.to("meta") for tensor in inputs(module)))


def test_a_file_of_safetensors_holds_its_state(module, make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    models = nn.ModuleList([module, make()]), nn.ModuleList([make(), make()])
    safetensors.save_model(models[0], str(tmp_path / "saved"))
    safetensors.load_model(models[1], str(tmp_path / "saved"))
    for saved, found in zip(*models, strict=True):
        given = inputs(found)
        assert_same(found.bits(), saved.bits())
        assert torch.equal(found(*given), saved(*given))


def test_a_dense_weight_is_unexpected():
    module = linear(torch.float32, True)
    dense = {"weight": torch.randn(N, K), "bias": torch.zeros(N)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        module.load_state_dict(dense)
    assert module.load_state_dict(dense, strict=False).unexpected_keys == ["weight"] and module.weight.shape == (0, 0)


def test_a_tensor_of_another_shape_is_refused(module):
    state, name = module.state_dict(), next(name for name in module.bits() if name.startswith("scales"))
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        module.load_state_dict(state | {name: state[name][:, :0]})


def test_tensors_of_inference_mode_are_assigned(make):
    with torch.inference_mode():
        state = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    module = make()
    module.load_state_dict(state, assign=True)
    assert_same(bits(module), {name: state[name] for name in bits(module)})


@pytest.mark.parametrize("assign", [False, True])
def test_parameters_are_loaded_as_plain_tensors(module, make, assign):
    source = {name: nn.Parameter(t, requires_grad=False) for name, t in make().state_dict().items()}
    before, versions = addresses(module), {name: t._version for name, t in module.bits().items()}
    module.load_state_dict(source | {"_extra_state": source["_extra_state"].data}, assign=assign)
    assert all(type(tensor) is Tensor and tensor.equal(source[name]) for name, tensor in module.bits().items())
    assert assign or addresses(module) == before
    assert assign or all(tensor._version > versions[name] for name, tensor in module.bits().items())


def as_it_was(module: PackedState) -> PackedState:
    """The module as code unpickles it that held words and scales as buffers, multipliers as parameters."""
    old = {name: value for name, value in vars(module).items() if name not in module.bits() and name != "_bits"}
    multipliers = {n: nn.Parameter(t, requires_grad=False) for n, t in module.bits().items() if n.startswith("mult")}
    old["_parameters"] = {name: p for name, p in module._parameters.items() if name.startswith("bias")} | multipliers
    old["_parameters"] |= {"weight": None} if isinstance(module, PackedLinear) else {}
    old["_buffers"] = {name: t for name, t in module.bits().items() if name not in multipliers}
    old["_uncast"] = tuple(multipliers)
    made = type(module).__new__(type(module))
    made.__setstate__(pickle.loads(pickle.dumps(old)))
    return made


def test_a_module_that_was_pickled_as_parameters_and_buffers_is_taken_over(form, module):
    _, bias, parameters, keys = FORMS[form]
    found, given = as_it_was(module), inputs(module)
    assert_same(found.bits(), module.bits())
    assert {name for name, _ in found.named_parameters()} == set(parameters) and not list(found.buffers())
    assert next(found.parameters()).dtype == (torch.float32 if bias else torch.bfloat16)
    assert list(found.bits()) == list(module.bits()) and not found._non_persistent_buffers_set
    for again in (found, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(again(*given), module(*given)) and list(again.state_dict()) == keys


def test_what_was_quantised_tells_its_dtype_when_it_is_taken_over():
    model = nn.Sequential(nn.Linear(K, N, bias=False)).half()
    quantize(model, "nvfp4", include="0", progress=False)
    assert as_it_was(model[0]).weight.dtype == torch.float16


# Moves and copies

MOVES = {
    "type": lambda m: m.type(torch.float16), "memory format": lambda m: m.to(memory_format=torch.channels_last),
    "float64": lambda m: m.to(torch.float64), "to": lambda m: m.to("cpu", torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_its_bits_stay_as_they_are_and_lie(module, move):
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in module.bits().items()}
    move(nn.Sequential(module))
    for name, tensor in module.bits().items():
        value, address = before[name]
        assert tensor.dtype == value.dtype and torch.equal(tensor, value) and tensor.is_contiguous()
        assert tensor.data_ptr() == address


def test_its_memory_is_shared(module):
    assert all(tensor.is_shared() for tensor in held_tensors(module.share_memory()))


def test_all_it_holds_is_found(module):
    packed = sum(tensor.nbytes for tensor in module.bits().values())
    assert sum(tensor.nbytes for tensor in held_tensors(nn.ModuleList([module, module]))) == packed + sum(
        p.nbytes for p in module.parameters()
    )


# In eager mode and compiled


@pytest.mark.parametrize("how", ["an attribute", "a parameter", "vars"])
def test_another_tensor_in_its_place_is_seen(module, how):
    given, name = inputs(module), next(name for name in module.bits() if name.startswith("words"))
    before, other = module(*given), getattr(module, name).flip(-1)
    if how == "vars":
        vars(module)[name] = other
    else:
        setattr(module, name, nn.Parameter(other, requires_grad=False) if how == "a parameter" else other)
    found = getattr(module, name)
    assert torch.equal(found, other) and not torch.equal(module(*given), before) and not module._buffers
    assert type(found) is Tensor and found.data_ptr() == other.data_ptr() and name not in module._parameters


def test_a_tensor_that_it_is_given_is_not_marked(module, make):
    given = {name: tensor.clone() for name, tensor in make().bits().items()}
    torch.func.functional_call(module, dict(given), inputs(module))
    for name, tensor in given.items():
        setattr(module, name, tensor)
        assert not vars(tensor)
        assert vars(getattr(module, name)).keys() >= {"_dynamo_static_input_type", "_dynamo_static_indices"}
        own = getattr(module, name)
        setattr(module, name, own)
        assert getattr(module, name) is own


def test_a_tensor_that_was_deleted_can_be_set_again(module):
    given, (name, tensor) = inputs(module), next(iter(module.bits().items()))
    before = module(*given)
    delattr(module, name)
    assert name not in copy.deepcopy(module).state_dict()
    with pytest.raises(AttributeError, match=name):
        module(*given)
    setattr(module, name, tensor)
    assert name in module.state_dict() and torch.equal(module(*given), before)


def test_a_buffer_in_the_place_of_one_that_was_deleted_is_kept(module):
    (name, tensor), given = next(iter(module.bits().items())), inputs(module)
    before = module(*given)
    delattr(module, name)
    module.register_buffer(name, tensor)
    module.load_state_dict(bits(module))
    assert module._buffers[name] is tensor and torch.equal(module(*given), before)


def test_inputs_on_another_device_are_refused(module):
    with pytest.raises(ValueError, match=r"found device cpu, expected that of the input, meta"):
        module(*(tensor.to("meta") for tensor in inputs(module)))


def test_what_is_no_tensor_does_not_take_its_place(module):
    name, given = next(iter(module.bits())), inputs(module)
    before = module(*given)
    with pytest.raises(TypeError, match=f"{name}: found NoneType, expected a packed tensor"):
        setattr(module, name, None)
    assert torch.equal(module(*given), before)


@pytest.mark.parametrize("how", [setattr, PackedState.register_parameter], ids=["set", "registered"])
def test_the_empty_parameter_stays_empty(module, how):
    name, given = module._empties[-1], inputs(module)
    before = module(*given)
    with pytest.raises(ValueError, match=rf"{name}: found a parameter of shape \[{N}, {K}\], expected an empty one"):
        how(module, name, nn.Parameter(torch.randn(N, K)))
    how(module, name, nn.Parameter(torch.empty(0, 0)))
    assert torch.equal(module(*given), before)


def test_a_linear_is_not_reset():
    module = linear(torch.float32, True)
    before = bits(module)
    module.reset_parameters()
    assert_same(bits(module), before)


# Shallow copies


def test_a_shallow_copy_is_another_module_over_the_same_tensors(module, make):
    copied, other, given = copy.copy(module), make(), inputs(module)
    expected, names = module(*given), list(module.bits())
    assert all(copied.bits()[name] is tensor for name, tensor in module.bits().items())
    assert torch.equal(copied(*given), expected)
    copied.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(copied(*given), other(*given)) and torch.equal(module(*given), expected)
    copied.register_bits("more", torch.zeros(3))
    copied.to("meta")
    assert torch.equal(module.to("cpu")(*given), expected) and list(module.bits()) == names
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(*given), expected)


def test_what_is_written_in_place_is_in_a_shallow_copy_too(module, make):
    copied, other, given = copy.copy(module), make(), inputs(module)
    module.load_state_dict(other.state_dict())
    assert torch.equal(copied(*given), other(*given))


@pytest.mark.parametrize("move", [lambda m: m.to("meta"), lambda m: m.to_empty(device="cpu")], ids=["meta", "empty"])
def test_what_is_in_no_state_is_there_after_the_state_was_loaded(module, move):
    module.register_bits("kept", torch.arange(3), persistent=False)
    state, given = bits(module), inputs(module)
    expected, copied = module(*given), copy.deepcopy(module)
    move(copied).load_state_dict(state, assign=True)
    assert torch.equal(copied.kept, torch.arange(3)) and torch.equal(copied(*given), expected)


def test_pruning_is_refused_and_leaves_it_whole():
    linear, x = PackedLinear(quantize_nvfp4(torch.randn(64, 64))), torch.randn(3, 64).bfloat16()
    before = linear(x)
    with pytest.raises(ValueError, match="found a packed weight, expected a dense one"):
        prune.l1_unstructured(linear, "weight", amount=0.5)
    assert [name for name, _ in linear.named_parameters()] == ["weight"] and torch.equal(linear(x), before)
    assert type(linear._parameters["weight"]) is nn.Parameter


@pytest.mark.parametrize("backend", [None, "aot_eager", "marlin_w4a16"])
def test_functional_call_takes_its_state(module, make, backend):
    other, given = make(), inputs(module)
    expected, before = other(*given), module(*given)

    def call(state: dict[str, Tensor], *given: Tensor) -> Tensor:
        return torch.func.functional_call(module, state, given)

    run = torch.compile(call, backend=backend, fullgraph=True) if backend else call
    state = {name: tensor for name, tensor in other.state_dict().items() if name != "_extra_state"}
    torch.testing.assert_close(run(state, *given), expected)
    kept = {id(t) for weight in module._weights.values() for t in (weight.words, weight.scales, weight.multiplier)}
    assert kept <= set(map(id, module.bits().values()))  # nothing of the other is held
    assert torch.equal(module(*given), before)


@pytest.mark.parametrize("strict", [False, True])
def test_it_is_exported(module, strict):
    given = inputs(module)
    program = torch.export.export(nn.Sequential(module)[0], given, strict=strict)
    torch.testing.assert_close(program.module()(*given), module(*given))


def marks(tensor: Tensor) -> dict[str, object]:
    return {"_dynamo_static_input_type": "unguarded", "_dynamo_static_indices": set(range(tensor.ndim))}


def test_its_tensors_are_marked_whenever_they_are_set_or_moved(module, make):
    def marked(module: PackedState) -> bool:
        return all(vars(tensor).items() >= marks(tensor).items() for tensor in module.bits().values())

    assert marked(module)
    for name, tensor in module.bits().items():
        setattr(module, name, tensor.clone())
    assert marked(module) and marked(module.to("meta")) and marked(module.to_empty(device="cpu"))
    module.load_state_dict(make().state_dict(), assign=True)
    assert marked(module) and marked(copy.deepcopy(module)) and marked(pickle.loads(pickle.dumps(module)))
    assert marked(as_it_was(module))


@pytest.mark.parametrize("dynamic", [None, True])
def test_its_tensors_are_static_inputs_and_nothing_compiles_again(module, make, dynamic):
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    given, state = inputs(module), bits(make())
    run = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    module.requires_grad_(False)
    run(*given)
    seen = {}
    for node in graphs[0].graph.find_nodes(op="placeholder"):
        source, value = getattr(node, "_dynamo_source", None), node.meta["example_value"]
        name = source.name if isinstance(source.name, str) else source.name()
        seen[name.rpartition(".")[2]] = (node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"), value)
    for name, tensor in module.bits().items():
        static, value = seen[name]
        assert static == "unguarded" and all(type(size) is int for size in value.shape) and value.shape == tensor.shape
    changes = (
        lambda: module.load_state_dict(state), lambda: module.to("cpu"), lambda: module.float(),
        lambda: module.load_state_dict(state, assign=True), lambda: module.half().float(), copy.deepcopy(module).eval,
    )  # fmt: skip
    for change in changes:
        change()
        torch.testing.assert_close(run(*given), module(*given))
    assert len(graphs) == 1


def test_a_view_brings_no_base_along(module):
    for name, tensor in module.bits().items():
        setattr(module, name, torch.stack((tensor, tensor))[1])
    assert not any(tensor._is_view() for tensor in module.bits().values())
    given = inputs(module)
    run = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(run(*given), module(*given))
