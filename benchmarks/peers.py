"""Linears of FP4 weights to time side by side: ours, cuBLAS, our portable kernel, Humming, Marlin, a compiled decode.

A peer turns one `FP4Weight` into a `Prepared` call over enough copies of its weights that no cache holds them.
Weights have one global scale, as checkpoints do: Humming and Marlin take no factor per row.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from unittest.mock import patch

import torch
from timing import copies_for
from torch import Tensor, nn
from triton.backends.nvidia import compiler as nvidia

from marlin_w4a16.kernels.fp4 import E2M1_VALUES, FP4Weight
from marlin_w4a16.kernels.launch import plan_linear
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.linear import linear
from marlin_w4a16.kernels.portable import linear as kernels
from marlin_w4a16.kernels.scale_bytes import ScaleKind
from marlin_w4a16.kernels.target import Target

FORMATS: dict[str, tuple[ScaleKind, int]] = {"nvfp4": ("e4m3", 16), "mxfp4": ("e8m0", 32)}
# Scale bytes to draw from: E4M3 normals, and powers of two that float16 holds without a second scale.
SCALE_BYTES = {"e4m3": (0x08, 0x7F), "e8m0": (113, 123)}
GLOBAL_SCALE = {"e4m3": 1.1 * 2.0**-12, "e8m0": 1.0}  # keeps float16 outputs in range
BLOCK_ELEMENTS = 1 << 24  # of a weight in float64 at a time: 128 MiB


@dataclass(frozen=True)
class Prepared:
    """``call(i, x)`` is ``x @ weight.T`` with copy ``i`` of ``copies``; ``nbytes`` are those of one copy."""

    call: Callable[[int, Tensor], Tensor]
    copies: int
    nbytes: int


class Peer(Protocol):
    """What is timed. ``missing`` says why it cannot run here, or None."""

    name: str

    def missing(self) -> str | None: ...

    def warm(self, shapes: Iterable[tuple[int, int]], formats: Iterable[str], dtype: torch.dtype) -> None:
        """Compiles ahead what takes long."""

    def takes(self, m: int) -> bool:
        """Whether it is timed at this number of tokens."""

    def prepare(self, weight: FP4Weight, dtype: torch.dtype) -> Prepared: ...


class Always:
    """The common case of a peer: it is there, compiles nothing ahead and is timed at every M."""

    def missing(self) -> str | None:
        return None

    def warm(self, shapes: Iterable[tuple[int, int]], formats: Iterable[str], dtype: torch.dtype) -> None:
        return None

    def takes(self, m: int) -> bool:
        return True


class Ours(Always):
    name = "ours"

    def prepare(self, weight: FP4Weight, dtype: torch.dtype) -> Prepared:
        packed = pack(weight.fit(dtype))
        weights = copies_of(packed)
        return Prepared(lambda i, x: linear(x, weights[i]), len(weights), packed.nbytes)


class Portable(Always):
    """The kernel for every GPU, in the machine code that Triton makes for SM80: loads, decode and ``mma.sync``.

    Triton compiles for SM80 where it is told so (``arch``); only its assembler is made to take the PTX on to this GPU.
    """

    name = "portable"

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else "portable: needs a GPU"

    def takes(self, m: int) -> bool:
        return m <= 64

    def prepare(self, weight: FP4Weight, dtype: torch.dtype) -> Prepared:
        packed = pack(weight.fit(dtype))
        weights = copies_of(packed)
        properties = torch.cuda.get_device_properties(0)
        here = f"sm_{properties.major}{properties.minor}"

        def call(i: int, x: Tensor) -> Tensor:
            out = x.new_empty(x.shape[0], packed.n)
            launch = plan_linear(Target((8, 0), properties.multi_processor_count), x.shape[0], packed.n, packed.k)
            with (
                patch.object(nvidia, "sm_arch_from_capability", lambda capability: here),
                patch.object(kernels, "_linear_kernel", ForSM80(kernels._linear_kernel)),
            ):
                kernels.fused(x, weights[i], None, out, launch, ptx=True, wgmma=False)
            return out

        return Prepared(call, len(weights), packed.nbytes)


@dataclass(frozen=True)
class ForSM80:
    """A kernel that is compiled for SM80 wherever it is launched."""

    kernel: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self.kernel[grid], arch="sm80")


class CuBLAS(Always):
    """``F.linear`` with the weight decoded to 16 bits: what the model would run without quantisation."""

    name = "cublas"

    def prepare(self, weight: FP4Weight, dtype: torch.dtype) -> Prepared:
        dense = torch.cat([part.decode(dtype) for _, part in weight.row_blocks(BLOCK_ELEMENTS)])
        weights = [dense.clone() for _ in range(copies_for(dense.nbytes))]
        return Prepared(lambda i, x: nn.functional.linear(x, weights[i]), len(weights), dense.nbytes)


class Compiled(Always):
    """The decode in plain torch operations and ``F.linear``, in one ``torch.compile``."""

    name = "compiled"

    def __init__(self, tokens: Iterable[int] | None = (1, 256)) -> None:
        self.tokens = None if tokens is None else frozenset(tokens)

    def takes(self, m: int) -> bool:
        return self.tokens is None or m in self.tokens

    def prepare(self, weight: FP4Weight, dtype: torch.dtype) -> Prepared:
        copies = copies_for(weight.nbytes)
        codes = [weight.codes.clone() for _ in range(copies)]
        source = scales_of(weight) if weight.kind == "e4m3" else weight.scales
        scales = [source.clone() for _ in range(copies)]
        factor, table = global_scale(weight), torch.tensor(E2M1_VALUES, device=weight.codes.device)
        run, compiled_for = plain_linear, None

        def call(i: int, x: Tensor) -> Tensor:
            nonlocal run, compiled_for
            if x.shape[0] != compiled_for:  # without the reset, Dynamo stops compiling after eight shapes
                torch._dynamo.reset()
                run, compiled_for = torch.compile(plain_linear, dynamic=False), x.shape[0]
            return run(x, codes[i], scales[i], factor, table)

        return Prepared(call, copies, weight.nbytes)


class Humming(Always):
    """The kernels of the package humming-kernels, with the schedules that it chooses itself.

    It compiles with NVRTC for every shape and many ranges of M, so only what ``tokens`` need is compiled. Its launches
    overlap the end of the kernel before (programmatic dependent launch).
    """

    name = "humming"

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens = tuple(tokens)

    def missing(self) -> str | None:
        return not_importable("humming")

    def warm(self, shapes: Iterable[tuple[int, int]], formats: Iterable[str], dtype: torch.dtype) -> None:
        """Compiles the kernels of all shapes, a few shapes at a time; an error shows again when it is prepared."""
        device = torch.cuda.current_device()
        todo = [(n, k, name) for name in formats for n, k in shapes if k % FORMATS[name][1] == 0]
        with ThreadPoolExecutor(3) as pool:  # each starts a compiler per core by itself
            for layer in todo:
                pool.submit(self._warm_one, *layer, dtype, device)

    def _warm_one(self, n: int, k: int, name: str, dtype: torch.dtype, device: int) -> None:
        self._kernels(humming_config(n, k, name, dtype), device)

    def prepare(self, weight: FP4Weight, dtype: torch.dtype) -> Prepared:
        from humming.ops.launcher import launch_kernel
        from humming.transform import prepare_fp16_e8m0_scale, transform_humming_tensors

        name = next(name for name, (kind, _) in FORMATS.items() if kind == weight.kind)
        tensors = {"weight": weight.codes.view(torch.int32), "weight_scale": scales_of(weight)}
        if weight.kind == "e4m3":
            tensors["weight_scale_2"] = global_scale(weight).reshape(1)
        elif global_scale(weight) != 1:
            raise ValueError("MXFP4 in Humming has no global scale")
        config, tensors = prepare_fp16_e8m0_scale(humming_config(weight.n, weight.k, name, dtype), tensors)
        tensors = transform_humming_tensors(config, tensors)
        kernels = self._kernels(config, torch.cuda.current_device())
        nbytes = sum(t.nbytes for t in tensors.values())
        # A launch leaves its locks at zero, but two that overlap must not share them.
        tensors["locks"] = torch.zeros(2048, dtype=torch.int32, device=weight.codes.device)
        weights = clones(tensors, copies_for(nbytes))
        return Prepared(lambda i, x: launch_kernel(configs=kernels, inputs=x, **weights[i]), len(weights), nbytes)

    def _kernels(self, config: Any, device: int) -> Any:
        """The table of launches, of those ranges of M alone that are timed."""
        from humming.kernel.humming import HummingKernel
        from humming.tune import get_heuristics_config

        ranges = get_heuristics_config(config, device=device)
        used = [entry for entry in ranges if any(entry[0] < m <= entry[1] for m in self.tokens)]
        return HummingKernel.prepare_kernels(config.to_str(), None, used, device)


class Marlin(Always):
    """vLLM's Marlin kernel for FP4 weights."""

    name = "marlin"

    def missing(self) -> str | None:
        return not_importable("vllm")

    def prepare(self, weight: FP4Weight, dtype: torch.dtype) -> Prepared:
        from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import (
            apply_fp4_marlin_linear,
            prepare_fp4_layer_for_marlin,
        )

        layer = marlin_layer(weight, dtype)
        prepare_fp4_layer_for_marlin(layer)
        names = ("weight", "weight_scale", "weight_global_scale", "workspace")
        tensors = {name: getattr(layer, name).data for name in names if hasattr(layer, name)}
        nbytes = tensors["weight"].nbytes + tensors["weight_scale"].nbytes
        weights = clones(tensors, copies_for(nbytes))
        for copy in weights:
            copy.setdefault("weight_global_scale", None)
        sizes = {"size_n": weight.n, "size_k": weight.k}
        return Prepared(lambda i, x: apply_fp4_marlin_linear(x, **weights[i], **sizes), len(weights), nbytes)


