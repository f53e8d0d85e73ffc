import json
import math
import re
import struct
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import get_args

import pytest
from documented import check, tables
from rich.console import Console

from checkpoints import damage
from checkpoints.formats import write, written
from marlin_w4a16.__main__ import main
from marlin_w4a16.checkpoints.layers import Problem
from marlin_w4a16.cli import inspection, show
from marlin_w4a16.cli.inspect import _WORDS, as_dict, summary
from marlin_w4a16.cli.inspection import Inspection, inspect, local
from narrow import wide

FILE = "model.safetensors"


# where it lies


def test_an_index_stands_for_its_folder(tmp_path, monkeypatch):
    folder = written("ct-nvfp4", "llama", shards=True)
    assert local(str(folder / damage.INDEX)) == local(str(folder)) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert local("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "path, words",
    [
        ("nvidia/Llama-3.1-8B-Instruct-NVFP4", "hf download nvidia/Llama-3.1-8B-Instruct-NVFP4"),
        ("/no/such/folder", "found no such folder, expected that of a checkpoint"),
        (__file__, "found a file, expected the folder"),
    ],
)
def test_a_path_that_is_no_folder(path, words, capsys):
    assert main(["inspect", path]) == 1
    out, err = capsys.readouterr()
    assert not out and words in err and ("hf download" in err) == path.startswith("nvidia")


# how it is told


def test_the_text(capsys):
    folder = written("ct-ignore-names", "llama")
    assert main(["inspect", str(folder)]) == 0
    out = [re.sub(r"  +", "  ", text) for text in capsys.readouterr().out.splitlines()]
    assert out == [
        f"{folder}: compressed-tensors nvfp4-pack-quantized (by config.json), 31 tensors in 1 file",
        "weight  n  shape  format  in files  loaded  as bfloat16  outcome",
        "model.layers.0.mlp.down_proj  1  96 x 160  NVFP4 group 16  8.4 KiB  13.9 KiB  30.0 KiB  packed",
        "model.layers.{0..1}.mlp.gate_proj  2  160 x 96  NVFP4 group 16  16.9 KiB  28.3 KiB  60.0 KiB  packed",
        "model.layers.{0..1}.mlp.up_proj  2  160 x 96  NVFP4 group 16  16.9 KiB  28.3 KiB  60.0 KiB  packed",
        "lm_head  1  208 x 96  BF16  39.0 KiB  39.0 KiB  39.0 KiB  dense",
        "model.embed_tokens  1  208 x 96  BF16  39.0 KiB  39.0 KiB  39.0 KiB  dense",
        "model.layers.{0..1}.self_attn.k_proj  2  48 x 96  BF16  18.0 KiB  18.0 KiB  18.0 KiB  dense",
        "model.layers.{0..1}.self_attn.o_proj  2  96 x 96  BF16  36.0 KiB  36.0 KiB  36.0 KiB  dense",
        "model.layers.{0..1}.self_attn.q_proj  2  96 x 96  BF16  36.0 KiB  36.0 KiB  36.0 KiB  dense",
        "model.layers.{0..1}.self_attn.v_proj  2  48 x 96  BF16  18.0 KiB  18.0 KiB  18.0 KiB  dense",
        "model.layers.1.mlp.down_proj  1  96 x 160  BF16  30.0 KiB  30.0 KiB  30.0 KiB  dense",
        "norms, biases and other vectors  5  96  BF16  0.9 KiB  0.9 KiB  0.9 KiB  dense",
        "5 FP4 linears (5 NVFP4 group 16); 259.1 KiB in files, 287.3 KiB loaded, 366.9 KiB as bfloat16",
    ]


def test_notes_and_problems_stand_under_the_table():
    problems = (Problem(None, "a", "b", "c"), Problem(None, "d", "b", "c"))
    found = Inspection(Path("x"), "config.json", "ModelOpt", "NVFP4", 1, 1, (), (), ("told",), problems)
    assert summary(found) == [
        "0 FP4 linears; 0.0 KiB in files", "note: told", "problem: a: found b, expected c",
        "problem: d: found b, expected c", "it cannot be loaded: 2 problems",
    ]  # fmt: skip


NAMES = ["modelopt-nvfp4", "modelopt-mixed", "modelopt-kv-fp8", "modelopt-svdquant", "ct-nvfp4-fp8", "ct-embedding"]


@pytest.mark.parametrize("name", NAMES)
def test_json_is_as_documented(name, capsys):
    folder = written(name, "llama")
    capsys.readouterr()
    code = main(["inspect", str(folder), "--json"])
    told = json.loads(capsys.readouterr().out)
    schema = tables("commands.md", "JSON of inspect, schema 1")
    assert set(schema) == {"Inspection", "Versions", "Totals", "Line", "Problem"}
    check(told, "Inspection", schema)
    assert told["schema"] == 1 and bool(told["problems"]) == (code == 1)
    assert told == json.loads(json.dumps(as_dict(inspect(folder))))
    assert {key: sum(one[key] for one in told["weights"]) for key in inspection.SIZES}.items() <= told["totals"].items()
    assert sum(told["formats"].values()) == told["totals"]["fp4_linears"]


def test_every_outcome_has_a_word_and_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text().partition("## bench")[0]
    documented = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert set(get_args(inspection.Outcome)) == set(_WORDS) == set(documented)


