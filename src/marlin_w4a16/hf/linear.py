"""Linears of a checkpoint: as their tensors lie in it, and as they run."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.fp8 import FP8Storage
from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.storage import DTYPES, LOW_RANK, Activations, FP4Storage
from marlin_w4a16.hf.dense import beside, decoded, plain_linear, rotated
from marlin_w4a16.kernels.inputs import fake_quantize
from marlin_w4a16.kernels.layout import pack
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
        decoded: code of the model reads its weight, which is dense therefore.
        alone: its tensors are no parameters, which transformers would load: it is given them by `take`.
    """

    def __init__(
        self,
        layer: Layer,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        keep: bool = False,
        decoded: bool = False,
        alone: bool = False,
    ) -> None:
        super().__init__()
        self.alone, self._taken = alone, dict[str, Tensor]()
        self.layer, self.dtype, self.keep, self.decoded = layer, dtype, keep, decoded
        self.in_features, self.out_features = layer.k, layer.n
        for leaf, entry in layer.entries.items() if not alone else ():
            empty = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            inner, _, name = leaf.rpartition(".")
            if inner and inner not in self._modules:
                self.add_module(inner, Nested())
            self.get_submodule(inner).register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", bias)

    bias: nn.Parameter | None

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Gives it its tensors by leaf, in the checkpoint's dtypes."""
        self._taken = tensors

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by leaf, in its dtypes."""
        if self.alone:
            return self._taken
        inner = {name: module() for name, module in self._modules.items() if isinstance(module, Nested)}
        places = {leaf: leaf.rpartition(".") for leaf in self.layer.entries}
        held = {
            leaf: inner[within][name] if within else getattr(self, leaf).detach()
            for leaf, (within, _, name) in places.items()
        }
        # a model that keeps some modules in float32 widens theirs, which loses nothing
        return {leaf: tensor.to(DTYPES[self.layer.entries[leaf].dtype]) for leaf, tensor in held.items()}

    def loaded(self) -> "CheckpointLinear | FP8Linear | DecodedLinear":
        """The linear that runs; an FP4 weight is packed on its device."""
        if self.decoded and isinstance(self.layer.storage, FP4Storage):
            return DecodedLinear(self.layer, self.tensors(), self.dense(self.dtype)).train(self.training)
        runs = FP8Linear if isinstance(self.layer.storage, FP8Storage) else CheckpointLinear
        return runs(self.layer, self.tensors(), self.bias, self.dtype, self.keep).train(self.training)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """A plain linear with the exact weight rounded once to ``dtype``; a pre-quant scale is multiplied in."""
        tensors, storage = self.tensors(), self.layer.storage
        if isinstance(storage, FP8Storage):
            return plain_linear(storage.read(tensors, dtype), self.bias)
        return plain_linear(decoded(storage.read(tensors, self.layer.path), dtype, beside(storage, tensors)), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        out: Tensor = self.loaded()(x)
        return out

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layer.format}, as stored"


class Nested(nn.Module):
    """Holds those of a `StoredLinear`'s tensors whose names have dots."""

    def forward(self) -> dict[str, Tensor]:
        """They by their last names; called, since accelerate brings offloaded ones back for the length of a call."""
        return {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}


