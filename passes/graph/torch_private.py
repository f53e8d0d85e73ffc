"""The private interfaces of torch that tracing and compiling touch, each read in torch 2.11 and 2.13."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from traceback import FrameSummary
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Whether Dynamo's guards compare the layouts of tensors in modules: those of 2.13 do, of 2.11 not; 2.12 was not read.
GUARDS_LAYOUTS = TorchVersion(torch.__version__) >= TorchVersion("2.13")
# What Dynamo traces of torch.nn.functional.grouped_mm, of Tensor.data, and of torch.autocast.
GROUPED_MM: Callable[..., Any] = torch._grouped_mm
GET_DATA = [f for f in [getattr(torch._C._autograd, "_get_data_attr", None)] if f is not None]
ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_c: Any = torch._C
_GENERATED = (_c._VariableFunctions, _c._nn, _c._linalg, _c._special, _c._fft, _c._sparse, _c._nested)


def is_fake(value: object) -> bool:
    """Whether a tensor holds no data (a FakeTensor)."""
    return isinstance(value, torch._subclasses.FakeTensor)


def is_plain(value: object) -> bool:
    """Whether a value that Dynamo traced is a tensor with elements in strides of its own: no subclass, not sparse."""
    return is_fake(value) and cast(Tensor, value).layout is torch.strided


def transform_of(value: object) -> str | None:
    """What of torch.func a traced value belongs to: under a transform, tensors are wrapped ones; None: to nothing."""
    functorch = torch._C._functorch
    if not isinstance(value, Tensor) or not functorch.is_functorch_wrapped_tensor(value):
        return None
    return "vmap" if functorch.is_batchedtensor(value) else "grad, vjp or jvp"


def forward_levels() -> int:
    """How many levels of forward-mode differentiation are entered: dual numbers show in no example value."""
    return torch.autograd.forward_ad._current_level + 1


def level_step(node: fx.Node) -> int:
    """1: a node enters such a level; -1: it leaves one."""
    return {"_enter_dual_level": 1, "_exit_dual_level": -1}.get(getattr(node.target, "__name__", ""), 0)


def overloads_of(target: object) -> tuple[Any, ...]:
    """An overload of an operator, or those of a packet; not those that only TorchScript has, on lists of its own."""
    packet = isinstance(target, torch._ops.OpOverloadPacket)
    found = [getattr(target, name) for name in cast(Any, target).overloads()] if packet else [target]
    overloads = (overload for overload in found if isinstance(overload, torch._ops.OpOverload))
    return tuple(o for o in overloads if o.namespace != "aten" or torch._C._dispatch_has_kernel(o.name()))


def operator_name(target: Callable[..., Any]) -> str | None:
    """The name of the aten operator that a builtin of torch was generated from, or None."""
    name = target.__name__
    return name if any(getattr(module, name, None) is target for module in _GENERATED) else None


def op_namespace(target: object) -> str | None:
    """The namespace of a custom op, or of its packet of overloads; None of anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace
    return target._qualified_op_name.partition("::")[0] if isinstance(target, torch._ops.OpOverloadPacket) else None


def placeholder_source(node: fx.Node) -> Any:
    """Where Dynamo read a placeholder from, or None."""
    return getattr(node, "_dynamo_source", None)


def source_name(node: fx.Node) -> str:
    """The source of a placeholder as an expression such as ``L['self']._modules['fc']._buffers['scale']``."""
    name = getattr(placeholder_source(node), "name", node.name)
    return str(name() if callable(name) else name)


def is_weight_like(node: fx.Node) -> bool:
    """Whether a placeholder is state (a parameter, buffer, module attribute, global or closure), not an argument.

    Parameters and buffers carry the static mark; globals and plain attributes are told by their source.
    """
    if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
        return True
    source = placeholder_source(node)
    if source is None:
        return False
    guard = source.guard_source
    guard = guard() if callable(guard) else guard  # a method before torch 2.12
    if guard.name != "LOCAL":
        return True
    while hasattr(source, "base"):
        source = source.base
    return not getattr(source, "is_input", True)


