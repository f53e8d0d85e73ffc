"""How a model of transformers that `quantize` packed is saved, as a checkpoint of ModelOpt, and made dense again.

transformers asks ``model.hf_quantizer`` when it saves (5.17 to 5.23). What would not be loaded again raises before
anything is written: the names and shapes to be written are placed as `from_pretrained` places those of files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import HfQuantizer

from marlin_w4a16.checkpoints import modelopt
from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.files import SINGLE, CheckpointError, Entry
from marlin_w4a16.checkpoints.layers import contents
from marlin_w4a16.checkpoints.modelopt_export import algorithm_of, config, exported
from marlin_w4a16.checkpoints.storage import DTYPES
from marlin_w4a16.hf.configs import ModelOptConfig
from marlin_w4a16.hf.dense_modules import dense, empty_twin, packed_in
from marlin_w4a16.hf.placing import place, put
from marlin_w4a16.hf.resizing import allow_resizing
from marlin_w4a16.kernels.expert_order import kinds
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.packed_linear import PackedLinear
from marlin_w4a16.modules.transformers_experts import biases_of, is_experts, names_of
from marlin_w4a16.version import __version__

WHAT_TO_DO = "model.dequantize() makes it dense; torch.save(model.state_dict()) keeps it packed"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class QuantizedHere(HfQuantizer):
    """What ``model.hf_quantizer`` is where `quantize` packed a dense model.

    Args:
        before: what it was, of a model that was loaded from a quantised checkpoint.
    """

    def __init__(self, before: Any = None) -> None:
        super().__init__(ModelOptConfig(quant_algo="W4A16_NVFP4") if before is None else before.quantization_config)
        self.before = before
        self.report = getattr(before, "report", None)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The state dict in ModelOpt's format; the config of the model is given its own.

        Raises:
            CheckpointError: there is no such checkpoint of the model.
        """
        if getattr(model, "_hf_peft_config_loaded", False) or not packed_in(model):
            return None, {}
        if self.before is not None:
            raise CheckpointError(
                f"{type(model).__name__}: found modules that quantize() packed in a model that was loaded quantised, "
                f"expected one or the other: no checkpoint holds both; {WHAT_TO_DO}"
            )
        return checkpoint_of(model), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        allow_resizing(model)
        if self.before is not None:
            model = self.before._dequantize(model, chosen)
        made: dict[int, nn.Module] = {}
        twin = empty_twin(model)
        for path, packed in packed_in(model):
            if id(packed) not in made:
                made[id(packed)] = dense(packed, twin.get_submodule(path), chosen).train(packed.training)
            put(model, path, made[id(packed)])
        return model

    def is_serializable(self) -> bool:
        """Whether a model can be saved is said when it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters, biases and dense layers are; FP4 weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Decode is compiled by generate()."""
        return True


def checkpoint_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict in ModelOpt's format; the config of the model is given its own.

    Raises:
        CheckpointError: there is no such checkpoint of the model.
    """
    state, values = _checkpoint(model)
    producer = {"name": "marlin_w4a16", "version": __version__}
    model.config.quantization_config = ModelOptConfig(**values, producer=producer)
    return state


def _checkpoint(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict to be written, and the quantisation config."""
    twin, state = empty_twin(model), dict(model.state_dict())
    algorithms: dict[str, str] = {}
    for path, packed in packed_in(model):
        biases = [f"{path}.{name}" for name in ("bias",) if isinstance(packed, PackedLinear)]
        state = {k: v for k, v in state.items() if not k.startswith(f"{path}.") or k in biases}
        if isinstance(packed, PackedExperts) and is_experts(twin.get_submodule(path)):
            like = twin.get_submodule(path)
            state |= {f"{path}.{name}": bias.detach() for name, bias in biases_of(packed, like).items()}
            weights = _of_experts(model, path, packed, like)
        elif isinstance(packed, PackedLinear):
            weights = {path: packed.to_fp4(path)}
        else:
            told = f"{path}: found {type(packed).__name__}, expected a linear or an Experts module"
            raise CheckpointError(_refused(model, [told]))
        for name, weight in weights.items():
            state |= {f"{name}.{leaf}": tensor for leaf, tensor in exported(weight, name).items()}
            algorithms[name] = algorithm_of(weight, name)
    linears = {path for path, module in twin.named_modules() if isinstance(module, nn.Linear)} - set(algorithms)
    empty = {f"{path}.weight": torch.empty((1, 1), device="meta") for path in linears}
    written = {name.removesuffix(".weight") for name in revert_weight_conversion(model, empty)}
    values = config(algorithms, linears | written)
    _check(model, twin, state, values)
    return state, values


def _of_experts(model: PreTrainedModel, path: str, packed: PackedExperts, like: Any) -> dict[str, FP4Weight]:
    """The matrices of experts by the paths under which transformers writes those of a dense model.

    Which is which is read off numbers that are put through its conversion: each row of the stacks is its own number.
    Where that leaves stacks, the paths are ModelOpt's.
    """
    found: dict[str, FP4Weight] = {}
    for name, stack in zip(names_of(like), packed.to_fp4(path), strict=True):
        experts, rows = stack.multiplier.shape
        numbers = torch.arange(experts * rows).view(experts, rows, 1)
        made = revert_weight_conversion(model, {f"{path}.{name}": numbers.mT if like.is_transposed else numbers})
        if any(tensor.ndim != 2 or not key.endswith(".weight") for key, tensor in made.items()):
            parts = kinds(packed.order, rows) if name != "down_proj" else (slice(None),)
            leaves = ("gate_proj", "up_proj") if len(parts) == 2 else (name,)
            named = zip(leaves, parts, strict=True)
            made = {f"{path}.{e}.{leaf}.weight": numbers[e, part] for leaf, part in named for e in range(experts)}
        for key, tensor in made.items():
            expert, own = int(tensor.flatten()[0]) // rows, tensor.flatten() % rows
            matrix = stack.derived(stack.codes[expert], stack.scales[expert], stack.multiplier[expert])
            fields = (field[own.to(field.device)] for field in (matrix.codes, matrix.scales, matrix.multiplier))
            found[key.removesuffix(".weight")] = matrix.derived(*fields)
    return found


def _check(model: PreTrainedModel, twin: PreTrainedModel, state: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Raises a CheckpointError where `from_pretrained` would not take what is to be written."""
    written = revert_weight_conversion(model, {k: torch.empty_like(t, device="meta") for k, t in state.items()})
    entries = {k: Entry(Path(SINGLE), _NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for k, t in written.items()}
    scheme = modelopt.scheme(Fields(values, "config.json: quantization_config"))
    held = contents(entries, scheme)
    problems = held.problems or place(held, twin, scheme).problems
    if problems:
        told = [f"{p.tensor}: found {p.found}, expected {p.expected}" for p in problems]
        raise CheckpointError(_refused(model, told))


def _refused(model: PreTrainedModel, problems: list[str]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{type(model).__name__} cannot be saved as a checkpoint of ModelOpt: {problems[0]}{more}; {WHAT_TO_DO}"