def test_a_terminal_gets_a_table_of_rich(monkeypatch, capsys):
    lines = [("model[0].up", "2", "packed"), ("model.down", "1", "cannot be loaded: [x]")]
    shown = StringIO()
    Console(file=shown, width=90).print(show.rich_table(("weight", "n", "outcome"), lines, {"n"}, lambda _: "bold"))
    words = shown.getvalue().split()
    assert [word for word in words if set(word) != {"─"}] == " ".join(" ".join(one) for one in [
        ("weight", "n", "outcome"), *lines]).split()  # fmt: skip
    show.show_table(("weight", "n", "outcome"), lines)
    text = capsys.readouterr().out
    assert "─" not in text and text.splitlines()[1] == "model[0].up  2  packed"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show.show_table(("weight", "n", "outcome"), lines)
    assert "─" in capsys.readouterr().out


# what it costs


def sparse(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file that takes no room but for its header."""
    bits = {"U8": 8, "F8_E4M3": 8, "F32": 32, "BF16": 16}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * bits[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with file.open("r+b") as opened:
        opened.truncate(8 + len(text) + end)


def linear(path: str, n: int, k: int) -> dict[str, tuple[str, list[int]]]:
    """The tensors of a linear of ModelOpt."""
    leaves = {"weight": ("U8", [n, k // 2]), "weight_scale": ("F8_E4M3", [n, k // 16])}
    leaves |= {"weight_scale_2": ("F32", []), "input_scale": ("F32", [])}
    return {f"{path}.{leaf}": entry for leaf, entry in leaves.items()}


def big(folder: Path, files: int, linears: int = 374) -> Path:
    """A checkpoint of ModelOpt of 5 GB and 1,500 tensors a file."""
    index = {}
    for i in range(files):
        tensors = {f"model.layers.{i}.norm{j}.weight": ("BF16", [6144]) for j in range(4)}
        for j in range(linears):
            block, part = divmod(j, 3)
            shape = (6144, 4096) if part == 2 else (4096, 6144)
            tensors |= linear(f"model.layers.{i}.mlp.blocks.{block}.{('gate', 'up', 'down')[part]}_proj", *shape)
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        sparse(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
    (folder / damage.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [f"model.layers.{i}.x*" for i in range(100)]}
    (folder / "config.json").write_text(json.dumps({"model_type": "big", "quantization_config": config}))
    return folder


@pytest.mark.parametrize("files", [20, wide(100)])
def test_half_a_terabyte_takes_seconds(files, tmp_path):
    import marlin_w4a16.hf.fit  # noqa: F401, it takes seconds of its own

    folder = big(tmp_path, files)
    start = time.process_time()  # 4.4 s for 100 files; the clock on the wall would count what runs beside
    found = inspect(folder)
    seconds = time.process_time() - start
    assert found.totals["bytes"] > files * 4.9 * 2**30 and (found.files, found.tensors) == (files, 1500 * files)
    assert [(one.path, one.count) for one in found.lines[:3]] == [
        (f"model.layers.{{0..{files - 1}}}.mlp.blocks.{{0..123}}.down_proj", 124 * files),
        (f"model.layers.{{0..{files - 1}}}.mlp.blocks.{{0..124}}.gate_proj", 125 * files),
        (f"model.layers.{{0..{files - 1}}}.mlp.blocks.{{0..124}}.up_proj", 125 * files),
    ]
    assert len(found.lines) == 4 and not found.problems
    assert "not held against a model: ValueError" in found.notes[-1] and "`big`" in found.notes[-1]
    assert seconds < 0.15 * files


def test_problems_of_thousands_of_experts_take_seconds_too(tmp_path):
    tensors = {}
    for j in range(9_000):
        path = f"model.layers.{j // 300}.mlp.experts.{j % 300}.up_proj"
        tensors |= linear(path, 64, 64)
        del tensors[f"{path}.weight_scale_2"]
    sparse(tmp_path / FILE, tensors)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    start = time.process_time()
    found = inspect(tmp_path)
    (one,) = found.lines
    assert time.process_time() - start < 15
    assert one.outcome == "refused" and len(found.problems) == 9_000
    assert (one.path, one.count) == ("model.layers.{0..29}.mlp.experts.{0..299}.up_proj", 9_000)


@pytest.mark.parametrize(
    "name, lost, code, imported",
    [("ct-nvfp4", None, 0, True), ("ct-fp8", None, 0, False), ("ct-nvfp4", "model.layers.0.mlp.up_proj.weight_scale", 1,
                                                              False)],
)  # fmt: skip
def test_no_gpu_is_touched_and_transformers_loaded_for_a_model_alone(name, lost, code, imported, tmp_path):
    script = """
import sys
from marlin_w4a16.__main__ import main
code = main(["inspect", sys.argv[1], "--values"])
import torch
slow = {"transformers", "triton", "torch._dynamo", "torch._inductor"} & set(sys.modules)
print("end", code, torch.cuda.is_initialized(), "rich" in sys.modules, "transformers" in slow, bool(slow))
"""
    folder = write(name, "llama", tmp_path)
    if lost is not None:
        damage.drop(folder, lost)
    ran = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == f"end {code} False False {imported} {imported}", ran.stderr
    assert imported or not ran.stderr  # torchao, which transformers imports, has words of its own


def test_the_files_are_left_as_they_are(tmp_path):
    folder = write("modelopt-w4a16", "llama", tmp_path / "model")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    inspect(folder, values=True)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
