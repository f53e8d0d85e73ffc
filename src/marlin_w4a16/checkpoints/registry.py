"""Which checkpoints are read here: a row for each format. A new one is a file of its own and a row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from marlin_w4a16.checkpoints import compressed_tensors, deepseek, gpt_oss, modelopt
from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.scheme import Scheme


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
    scheme: Callable[[Fields, Fields], Scheme | None]
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
    CheckpointFormat("OpenAI", "mxfp4", lambda config, model: gpt_oss.scheme(config), "Mxfp4Quantizer", "Mxfp4Config"),
    CheckpointFormat(
        "DeepSeek",
        "fp8",
        lambda config, model: deepseek.scheme(config) if deepseek.is_fp4(config, model) else None,
        "FP8Quantizer",
        "FineGrainedFP8Config",
    ),
)


def scheme_of(config: Mapping[str, Any], model: Mapping[str, Any], file: str = "config.json") -> Scheme | None:
    """How this project reads a checkpoint with this quantisation config; None: all is left to transformers.

    Args:
        config: the quantisation config.
        model: that of the model.
        file: where the quantisation config stands.

    Raises:
        CheckpointError: an entry is of another type than it must have; it names file and entry.
    """
    fields = Fields(config, f"{file}: quantization_config" if file == "config.json" else file)
    method = fields.text("quant_method")
    return next((row.scheme(fields, Fields(model, "config.json")) for row in FORMATS if row.method == method), None)
