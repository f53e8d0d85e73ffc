"""Checkpoints that NVIDIA ModelOpt exports."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rule = dict[str, Any]
FP8 = {"num_bits": (4, 3), "axis": None}


def nvfp4(group: int = 16) -> Rule:
    """The attributes of a quantiser to NVFP4."""
    return {"num_bits": (2, 1), "block_sizes": {-1: group, "type": "dynamic", "scale_bits": (4, 3)}}


def rule(quantizers: str, attributes: Rule | None = None) -> Rule:
    """What the quantisers that match a pattern do; without attributes they are switched off."""
    return {"quantizer_name": quantizers, **({"enable": False} if attributes is None else {"cfg": attributes})}


def fake_quantise(x: Tensor, block: int, amax: Tensor, *_: int) -> Tensor:
    """ModelOpt's own quantisation to NVFP4 and back, in plain PyTorch."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    factor = amax.float().max() / (6 * 448)
    packed, scale, factor = NVFP4QTensor.quantize(x.float(), block, None, factor)
    dense = packed.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: block})
    return dense.reshape(x.shape).to(x.dtype)


@contextmanager
def kernel_on_cpu() -> Iterator[None]:
    """The operator by which ModelOpt searches smoothing factors, there for CUDA only; its warnings are dropped."""
    import modelopt.torch.quantization  # noqa: F401, defines the operator

    library = torch.library.Library("tensorrt", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            library.impl("dynamic_block_quantize_op", fake_quantise, "CPU", allow_override=True)
            yield
        finally:
            library._destroy()


def write(model: PreTrainedModel, folder: Path, preset: str, *rules: Rule, max_shard_size: str = "5GB") -> None:
    """Quantises with a preset of ModelOpt, further rules last, and exports; the model is not to be used afterwards."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    config = copy.deepcopy(getattr(mtq, preset))
    config["quant_cfg"] += copy.deepcopy(rules)
    model.config.architectures = [type(model).__name__]  # its export looks for them
    tokens = torch.arange(64).view(2, 32)
    with kernel_on_cpu():
        mtq.quantize(model, config, lambda m: m(tokens))
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=folder, max_shard_size=max_shard_size)
