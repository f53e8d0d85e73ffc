"""The weights of packed modules as other code sees them: empty parameters that tell dtype and device, and no more.

What wants a dense weight (a merge of adapters, DoRA, a new size) gets an error that says what to do, in place of one
about shapes. Code that is compiled, and who looks into ``_parameters``, sees the plain empty parameter.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What may be asked: of attributes and of methods, of which those that make a tensor make a plain, empty one.
_ATTRIBUTES = {
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "is_leaf", "grad_fn", "is_meta", "is_cuda",
    "is_cpu", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "names", "_version", "is_mps", "is_xpu",
    "is_mkldnn", "_base", "retains_grad", "output_nr", "_backward_hooks", "_grad",
}  # fmt: skip
_METHODS = {
    "size", "dim", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous", "get_device",
    "is_floating_point", "is_complex", "is_inference", "is_shared", "is_pinned", "requires_grad_", "data_ptr", "type",
    "untyped_storage", "to", "cpu", "cuda", "detach", "clone", "type_as", "__repr__", "__len__", "__deepcopy__",
    "__reduce_ex__", "__hash__", "_is_view", "register_hook", "register_post_accumulate_grad_hook",
}  # fmt: skip


class AbsentWeight(nn.Parameter):
    """Stands for an empty parameter where code reads it from its module."""

    owner: nn.Parameter
    told: str
    refused: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        """Python attributes are those of the parameter."""
        return getattr(vars(self)["owner"], name)

    def refusal(self, wanted: str) -> ValueError:
        """Says what to do to who wants something of a dense weight."""
        return ValueError(
            f"{vars(self)['told']}: found a packed weight, expected a dense one for {wanted!r}: make the model dense "
            "first, by model.dequantize() (or load it so: quantization_config=...(dequantize=True))"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(vars(self)["owner"], memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return vars(self)["owner"].__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs on the empty parameter what only asks.

        Raises:
            ValueError: it wants the weight.
        """
        given = [*args, *(kwargs or {}).values()]
        asked, of = getattr(func, "__name__", str(func)), getattr(getattr(func, "__self__", None), "__name__", "")
        name, known = (of, _ATTRIBUTES) if asked in ("__get__", "__set__") else (asked, _METHODS)
        one = next(value for value in given if isinstance(value, AbsentWeight))
        if name not in known or name in one.refused:
            raise one.refusal(name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map(present, args), **{key: present(value) for key, value in (kwargs or {}).items()})


def absent(name: str, refused: Sequence[str] = ()) -> Any:
    """The property of a packed module that is read where code asks for a weight.

    Args:
        name: of the empty parameter.
        refused: what of it must not be asked, either.
    """

    def read(self: nn.Module) -> Any:
        own = vars(self)
        if name in own:  # what took its place, as pruning does
            return own[name]
        if name not in own.get("_parameters", ()):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        held = own["_parameters"][name]
        if torch.compiler.is_compiling() or type(held) is not nn.Parameter or held.numel():
            return held
        made = torch.Tensor._make_subclass(AbsentWeight, held.detach(), held.requires_grad)
        vars(made).update(owner=held, told=f"{type(self).__name__}.{name}", refused=frozenset(refused))
        return made

    def write(self: nn.Module, value: Any) -> None:
        vars(self)[name] = value

    def delete(self: nn.Module) -> None:
        del vars(self)[name]

    return property(read, write, delete)


def present(value: Any) -> Any:
    """The empty parameter itself, where something stands for it; all else as it is."""
    if isinstance(value, AbsentWeight):
        return vars(value)["owner"]
    if isinstance(value, tuple | list):
        return type(value)(map(present, value))
    return value


def is_empty(tensor: Any) -> bool:
    """Whether something is a tensor without elements."""
    return isinstance(tensor, Tensor) and not tensor.numel()
