"""The benchmark of whole mixtures: its checkpoints by their names, its loop and its tables on the CPU."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def eagerly_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda function, **choices: function)


def choices(folder: Path, **others) -> argparse.Namespace:
    common = {"model": "gpt-oss-20b", "side": "bf16", "batch": [1, 3], "layers": 2, "stop_after": 1e9}
    return argparse.Namespace(folder=folder, json=str(folder / "run.json"), **{**common, **others})


def entries(folder: Path) -> dict:
    from marlin_w4a16.checkpoints import files

    return files.entries(files.files_of(folder))


def test_gpt_oss_is_written_as_it_is_published(benchmark, tmp_path):
    nbytes = benchmark("mixture_checkpoints").write(tmp_path, "gpt-oss-20b", 2)
    held = entries(tmp_path)
    assert nbytes == sum(entry.nbytes for entry in held.values())
    model = benchmark("moe_decode").bf16(tmp_path, "gpt-oss-20b", 2)
    names = set(model.state_dict())
    experts = {name for name in names if name.endswith("_proj") and ".experts." in name}
    assert set(held) == names - experts | {f"{name}_{part}" for name in experts for part in ("blocks", "scales")}
    for name in experts:
        e, k, n = model.state_dict()[name].shape
        assert held[f"{name}_blocks"].shape == (e, n, k // 32, 16)
        assert held[f"{name}_scales"].shape == (e, n, k // 32)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


def test_qwen3_is_written_as_modelopt_exports_it(benchmark, tmp_path):
    benchmark("mixture_checkpoints").write(tmp_path, "qwen3-30b-a3b", 2)
    model, dense = benchmark("moe_decode").bf16(tmp_path, "qwen3-30b-a3b", 2), tmp_path / "dense"
    model.save_pretrained(dense)  # by the published names
    held, wanted = entries(tmp_path), entries(dense)
    assert {name for name in held if not name.endswith(("_scale", "_scale_2"))} == set(wanted)
    packed = [name for name, entry in held.items() if entry.dtype == "U8"]
    assert len(packed) == 2 * (4 + 3 * 8)
    for name in packed:
        n, k = wanted[name].shape
        assert held[name].shape == (n, k // 2)
        assert held[f"{name}_scale"].shape == (n, k // 16) and held[f"{name}_scale_2"].shape == ()


@pytest.mark.parametrize("model, layers, side", [("gpt-oss-20b", 2, "bf16"), ("qwen3-30b-a3b", 1, "ours")])
def test_both_batch_sizes_are_measured_and_shown(model, layers, side, benchmark, tmp_path, capsys, monkeypatch):
    decode = benchmark("moe_decode")
    for constant, value in {"CONTEXT": 136, "CHUNK": 68, "WARM_UP": 2, "STEPS": 2}.items():
        monkeypatch.setattr(decode, constant, value)
    told = []
    result = decode.measure(choices(tmp_path, model=model, layers=layers, side=side), told.append)
    assert [(row["batch"], row["status"]) for row in result["rows"]] == [(1, "ok"), (3, "ok")], told
    assert result == json.loads((tmp_path / "run.json").read_text())
    first, last = result["rows"]
    assert first["touched"] == 2 and 2 <= last["touched"] <= 6
    assert 0 < first["floor_us"] < last["floor_us"]
    assert (result["loads"][0]["packing_s"] is not None) == (side == "ours")
    assert first["skips"] == first["graphs"] == 0
    monkeypatch.setattr(sys, "argv", ["moe_decode.py", "--from", str(tmp_path / "run.json")])
    decode.main()
    shown = capsys.readouterr().out
    assert "decode, compiled" in shown and side in shown and f"{first['step_us']:.0f}" in shown


def test_what_fails_has_a_row_and_what_is_late_has_none(benchmark, tmp_path, capsys, monkeypatch):
    decode = benchmark("moe_decode")
    monkeypatch.setattr(decode, "decode", lambda *_: 1 / 0)
    told = []
    result = decode.measure(choices(tmp_path, batch=[4]), told.append)
    assert [row["status"] for row in result["rows"]] == ["failed: ZeroDivisionError: division by zero"]
    decode.report(result)
    assert "bf16 batch 4: failed: ZeroDivisionError" in capsys.readouterr().out
    assert decode.measure(choices(tmp_path, stop_after=-1.0), told.append)["rows"] == []
    assert "left out" in told[-1]


def test_ratios_are_to_the_dense_model_of_the_same_batch(benchmark):
    decode = benchmark("moe_decode")
    row = {"side": "ours", "batch": 8, "step_us": 2000.0, "tokens_per_s": 4000.0, "floor_us": 900.0, "touched": 21.0}
    row |= {"host_us": 700.0, "compile_s": 60.0, "decode_peak": 16 << 30, "graphs": 1, "skips": 0}
    shown = decode.line(row, {"step_us": 5000.0})
    assert shown == ["ours", "8", "2000", "700", "900", "4000", "2.50", "21.0", "60", "16.0", "1", "0"]
    assert decode.line(row, None)[6] == "-"