def storage_key(value: object) -> int | None:
    """What two tensors share when one is a view of the other; also for fake ones, and under transforms."""
    while transform_of(value) is not None:
        value = torch._C._functorch.get_unwrapped(cast(Tensor, value))
    held = storage_of(next(inner_tensors(value))) if isinstance(value, Tensor) else None
    return None if held is None else held._cdata


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor, an object that lives as long as the memory does; wrapper subclasses have none."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


# Inference tensors have no version counter; `mark_written` counts for them under this name, among their attributes.
_WRITES = "_marlin_w4a16_writes"


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """The version counters; of inference tensors, which have none, how often they were marked as written."""
    try:
        return [t._version for t in tensors]
    except RuntimeError:
        return [vars(t).get(_WRITES, 0) if t.is_inference() else t._version for t in tensors]


def layout_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether as many tensors have the shapes, strides and dtypes of these, in the mode of now, told by C++ at once."""
    # needs both lists of what may change; keeps nothing alive
    guards: Any = _c._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return cast(Callable[..., bool], guards.check)


def mark_written(tensors: Iterable[Tensor]) -> None:
    """Counts one write to each tensor, as an in-place operation would."""
    for tensor in tensors:
        if tensor.is_inference():
            vars(tensor)[_WRITES] = vars(tensor).get(_WRITES, 0) + 1
        else:
            torch.autograd.graph.increment_version(tensor)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a wrapper subclass, whose data other tensors hold."""
    return is_traceable_wrapper_subclass(tensor)


def part_names(tensor: Tensor) -> tuple[str, ...]:
    """The names of the tensors that hold the data of a wrapper subclass; none of another tensor."""
    return tuple(tensor.__tensor_flatten__()[0]) if is_traceable_wrapper_subclass(tensor) else ()


def inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the data of a wrapper subclass, at any depth, or the tensor itself."""
    if not is_wrapper(tensor):
        yield tensor
    for name in part_names(tensor):
        yield from inner_tensors(getattr(tensor, name))


def graph_copy(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy with what AOTAutograd expects of a graph from Dynamo, and the copy of each node."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, values)
    graph.output(output).meta.update(gm.graph.output_node().meta)
    for old, new in values.items():
        new.meta.pop("grapharg", None)  # holds a weak reference to the live tensor, which swap_tensors does not allow
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    told = ("_param_name_to_source", "compile_subgraph_reason")
    vars(copy).update({name: vars(gm)[name] for name in told if name in vars(gm)})
    return copy, values


def add_static_input(graph: fx.Graph, like: fx.Node, member: str, value: Tensor) -> tuple[fx.Node, Tensor]:
    """Adds a placeholder for a tensor that keeps its address, and the fake tensor that stands for it.

    It is told apart from its origin ``like`` by an attribute source; AOTAutograd wants sources to be unique.
    """
    from torch._dynamo.source import AttrSource

    fake = cast(Any, next(inner_tensors(like.meta["example_value"]))).fake_mode.from_tensor(value, static_shapes=True)
    node = graph.placeholder(f"{like.name}_{member}")
    node.meta["example_value"] = fake
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = (source := placeholder_source(like)) and AttrSource(source, f"marlin_w4a16_{member}")
    return node, fake


def stays(tensor: Tensor) -> Tensor:
    """It, or an alias, marked as Dynamo's ``mark_static_address`` and ``mark_static`` do: address and sizes stay."""
    marks = {"_dynamo_static_input_type": "unguarded", "_dynamo_static_indices": set(range(tensor.ndim))}
    if isinstance(tensor, torch.nn.Parameter) or tensor._is_view() or not marks.items() <= vars(tensor).items():
        vars(tensor := tensor.detach()).update(marks)  # Dynamo also traces what a view is of
    return tensor


