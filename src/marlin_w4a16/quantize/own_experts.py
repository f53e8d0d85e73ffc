"""Experts in two stacks of weights whose module has a forward of its own, which is run to find out what it computes.

Those of Llama 4 are given rows in equal parts, others get ids and routing weights as `PackedExperts` does. See
linear.py for what each function does.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order, kinds
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.modules.batched_experts import BatchedExperts
from marlin_w4a16.modules.gates import recognise_gate
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.swaps import has_hooks
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.quantize.dense import dense_refusal, is_near, lost_with, read_outside
from marlin_w4a16.quantize.experts import shape_refusal, stacked
from marlin_w4a16.quantize.readers import Readers

_Between = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Computed:
    """What a module computes: its weights as ``[experts, n, k]``, what stands between them, and how it holds them."""

    weights: tuple[Tensor, Tensor]
    activation: Activation
    order: Order | None
    turned: bool


def names_of(module: nn.Module) -> tuple[str, str] | None:
    """The names of the two stacks of a module that may be such experts, or None."""
    held = {name: parameter.ndim for name, parameter in module._parameters.items() if parameter is not None}
    one, two = held if list(held.values()) == [3, 3] else ("", "")
    return (one, two) if one and _inputs(module) in (1, 3) else None


def refusal(module: Any, readers: Readers, group: int, named: bool) -> str | None:
    """See linear.py."""
    names = names_of(module) or ("", "")
    if has_hooks(module):
        return "it has hooks, which a PackedExperts would lose"
    if "forward" in vars(module):
        return "its forward has been replaced"
    stateless = [n for n, child in module._modules.items() if not [*child.parameters(), *child.buffers()]]
    refused = (
        next(filter(None, (dense_refusal(module, name) for name in names)), None)
        or lost_with(module, (*names, *stateless), "PackedExperts")
        or read_outside(readers, module, names, "which a PackedExperts does not have")
    )
    if refused is not None:
        return refused
    found = _computed(module)
    if found is None:
        return f"a {type(module).__name__} has a forward of its own, which is not that of experts in two stacks"
    return shape_refusal(found.weights, found.order is not None, group, named)


def packed(module: Any, quantise: Callable[..., FP4Weight], group: int) -> PackedExperts:
    """See linear.py and experts.py."""
    found = _computed(module)
    if found is None:
        raise ValueError("what it computes could not be told")
    (w13, w2), order, names = found.weights, found.order, names_of(module) or ("", "")
    first = stacked(w13, kinds(order, w13.shape[1]), quantise, group, f"its {names[0]}")
    second = stacked(w2, (slice(None),), quantise, group, f"its {names[1]}")
    cls = BatchedExperts if _inputs(module) == 1 else PackedExperts
    made = cls(first, second, found.activation, order, dtype=w13.dtype)
    made.turned = found.turned
    return made


def _inputs(module: nn.Module) -> int:
    """How many tensors a module takes."""
    try:
        return len(inspect.signature(type(module).forward).parameters) - 1
    except (TypeError, ValueError):
        return 0


def _computed(module: Any) -> _Computed | None:
    """The first of what such modules compute that gives what this one gives."""
    one, two = (module._parameters[name].detach() for name in names_of(module) or ())
    for turned, (w13, w2) in enumerate(((one, two), (one.mT, two.mT))):
        experts, hidden, intermediate = w2.shape
        if w13.shape[0] != experts or w13.shape[2] != hidden or w13.shape[1] not in (intermediate, 2 * intermediate):
            continue
        for between in _between(module, intermediate, w13.shape[1] == 2 * intermediate):
            if not _gives(module, w13, w2, between):
                continue
            found = recognise_gate(between, w13.shape[1], _numbers(module), w13.device)
            if not isinstance(found, Rejected):
                return _Computed((w13, w2), *found, bool(turned))
    return None


def _between(module: Any, i: int, gated: bool) -> Iterator[_Between]:
    """What may stand between the products: the module's own function of gates and ups, or its activation."""
    if callable(getattr(module, "_apply_gate", None)):
        yield module._apply_gate
    functions = [*module.children(), *(v for v in vars(module).values() if callable(v) and not isinstance(v, type))]
    if len(functions) != 1:
        return
    act = functions[0]
    if gated:
        yield lambda sums: act(sums[..., :i]) * sums[..., i:]
        yield lambda sums: sums[..., :i] * act(sums[..., i:])
        yield lambda sums: act(sums[..., ::2]) * sums[..., 1::2]
    else:
        yield act


def _gives(module: Any, w13: Tensor, w2: Tensor, between: _Between) -> bool:
    """Whether a module gives for some tokens what two products with that between them give."""
    experts, _, hidden = w13.shape
    x = torch.randn((experts, 2, hidden), generator=torch.Generator().manual_seed(0)).to(w13)
    ids = torch.arange(experts, device=x.device).repeat_interleave(2)[:, None]
    weights = torch.linspace(0.5, 1.5, len(ids)).to(x)[:, None] if _inputs(module) == 3 else torch.ones_like(x[0, :1])
    routed = (ids, weights) if _inputs(module) == 3 else ()
    try:
        with torch.no_grad():
            parts = [nn.functional.linear(between(nn.functional.linear(*p[:2])), p[2]) for p in zip(x, w13, w2)]  # noqa: B905
            return is_near(module.forward(x.flatten(0, 1), *routed), torch.cat(parts) * weights)
    except Exception:  # whatever a module's own code raises
        return False


def _numbers(module: Any) -> tuple[float, ...]:
    """What may be a limit or a slope."""
    held = (*vars(module).values(), *(value for child in module.children() for value in vars(child).values()))
    return tuple(float(v) for v in held if type(v) in (int, float) and math.isfinite(v) and abs(v) <= 1000)
