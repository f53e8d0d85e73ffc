"""Which checkpoints are read here: a row for each format. A new one is a file of its own and a row."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_w4a16.checkpoints import (
    auto_round,
    compressed_tensors,
    deepseek,
    fp_quant,
    gpt_oss,
    mlx,
    modelopt,
    quark,
    torchao,
)
from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import QUANTISED
from marlin_w4a16.checkpoints.scheme import Scheme


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """How the checkpoints of a producer are told, and read.

    Attributes:
        producer: as people know it, and its schemes name it.
        method: the ``quant_method`` of their quantisation configs.
        scheme: reads such a config, beside that of the model; None: transformers loads all of it.
        quantizer: the class of ``hf/quantizer.py`` or ``hf/producers.py`` that loads them.
        options: the class of ``hf/configs.py`` or ``hf/producers.py`` by which a user chooses how.
        of_headers: what the headers of the files add to a scheme.
    """

    producer: str
    method: str
    scheme: Callable[[Fields, Fields], Scheme | None]
    quantizer: str = "OwnQuantizer"
    options: str = "ModelOptConfig"
    of_headers: Callable[[Scheme, Iterable[Path]], Scheme] = lambda scheme, files: scheme


FORMATS = (
    CheckpointFormat("ModelOpt", "modelopt", lambda config, model: modelopt.scheme(config)),
    CheckpointFormat(
        "compressed-tensors",
        "compressed-tensors",
        lambda config, model: (
            auto_round.e5m3(config.values)
            or (compressed_tensors.scheme(config) if compressed_tensors.is_fp4(config) else None)
        ),
        "CompressedTensorsQuantizer",
        "CompressedTensorsConfig",
    ),
    CheckpointFormat("OpenAI", "mxfp4", lambda config, model: gpt_oss.scheme(config), "Mxfp4Quantizer", "Mxfp4Config"),
    CheckpointFormat(
        "DeepSeek",
        "fp8",
        lambda config, model: deepseek.scheme(config) if deepseek.is_fp4(config, model) else None,
        "FP8Quantizer",
        "FineGrainedFP8Config",
    ),
    CheckpointFormat(
        "Quark",
        "quark",
        lambda config, model: quark.scheme(config.values) if quark.is_fp4(config.values) else None,
        "QuarkQuantizer",
        "QuarkConfig",
    ),
    CheckpointFormat(
        "AutoRound",
        "auto-round",
        lambda config, model: auto_round.scheme(config.values) if auto_round.is_fp4(config.values) else None,
        "AutoRoundQuantizer",
        "AutoRoundConfig",
    ),
    CheckpointFormat(
        "FP-Quant",
        "fp_quant",
        lambda config, model: fp_quant.scheme(config.values) if fp_quant.is_fp4(config.values) else None,
        "FPQuantQuantizer",
        "FPQuantConfig",
    ),
    CheckpointFormat(
        "torchao",
        "torchao",
        lambda config, model: torchao.scheme(config.values) if torchao.is_fp4(config.values) else None,
        "TorchAoQuantizer",
        "TorchAoConfig",
        torchao.of_headers,
    ),
    CheckpointFormat(
        "MLX",
        "mlx",
        lambda config, model: mlx.scheme(config.values) if mlx.is_fp4(config.values) else None,
        "MLXQuantizer",
        "MLXConfig",
    ),
)

# Leaves of FP-Quant, torchao and gpt-oss beside those of `QUANTISED`.
_PACKED = {"qweight", "_weight_qdata", "gate_up_proj_blocks", "down_proj_blocks"}


def scheme_of(
    config: Mapping[str, Any], model: Mapping[str, Any], files: Iterable[Path] = (), where: str = "config.json"
) -> Scheme | None:
    """How this project reads a checkpoint with this quantisation config; None: all is left to transformers.

    Args:
        config: the quantisation config.
        model: that of the model.
        files: of weights, whose headers may say more.
        where: the file in which the quantisation config stands.

    Raises:
        CheckpointError: an entry is of another type than it must have; it names file and entry.
    """
    fields = Fields(config, f"{where}: quantization_config" if where == "config.json" else where)
    method = "mlx" if mlx.is_mlx(config) else fields.text("quant_method")
    row = next((row for row in FORMATS if row.method == method), None)
    scheme = row.scheme(fields, Fields(model, "config.json")) if row is not None else None
    held = tuple(files)
    return row.of_headers(scheme, held) if row is not None and scheme is not None and held else scheme


def stray(method: str | None, tensors: Mapping[str, Entry | None]) -> str | None:
    """A tensor that only a quantised weight has and that nobody reads, by its name.

    Args:
        method: the ``quant_method``; ``"fp8"`` where no layer is FP4, or None: no config says how weights are stored.
        tensors: by name, as far as they are known.
    """
    leaves = (QUANTISED | _PACKED) - ({"weight_scale"} if method == "fp8" else set())
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf in leaves or (leaf == "scales" and getattr(tensors.get(f"{path}.weight"), "dtype", "") == "U32"):
            return name
    return None
