"""Checkpoints of classes that no producer here exports: some weights of tiny models are NVFP4 as ModelOpt stores it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf.dense import exact

SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def nvfp4(rows: int, columns: int) -> dict[str, Tensor]:
    """The tensors of a random weight by leaf."""
    scales = torch.randint(0x28, 0x48, (rows, columns // 16), dtype=torch.uint8)
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
    factor = torch.rand(()) * 0.02 + 0.02
    return {"weight": codes, "weight_scale": scales.view(torch.float8_e4m3fn), "weight_scale_2": factor}


def fp8(rows: int, columns: int, block: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random weight whose blocks have scales, and its exact value; in MXFP8 they are E8M0."""
    codes = (torch.randn(rows, columns) * 20).to(torch.float8_e4m3fn)
    shape = -(-rows // block[0]), -(-columns // block[1])
    powers = torch.randint(118, 124, shape, dtype=torch.uint8)
    scales = torch.rand(shape) * 0.01 + 0.001
    values = (powers.double() - 127).exp2() if block[0] == 1 else scales.double()
    spread = values.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return {"weight": codes, "weight_scale": powers if block[0] == 1 else scales}, codes.double() * spread


class Written:
    """A model and a checkpoint of it; weights go over one by one, `save` writes what there is.

    Attributes:
        model: dense, with the exact values of what is packed.
        tensors: of the checkpoint.
    """

    def __init__(self, cls: Any, config: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model: Any = cls(config).eval()
            for parameter in self.model.parameters():
                parameter.data = torch.randn(parameter.shape) * (0.1 if parameter.ndim > 1 else 1.0)
        self.tensors: dict[str, Tensor] = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.packed: dict[str, str] = {}  # by which algorithm of ModelOpt

    def pack(self, path: str, rows: int, columns: int) -> Tensor:
        """A new weight at a path of the checkpoint; its exact value."""
        self.store(path, "W4A16_NVFP4", nvfp4(rows, columns))
        return exact(self.tensors, path).float()

    def drop(self, path: str) -> None:
        """There is no weight at a path of the checkpoint."""
        self.tensors = {name: t for name, t in self.tensors.items() if name.rpartition(".")[0] != path}
        self.packed.pop(path, None)

    def store(self, path: str, algorithm: str, tensors: dict[str, Tensor]) -> None:
        """The tensors of a weight of an algorithm of ModelOpt by leaf."""
        self.drop(path)
        self.packed[path] = algorithm
        self.tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in tensors.items()}

    def experts(self, module: str, stored: str, names: tuple[str, str, str]) -> None:
        """Those of a module become one by one: gate, up and down of each by these names below the stored path."""
        experts = self.model.get_submodule(module)
        for leaf in ("gate_up_proj", "down_proj"):
            del self.tensors[f"{module}.{leaf}"]
        for number in range(len(experts.down_proj)):
            both, down = experts.gate_up_proj.data[number], experts.down_proj.data[number]
            both, down = (both.T, down.T) if experts.is_transposed else (both, down)
            for part, name in zip((*both.chunk(2), down), names, strict=True):
                part.copy_(self.pack(f"{stored}.{number}.{name}", *part.shape))

    def linear(self, path: str, *stored: str) -> None:
        """A linear becomes as many, one below the other."""
        linear: nn.Linear = self.model.get_submodule(path)
        del self.tensors[f"{path}.weight"]
        for part, name in zip(linear.weight.data.chunk(len(stored)), stored, strict=True):
            part.copy_(self.pack(name, *part.shape))

    def decode(self, path: str, algorithm: str, block: tuple[int, int]) -> None:
        """A linear becomes one in FP8."""
        weight = self.model.get_submodule(path).weight
        tensors, value = fp8(*weight.shape, block)
        weight.data.copy_(value.float())
        self.store(path, algorithm, tensors)

    def save(self, folder: Path) -> None:
        """Writes the checkpoint; its config names each packed layer."""
        layers = {path: {"quant_algo": algorithm} for path, algorithm in self.packed.items()}
        config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        self.model.config.architectures = [type(self.model).__name__]
        whole = {**self.model.config.to_dict(), "dtype": "float32", "quantization_config": config}
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(whole))
        save_file(
            {name: t.contiguous() for name, t in self.tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
