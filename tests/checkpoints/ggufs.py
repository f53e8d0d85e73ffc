"""Small files of GGUF, written by gguf's writer, and their values by an independent decode of the format's description.

In float64: ``value = kvalue * scale``, where kvalues are those of E2M1 doubled and scales are halved. A block of MXFP4
is a byte ``e`` (``2 ** (e - 127)``) and 16 bytes, of which byte j holds the code of column j in its low nibble and that
of column j + 16 in its high one; a block of NVFP4 is four bytes of unsigned E4M3 and 32 bytes of codes, eight for each
scale, of which byte j holds the codes of columns j and j + 8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

KVALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float64)
SIZES = {"MXFP4": (32, 17), "NVFP4": (64, 36)}


def drawn(kind: str, shape: tuple[int, ...], rng: np.random.Generator, size: float) -> np.ndarray:
    """Random blocks of a tensor, bytes ``[..., columns / block * bytes]``, whose values are about ``size``."""
    columns, nbytes = SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // columns, nbytes), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = 127 + round(np.log2(size)) - rng.integers(0, 4, blocks.shape[:-1])
    else:
        blocks[..., :4] = rng.integers(0x20, 0x48, (*blocks.shape[:-1], 4))
        blocks[..., 0, :2] = 0x7F, 0  # both are zero
        blocks[..., 0, 2] |= 0x80  # a sign that nothing looks at
    return blocks.reshape(*shape[:-1], -1)


def decoded(kind: str, stored: np.ndarray) -> np.ndarray:
    """The values of such bytes in float64."""
    blocks = stored.reshape(*stored.shape[:-1], -1, SIZES[kind][1])
    if kind == "MXFP4":
        scales = 2.0 ** (blocks[..., :1].astype(np.float64) - 127) / 2
        codes = blocks[..., None, 1:]
    else:
        byte = blocks[..., :4]
        exponent, mantissa = byte >> 3 & 15, byte & 7
        normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - 7)
        scales = np.where(exponent == 0, mantissa / 512, normal) / 2
        scales = np.where((byte == 0) | (byte == 0x7F), 0, scales)
        codes = blocks[..., 4:].reshape(*blocks.shape[:-1], 4, 8)
    values = KVALUES[np.concatenate([codes & 15, codes >> 4], -1)] * scales[..., None]
    return values.reshape(*stored.shape[:-1], -1)


class Made:
    """A file that grows, and what its tensors are.

    Attributes:
        values: of each tensor by its name in the file, in the file's shape, float64.
        changes: see `write`.
    """

    changes: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, file: Path, architecture: str, seed: int = 0) -> None:
        from gguf import GGUFWriter

        self.file, self.rng = file, np.random.default_rng(seed)
        self.writer, self.values = GGUFWriter(file, architecture), dict[str, np.ndarray]()

    def dense(self, name: str, values: np.ndarray) -> None:
        """A tensor in float32."""
        if name == self.changes.get("left_out"):
            return
        values = values.astype(np.float32)
        self.writer.add_tensor(name, values)
        self.values[name] = values.astype(np.float64)

    def fp4(self, name: str, shape: tuple[int, ...], kind: str, size: float, scale: bool = True) -> None:
        """A tensor in FP4; with ``scale``, in NVFP4, one number beside it, or one for each expert."""
        from gguf import GGMLQuantizationType

        if name == self.changes.get("left_out"):
            return
        if name == self.changes.get("wide"):
            shape = (*shape[:-1], 2 * shape[-1])
        stored = drawn(kind, shape, self.rng, size)
        if name == self.changes.get("nan"):
            stored[0, 0] = 0xFF
        self.writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType[kind])
        self.values[name] = decoded(kind, stored)
        if kind == "NVFP4" and scale:
            factors = self.rng.uniform(0.5, 2, shape[0] if len(shape) == 3 else 1).astype(np.float32) * size / 2
            own = name.replace(".weight", ".scale")
            if name == "blk.0.attn_q.weight" and "scale" in self.changes:
                own, factors = self.changes["scale"], np.repeat(factors, self.changes.get("scales", 1))
            self.writer.add_tensor(own, factors)
            self.writer.add_tensor(name.replace(".weight", ".input_scale"), np.ones_like(factors))
            factors = factors[: shape[0] if len(shape) == 3 else 1]
            self.values[name] = self.values[name] * factors.reshape(-1, *(1,) * (len(shape) - 1))

    def q8(self, name: str, values: np.ndarray) -> None:
        """A tensor in Q8_0: blocks of a float16 scale and 32 signed bytes."""
        from gguf import GGMLQuantizationType

        blocks = values.reshape(*values.shape[:-1], -1, 32)
        scales = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
        codes = np.clip(np.round(blocks / scales), -127, 127).astype(np.int8)
        stored = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], -1)
        self.writer.add_tensor(name, stored.reshape(*values.shape[:-1], -1), raw_dtype=GGMLQuantizationType.Q8_0)
        self.values[name] = (codes * scales.astype(np.float64)).reshape(values.shape)

    def half(self, name: str, values: np.ndarray, brain: bool) -> None:
        """A tensor in bfloat16, of which the low bits are cut off, or in float16."""
        from gguf import GGMLQuantizationType

        if not brain:
            self.writer.add_tensor(name, values.astype(np.float16))
            self.values[name] = values.astype(np.float16).astype(np.float64)
            return
        bits = values.astype(np.float32).view(np.uint32) >> 16
        stored = bits.astype(np.uint16).view(np.uint8).reshape(*values.shape[:-1], -1)
        self.writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType.BF16)
        self.values[name] = (bits << 16).view(np.float32).astype(np.float64)

    def finish(self) -> Path:
        """Writes the file."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.file


