"""Linears of a checkpoint: as their tensors lie in it, and as they run."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.storage import DTYPES, Activations, FP8Storage
from marlin_w4a16.kernels.fp4 import FP4Weight, round_once
from marlin_w4a16.kernels.inputs import fake_quantize
from marlin_w4a16.kernels.scale_bytes import E4M3_MAX, ScaleKind
from marlin_w4a16.modules.packed_linear import PackedLinear


class StoredLinear(nn.Module):
    """A linear with the tensors that its checkpoint holds, under their names, for a loader to fill.

    `loaded` and `dense` turn it into what runs. It runs itself too, by packing in each call: what a device map puts on
    another device than the one that computes stays as it was stored.

    Args:
        layer: what the checkpoint holds.
        bias: of the linear that this one stands for, or None.
        dtype: of the model.
        keep: quantise the inputs as the producer did.
    """

    def __init__(self, layer: Layer, bias: nn.Parameter | None, dtype: torch.dtype, keep: bool = False) -> None:
        super().__init__()
        self.layer, self.dtype, self.keep = layer, dtype, keep
        self.in_features, self.out_features = layer.k, layer.n
        for leaf, entry in layer.entries.items():
            empty = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            self.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", bias)

    bias: nn.Parameter | None

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by leaf, in its dtypes."""
        held = {leaf: getattr(self, leaf).detach() for leaf in self.layer.entries}
        # a model that keeps some modules in float32 widens theirs, which loses nothing
        return {leaf: tensor.to(DTYPES[self.layer.entries[leaf].dtype]) for leaf, tensor in held.items()}

    def loaded(self) -> "CheckpointLinear | FP8Linear":
        """The linear that runs; an FP4 weight is packed on its device."""
        runs = FP8Linear if isinstance(self.layer.storage, FP8Storage) else CheckpointLinear
        return runs(self.layer, self.tensors(), self.bias, self.dtype, self.keep).train(self.training)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """A plain linear with the exact weight rounded once to ``dtype``; a pre-quant scale is multiplied in."""
        tensors, storage = self.tensors(), self.layer.storage
        if isinstance(storage, FP8Storage):
            return plain_linear(storage.read(tensors, dtype), self.bias)
        columns, rotation = (tensors[leaf] if leaf else None for leaf in before(self.layer))
        return plain_linear(decoded(storage.read(tensors, self.layer.path), dtype, columns, rotation), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        out: Tensor = self.loaded()(x)
        return out

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layer.format}, as stored"


