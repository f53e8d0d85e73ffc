import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from documented import check, tables
from safetensors.torch import save_file
from torch import nn

from checkpoints import damage
from checkpoints.formats import write, written
from checkpoints.models import FAMILIES
from marlin_w4a16 import quantize_nvfp4
from marlin_w4a16.__main__ import main
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.cli import bench
from marlin_w4a16.cli.inspection import inspect
from marlin_w4a16.cli.measure import Result, Work

SMALL = ["--prompt", "6", "--new-tokens", "4", "--device", "cpu"]
WORK = Work(2, 6, 5, "bfloat16", "cpu")
PACKED = Result("packed", "marlin_w4a16", 2.0, 3 << 30, 2 << 30, 30.0, 0.5, 0.02, 0.004, 250.0, 4 << 30, 5 << 30)
DENSE = Result("dequantised", "inductor", 1.0, 6 << 30, 6 << 30, 15.0, 1.0, 0.01, 0.006, 166.67, 7 << 30, 8 << 30)


# on real checkpoints, on the CPU


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "modelopt-mixed", "ct-mxfp4a16"])
def test_json_is_as_documented(name, capsys):
    folder = written(name, "llama")
    capsys.readouterr()
    assert main(["bench", str(folder), *SMALL, "--batch", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    told, schema = json.loads(out), tables("commands.md", "JSON of bench, schema 1")
    assert set(schema) == {"Benchmark", "BenchmarkVersions", "Work", "Result"}
    check(told, "Benchmark", schema)
    assert told["schema"] == 1 and told["folder"] == str(folder) and told["notes"] == []
    assert told["work"] == {"batch": 3, "prompt": 6, "new_tokens": 4, "dtype": "bfloat16", "device": "cpu"}
    packed, dense = told["results"]
    assert (packed["name"], dense["name"]) == ("packed", "dequantised")
    for one in told["results"]:
        assert one["compiled"] is one["load_peak_bytes"] is one["peak_bytes"] is None
        assert 0 < one["prefill_s"] < one["generate_s"] and 0 < one["step_s"] < one["generate_s"]
    totals, rotary = inspect(folder).totals, 96
    assert packed["model_bytes"] == totals["loaded_bytes"] + rotary
    assert dense["model_bytes"] == totals["bf16_bytes"] + rotary
    assert packed["model_bytes"] - packed["read_bytes"] == 208 * 96 * 2
    steps = [f"{name}: {step} ..." for name in ("packed", "dequantised") for step in STEPS]
    assert [line for line in err.splitlines() if line in steps] == steps


STEPS = ["loading", "first generate()", *(f"generate(), {run} of 3" for run in (1, 2, 3))]


def test_the_text_of_one_model(capsys):
    folder = written("ct-nvfp4a16", "llama")
    capsys.readouterr()
    assert main(["bench", str(folder), *SMALL, "--no-dense", "--dtype", "float16"]) == 0
    head, columns, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{folder}: compressed-tensors nvfp4-pack-quantized; batch 1, 6 + 4 tokens, float16; CPU ")
    assert columns.split() == ["packed"]
    assert [line.split("  ")[0] for line in lines] == [
        "compiled by", "load", "model in memory", "first token", "step of decode", "tokens a second",
        "weights read at", "whole generate()",
    ]  # fmt: skip


def test_a_config_that_stands_in_hf_quant_config_alone(tmp_path, capsys):
    folder = write("modelopt-w4a16", "llama", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    capsys.readouterr()
    assert main(["bench", str(folder), *SMALL, "--json"]) == 0
    packed, dense = json.loads(capsys.readouterr().out)["results"]
    assert packed["model_bytes"] < 0.65 * dense["model_bytes"]


def test_dequantised_models_are_dense():
    from marlin_w4a16.modules.packed_linear import PackedLinear

    for name in ("modelopt-nvfp4", "ct-nvfp4"):
        found = inspect(written(name, "llama"))
        packed, dense = (bench.load(found, replace(WORK, dtype="float16"), dequantize) for dequantize in (False, True))
        linears = [[type(m) for m in model.modules() if isinstance(m, nn.Linear)] for model in (packed, dense)]
        assert sum(issubclass(kind, PackedLinear) for kind in linears[0]) == 14
        assert set(linears[1]) == {nn.Linear} and len(linears[1]) == 15
        assert packed.dtype == dense.dtype == torch.float16


# what cannot be measured


@pytest.mark.parametrize("name", ["modelopt-fp8", "ct-fp8"])
def test_a_checkpoint_without_fp4_is_an_error(name, capsys):
    folder = written(name, "llama")
    capsys.readouterr()
    assert main(["bench", str(folder), *SMALL]) == 1
    out, err = capsys.readouterr()
    assert not out and "found no FP4 linear" in err and "inspect" in err


def test_a_damaged_checkpoint_is_an_error(tmp_path, capsys):
    folder = write("modelopt-w4a16", "llama", tmp_path / "model")
    damage.drop(folder, "model.layers.0.mlp.up_proj.weight_scale")
    assert main(["bench", str(folder), *SMALL]) == 1
    out, err = capsys.readouterr()
    assert "{" not in out and "model.layers.0.mlp.up_proj.weight_scale: found no such tensor" in err


def test_a_name_on_the_hub_is_to_be_downloaded_first(capsys):
    assert main(["bench", "nvidia/Llama-NVFP4"]) == 1
    assert "hf download nvidia/Llama-NVFP4" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert main(["bench", "anywhere", "--device", "cuda"]) == 1
    assert "--device cuda: found no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--batch", "0"], ["--prompt", "-1"], ["--new-tokens", "1"], ["--new-tokens", "ten"], ["--dtype", "float32"]],
    ids=" ".join,
)
def test_arguments_are_checked(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "folder", *words])
    assert exit.value.code == 2 and words[1] in capsys.readouterr().err


