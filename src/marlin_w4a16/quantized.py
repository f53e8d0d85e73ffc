"""The front door of quantize(), which also tells models that save themselves how."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from marlin_w4a16.modules.state import PackedState
from marlin_w4a16.modules.swaps import Swaps
from marlin_w4a16.producers.found import is_of
from marlin_w4a16.quantize import quantize as dense
from marlin_w4a16.quantize.quantize import Format


def quantize(
    model: nn.Module,
    format: Format,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> Swaps:
    """Rounds the weights of a model's linears and experts to FP4, in place; activations stay.

    Each linear becomes a `PackedLinear`, also one of a class of its own that computes what a linear does (Falcon's,
    GPT-2's Conv1D), and the stacked weights of a mixture, such as an Experts module of transformers, a `PackedExperts`.
    Weights are rounded to nearest from their values alone, on their device, with no calibration; each expert by itself,
    its gates and its ups apart. One module is done at a time and its dense weights let go, so that beyond what is
    packed there is no more than the dense weights of one and 64 MB; nothing can undo it. Linears that share a weight
    share the packed one. Left as they are are modules that compute something else, and those whose weights something
    else needs: they are tied, or read by code that a call runs.

    A model of transformers is saved as a checkpoint of ModelOpt by ``save_pretrained`` afterwards, which
    `marlin_w4a16.hf` loads; ``dequantize()`` makes it dense. Where that cannot be done, and for other models with a
    ``save_pretrained`` that asks (diffusers), saving raises; ``torch.save(model.state_dict())`` is for all.

    Args:
        model: the model; its root itself is not swapped.
        format: ``"nvfp4"`` (groups of 16, E4M3 scales and a global one) or ``"mxfp4"`` (groups of 32, E8M0 scales).
        include: globs; where given, only linears and experts whose path matches one are looked at, or all of whose
            weights' paths do. The exact path of one takes it even where it is usually dense, tied (which unties it), or
            no smaller when it is packed.
        exclude: globs; linears and experts that match one are left alone. None stands for `USUALLY_DENSE`: output
            heads, routers, the vision tower; ``()`` for none.
        progress: see `marlin_w4a16.report.progress.track`.

    Returns:
        One row per module that owns a matrix of a product, swapped or left with its reason.

    Raises:
        ValueError: an unknown format.
        TypeError: ``include`` or ``exclude`` of another type.
    """
    swaps = dense.quantize(model, format, include, exclude, progress)
    for module in model.modules():
        if hasattr(module, "save_pretrained") and any(isinstance(part, PackedState) for part in module.modules()):
            _tell(module)
    return swaps


@dataclass(frozen=True, slots=True)
class _Method:
    quant_method: str


@dataclass(frozen=True, slots=True)
class _NotSaved:
    """What ``model.hf_quantizer`` is where nothing is written: whoever asks it says its ``quant_method`` and raises."""

    quantization_config: _Method = _Method(
        "marlin_w4a16.quantize(), in place (torch.save its state_dict(), and load that into a model quantised alike)"
    )

    def dequantize(self, model: nn.Module) -> nn.Module:
        """Raises: the model's dense modules are gone."""
        raise NotImplementedError(
            f"{type(model).__name__}: found packed modules of quantize(), which let the dense ones go: load it again"
        )


def _tell(module: Any) -> None:
    """Gives a model what its ``save_pretrained`` asks."""
    before = getattr(module, "hf_quantizer", None)
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(module, transformers.PreTrainedModel):
        from marlin_w4a16.hf.resizing import refuse_resizing
        from marlin_w4a16.hf.saved import QuantizedHere

        if not isinstance(before, QuantizedHere):
            module.hf_quantizer = QuantizedHere(before)
        refuse_resizing(module)
    elif before is None and not is_of("peft", module):  # which saves adapters alone
        module.hf_quantizer = _NotSaved()