class CheckpointLinear(PackedLinear):
    """A `PackedLinear` that can give back the tensors of its checkpoint, bit for bit.

    Beside the packed weight it holds the checkpoint's small tensors under their names (global scales, input scales).
    A pre-quant scale (AWQ) multiplies the input, a rotation turns each block of it; with ``keep`` the input is
    quantised as its producer does (W4A4).

    Args:
        layer, tensors: what the checkpoint holds, and its tensors by leaf.
        bias, dtype: see `PackedLinear`.
    """

    def __init__(
        self, layer: Layer, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, keep: bool
    ) -> None:
        storage = layer.fp4
        stored = storage.read(tensors, layer.path)
        fitted = stored.fit_first(torch.float16, dtype)
        super().__init__(fitted, bias, dtype)
        self.layer = layer
        self.quantize_input = storage.activations if keep else None
        for leaf in layer.small:
            self.register_bits(leaf, tensors[leaf])
        factor = storage.part("input multiplier", "input divisor")
        self.pre_scale, self.rotation = before(layer)
        self.input_factor = factor if factor is not None and factor.leaf in layer.entries else None
        # rows whose scales packing changed (see FP4Weight.fit), as they were
        rows = (fitted.scales != stored.scales).any(-1).nonzero()[:, 0]
        self.register_bits("unfitted_rows", rows, persistent=False)
        self.register_bits("unfitted_scales", stored.scales[rows], persistent=False)

    unfitted_rows: Tensor
    unfitted_scales: Tensor

    def stored(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by leaf, bit for bit, on the CPU, without the bias.

        Raises:
            CheckpointError: the weight was changed since it was loaded, so that its global scale does not belong to it.
        """
        small = {leaf: getattr(self, leaf).detach() for leaf in self.layer.small}
        held, unfitted = self.to_fp4(self.layer.path), (self.unfitted_rows, self.unfitted_scales)
        return self.layer.fp4.restore(held, unfitted, small, self.layer.entries, self.layer.path)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """See `StoredLinear.dense`."""
        columns, rotation = (getattr(self, leaf).detach() if leaf else None for leaf in (self.pre_scale, self.rotation))
        return plain_linear(decoded(self.to_fp4(self.layer.path), dtype, columns, rotation), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, the input scaled and quantised first where the checkpoint says so."""
        if self.pre_scale is not None:
            x = (x * getattr(self, self.pre_scale)).to(x.dtype)
        if self.rotation is not None:
            x = rotated(x, getattr(self, self.rotation))
        if self.quantize_input is not None:
            x = quantized_input(x, self.quantize_input, self.layer.group, self._input_scale())
        return super().forward(x)

    def _input_scale(self) -> Tensor | None:
        if self.input_factor is None:
            return None
        factor: Tensor = getattr(self, self.input_factor.leaf).float().reshape(())
        return factor.reciprocal() if self.input_factor.role == "input divisor" else factor


class FP8Linear(nn.Linear):
    """A linear that was stored in FP8 and runs dense; it can give back the tensors of its checkpoint.

    Args: see `CheckpointLinear`.
    """

    def __init__(
        self, layer: Layer, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, keep: bool
    ) -> None:
        super().__init__(layer.k, layer.n, bias=bias is not None, device="meta")
        self.layer, self.loaded_as, self.quantize_input = layer, dtype, keep and "input_scale" in tensors
        self.weight = nn.Parameter(fp8(layer).read(tensors, dtype), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        for leaf in layer.small:  # kept as bytes, which casts leave alone
            self.register_buffer(leaf, tensors[leaf].reshape(-1).view(torch.uint8), persistent=False)

    def stored(self) -> dict[str, Tensor]:
        """See `CheckpointLinear.stored`."""
        kept = {leaf: self._kept(leaf) for leaf in self.layer.small}
        weight = self.weight.detach()
        as_loaded = weight.to(self.loaded_as)
        if torch.equal(as_loaded.to(weight.dtype), weight):  # a cast since then is no change
            weight = as_loaded
        try:
            tensors = fp8(self.layer).write(weight, kept, self.layer.path)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        return {leaf: tensors[leaf].cpu() for leaf in self.layer.entries}

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """See `StoredLinear.dense`."""
        return plain_linear(self.weight.detach().to(dtype), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, the input quantised first where the checkpoint says so."""
        if self.quantize_input:
            scale = self._kept("input_scale").float()
            x = ((x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
        return super().forward(x)

    def _kept(self, leaf: str) -> Tensor:
        entry = self.layer.entries[leaf]
        kept: Tensor = getattr(self, leaf)
        return kept.view(DTYPES[entry.dtype]).reshape(entry.shape)


def quantized_input(x: Tensor, activations: Activations, group: int, scale: Tensor | None) -> Tensor:
    """The input as its producer would hand it to an FP4 product, in its own dtype."""
    kind: ScaleKind | None = activations.kind
    if kind is None:
        raise ValueError(f"{activations.told}: it cannot be kept")
    return fake_quantize(x, kind, activations.group or group, scale, activations.rounding)


def decoded(
    weight: FP4Weight, dtype: torch.dtype, columns: Tensor | None = None, rotation: Tensor | None = None
) -> Tensor:
    """The exact weight ``[n, k]`` times a factor for each column, rounded once; made in blocks of rows.

    A rotation of the input is one of the weight by its transpose, which is added up in float64.
    """
    out = torch.empty((weight.n, weight.k), dtype=dtype, device=weight.codes.device)
    for rows, part in weight.row_blocks():
        exact = part.decode()
        exact = exact if columns is None else exact * columns.double()
        out[rows] = round_once(exact if rotation is None else rotated(exact, rotation.T), dtype)
    return out


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """Each block of ``x`` times a square matrix, in the dtype of ``x``."""
    blocks: Tensor = x.unflatten(-1, (-1, matrix.shape[0]))
    return (blocks @ matrix.to(x.dtype)).flatten(-2)


def before(layer: Layer) -> tuple[str | None, str | None]:
    """What multiplies the input of a linear, by the leaves of its tensors: a factor for each column, a matrix."""
    parts = (layer.fp4.part("pre-quant scale"), layer.fp4.part("rotation"))
    scale, rotation = (part.leaf if part is not None and part.leaf in layer.entries else None for part in parts)
    return scale, rotation


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A dense linear around existing tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    linear.bias = bias  # type: ignore[assignment]
    return linear


def fp8(layer: Layer) -> FP8Storage:
    """The storage of a layer that is FP8."""
    if not isinstance(layer.storage, FP8Storage):
        raise TypeError(f"{layer.path}: found {layer.format}, expected FP8")
    return layer.storage