def test_without_transformers_the_extra_is_named(monkeypatch, capsys):
    folder = written("ct-nvfp4a16", "llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["bench", str(folder), *SMALL]) == 1
    assert "bench needs transformers: pip install 'marlin_w4a16[hf]'" in capsys.readouterr().err


def test_help_loads_no_transformers():
    code = """
import sys
from marlin_w4a16.__main__ import main
try:
    main(["bench", "--help"])
except SystemExit:
    print("transformers" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "False" and "(default: 512)" in ran.stdout, ran.stderr


# a dequantised model that is too big, and what is told of two


@pytest.fixture
def stubbed(monkeypatch):
    """Nothing is measured: results are these, or exceptions that are raised."""
    results = {"packed": PACKED, "dequantised": DENSE}

    def stub(name, load, work, tell):
        if isinstance(results[name], Exception):
            raise results[name]
        return results[name]

    monkeypatch.setattr(bench, "measure", stub)
    return results


def test_a_dequantised_model_that_does_not_fit_is_a_note(stubbed, capsys):
    stubbed["dequantised"] = torch.OutOfMemoryError("CUDA out of memory")
    folder = str(written("ct-nvfp4a16", "llama"))
    capsys.readouterr()
    assert main(["bench", folder, *SMALL]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"note: {bench._TOO_BIG}"
    assert main(["bench", folder, *SMALL, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["results"]) == len(told["notes"]) == 1
    stubbed["packed"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        main(["bench", folder, *SMALL])


def test_the_table_of_two(stubbed, capsys):
    folder = str(written("ct-nvfp4a16", "llama"))
    capsys.readouterr()
    assert main(["bench", folder, *SMALL]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "packed dequantised ratio", "compiled by marlin_w4a16 inductor", "load 2.0 s 1.0 s 0.50",
        "peak memory meanwhile 4.00 GiB 7.00 GiB 1.75", "model in memory 3.00 GiB 6.00 GiB 2.00",
        "compile 30.0 s 15.0 s 0.50", "first token 20.0 ms 10.0 ms 0.50", "step of decode 4.00 ms 6.00 ms 1.50",
        "tokens a second 250.0 166.7 1.50", "weights read at 536.9 GB/s 1074 GB/s",
        "whole generate() 0.50 s 1.00 s 2.00", "peak memory in it 5.00 GiB 8.00 GiB 1.60",
        "ratio: how many times as fast, or as small, packed is",
    ]  # fmt: skip


# on a GPU


def by_hand(folder):
    """A checkpoint of ModelOpt without ModelOpt."""
    model = FAMILIES["llama"]()
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            weight = quantize_nvfp4(module.weight.data)
            state[f"{path}.weight"] = weight.codes
            state[f"{path}.weight_scale"] = weight.scales.view(torch.float8_e4m3fn)
            state[f"{path}.weight_scale_2"] = weight.multiplier[0].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"]}
    values = {"architectures": ["LlamaForCausalLM"], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), **values}))


@pytest.mark.gpu
def test_on_a_gpu_decode_is_compiled_and_memory_is_told(tmp_path, capsys):
    by_hand(tmp_path)
    assert main(["bench", str(tmp_path), "--prompt", "16", "--new-tokens", "8", "--json"]) == 0
    packed, dense = json.loads(capsys.readouterr().out)["results"]
    assert (packed["compiled"], dense["compiled"]) == ("marlin_w4a16", "inductor")
    for one in (packed, dense):
        assert one["compile_s"] > 1 > one["step_s"]
        assert one["load_peak_bytes"] >= 0.9 * one["model_bytes"] and one["peak_bytes"] >= one["model_bytes"]
    assert packed["model_bytes"] < dense["model_bytes"]


def test_a_checkpoint_by_hand_is_measured(tmp_path, capsys):
    by_hand(tmp_path)
    assert main(["bench", str(tmp_path), *SMALL, "--no-dense"]) == 0
    assert "ModelOpt W4A16_NVFP4" in capsys.readouterr().out


def test_an_error_of_loading_is_the_plugins(monkeypatch):
    def refuse(*_, **__):
        raise CheckpointError("no")

    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(CheckpointError):
        bench.load(inspect(written("ct-nvfp4a16", "llama")), WORK, dequantize=False)
