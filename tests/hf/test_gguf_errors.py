"""GGUF files with FP4 that cannot be loaded are refused before weights are read, and inspection says the same."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="needs gguf, which reads and writes such files")

from checkpoints import ggufs
from hf.loading import read
from marlin_w4a16.cli.gguf_inspection import inspect_gguf
from marlin_w4a16.hf import CheckpointError


def refused(file: Path, **options: Any) -> str:
    """What loading says, and inspection too."""
    with pytest.raises(CheckpointError) as raised:
        read(file.parent, gguf_file=file.name, **options)
    try:
        told = [str(problem) for problem in inspect_gguf(file, values=True).problems]
    except CheckpointError as error:
        told = [str(error)]
    assert told and any(part in str(raised.value) for part in (told[0], told[0].partition(": found ")[2]))
    return str(raised.value)


@pytest.mark.parametrize("keep", [0.99, 0.3, 30, 5, 0])
def test_a_truncated_file(keep, tmp_path):
    file = ggufs.write(tmp_path / "x.gguf", "llama", "MXFP4").file
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    assert "expected a whole GGUF file: download it again" in refused(file)


def test_malformed_files(tmp_path):
    file = ggufs.write(tmp_path / "x.gguf", "llama", "MXFP4").file
    whole = file.read_bytes()
    count = struct.pack("<Q", 1 << 60)
    for changed, said in (
        (b"GGML" + whole[4:], "found b'GGML' at its beginning, expected b'GGUF'"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "found version 9, expected 2 or 3"),
        (whole[:8] + count + whole[16:], "expected a whole GGUF file"),
        (whole[:16] + count + whole[24:], "expected a whole GGUF file"),
        (whole.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "blk.0.attn_q.weight: found it twice"),
        (whole.replace(b"general.architecture", b"general.architectura"), "general.architecture: found none"),
        (
            re.sub(rb"(?s)(blk\.0\.ffn_up\.weight.{4}.{16})\x27", lambda m: m[1] + b"\x63", whole),
            "found ggml's type 99",
        ),
    ):
        assert changed != whole
        file.write_bytes(changed)
        assert said in refused(file)


def test_a_scale_that_is_nan(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "llama", "MXFP4", nan="blk.1.ffn_up.weight")
    assert "NaN (byte 0xff) at [0, 0]" in refused(made.file)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"scale": "blk.0.attn_q.weight.scale"}, "expected blk.0.attn_q.scale"),
        ({"scale": "blk.0.attn_q.scale", "scales": 3}, "blk.0.attn_q.scale: found F32 [3], expected one element"),
        ({"left_out": "blk.1.ffn_up.weight"}, "model.layers.1.mlp.up_proj.weight: found no such tensor"),
        ({"left_out": "blk.1.ffn_norm.weight"}, "model.layers.1.post_attention_layernorm.weight: found no such tensor"),
        ({"wide": "blk.0.ffn_up.weight"}, "found NVFP4 group 16 of 192 x 256, expected 192 x 128"),
    ],
)
def test_files_that_do_not_fit(changes, said, tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "llama", "NVFP4", **changes)
    assert said in refused(made.file)


def test_one_of_several_files(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "llama", "NVFP4", split=3)
    assert "found one of 3 files, expected all in one" in refused(made.file)


def test_transformers_that_asks_no_quantizer(tmp_path, monkeypatch):
    made = ggufs.write(tmp_path / "x.gguf", "llama", "NVFP4")
    monkeypatch.setattr("marlin_w4a16.hf.gguf_config.QUANTIZER", "transformers.quantizers.none")
    assert "expected 5.23 or later" in refused(made.file)


def test_an_architecture_that_is_not_mapped(tmp_path, monkeypatch):
    made = ggufs.write(tmp_path / "x.gguf", "llama", "NVFP4")
    monkeypatch.setattr("gguf.MODEL_ARCH_NAMES", {})
    assert "general.architecture: found 'llama' with FP4" in refused(made.file)


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss"])
def test_experts_of_which_a_projection_is_dense(architecture, tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", architecture, "MXFP4", fp4="(gate|down)_exps", head="dense")
    assert "_exps in MXFP4 group 32 alone, expected all of it in FP4" in refused(made.file)


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "arcee", "NVFP4")
    said = refused(made.file)
    assert "general.architecture: found 'arcee', expected one that transformers reads" in said
