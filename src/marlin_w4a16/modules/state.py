"""What modules that own packed weights share: tensors that nothing may change but what loads, moves or saves them."""

import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.modules.absent import AbsentWeight, is_empty, present
from marlin_w4a16.modules.origin import Origin
from marlin_w4a16.passes.graph.torch_private import stays, transform_of

_FORMER = "input_like"  # what the empty parameter of experts was called
_NAMES = {of: (f"words{of}", f"scales{of}", f"multiplier{of}") for of in ("", "13", "2")}


class PackedState(nn.Module):
    """A module that holds packed weights.

    Their tensors are bits, of which there is no average, no gradient, no cast and no initial value. So they are neither
    parameters, all of which some code averages or updates (AveragedModel), nor buffers, which DistributedDataParallel
    sends around at each step, but plain attributes, which this class moves, loads and saves. Casts leave them alone.

    The first parameter of a module is where libraries look for the dtype of its inputs, and weights are where they look
    for what they change. So a module has an empty parameter for each weight, by its usual name, which requires no grad;
    casts and moves take it along, and a state dict may lack it. See `marlin_w4a16.modules.absent`.

    ``_extra_state`` holds ``_packing`` as JSON bytes; a state that says something else is refused before anything of it
    is loaded.
    """

    origin: Origin | None = None
    turned = False  # whether the dense module holds its matrices as [k, n]
    _empties: tuple[str, ...]  # the names of the empty parameters

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._bits: dict[str, bool] = {}
        self._formats: dict[str, tuple[Any, ...]] = {}
        self._weights: dict[str, PackedFP4] = {}

    def _own(self, weights: dict[str, PackedFP4], biases: dict[str, nn.Parameter | None], dtype: torch.dtype) -> None:
        """Takes over packed weights, by what stands behind the names of their tensors, and biases by their names.

        ``dtype`` is that of the activations to come, if no bias tells it.
        """
        self._formats = {of: (p.n, p.k, p.kind, p.group, p.layout) for of, p in weights.items()}
        for name, bias in biases.items():
            self.register_parameter(name, bias)
        for of, weight in weights.items():
            self.register_bits(f"multiplier{of}", weight.multiplier)
        for of, weight in weights.items():
            self.register_bits(f"words{of}", weight.words)
            self.register_bits(f"scales{of}", weight.scales)
        self._tell(dtype)

    def _tell(self, dtype: torch.dtype) -> None:
        """Adds the empty parameters, or lets them follow the bias and the words."""
        words = vars(self).get(f"words{next(iter(self._formats))}")
        biases = (p for name, p in self._parameters.items() if name not in self._empties and p is not None)
        told = next((bias.dtype for bias in biases), None)
        for name in self._empties:
            held = self._parameters.get(name)
            if words is None or (held is None and getattr(self, name, None) is not None):  # pruned, parametrised
                continue
            wanted = told or (dtype if held is None else held.dtype)
            if held is None or (is_empty(held) and (held.dtype, held.device) != (wanted, words.device)):
                empty = torch.empty(0, 0, dtype=wanted, device=words.device)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def register_bits(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """Adds a tensor that is moved, loaded and saved as a buffer is, and cast, averaged or sent by nobody."""
        self._bits[name] = persistent
        setattr(self, name, tensor)

    def bits(self) -> dict[str, Tensor]:
        """These tensors by name, but for those that were deleted."""
        return {name: vars(self)[name] for name in self._bits if name in vars(self)}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module does it; what takes the place of an empty parameter must be empty."""
        if isinstance(param, AbsentWeight) and name not in self._empties:
            raise param.refusal(name)  # pruning, before anything is changed
        param = present(param)
        if name in self._empties and param is not None and param.numel():
            raise ValueError(
                f"{type(self).__name__}: {name}: found a parameter of shape {list(param.shape)}, expected an empty "
                "one, since its weights are packed: untie it, load a state dict, or put a dense module in its place"
            )
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self).get("_bits", ()):
            super().__setattr__(name, value)
        elif not isinstance(value, Tensor):
            raise TypeError(f"{type(self).__name__}: {name}: found {type(value).__name__}, expected a packed tensor")
        elif torch.compiler.is_compiling():  # torch.func.functional_call
            vars(self)[name] = value
        else:
            vars(self)[name] = stays(value)
            self._weights.clear()

    def _packed(self, of: str) -> PackedFP4:
        words, scales, multiplier = (getattr(self, f"{name}{of}") for name in ("words", "scales", "multiplier"))
        return PackedFP4(words, scales, multiplier, *self._formats[of])

    def _kept(self, of: str) -> PackedFP4:
        """The same, made once for the tensors that the module holds: not for code that is compiled."""
        held, (words, scales, multiplier) = self.__dict__, _NAMES[of]
        kept: PackedFP4 | None = held["_weights"].get(of)
        if (
            kept is None or kept.words is not held.get(words) or kept.scales is not held.get(scales)
            or kept.multiplier is not held.get(multiplier)
        ):  # fmt: skip
            kept = self._weights[of] = self._packed(of)
        return kept

    def _expect_one(self) -> None:
        """Raises a NotImplementedError where parameters of several modules stand in the place of its own."""
        if transform_of(self._parameters.get(self._empties[0])) == "vmap":
            raise NotImplementedError(
                f"{type(self).__name__}: found parameters of several modules (torch.func.stack_module_state), which do "
                f"not hold packed tensors, expected these as well: stack those of bits() beside them"
            )

    def _asking(self, out: Tensor) -> Tensor:
        """The output, with a gradient for each empty parameter that is trained: DDP waits for one of each."""
        for name in self._empties:
            empty = self._parameters.get(name)
            if empty is not None and empty.requires_grad and torch.is_grad_enabled() and is_empty(empty):
                if not torch.compiler.is_compiling():
                    _warn(f"{type(self).__name__}.{name}")
                out = out + empty.sum().to(out.dtype)
        return out

    @property
    def _packing(self) -> dict[str, Any]:
        """How the tensors of the state dict are to be read: values that JSON can hold."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """How the tensors of the state dict are packed, as JSON in a uint8 tensor, which safetensors can hold."""
        return torch.tensor(list(json.dumps(self._packing).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Checked before anything is loaded."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        said = destination.pop(f"{prefix}_extra_state")
        saved = ((name, tensor) for name, tensor in self.bits().items() if self._bits[name])
        destination.update((f"{prefix}{name}", t if keep_vars else t.detach()) for name, t in saved)
        destination[f"{prefix}_extra_state"] = said

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state, errors = state_dict.get(f"{prefix}_extra_state"), args[-1]
        found = self._packing if state is None else _read(state)  # None: reported as missing
        if found != self._packing:
            errors.append(
                f"{prefix.rstrip('.') or type(self).__name__}: found a weight packed as {found}, expected "
                f"{self._packing}: go through to_fp4() of a module that holds it"
            )
            return
        for name in (*self._empties, _FORMER):
            if is_empty(state_dict.get(f"{prefix}{name}")):
                del state_dict[f"{prefix}{name}"]
        with self._as_buffers():
            super()._load_from_state_dict(state_dict, prefix, *args)
        self._settle()
        for of in self._formats:  # a kernel may read words while the one before it runs: that is to write none
            multiplier = getattr(self, f"multiplier{of}").detach()
            if torch.is_inference_mode_enabled() or not multiplier.is_inference():
                multiplier.mul_(1)

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """For its length the tensors are buffers, and the empty parameters are none: so nn.Module loads them."""
        empties = {name: p for name in self._empties if is_empty(p := self._parameters.get(name))}
        self._parameters.update(dict.fromkeys(empties))
        own = {name: tensor for name, tensor in self.bits().items() if self._bits[name]}
        self._buffers.update(own)
        try:
            yield
        finally:
            for name in own:
                self._buffers.pop(name, None)
            self._parameters.update(empties)

    def __copy__(self) -> "PackedState":
        """Another module over the same tensors: what is set, moved or registered on one is not on the other."""
        made = type(self).__new__(type(self))
        made.__setstate__({name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(self).items()})
        made.origin = copy.deepcopy(self.origin)  # restore() fills its module
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedState":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in self.bits().items():
            after, loaded = fn(before), self._bits[name] or before.is_meta
            if not loaded and after.is_meta:
                continue  # no state would bring it back, nor what to_empty() does not copy
            is_moved = loaded and after.dtype == before.dtype and after.stride() == before.stride()
            setattr(self, name, after if is_moved else before.to(after.device))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_bits" not in state:  # pickled while they were parameters and buffers
            self._take_over()
        self._settle()

    def _settle(self) -> None:
        """Marks the tensors, whose marks may be lost, and forgets what was made of others."""
        for name, tensor in self.bits().items():
            setattr(self, name, tensor)
        self._tell(torch.bfloat16 if self.origin is None else self.origin.dtype)

    def _take_over(self) -> None:
        self._bits = {}
        for holder in (self._parameters, self._buffers):
            for name in [name for name, tensor in holder.items() if tensor is not None]:
                if not name.startswith("bias"):
                    tensor: Any = holder.pop(name)
                    self.register_bits(name, tensor, name not in self._non_persistent_buffers_set)
        self._non_persistent_buffers_set.clear()


def held(module: PackedState) -> tuple[str, int]:
    """The format of what a module holds packed, and its bytes."""
    weights = [module._packed(of) for of in module._formats]
    return " and ".join(dict.fromkeys(weight.format for weight in weights)), sum(weight.nbytes for weight in weights)


def parameter_of(bias: Tensor | None) -> nn.Parameter | None:
    """A bias as a parameter; one that is a parameter is kept as it is."""
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


@functools.cache
def _warn(name: str) -> None:
    warnings.warn(
        f"{name}: found a packed weight that requires a gradient, expected a frozen one: it is not trained, only "
        "adapters beside it are; model.dequantize() makes it dense",
        stacklevel=4,
    )


def _read(state: Any) -> Any:
    try:
        return json.loads(bytes(state.tolist()))
    except (AttributeError, TypeError, ValueError):
        return state
