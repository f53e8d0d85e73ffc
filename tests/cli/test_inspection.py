import json
import re
import struct
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import damage
from checkpoints.formats import FORMATS, write, written
from checkpoints.models import FAMILIES
from checkpoints.names import renamed
from marlin_w4a16.__main__ import main
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.cli import inspection
from marlin_w4a16.cli.inspection import Inspection, Line, inspect
from marlin_w4a16.hf.experts.modules import CheckpointExperts
from marlin_w4a16.kernels.layout import packed_nbytes
from marlin_w4a16.modules.state import PackedState

Q = "model.layers.0.self_attn.q_proj"
FILE = "model.safetensors"
PUBLISHED = {"gptoss": "OpenAI", "deepseekv4": "DeepSeek"}
CASES = [(name, made.family) for name, made in FORMATS.items()] + [
    ("modelopt-w4a16", "gemma3-tied"), ("modelopt-head", "llama-tied"), ("ct-nvfp4a16", "llama-bias"),
    ("ct-nvfp4", "qwen3moe"), ("modelopt-nvfp4", "mixtral"), ("ct-mxfp4a16", "deepseekv3"),
]  # fmt: skip


def stored_bytes(folder: Path) -> int:
    """Bytes of a folder's tensors, by the sizes of its files."""
    files = [*folder.glob("*.safetensors")]
    return sum(file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0] for file in files)


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of what a model holds of its checkpoint."""
    made = ("inv_freq", "embed_scale", "unfitted_rows", "unfitted_scales")
    packed = (module.bits().items() for module in model.modules() if isinstance(module, PackedState))
    tensors = [*model.named_parameters(), *model.named_buffers(), *chain.from_iterable(packed)]
    return sum(tensor.nbytes for name, tensor in tensors if not name.endswith(made))


def shared_rows(model: torch.nn.Module) -> int:
    """Bytes by which gate and up, one below the other, take less than each on its own: rows are filled up to tiles."""
    saved = 0
    for module in model.modules():
        if isinstance(module, CheckpointExperts):
            first = [stack.like for stack in module.mixture.first]
            alone = sum(packed_nbytes(one.n, one.k, one.group) for one in first)
            saved += module.num_experts * (
                alone - packed_nbytes(sum(one.n for one in first), first[0].k, first[0].group)
            )
    return saved


def modules(found: Inspection, model_type: str) -> list[tuple[str, str]]:
    """Path in the model and format of each linear, and of each module of experts."""
    told = {(re.sub(r"\.experts\..*", ".experts", renamed(one.path, model_type)), one.format) for one in found.layers}
    return sorted(told)


def loaded(folder: Path, **choices):
    import transformers

    import marlin_w4a16.hf  # noqa: F401

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **choices)


def line(found: Inspection, path: str) -> Line:
    (one,) = [one for one in found.lines if one.path == path]
    return one


def outcomes(found: Inspection) -> set[str]:
    return {one.outcome for one in found.lines}


# every format


@pytest.mark.parametrize("name, family", CASES)
def test_what_is_told_is_what_is_loaded(name, family):
    folder = written(name, family)
    found = inspect(folder, values=True)
    assert found.totals["bytes"] == stored_bytes(folder)
    assert found.producer == PUBLISHED.get(family, FORMATS[name].producer) and found.config == "config.json"
    if found.problems:
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            loaded(folder)
        return
    model, told = loaded(folder), found.totals["loaded_bytes"]
    if family == "deepseekv4":  # without a GPU, transformers decodes FP8 in blocks
        told += sum(one.bf16_bytes - one.loaded_bytes for one in found.lines if one.outcome == "left")
    assert told == held_bytes(model) + shared_rows(model)
    report = getattr(model.hf_quantizer, "report", None)
    told = sorted((one.path, one.format) for one in report.layers) if report else []
    assert modules(found, model.config.model_type) == told


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "modelopt-mixed", "ct-mxfp4a16", "ct-nvfp4-fp8"])
def test_bytes_as_bfloat16_are_those_of_the_dequantised_model(name):
    from marlin_w4a16.hf import CompressedTensorsConfig, ModelOptConfig

    folder = written(name, "llama")
    kind = ModelOptConfig if name.startswith("modelopt") else CompressedTensorsConfig
    model = loaded(folder, quantization_config=kind(dequantize=True))
    plain = sum(tensor.nbytes for tensor in model.parameters())
    scales = sum(tensor.nbytes for key, tensor in model.named_parameters() if key.endswith("_scale"))
    assert inspect(folder).totals["bf16_bytes"] == plain - scales


def test_which_formats_are_refused():
    refused = {name for name, made in FORMATS.items() if inspect(written(name, made.family)).problems}
    assert refused == {"ct-embedding"}


def test_shards_are_told_as_one():
    whole, parts = (inspect(written("ct-nvfp4", "llama", shards)) for shards in (False, True))
    assert parts.files > whole.files == 1 and parts.tensors == whole.tensors
    assert set(parts.lines) == set(whole.lines) and parts.totals == whole.totals and parts.notes == whole.notes


def test_a_mixed_checkpoint():
    found = inspect(written("modelopt-mixed", "llama"))
    assert found.formats == {"NVFP4 group 16": 5}
    assert (found.totals["fp4_linears"], found.totals["fp8_linears"]) == (5, 8)
    up = line(found, "model.layers.{0..1}.mlp.up_proj")
    stored, packed = 2 * (160 * 48 + 160 * 6 + 4 + 4), 2 * (3 * 2 * (2048 + 256) + 4 * 160 + 4 + 4)
    assert up == Line(up.path, 2, (160, 96), "NVFP4 group 16", "packed", None, stored, packed, 2 * 160 * 96 * 2)
    q = line(found, "model.layers.{0..1}.self_attn.q_proj")
    assert q == Line(q.path, 2, (96, 96), "FP8 E4M3", "decoded", None, 2 * 9224, 2 * 18440, 2 * 18432)
    down = line(found, "model.layers.1.mlp.down_proj")
    assert down == Line(down.path, 1, (96, 160), "BF16", "dense", None, *[96 * 160 * 2] * 3)
    vectors = line(found, "norms, biases and other vectors")
    assert vectors == Line(vectors.path, 5, (96,), "BF16", "dense", None, *[5 * 192] * 3)
    assert found.notes == (
        "ModelOpt quantises the inputs to FP4 (W4A4); this is left out, unless activation_quant='keep' (5 linears)",
        "FP8 weights are decoded to the model's dtype (8 linears)",
    )


def test_inputs_that_cannot_be_kept_are_told_otherwise():
    (note,) = inspect(written("modelopt-w4a8-nvfp4", "llama")).notes
    assert note == "ModelOpt quantises the inputs to FP8 (W4A8); this is left out (14 linears)"


@pytest.mark.parametrize("name, scale", [("modelopt-kv-fp8", "k_proj.k_scale"), ("ct-kv", "v_scale")])
def test_scales_of_a_quantised_cache_are_not_loaded(name, scale):
    found = inspect(written(name, "llama"))
    one = line(found, f"model.layers.{{0..1}}.self_attn.{scale}")
    assert (one.outcome, one.count, one.loaded_bytes, one.bf16_bytes) == ("unused", 2, 0, 0) and one.bytes > 0
    assert any("key/value cache" in note for note in found.notes)


def test_the_names_of_those_scales_are_the_plugins():
    from marlin_w4a16.hf.placing import CACHE_SCALE

    assert inspection.CACHE_SCALE.pattern == CACHE_SCALE.pattern


def test_groups_that_are_not_fp4_are_left_to_transformers():
    found = inspect(written("ct-nvfp4-fp8", "llama"))
    q = line(found, "model.layers.{0..1}.self_attn.q_proj")
    assert q == Line(q.path, 2, (96, 96), "F8_E4M3", "left", None, *[2 * (96 * 96 + 2 * 96)] * 2, 2 * 96 * 96 * 2)
    assert outcomes(found) == {"packed", "left", "dense"} and not found.problems


def test_the_cache_of_what_transformers_loads_is_its_own(tmp_path):
    folder = write("ct-fp8", "llama", tmp_path / "model")
    damage.configure(folder, kv_cache_scheme={"num_bits": 8})
    assert not inspect(folder).notes and inspect(folder).algorithm == "float-quantized"


def test_vectors_of_many_sizes_have_no_shape():
    vectors = line(inspect(written("ct-nvfp4a16", "llama-bias")), "norms, biases and other vectors")
    assert (vectors.count, vectors.shape) == (19, None)


def test_a_quantised_embedding_is_refused():
    found = inspect(written("ct-embedding", "llama"))
    embedding = line(found, "model.embed_tokens")
    assert embedding.outcome == "refused" and "Embedding" in embedding.reason and embedding.loaded_bytes == 0
    assert {one.outcome for one in found.lines if "_proj" in one.path} == {"packed"}
    (problem,) = found.problems
    assert str(problem).startswith(f"{FILE}: model.embed_tokens.weight_packed: found NVFP4 group 16 of an embedding")


# what is wrong


def scaled(change, *more):
    return lambda folder: change(folder, f"{Q}.weight_scale", *more)


DAMAGE = {
    "missing": (scaled(damage.drop), f"{Q}.weight_scale", "no such tensor"),
    "narrow": (scaled(damage.cut_columns), f"{Q}.weight_scale", "F8_E4M3 [96, 5]"),
    "cast": (scaled(damage.cast, torch.float32), f"{Q}.weight_scale", "F32 [96, 6]"),
    "surplus": (lambda f: damage.put(f, f"{Q}.weight_global_scale", torch.ones(1)), f"{Q}.weight_global_scale", "F32"),
    "ignored": (lambda f: [damage.configure(f, ignore=["lm_head", Q]), damage.drop(f, f"{Q}.weight_scale")],
                f"{Q}.weight", "U8 [96, 48]"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, tensor, words", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("shards", [False, True])
def test_a_problem_is_told_and_is_1(shards, spoil, tensor, words, tmp_path, capsys):
    folder = write("modelopt-w4a16", "llama", tmp_path / "model", shards)
    spoil(folder)
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert not err and out.splitlines()[-1] == "it cannot be loaded: 1 problem"
    (told,) = re.findall(r"^problem: (.*)$", out, re.M)
    assert f"{tensor}: found {words}" in told and told.startswith("model") and ".safetensors: " in told
    found = inspect(folder)
    assert line(found, Q).outcome == "refused" and f"found {words}" in line(found, Q).reason
    assert line(found, "model.layers.1.self_attn.q_proj").outcome == "packed"
    with pytest.raises(CheckpointError, match=re.escape(tensor)):
        loaded(folder)


def test_an_algorithm_that_is_not_known(tmp_path, capsys):
    folder = write("modelopt-w4a16", "llama", tmp_path / "model")
    damage.configure(folder, quant_algo="NVFP4_NEW")
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "ModelOpt NVFP4_NEW" in out and "and 13 more: found ModelOpt's NVFP4_NEW, expected one of NVFP4" in out
    assert "0 FP4 linears; 160.0 KiB in files\n" in out


@pytest.mark.parametrize("name", ["modelopt-w4a16", "ct-mxfp4a16"])
def test_values_are_read_if_asked_for(name, tmp_path, capsys):
    folder = write(name, "llama", tmp_path / "model")
    damage.not_a_number(folder, f"{Q}.weight_scale")
    assert main(["inspect", str(folder)]) == 0 and main(["inspect", str(folder), "--values"]) == 1
    assert f"problem: {FILE}: {Q}.weight_scale: found NaN" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: damage.truncate(folder, f"{Q}.weight"), "expected a whole safetensors file"),
        (lambda folder: damage.lead_outside(folder, f"{Q}.weight"), "'../x.safetensors', expected one inside"),
        (lambda folder: (folder / FILE).unlink(), f"expected {FILE} or"),
        (lambda folder: damage.configure(folder, quant_algo=None), "quant_algo"),
    ],
)
def test_files_that_cannot_be_read_are_an_error(spoil, words, tmp_path, capsys):
    folder = write("modelopt-w4a16", "llama", tmp_path / "model")
    spoil(folder)
    assert main(["inspect", str(folder), "--json"]) == 1
    out, err = capsys.readouterr()
    assert not out and words in err and err.count("\n") == 1


# other checkpoints


def plain(folder: Path, **config) -> Path:
    """A checkpoint without a quantisation config, but for what is given."""
    FAMILIES["llama"]().save_pretrained(folder)
    if config:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    return folder


def test_a_dense_checkpoint_is_no_problem(tmp_path, capsys):
    folder = plain(tmp_path)
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{folder}: no quantisation config, 21 tensors in 1 file"
    assert out[-1] == "nothing here is FP4: there is no quantisation config, every tensor is dense"
    found = inspect(folder)
    assert found.config is found.producer is found.algorithm is None and outcomes(found) == {"dense"}
    assert [found.totals[name] for name in inspection.SIZES] == [stored_bytes(folder)] * 3
    *matrices, rest, vectors = found.lines
    assert len(matrices) == 8 and min(one.bytes for one in matrices) >= rest.bytes / rest.count
    assert (rest.path, rest.count, rest.shape) == ("other matrices", 2, (48, 96))
    assert vectors.count == 5


def test_integers_of_a_dense_checkpoint_are_dense(tmp_path):
    save_file({"position_ids": torch.arange(4), "mask": torch.ones(4, 4, dtype=torch.uint8)}, tmp_path / FILE)
    assert outcomes(inspect(tmp_path)) == {"dense"}


@pytest.mark.parametrize("name, last", [("modelopt-fp8", "nothing here is FP4"), ("ct-fp8", "is left to transformers")])
def test_fp8_alone_is_no_problem(name, last, capsys):
    assert main(["inspect", str(written(name, "llama"))]) == 0
    out = capsys.readouterr().out
    assert "0 FP4 linears; 22" in out and last in out
    assert outcomes(inspect(written(name, "llama"))) == {"decoded" if name == "modelopt-fp8" else "left", "dense"}


def test_another_method_is_left_to_transformers(tmp_path, capsys):
    folder = plain(tmp_path, quant_method="gptq", bits=4)
    damage.edit(folder, f"{Q}.weight", lambda tensors: tensors.update(quantised(tensors.pop(f"{Q}.weight"))))
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert ": gptq (by config.json), " in out
    known = "ModelOpt, compressed-tensors, OpenAI, DeepSeek, Quark, AutoRound, FP-Quant, torchao or MLX"
    assert f"nothing here is FP4 of {known}: gptq is left to transformers" in out
    assert line(inspect(folder), Q) == Line(Q, 1, (12, 96), "I32", "left", None, *[12 * 96 * 4 + 96 * 2] * 3)


def quantised(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{Q}.qweight": torch.zeros(12, 96, dtype=torch.int32), f"{Q}.scales": weight[0]}


def test_a_config_that_no_tensor_bears_out(tmp_path, capsys):
    assert main(["inspect", str(plain(tmp_path, quant_method="modelopt", quant_algo="NVFP4"))]) == 0
    assert "nothing here is FP4: no tensor is quantised\n" in capsys.readouterr().out


def test_a_config_that_stands_in_hf_quant_config_alone(tmp_path):
    folder = write("modelopt-w4a16", "llama", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    found = inspect(folder)
    assert (found.config, found.notes, found.problems) == ("hf_quant_config.json", (), ())
    assert found.lines == inspect(written("modelopt-w4a16", "llama")).lines
    assert held_bytes(loaded(folder)) == found.totals["loaded_bytes"]