def described(made: Made, config: Mapping[str, Any], vocabulary: int) -> None:
    """The metadata that llama.cpp's converter writes of a config."""
    writer = made.writer
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(vocabulary)])


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter puts the second half of each head's rows between those of the first; this undoes it."""
    n = weight.shape[0] // heads
    rows = [head * n + 2 * (row % (n // 2)) + row // (n // 2) for head in range(heads) for row in range(n)]
    return weight[rows]


CONFIG: dict[str, Any] = {
    "vocab_size": 208, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def linears(config: Mapping[str, Any], experts: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's matrices."""
    h, heads, groups, d = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    found: dict[str, tuple[int, ...]] = {
        "attn_q": (heads * d, h), "attn_k": (groups * d, h), "attn_v": (groups * d, h), "attn_output": (h, heads * d),
    }  # fmt: skip
    i, e = config["intermediate_size"], config.get("num_experts", 0)
    if not experts:
        return found | {"ffn_gate": (i, h), "ffn_up": (i, h), "ffn_down": (h, i)}
    i = config["moe_intermediate_size"]
    return found | {"ffn_gate_exps": (e, i, h), "ffn_up_exps": (e, i, h), "ffn_down_exps": (e, h, i)}


def write(file: Path, architecture: str, kind: str, **changes: Any) -> Made:
    """A small model: ``llama``, ``qwen2``, ``qwen3``, ``qwen3moe`` or ``gpt-oss``, its linears and experts in FP4.

    Args:
        file: to be written.
        architecture: as llama.cpp names it.
        kind: ``"MXFP4"``, ``"NVFP4"`` or ``"mixed"``: the first in the even layers.
        changes: ``fp4``, a pattern of the numbers and names of what is FP4 (``q8``, ``f16``, ``bf16``:
            in these; else in float32);
            ``embedding``: it is, too; ``head``: is there one, or a ``"dense"`` one; ``odd``: names of what else is;
            ``yarn``: metadata of it; ``split``: files; and damages: ``nan``, a tensor whose first
            scale is; ``left_out``, one; ``wide``, one that is too wide; ``scale``, another name of the scale of the
            first query, with ``scales`` numbers.
    """
    moe = architecture in ("qwen3moe", "gpt-oss")
    config = {**CONFIG, **(EXPERTS if moe else {}), **({"sliding_window": 16} if architecture == "gpt-oss" else {})}
    made, h, vocabulary = Made(file, architecture), config["hidden_size"], config["vocab_size"]
    described(made, config, vocabulary)
    pattern = changes.get("fp4", "_exps" if architecture == "gpt-oss" else ".")
    made.changes, odd = changes, changes.get("odd", ())
    if changes.get("yarn"):
        made.writer.add_string(f"{architecture}.rope.scaling.type", "yarn")
        made.writer.add_rope_scaling_factor(32.0)
        made.writer.add_rope_scaling_orig_ctx_len(4096)
    if "split" in changes:
        made.writer.add_uint16("split.count", changes["split"])

    def random(*shape: int, around: float = 0.0, size: float = 0.1) -> np.ndarray:
        return around + size * made.rng.standard_normal(shape)

    if changes.get("embedding"):
        made.fp4("token_embd.weight", (vocabulary, h), kind, 0.25, scale=False)
    else:
        made.dense("token_embd.weight", random(vocabulary, h, size=1.0))
    made.dense("output_norm.weight", random(h, around=1))
    if changes.get("head", True) == "dense":
        made.dense("output.weight", random(vocabulary, h))
    elif changes.get("head", True):
        made.fp4("output.weight", (vocabulary, h), "NVFP4" if kind == "mixed" else kind, 0.125)
    for layer in range(config["num_hidden_layers"]):
        of_layer = kind if kind != "mixed" else ("MXFP4", "NVFP4")[layer % 2]
        for name in ("attn_norm", "post_attention_norm" if architecture == "gpt-oss" else "ffn_norm"):
            if name in odd:
                made.fp4(f"blk.{layer}.{name}.weight", (h,), kind, 1.0, scale=False)
            else:
                made.dense(f"blk.{layer}.{name}.weight", random(h, around=1))
        for name, shape in linears(config, moe).items():
            if re.search(pattern, f"{layer}.{name}"):
                made.fp4(f"blk.{layer}.{name}.weight", shape, of_layer, 0.125)
            elif re.search(changes.get("q8", "$^"), name):
                made.q8(f"blk.{layer}.{name}.weight", random(*shape))
            elif re.search(changes.get("f16", "$^"), name) or re.search(changes.get("bf16", "$^"), name):
                made.half(f"blk.{layer}.{name}.weight", random(*shape), bool(re.search(changes["bf16"], name)))
            else:
                made.dense(f"blk.{layer}.{name}.weight", random(*shape))
            if architecture == "gpt-oss" or (architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v")):
                made.dense(f"blk.{layer}.{name}.bias", random(*shape[:-1]))
        if architecture in ("qwen3", "qwen3moe"):
            for name in ("attn_q_norm", "attn_k_norm"):
                made.dense(f"blk.{layer}.{name}.weight", random(config["head_dim"], around=1))
        if moe:
            router = f"blk.{layer}.ffn_gate_inp.weight"
            if "ffn_gate_inp" in odd:
                made.fp4(router, (config["num_experts"], h), kind, 1.0)
            else:
                made.dense(router, random(config["num_experts"], h, size=1.0))
        if architecture == "gpt-oss":
            made.dense(f"blk.{layer}.ffn_gate_inp.bias", random(config["num_experts"]))
            made.dense(f"blk.{layer}.attn_sinks.weight", random(config["num_attention_heads"]))
    made.finish()
    return made
