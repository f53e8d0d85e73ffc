"""The experts of a mixture as one module that owns their packed weights."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.fake_impls.moe import moe
from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.experts import pack_bias, pack_experts, unpack_experts
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.modules.absent import absent
from marlin_w4a16.modules.state import PackedState, held, parameter_of
from marlin_w4a16.report.table import size

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class PackedExperts(PackedState):
    """The weighted sum of what the chosen experts make of each token, from weights that are held packed only.

    Stands where an Experts module of transformers does, with its arguments. Runs in eager mode and under any
    torch.compile backend, as one op, differentiable in the hidden states, the routing weights and the biases. The
    rules of `PackedLinear` for packed tensors, casts and state dicts are its own. Its parameters are the biases, and
    two that are empty and have the dtype of the activations, ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.

    Args:
        w13: gate and up of each expert, or up alone: ``[experts, rows, hidden]``; packed on its device, as is ``w2``.
        w2: down: ``[experts, hidden, intermediate]``, its columns in whole groups (those past i are never used).
        activation: what stands between them.
        order: which rows of ``w13`` are gates; None if there are none.
        bias13: ``[experts, rows]`` in the order of ``w13``, or None. Held as `pack_bias` orders it.
        bias2: ``[experts, hidden]`` or None.
        dtype: the activations to come, where no bias tells it; also for weights whose scales float16 cannot hold (see
            `FP4Weight.fit`).
        weight_on_input: see `marlin_w4a16.moe`.

    Raises:
        ValueError: weights, order or biases that do not belong together, or scales that ``dtype`` cannot hold.
    """

    bias13: nn.Parameter | None
    bias2: nn.Parameter | None
    gate_up_proj, up_proj, down_proj = (absent(name, ("ndim", "dim")) for name in _WEIGHTS)

    def __init__(
        self,
        w13: FP4Weight,
        w2: FP4Weight,
        activation: Activation,
        order: Order | str | None,
        bias13: Tensor | None = None,
        bias2: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        weight_on_input: bool = False,
    ) -> None:
        super().__init__()
        order = None if order is None else Order(order)
        if activation.gated != (order is not None):
            wanted = "an order of gates and ups" if activation.gated else "None"
            raise ValueError(f"PackedExperts: order: found {order!r}, expected {wanted} for {activation}")
        for name, bias, weight in (("bias13", bias13, w13), ("bias2", bias2, w2)):
            if bias is not None and bias.shape != weight.multiplier.shape:
                found, expected = list(bias.shape), list(weight.multiplier.shape)
                raise ValueError(f"PackedExperts: {name}: found shape {found}, expected {expected}")
        packed = pack_experts(w13.fit_first(torch.float16, dtype), w2.fit_first(torch.float16, dtype), order)
        self._hold(packed, activation, order, w13.n, (bias13, bias2), dtype)
        self.weight_on_input = weight_on_input

    def _hold(
        self,
        packed: Sequence[PackedFP4],
        activation: Activation,
        order: Order | None,
        rows: int,
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> None:
        """Takes packed weights over; ``rows`` are those of the first product, for other arguments see the class."""
        (w13, w2), (bias13, bias2) = packed, biases
        self.activation, self.order, self.weight_on_input = activation, order, False
        self.num_experts, self.intermediate = len(w13.words), rows // (1 if order is None else 2)
        if bias13 is not None:
            trained = isinstance(bias13, nn.Parameter) and bias13.requires_grad
            bias13 = nn.Parameter(pack_bias(bias13.detach(), w2.k, order), requires_grad=trained)
        self._own({"13": w13, "2": w2}, {"bias13": parameter_of(bias13), "bias2": parameter_of(bias2)}, dtype)

    @property
    def _empties(self) -> tuple[str, ...]:  # type: ignore[override]
        return _WEIGHTS[0 if self.activation.gated else 1], _WEIGHTS[2]

    @property
    def w13(self) -> PackedFP4:
        """The first product in packed form; its tensors are the module's own, as are those of ``w2``."""
        return self._packed("13")

    @property
    def w2(self) -> PackedFP4:
        """The second product in packed form."""
        return self._packed("2")

    def to_fp4(self, name: str = "experts") -> tuple[FP4Weight, FP4Weight]:
        """Both weights in canonical form, every code and scale byte as it was packed; ``decode()`` makes them dense."""
        return unpack_experts(self.w13, self.w2, self.order, self.intermediate, name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `marlin_w4a16.moe`.

        Args:
            hidden_states: ``[..., hidden]``.
            top_k_index: ``[..., k]``, integers. What is no expert (their number, as expert parallelism of transformers
                has it) contributes nothing.
            top_k_weights: ``[..., k]``.

        Returns:
            The shape and dtype of ``hidden_states``.
        """
        if not torch.compiler.is_compiling():
            self._expect_one()
        packed = self._packed if torch.compiler.is_compiling() else self._kept
        weights, biases = (packed("13"), packed("2")), (self.bias13, self.bias2)
        return self._run(hidden_states, top_k_index, top_k_weights, weights, biases)

    def _run(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        weights: tuple[PackedFP4, PackedFP4],
        biases: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """See `forward`, with weights and biases that may stand elsewhere than those of the module."""
        out = moe(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            *weights,
            top_k_weights.reshape(-1, top_k_weights.shape[-1]),
            top_k_index.reshape(-1, top_k_index.shape[-1]),
            activation=self.activation,
            bias13=biases[0],
            bias2=biases[1],
            weight_on_input=self.weight_on_input,
        )
        return self._asking(out.reshape(*hidden_states.shape[:-1], out.shape[-1]))

    def extra_repr(self) -> str:
        """Shapes, activation, formats and bytes of the packed weights."""
        format, nbytes = held(self)
        shape = f"experts={self.num_experts}, hidden={self.w13.k}, intermediate={self.intermediate}"
        biases = f"bias={self.bias13 is not None or self.bias2 is not None}"
        return f"{shape}, {biases}, {self.activation}, {format}, {size(nbytes)}"

    @property
    def _packing(self) -> dict[str, Any]:
        fields = ("n", "k", "kind", "group", "layout")
        return {
            "experts": self.num_experts,
            "intermediate": self.intermediate,
            "activation": asdict(self.activation),
            "order": self.order,
            "weight_on_input": self.weight_on_input,
            **{f"w{of}": dict(zip(fields, values, strict=True)) for of, values in self._formats.items()},
        }
