"""Headers, indices and configs; an error names the file and the tensor, what was found and what was expected."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import damage
from marlin_w4a16.checkpoints import files
from marlin_w4a16.checkpoints.files import INDEX, SINGLE, CheckpointError, Entry

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SCALE = torch.ones(2, 1).to(torch.float8_e4m3fn)


def write_index(folder: Path, **weight_map: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path) -> Path:
    save_file({"a.weight": torch.zeros(2, 8, dtype=torch.uint8), "a.weight_scale": SCALE}, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def shards(tmp_path) -> Path:
    save_file({"a.weight": torch.zeros(2, 8, dtype=torch.uint8)}, tmp_path / A)
    save_file({"a.weight_scale": SCALE, "b": torch.zeros(3)}, tmp_path / B)
    write_index(tmp_path, **{"a.weight": A, "a.weight_scale": B, "b": B})
    return tmp_path


def load(folder: Path) -> dict[str, Entry]:
    return files.entries(files.files_of(folder))


def error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def test_a_single_file(single):
    assert files.files_of(single) == [single / SINGLE]
    assert load(single) == {
        "a.weight": Entry(single / SINGLE, "U8", (2, 8)),
        "a.weight_scale": Entry(single / SINGLE, "F8_E4M3", (2, 1)),
    }


def test_shards(shards):
    assert files.files_of(shards) == [shards / A, shards / B]
    assert {name: entry.file.name for name, entry in load(shards).items()} == files.index_of(shards)
    assert str(load(shards)["b"]) == "F32 [3]"


def test_a_single_file_goes_before_an_index(shards):
    """As in transformers."""
    save_file({"other": torch.zeros(1)}, shards / SINGLE)
    (shards / B).unlink()
    assert load(shards).keys() == {"other"}


def test_files_in_a_folder_of_the_folder(single):
    (single / "parts").mkdir()
    (single / SINGLE).rename(single / "parts" / A)
    write_index(single, **{"a.weight": f"parts/{A}", "a.weight_scale": f"parts/{A}"})
    assert load(single)["a.weight"].file == single / "parts" / A


@pytest.mark.parametrize(
    "dtype, name, size",
    [
        (torch.uint8, "U8", 1), (torch.int8, "I8", 1), (torch.bool, "BOOL", 1), (torch.float8_e4m3fn, "F8_E4M3", 1),
        (torch.float8_e5m2, "F8_E5M2", 1), (torch.float8_e8m0fnu, "F8_E8M0", 1), (torch.bfloat16, "BF16", 2),
        (torch.float16, "F16", 2), (torch.int16, "I16", 2), (torch.uint16, "U16", 2), (torch.float32, "F32", 4),
        (torch.int32, "I32", 4), (torch.uint32, "U32", 4), (torch.float64, "F64", 8), (torch.int64, "I64", 8),
        (torch.uint64, "U64", 8),
    ],
    ids=str,
)  # fmt: skip
def test_a_dtype_and_its_bytes(dtype, name, size, tmp_path):
    save_file({"a": torch.zeros(3, 5, dtype=dtype), "b": torch.zeros((), dtype=dtype)}, tmp_path / SINGLE)
    found = load(tmp_path)
    assert [(e.dtype, e.shape, e.nbytes) for e in found.values()] == [(name, (3, 5), 15 * size), (name, (), size)]


def test_packed_pairs_of_fp4_are_half_a_byte_each(tmp_path):
    assert Entry(tmp_path, "F4", (4, 6)).nbytes == 12


CUTS = {
    "empty": lambda header, size: 0, "in the header's length": lambda header, size: 5,
    "no header": lambda header, size: 8, "in the header": lambda header, size: 8 + header // 2,
    "no data": lambda header, size: 8 + header, "one byte missing": lambda header, size: size - 1,
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_a_truncated_file(cut, shards):
    whole = (shards / B).read_bytes()
    (shards / B).write_bytes(whole[: CUTS[cut](int.from_bytes(whole[:8], "little"), len(whole))])
    message = error(shards)
    assert message.startswith(f"{shards / B}: ")
    assert message.endswith(": expected a whole safetensors file: download it again")


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64], ids=["lfs", "bytes"]
)
def test_a_file_of_another_kind(content, single):
    (single / SINGLE).write_bytes(content)
    message = error(single)
    assert str(single / SINGLE) in message and "expected a whole safetensors file" in message


@pytest.mark.parametrize("name, kind", [("pytorch_model.bin", ".bin"), ("model.gguf", ".gguf"), ("model", "nameless")])
def test_files_that_are_not_safetensors(name, kind, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        files.entries([tmp_path / name])
    assert str(caught.value) == f"{tmp_path / name}: found a {kind} file, expected safetensors"


def test_a_file_that_the_index_names_is_missing(shards):
    (shards / B).unlink()
    expected = f"{shards / B}: found no such file, expected it since {INDEX} names it: download it again"
    assert error(shards) == expected
    with pytest.raises(CheckpointError, match=B):  # without files_of, as transformers resolves them
        files.entries([shards / A, shards / B])


def test_what_an_index_says_of_tensors_is_not_relied_on(shards):
    expected = load(shards)
    damage.repoint(shards, {"c.weight": A, "b": A})
    assert load(shards) == expected
    damage.repoint(shards, {"c.weight": "model-00003-of-00003.safetensors"})
    assert error(shards).startswith(f"{shards / 'model-00003-of-00003.safetensors'}: found no such file")


def test_a_tensor_in_two_files(shards):
    save_file({"a.weight": torch.zeros(1), "b": torch.zeros(3)}, shards / A)
    assert error(shards) == f"{shards / B}: b: found it in {A} too, expected it once"


@pytest.mark.parametrize("name", ["../x.safetensors", "parts/../../x.safetensors", "/x.safetensors"])
def test_an_index_that_leads_outside(name, shards):
    damage.repoint(shards, {"b": name})
    assert error(shards) == f"{shards / INDEX}: found the file {name!r}, expected one inside the folder"


@pytest.mark.parametrize(
    "content, says",
    [
        (b"{", "expected a JSON file"),
        (b"\xff\xfe", "expected a JSON file"),
        (b"[]", "found list, expected a JSON object"),
        (b"{}", "weight_map: found NoneType, expected tensors and their files"),
        (b'{"weight_map": []}', "weight_map: found list, expected tensors and their files"),
        (b'{"weight_map": {}}', "weight_map: found dict, expected tensors and their files"),
        (b'{"weight_map": {"b": 2}}', "weight_map.b: found int, expected the name of a file"),
        (b'{"weight_map": {"b": null}}', "weight_map.b: found NoneType, expected the name of a file"),
        (b'{"weight_map": {"b": "x.bin"}}', "weight_map: found the file 'x.bin', expected one of safetensors"),
        (b'{"weight_map": {"b": ""}}', "weight_map: found the file '', expected one of safetensors"),
        (b'{"weight_map": {"b": "\\u0000.safetensors"}}', ".safetensors', expected one of safetensors"),
        (b'{"weight_map": {"b": "%s.safetensors"}}' % (b"x" * 5000), "xxx', expected one of safetensors"),
        (
            json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(10_001)}}).encode(),
            "weight_map: found 10001 files, expected at most 10000",
        ),
        (b'{"weight_map": {"b": "b.safetensors"}}', "metadata: found NoneType, expected an object"),
        (b'{"weight_map": {"b": "b.safetensors"}, "metadata": []}', "metadata: found list, expected an object"),
        (b"[" * 100_000, "expected a JSON file"),
    ],
    ids=lambda value: value[-40:],
)
def test_an_index_that_is_none(content, says, shards):
    (shards / INDEX).write_bytes(content)
    assert error(shards).startswith(f"{shards / INDEX}: ") and error(shards).endswith(says)


def test_no_weights(tmp_path):
    expected = f"expected {SINGLE} or {INDEX}"
    assert error(tmp_path / "none") == f"{tmp_path / 'none'}: found no such folder, {expected}"
    assert error(tmp_path) == f"{tmp_path}: found an empty folder, {expected}"
    (tmp_path / SINGLE).mkdir()
    (tmp_path / "config.json").touch()
    assert error(tmp_path) == f"{tmp_path}: found config.json, {SINGLE}, {expected}"
    for i in range(10):
        (tmp_path / f"{i}.bin").touch()
    assert f"found {', '.join(f'{i}.bin' for i in range(8))}, {expected}" in error(tmp_path)


# Configs

QUANTISED = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
OTHER = {"quantization": {"quant_algo": "MXFP4"}}
FROM_OTHER = ("hf_quant_config.json", {"quant_method": "modelopt", **OTHER})


@pytest.mark.parametrize(
    "config, other, expected",
    [
        ({"quantization_config": QUANTISED}, None, ("config.json", QUANTISED)),
        ({"text_config": {"quantization_config": QUANTISED}}, None, ("config.json", QUANTISED)),
        ({"quantization_config": QUANTISED, "text_config": {"quantization_config": {}}}, None,
         ("config.json", QUANTISED)),
        ({"quantization_config": QUANTISED}, OTHER, ("config.json", QUANTISED)),
        ({"quantization_config": None, "text_config": None}, OTHER, FROM_OTHER),
        ({}, OTHER, FROM_OTHER),
        (None, OTHER, FROM_OTHER),
        ({}, None, None),
        (None, None, None),
    ],
)  # fmt: skip
def test_where_the_quantisation_config_stands(config, other, expected, tmp_path):
    for name, content in (("config.json", config), (files.HF_QUANT_CONFIG, other)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert files.quantization_of(tmp_path) == expected


@pytest.mark.parametrize("value, word", [("NVFP4", "str"), (["NVFP4"], "list"), (4, "int")])
@pytest.mark.parametrize("inside", [False, True])
def test_a_quantisation_config_that_is_no_object(inside, value, word, tmp_path):
    config = {"quantization_config": value}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if inside else config))
    with pytest.raises(CheckpointError) as caught:
        files.quantization_of(tmp_path)
    where = tmp_path / "config.json"
    assert str(caught.value) == f"{where}: quantization_config: found {word}, expected an object"


@pytest.mark.parametrize("name", ["config.json", files.HF_QUANT_CONFIG])
def test_a_config_that_is_none(name, tmp_path):
    for content, says in (("{", "expected a JSON file"), ("3", "found int, expected a JSON object")):
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match=says) as caught:
            files.quantization_of(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_a_json_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"No such file.*x\.json.*: expected a JSON file"):
        files.read_json(tmp_path / "x.json")
    assert issubclass(CheckpointError, ValueError)


def test_more_axes_than_a_tensor_may_have(tmp_path):
    header = json.dumps({"x": {"dtype": "U8", "shape": [1] * 65, "data_offsets": [0, 1]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(CheckpointError, match="x: found 65 axes, expected at most 64"):
        files.entries([tmp_path / SINGLE])
