"""What operations are known to do: which give the same for the same arguments, and to which of these they write.

Schemas and tags say it of aten's operators, under every name that torch has for them; the tables below say it of what
is written in Python, as it was read in torch 2.13. Anything else may give anything and write to all that it reads.
"""

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.graph.torch_private import (
    GET_DATA,
    is_fake,
    is_wrapper,
    op_namespace,
    operator_name,
    overloads_of,
)


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_PYTHON = (
    "abs add and_ concat contains eq floordiv ge getitem gt index inv invert is_ is_not le lshift lt matmul mod mul ne "
    "neg not_ or_ pos pow rshift sub truediv truth xor"
)
_IN_PLACE = "iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem"
_BUILTINS = (abs, bool, divmod, float, int, len, max, min, pow, round, slice, sum, tuple)
_TORCH = "as_tensor sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum tensor"
_TORCH_FUNCTIONAL = (
    "atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors cartesian_prod cdist chain_matmul einsum istft "
    "meshgrid norm split stft tensordot unique unique_consecutive unravel_index"
)
_FUNCTIONAL = (
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool1d_with_indices adaptive_max_pool2d "
    "adaptive_max_pool2d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices affine_grid batch_norm "
    "binary_cross_entropy binary_cross_entropy_with_logits celu cosine_embedding_loss cross_entropy ctc_loss elu "
    "embedding embedding_bag fold gaussian_nll_loss glu grid_sample group_norm grouped_mm hardsigmoid hardswish "
    "hardtanh hinge_embedding_loss huber_loss instance_norm interpolate kl_div l1_loss layer_norm leaky_relu "
    "local_response_norm log_softmax lp_pool1d lp_pool2d lp_pool3d margin_ranking_loss max_pool1d "
    "max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool1d "
    "max_unpool2d max_unpool3d mish mse_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss "
    "nll_loss normalize pad poisson_nll_loss relu relu6 rms_norm scaled_grouped_mm scaled_mm selu sigmoid silu "
    "smooth_l1_loss soft_margin_loss softmax softmin softsign tanh tanhshrink threshold triplet_margin_loss unfold "
    "upsample upsample_bilinear upsample_nearest"
)
# They draw numbers, or may, and write to nothing but what `inplace` says.
_DRAWING = (
    "alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout fractional_max_pool2d "
    "fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices gumbel_softmax "
    "multi_head_attention_forward rrelu"
)
_METHODS = _words(
    "__bool__ __float__ __index__ __int__ __len__ bfloat16 bool byte cdouble cfloat char cpu cuda double element_size "
    "float half int long ndimension nelement new_tensor short tolist type unique"
)
_ATTRIBUTES = _words(
    "H T data device dtype imag is_cpu is_cuda itemsize layout mH mT nbytes ndim real requires_grad shape"
)
# Of aten: what changes the memory that tensors hold, or is no function of values.
_OPAQUE = _words(
    "_resize_output _resize_output_ _version from_file is_pinned record_stream resize resize_ resize_as resize_as_ "
    "resize_as_sparse resize_as_sparse_ retain_grad set set_ set_data _empty_affine_quantized "
    "_empty_per_channel_affine_quantized empty_quantized"
)
# Of aten: what writes to running statistics, of which schemas are silent, and the argument that may say it does not.
_STATISTICS = {
    **dict.fromkeys(("_batch_norm_impl_index", "batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), "training"),
    "native_batch_norm": "training",
    "instance_norm": "use_input_stats",
    **dict.fromkeys(("batch_norm_gather_stats", "batch_norm_gather_stats_with_counts", "batch_norm_update_stats"), ""),
}
# Namespaces whose tags say what is random, and operators of others that were read.
_BELIEVED = frozenset({"aten", "prims", "marlin_w4a16", "transformers::grouped_mm_fallback"})
_BY_NAME = 1 << 16  # the position of what is given by its name only


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a function: its position, its name, and its value if it is not given."""

    index: int
    name: str
    default: Any = None

    def of(self, node: fx.Node) -> Any:
        """What a node gives for it."""
        if self.index < len(node.args):
            return node.args[self.index]
        given = node.kwargs.get(self.name, self.default)
        return node.kwargs.get("input", given) if self.name == "self" else given  # the name of bound functions


@dataclass(frozen=True, slots=True)
class Rule:
    """What a function does.

    Attributes:
        pure: its value, and what it writes, are those of its arguments, whenever it is called.
        writes: what it may write to beside ``out``; None: to anything.
        unless: it does not, if this argument is false or None.
        reshapes: it may give its first argument another shape, or other strides, in place.
    """

    pure: bool
    writes: tuple[Argument, ...] | None = ()
    unless: Argument | None = None
    reshapes: bool = False

    def written(self, node: fx.Node) -> list[fx.Node]:
        """The nodes among the arguments of a node that it may write to."""
        if self.writes is None:
            return node.all_input_nodes
        if not self.writes and "out" not in node.kwargs:
            return []
        given = self.unless.of(node) if self.unless is not None else True
        writes = () if given is None or given is False else self.writes
        found: list[fx.Node] = []
        fx.map_arg(([argument.of(node) for argument in writes], node.kwargs.get("out")), found.append)
        return found


_PURE, _QUIET, _UNKNOWN = Rule(pure=True), Rule(pure=False), Rule(pure=False, writes=None)
_OTHER_MEMORY = replace(_UNKNOWN, reshapes=True)


def is_pure(node: fx.Node) -> bool:
    """Whether a node is known to compute from its inputs alone, and to write to nothing but what `written_by` says."""
    return _rule(node).pure and not any(_is_foreign(example(used)) for used in node.all_input_nodes)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors a node writes to in place, or may write to."""
    return [written for written in _rule(node).written(node) if _has_tensors(example(written))]


def note_reshaped(graph: fx.Graph) -> None:
    """Notes at the nodes of a flat graph that their tensor gets another shape in place: what was traced shows the last.

    See `is_reshaped`.
    """
    changed = {id(example(node.all_input_nodes[0])) for node in graph.nodes if _rule(node).reshapes}
    for node in graph.nodes if changed else ():
        if id(example(node)) in changed:
            node.meta["reshaped"] = True


def _rule(node: fx.Node) -> Rule:
    if node.op == "call_method":
        return _of_method(str(node.target))
    if node.op == "call_function":
        if node.target is getattr:
            return _PURE if node.args[1] in _ATTRIBUTES else _QUIET
        if node.target is torch.Tensor:  # which is uninitialised if it is given sizes
            return _PURE if node.args and isinstance(node.args[0], list | tuple) else _UNKNOWN
        return _FUNCTIONS.get(node.target) or _of_function(node.target)
    return _UNKNOWN if node.op == "call_module" else _QUIET


@functools.cache
def _of_method(name: str) -> Rule:
    if name in _METHODS:
        return _PURE
    if name.startswith("__"):
        plain = getattr(operator, name, None) or getattr(operator, f"__{name[3:]}", None)  # __radd__, too
        return _FUNCTIONS.get(plain, _UNKNOWN)
    return _of_aten(name) if hasattr(Tensor, name) else _UNKNOWN


def _of_function(target: object) -> Rule:
    """Of a function that is in no table; one of somebody else is not held on to."""
    generated = isinstance(target, types.BuiltinFunctionType) or op_namespace(target) is not None
    return _of_operator(target) if generated else _UNKNOWN


@functools.cache
def _of_operator(target: Any) -> Rule:
    if op_namespace(target) is None:
        name = operator_name(target)
        return _UNKNOWN if name is None else _of_aten(name)
    overloads = overloads_of(target)
    return _of_overloads(overloads[0].name().partition(".")[0], overloads) if overloads else _UNKNOWN


def _of_aten(name: str) -> Rule:
    overloads = overloads_of(getattr(torch.ops.aten, name, None))
    return _of_overloads(f"aten::{name}", overloads) if overloads else _UNKNOWN


def _of_overloads(qualified: str, overloads: Iterable[Any]) -> Rule:
    """Of an operator that is called by one of these overloads."""
    namespace, _, name = qualified.partition("::")
    if namespace == "aten" and name in _OPAQUE:
        return _OTHER_MEMORY
    arguments = [(_argument(i, a), a.alias_info) for o in overloads for i, a in enumerate(o._schema.arguments)]
    writes = tuple({argument for argument, alias in arguments if alias is not None and alias.is_write})
    reshapes = any(torch.Tag.inplace_view in overload.tags for overload in overloads)
    pure = not _BELIEVED.isdisjoint((namespace, qualified)) and not any(map(_draws, overloads)) and not reshapes
    if namespace == "aten" and name in _STATISTICS:
        return _with_statistics(pure, [argument for argument, _ in arguments], _STATISTICS[name])
    return Rule(pure, writes, reshapes=reshapes)


def _argument(index: int, argument: Any) -> Argument:
    return Argument(_BY_NAME if argument.kwarg_only else index, argument.name, argument.default_value)


def _draws(overload: Any) -> bool:
    generators = any("Generator" in str(argument.type) for argument in overload._schema.arguments)
    return generators or torch.Tag.nondeterministic_seeded in overload.tags


def _with_statistics(pure: bool, arguments: Iterable[Argument], flag: str) -> Rule:
    named = {argument.name: argument for argument in arguments}
    return Rule(pure, tuple(named[name] for name in ("running_mean", "running_var")), named.get(flag))


def _of_python(function: Callable[..., Any], rule: Rule) -> Rule:
    """What is known of a function of torch, by the arguments that tell what it writes to."""
    if isinstance(function, types.BuiltinFunctionType):
        return rule
    parameters = enumerate(inspect.signature(function).parameters.values())
    named = {p.name: _parameter(i, p) for i, p in parameters}
    if "running_mean" in named:
        return _with_statistics(rule.pure, named.values(), "training" if "training" in named else "use_input_stats")
    if "max_norm" in named:
        return replace(rule, writes=tuple(named.values())[:2], unless=named["max_norm"])
    if "inplace" in named:
        return replace(rule, writes=tuple(named.values())[:1], unless=named["inplace"])
    return replace(rule, writes=(named["out"],)) if "out" in named else rule


def _parameter(index: int, parameter: inspect.Parameter) -> Argument:
    index = _BY_NAME if parameter.kind is parameter.KEYWORD_ONLY else index
    return Argument(index, parameter.name, None if parameter.default is parameter.empty else parameter.default)


def _named(module: Any, names: str) -> list[Any]:
    """The functions by these names, those that this version of torch has."""
    return [getattr(module, name) for name in _words(names) if hasattr(module, name)]


_FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((*_named(operator, _PYTHON), *_BUILTINS, *_named(torch, _TORCH), *GET_DATA), _PURE),
    **dict.fromkeys(_named(operator, _IN_PLACE), Rule(pure=True, writes=(Argument(0, "self"),))),
    **{function: _of_python(function, _PURE) for function in _named(torch.functional, _TORCH_FUNCTIONAL)},
    **{function: _of_python(function, _PURE) for function in _named(functional, _FUNCTIONAL)},
    **{function: _of_python(function, _QUIET) for function in _named(functional, _DRAWING)},
}


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _is_foreign(value: Any) -> bool:
    """Whether what operations do to a value is said by a class that is not known."""
    if not isinstance(value, Tensor) or is_fake(value) or not is_wrapper(value):
        return False
    return type(value).__module__.partition(".")[0] not in ("torch", "torchao")
