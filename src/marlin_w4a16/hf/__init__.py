"""FP4 checkpoints in transformers: after ``import marlin_w4a16.hf``, ``from_pretrained`` loads them four bits wide.

Checkpoints of NVIDIA ModelOpt, of compressed-tensors, of gpt-oss and of DeepSeek-V4, linears and experts, keep their
format in memory, run in eager mode and under torch.compile, and are saved as they were. `ModelOptConfig` and
`CompressedTensorsConfig` hold the options, `report` says what a model was loaded from. ``pack_experts_of`` makes packed
experts of a module of transformers, for which ``model.set_experts_implementation("marlin_w4a16")`` is there too;
``compile_blocks`` compiles models that cannot decode with a static cache.
"""

from importlib.util import find_spec

from transformers import PreTrainedModel
from transformers.quantizers import auto

from marlin_w4a16.checkpoints import registry
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.hf import announced, configs, gguf_config, mlx, producers, quantizer
from marlin_w4a16.hf.configs import CompressedTensorsConfig, ModelOptConfig
from marlin_w4a16.hf.experts import implementation as implementation
from marlin_w4a16.hf.generation import compile_blocks
from marlin_w4a16.hf.loaded import Loaded
from marlin_w4a16.hf.mlx import MLXConfig, mlx_config
from marlin_w4a16.hf.producers import AutoRoundConfig, FPQuantConfig, QuarkConfig, TorchAoConfig
from marlin_w4a16.modules.transformers_experts import pack_experts_of

__all__ = [
    "AutoRoundConfig",
    "CheckpointError",
    "CompressedTensorsConfig",
    "FPQuantConfig",
    "Loaded",
    "MLXConfig",
    "ModelOptConfig",
    "QuarkConfig",
    "TorchAoConfig",
    "compile_blocks",
    "mlx_config",
    "pack_experts_of",
    "report",
]


def report(model: PreTrainedModel) -> Loaded | None:
    """What a model was loaded from, or None if this plugin did not load it."""
    found: Loaded | None = getattr(getattr(model, "hf_quantizer", None), "report", None)
    return found


def _register() -> None:
    """Of formats that transformers knows, its quantizers and configs are replaced; what is not FP4 goes on to those."""
    announced.wrap()
    rooms = (producers, mlx, configs, quantizer)
    for row in registry.FORMATS:
        options, loads = (
            next(getattr(room, name) for room in rooms if hasattr(room, name)) for name in (row.options, row.quantizer)
        )
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[row.method] = options
        auto.AUTO_QUANTIZER_MAPPING[row.method] = loads
    if find_spec(gguf_config.QUANTIZER) is not None:
        from marlin_w4a16.hf.gguf import GGUFQuantizer

        auto.AUTO_QUANTIZER_MAPPING["gguf"] = GGUFQuantizer


_register()