class CheckpointLinear(PackedLinear):
    """A `PackedLinear` that can give back the tensors of its checkpoint, bit for bit.

    Beside the packed weight it holds the checkpoint's small tensors under their names, dots in them as underscores
    (global scales, input scales).
    A pre-quant scale (AWQ) multiplies the input, a rotation turns each block of it, a low-rank part (SVDQuant) of it is
    computed beside the product; with ``keep`` the input of the product is quantised as its producer does (W4A4).

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
        super().__init__(pack(fitted), bias, dtype)
        self.layer = layer
        self.quantize_input = storage.activations if keep else None
        for leaf in layer.small:
            self.register_bits(_flat(leaf), tensors[leaf])
        scale, rotation = (storage.part(role) for role in ("pre-quant scale", "rotation"))
        factor = storage.part("input multiplier", "input divisor")
        self.pre_scale = scale.leaf if scale is not None and scale.leaf in layer.entries else None
        self.rotation = rotation.leaf if rotation is not None and rotation.leaf in layer.entries else None
        self.input_factor = factor if factor is not None and factor.leaf in layer.entries else None
        of_rank = (part.leaf for part in storage.parts if part.role in LOW_RANK)
        self.low_rank = tuple(leaf for leaf in of_rank if leaf in layer.entries)
        # rows whose scales packing changed (see FP4Weight.fit), as they were
        rows = torch.empty(0, dtype=torch.int64, device=stored.scales.device)
        if fitted is not stored:  # or the device would be waited for
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
        small = {leaf: self._small(leaf).detach() for leaf in self.layer.small}
        held, unfitted = self.to_fp4(self.layer.path), (self.unfitted_rows, self.unfitted_scales)
        return self.layer.fp4.restore(held, unfitted, small, self.layer.entries, self.layer.path)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """See `StoredLinear.dense`."""
        kept = {leaf: self._small(leaf).detach() for leaf in self.layer.small}
        return plain_linear(decoded(self.to_fp4(self.layer.path), dtype, beside(self.layer.fp4, kept)), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, the input scaled and quantised first where the checkpoint says so."""
        if self.pre_scale is not None:
            x = (x * self._small(self.pre_scale)).to(x.dtype)
        if self.rotation is not None:
            x = rotated(x, self._small(self.rotation))
        given = x
        if self.quantize_input is not None:
            given = quantized_input(x, self.quantize_input, self.layer.group, self._input_scale())
        out = super().forward(given)
        if self.low_rank:
            a, b = (self._small(leaf).to(x.dtype) for leaf in self.low_rank)
            out = out + nn.functional.linear(nn.functional.linear(x, a), b)
        return out

    def _small(self, leaf: str) -> Tensor:
        kept: Tensor = getattr(self, _flat(leaf))
        return kept

    def _input_scale(self) -> Tensor | None:
        if self.input_factor is None:
            return None
        factor = self._small(self.input_factor.leaf).float().reshape(())
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
        return fp8_tensors(self.layer, self.weight.detach(), kept, self.loaded_as)

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


class DecodedLinear(nn.Linear):
    """A linear that was stored in FP4 and is dense, since code of the model reads its weight.

    It keeps the tensors of its checkpoint beside that, to give them back.

    Args:
        layer, tensors: what the checkpoint holds, and its tensors by leaf.
        dense: the exact weight in the dtype of the model.
    """

    def __init__(self, layer: Layer, tensors: Mapping[str, Tensor], dense: nn.Linear) -> None:
        super().__init__(layer.k, layer.n, bias=dense.bias is not None, device="meta")
        self.layer = layer
        self.weight, self.bias = dense.weight.requires_grad_(False), dense.bias
        for leaf, tensor in tensors.items():  # kept as bytes, which casts leave alone
            self.register_buffer(f"stored_{_flat(leaf)}", tensor.reshape(-1).view(torch.uint8), persistent=False)

    def stored(self) -> dict[str, Tensor]:
        """See `CheckpointLinear.stored`."""
        tensors = {}
        for leaf, entry in self.layer.entries.items():
            held: Tensor = getattr(self, f"stored_{_flat(leaf)}")
            tensors[leaf] = held.view(DTYPES[entry.dtype]).reshape(entry.shape)
        weight, more = self.layer.fp4.read(tensors, self.layer.path), beside(self.layer.fp4, tensors)
        if not torch.equal(decoded(weight, self.weight.dtype, more), self.weight):
            raise CheckpointError(f"{self.layer.path}.weight: found values that were changed, expected those loaded")
        return {leaf: tensor.cpu() for leaf, tensor in tensors.items()}

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """See `StoredLinear.dense`."""
        return plain_linear(self.weight.detach().to(dtype), self.bias)


def fp8_tensors(layer: Layer, weight: Tensor, kept: Mapping[str, Tensor], loaded_as: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an FP8 layer by leaf, bit for bit, on the CPU, from its dense weight.

    Raises:
        CheckpointError: the weight was changed since it was loaded in the dtype ``loaded_as``.
    """
    as_loaded = weight.to(loaded_as)
    if torch.equal(as_loaded.to(weight.dtype), weight):  # a cast since then is no change
        weight = as_loaded
    try:
        tensors = fp8(layer).write(weight, kept, layer.path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return {leaf: tensors[leaf].cpu() for leaf in layer.entries}


def quantized_input(x: Tensor, activations: Activations, group: int, scale: Tensor | None) -> Tensor:
    """The input as its producer would hand it to an FP4 product, in its own dtype."""
    kind: ScaleKind | None = activations.kind
    if kind is None:
        raise ValueError(f"{activations.told}: it cannot be kept")
    return fake_quantize(x, kind, activations.group or group, scale, activations.rounding)


def _flat(leaf: str) -> str:
    """A name that torch takes for a tensor of a module."""
    return leaf.replace(".", "_")


def fp8(layer: Layer) -> FP8Storage:
    """The storage of a layer that is FP8."""
    if not isinstance(layer.storage, FP8Storage):
        raise TypeError(f"{layer.path}: found {layer.format}, expected FP8")
    return layer.storage