def fake_result(node: fx.Node, like: fx.Node) -> Any:
    """Runs a new node's operator on the example values of its inputs; fakes are made as that of ``like`` was."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    with next(inner_tensors(like.meta["example_value"])).fake_mode:  # type: ignore[attr-defined]
        return node.target(*args, **kwargs)  # type: ignore[operator]


def modes() -> dict[str, dict[str, Any]]:
    """The torch.compile modes by name, as Inductor settings."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options())


def compile_graph(gm: fx.GraphModule, inputs: list[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Hands a graph from Dynamo to Inductor."""
    from torch._inductor.compile_fx import compile_fx

    return cast(Callable[..., Any], compile_fx(gm, inputs, config_patches=patches))


def region_operands(target: object) -> int | None:
    """Where the operands of a region stand: of an operator that runs its first argument, a graph, once on them."""
    regions = torch.ops.higher_order
    starts = {
        regions.wrap: 1,
        regions.tag_activation_checkpoint: 1,
        regions.wrap_activation_checkpoint: 1,
        regions.invoke_subgraph: 2,  # after the name by which calls share what is compiled
    }
    return starts.get(cast(Any, target)) if isinstance(target, torch._ops.HigherOrderOperator) else None


def copy_source(node: fx.Node, like: fx.Node) -> None:
    """Gives a placeholder the source of another."""
    node._dynamo_source = placeholder_source(like)


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Adds a JSON artifact to the trace of this compilation; ``payload`` is called only under ``TORCH_TRACE``."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


def graph_break(gm: fx.GraphModule) -> tuple[str, FrameSummary] | None:
    """Dynamo's message about the break that ended a graph, and the user's line; None if its function returned."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return (reason.reason, reason.user_stack[-1]) if reason is not None and reason.graph_break else None


def graph_breaks() -> list[tuple[str, FrameSummary]]:
    """Every break of this process, also those before the first operator, which leave no graph."""
    from torch._dynamo.utils import graph_break_reasons

    return [(reason.reason, reason.user_stack[-1]) for reason in graph_break_reasons]


def skipped_functions() -> list[Any]:
    """What Dynamo noted of the functions that it left to Python, among the last 64 that it compiled."""
    from torch._dynamo.utils import get_compilation_metrics

    return [function for function in get_compilation_metrics() if function.fail_type == "Unsupported"]


def refusals() -> Counter[str]:
    """How often Dynamo refused something, by its message; not those that it told as the reason of a break."""
    return Counter(torch._dynamo.utils.counters["unimplemented"])


def size_hint(size: Any) -> int:
    """The size that a dimension was traced with; -1 where data tell it."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return -1 if hint is None else int(hint)


def size_at(size: Any, times: int) -> int:
    """The size of a dimension where each that may change is so many times the traced one; ValueError: no integer."""
    if not isinstance(size, int | torch.SymInt) or isinstance(size, bool):
        raise ValueError(f"{type(size).__name__} where a size is expected")
    if times == 1 or isinstance(size, int):
        return size_hint(size)
    environment = size.node.shape_env
    hint = getattr(environment, "guarding_hint_or_throw", environment.size_hint)  # the first since torch 2.12
    return int(size.node.expr.subs({symbol: times * hint(symbol) for symbol in size.node.expr.free_symbols}))


def is_multiple(size: Any, of: Any) -> bool:
    """Whether a size is always as many times another one, which changes."""
    both = isinstance(size, torch.SymInt) and isinstance(of, torch.SymInt)
    return both and not (size.node.expr / of.node.expr).free_symbols


def number_hint(value: Any) -> Any:
    """The number that an argument was traced with; a dynamic graph takes floats of Python as inputs."""
    traced = value.meta.get("example_value") if isinstance(value, fx.Node) else value
    return float(traced.node.hint) if isinstance(traced, torch.SymFloat) else traced
