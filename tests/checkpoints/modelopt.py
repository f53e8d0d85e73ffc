"""Checkpoints that NVIDIA ModelOpt exports."""

from __future__ import annotations

import copy
import json
import re
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


def name_layers(folder: Path) -> None:
    """Names layers of NemotronH as published: ModelOpt 0.47 leaves a NUL in names, and names no single expert."""
    whole = json.loads((folder / "config.json").read_text().replace(r".\u0000backbone.pt_name_sentinel", ""))
    config = whole["quantization_config"]
    layers = config["quantized_layers"]
    projections = [f"{i}.{name}_proj" for i in range(whole["n_routed_experts"]) for name in ("up", "down")]
    for path in [path for path in layers if path.endswith(".experts")]:
        layers |= {f"{path}.{projection}": layers[path] for projection in projections}
        del layers[path]
    for group in config["config_groups"].values():
        targets = [[f"{t}.{p}" for p in projections] if t.endswith(".experts") else [t] for t in group["targets"]]
        group["targets"] = [name for names in targets for name in names]
    tensors = {name.removesuffix(".weight") for file in folder.glob("*.safetensors") for name in names_in(file)}
    config["ignore"] = sorted(name for name in tensors - {*layers} if re.search(r"(proj|gate|embeddings|head)$", name))
    (folder / "config.json").write_text(json.dumps(whole, indent=2))
    (folder / "hf_quant_config.json").unlink()


def names_in(file: Path) -> list[str]:
    """The names of its tensors."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())
