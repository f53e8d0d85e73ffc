"""What modules that own packed weights share: their state dict says how they are packed, and casts leave them alone."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.modules.origin import Origin

_TENSORS = ("words", "scales", "multiplier")


class PackedState(nn.Module):
    """A module that holds packed weights.

    Words and scales are buffers: they are bits, of which there is no average, no gradient and no initial value. The
    multipliers are parameters that require no grad, and stand behind the biases, since the first parameter of a module
    is where libraries look for the dtype of its inputs.

    ``_extra_state`` holds ``_packing`` as JSON bytes; a state that says something else is refused before anything of it
    is loaded. Casts of the module leave packed tensors as they are, since they hold bits and float32 multipliers.
    """

    origin: Origin | None = None

    def _own(self, weights: dict[str, PackedFP4], biases: dict[str, nn.Parameter | None]) -> None:
        """Takes packed weights over, by what stands behind the names of their tensors, and biases by their names."""
        self._formats = {of: (p.n, p.k, p.kind, p.group, p.layout) for of, p in weights.items()}
        self._weights: dict[str, PackedFP4] = {}
        self._uncast = tuple(f"multiplier{of}" for of in weights)  # the parameters that casts would round
        for name, bias in biases.items():
            self.register_parameter(name, bias)
        for of, weight in weights.items():
            self.register_buffer(f"words{of}", weight.words)
            self.register_buffer(f"scales{of}", weight.scales)
            self.register_parameter(f"multiplier{of}", nn.Parameter(weight.multiplier, requires_grad=False))

    def _packed(self, of: str) -> PackedFP4:
        words, scales, multiplier = (getattr(self, f"{name}{of}") for name in _TENSORS)
        return PackedFP4(words, scales, multiplier, *self._formats[of])

    def _kept(self, of: str) -> PackedFP4:
        """The same, made once for the tensors that the module holds: not for code that is compiled."""
        kept = self._weights.get(of)
        words, scales = self._buffers[f"words{of}"], self._buffers[f"scales{of}"]
        same = kept is not None and kept.words is words and kept.scales is scales
        if kept is None or not same or kept.multiplier is not self._parameters[f"multiplier{of}"]:
            kept = self._weights[of] = self._packed(of)
        return kept

    @property
    def _packing(self) -> dict[str, Any]:
        """How the tensors of the state dict are to be read: values that JSON can hold."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """How the tensors of the state dict are packed, as JSON in a uint8 tensor, which safetensors can hold."""
        return torch.tensor(list(json.dumps(self._packing).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Checked before anything is loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state, errors = state_dict.get(f"{prefix}_extra_state"), args[-1]
        found = self._packing if state is None else _read(state)  # None: reported as missing
        self._weights.clear()
        if found == self._packing:
            super()._load_from_state_dict(state_dict, prefix, *args)
            for of in self._formats:  # a kernel may read words while the one before it runs: that is to write none
                getattr(self, f"multiplier{of}").detach().mul_(1)
        else:
            errors.append(
                f"{prefix.rstrip('.') or type(self).__name__}: found a weight packed as {found}, expected "
                f"{self._packing}: go through to_fp4() of a module that holds it"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedState":
        # aliases: a parameter's own data may be replaced by a narrower one
        kept = {name: getattr(self, name).detach() for name in self._uncast}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._weights.clear()
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self


def held(module: PackedState) -> tuple[str, int]:
    """The format of what a module holds packed, and its bytes."""
    weights = [module._packed(of) for of in module._formats]
    return " and ".join(dict.fromkeys(weight.format for weight in weights)), sum(weight.nbytes for weight in weights)


def parameter_of(bias: Tensor | None) -> nn.Parameter | None:
    """A bias as a parameter; one that is a parameter is kept as it is."""
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


def _read(state: Any) -> Any:
    try:
        return json.loads(bytes(state.tolist()))
    except (AttributeError, TypeError, ValueError):
        return state
