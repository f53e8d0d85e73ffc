"""The grouped linear of FP4 experts for SM80 to SM90: rows that are sorted by expert."""

import torch
from torch import Tensor

from marlin_w4a16.kernels.decode.tiles import tiles_of_offsets
from marlin_w4a16.kernels.hopper_launch import plan_hopper_experts
from marlin_w4a16.kernels.launch import Launch, plan_experts
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable.grouped import FEW, grouped_product
from marlin_w4a16.kernels.target import Target


def grouped_linear(x: Tensor, packed: PackedFP4, offsets: Tensor) -> Tensor:
    """``marlin_w4a16::grouped_linear`` on a GPU of capability 8.0 to 9.x, for float16 and bfloat16."""
    out = torch.empty((x.shape[0], packed.n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device(x.device):
        target = Target.of(x.device)
        if target.gluon:
            from marlin_w4a16.kernels.hopper.experts import stream_experts

            (hopper,) = plan_hopper_experts(target.processors, x.shape[0], len(offsets), packed.n)
            if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # what the copy engine asks for
                x = x.clone(memory_format=torch.contiguous_format)
            stream_experts(x, packed.contiguous(), None, out, tiles_of_offsets(offsets, len(x), hopper.block_m), hopper)
            return out
        launch = plan_experts(x.shape[0], len(offsets)) or FEW
        grouped(x, packed, offsets, out, launch, ptx=True, wgmma=target.hopper)
    return out


def grouped(
    x: Tensor, packed: PackedFP4, offsets: Tensor, out: Tensor, launch: Launch, *, ptx: bool, wgmma: bool
) -> None:
    """Launches the grouped linear into ``out``; without ``ptx`` it runs in Triton's interpreter too."""
    tiles = tiles_of_offsets(offsets, len(x), launch.block_m)
    grouped_product(x, packed, None, out, tiles, launch, choices=1, ptx=ptx, wgmma=wgmma)