def peers(tokens: Iterable[int], all_compiled: bool = False) -> list[Peer]:
    """Every peer, ours first."""
    return [Ours(), CuBLAS(), Portable(), Humming(tokens), Marlin(), Compiled(None) if all_compiled else Compiled()]


def random_weight(n: int, k: int, kind: ScaleKind, group: int, device: str = "cuda") -> FP4Weight:
    """Random codes and scales of common sizes, and one global scale."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(*SCALE_BYTES[kind], (n, k // group), dtype=torch.uint8, device=device)
    multiplier = torch.full((n,), GLOBAL_SCALE[kind], device=device)
    return FP4Weight(codes, scales, multiplier, kind, group)


def random_packed(n: int, k: int, kind: ScaleKind, group: int) -> PackedFP4:
    """`random_weight` as our kernels read it."""
    return pack(random_weight(n, k, kind, group))


def copies_of(packed: PackedFP4) -> list[PackedFP4]:
    """The weight as often as it takes to leave no cache warm."""
    fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    return [dataclasses.replace(packed, **copy) for copy in clones(tensors, copies_for(packed.nbytes))]


def clones(tensors: dict[str, Tensor], count: int) -> list[dict[str, Any]]:
    return [{name: t.clone() for name, t in tensors.items()} for _ in range(count)]


def exact_product(x: Tensor, weight: FP4Weight) -> Tensor:
    """``x @ weight.T`` in float64 of the exact decode."""
    wide = x.double()
    return torch.cat([wide @ part.decode().T for _, part in weight.row_blocks(BLOCK_ELEMENTS)], dim=1)


def plain_linear(x: Tensor, codes: Tensor, scales: Tensor, factor: Tensor, table: Tensor) -> Tensor:
    """What a model author writes: look codes up, scale blocks, scale all, round to the dtype of x, multiply.

    ``scales`` are float8_e4m3fn, or E8M0 bytes as uint8: Inductor has no float8_e8m0fnu.
    """
    values = table[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
    wide = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    blocks = values.view(*scales.shape, -1) * (wide * factor).unsqueeze(-1)
    return nn.functional.linear(x, blocks.flatten(-2).to(x.dtype))


def scales_of(weight: FP4Weight) -> Tensor:
    """The scale bytes as the float8 that they are."""
    return weight.scales.view(torch.float8_e4m3fn if weight.kind == "e4m3" else torch.float8_e8m0fnu)


def global_scale(weight: FP4Weight) -> Tensor:
    """The one factor of the weight, float32 of no dimensions."""
    factor = weight.multiplier[0].clone()
    if not bool((weight.multiplier == factor).all()):
        raise ValueError("multiplier: found several values, expected one global scale")
    return factor


def humming_config(n: int, k: int, name: str, dtype: torch.dtype, **more: Any) -> Any:
    """Humming's description of a layer, dense or of ``num_experts``; sizes that its tiles do not divide are padded."""
    from humming import dtypes
    from humming.schema import BaseWeightSchema, HummingInputSchema
    from humming.transform import prepare_layer_config

    source = {"quant_method": "modelopt", "quant_algo": "nvfp4"} if name == "nvfp4" else {"quant_method": "mxfp4"}
    return prepare_layer_config(
        shape_n=n,
        shape_k=k,
        weight_schema=BaseWeightSchema.from_config(source).to_humming_schema(dtype),
        input_schema=HummingInputSchema(a_dtype=dtypes.DataType.from_torch_dtype(dtype)),
        pad_n_to_multiple=128,
        pad_k_to_multiple=64,
        torch_dtype=dtype,
        **more,
    )


def marlin_layer(weight: FP4Weight, dtype: torch.dtype) -> Any:
    """A layer as vLLM's loaders leave it; a global scale makes it NVFP4, none MXFP4."""
    layer: Any = nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = weight.n, weight.k
    layer.params_dtype = dtype
    tensors = {"weight": weight.codes, "weight_scale": weight.scales}
    if weight.kind == "e4m3":
        tensors |= {"weight_scale": scales_of(weight), "weight_global_scale": global_scale(weight)}
    elif global_scale(weight) != 1:
        raise ValueError("MXFP4 in Marlin has no global scale")
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer


def not_importable(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"
