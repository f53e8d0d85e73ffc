"""Which checkpoints are read here: a row for each format. A new one is a file of its own and a row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from marlin_w4a16.checkpoints import compressed_tensors, deepseek, gpt_oss, modelopt
from marlin_w4a16.checkpoints.scheme import Scheme

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """How the checkpoints of a producer are told, and read.

    Attributes:
        producer: as people know it, and its schemes name it.
        method: the ``quant_method`` of their quantisation configs.
        scheme: reads such a config, beside that of the model; None: transformers loads all of it.
        quantizer: the class of ``hf/quantizer.py`` that loads them.
        options: the class of ``hf/configs.py`` by which a user chooses how.
    """

    producer: str
    method: str
    scheme: Callable[[Config, Config], Scheme | None]
    quantizer: str = "OwnQuantizer"
    options: str = "ModelOptConfig"


FORMATS = (
    CheckpointFormat("ModelOpt", "modelopt", lambda config, model: modelopt.scheme(config)),
    CheckpointFormat(
        "compressed-tensors",
        "compressed-tensors",
        lambda config, model: compressed_tensors.scheme(config) if compressed_tensors.is_fp4(config) else None,
        "CompressedTensorsQuantizer",
        "CompressedTensorsConfig",
    ),
    CheckpointFormat("OpenAI", "mxfp4", lambda config, model: gpt_oss.scheme(), "Mxfp4Quantizer", "Mxfp4Config"),
    CheckpointFormat(
        "DeepSeek",
        "fp8",
        lambda config, model: deepseek.scheme() if deepseek.is_fp4(config, model) else None,
        "FP8Quantizer",
        "FineGrainedFP8Config",
    ),
)


def scheme_of(config: Config, model: Config) -> Scheme | None:
    """How this project reads a checkpoint with this quantisation config; None: all is left to transformers."""
    method = config.get("quant_method")
    return next((row.scheme(config, model) for row in FORMATS if row.method == method), None)
