"""Values that no header tells: NaN scales and global scales that cannot be multiplied or divided by."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.headers import fields
from marlin_w4a16.checkpoints import compressed_tensors, deepseek, files, gpt_oss, modelopt, values
from marlin_w4a16.checkpoints.layers import contents
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.checkpoints.scheme import LINEAR, Scheme
from marlin_w4a16.checkpoints.values import bad_values, read

N, K = 3, 64
COLUMNS, ONE = torch.ones(K, dtype=torch.bfloat16), torch.tensor(0.5)
CODES = torch.zeros(N, K // 2, dtype=torch.uint8)
E4M3 = torch.ones(N, K // 16).to(torch.float8_e4m3fn)
E8M0 = torch.full((N, K // 32), 127, dtype=torch.uint8)
DIVIDED = {"format": "nvfp4-pack-quantized", "targets": ["Linear"]}
FORMATS: dict[str, tuple[Scheme, dict[str, Tensor]]] = {
    "nvfp4": (
        modelopt.scheme(fields({"quant_algo": "NVFP4"})),
        {"weight": CODES, "weight_scale": E4M3, "weight_scale_2": ONE, "input_scale": ONE, "pre_quant_scale": COLUMNS},
    ),
    "svd": (
        modelopt.scheme(fields({"quant_algo": "NVFP4_SVD"})),
        {"weight": CODES, "weight_scale": E4M3, "weight_scale_2": ONE, "pre_quant_scale": COLUMNS,
         "svdquant_lora_a": torch.ones(2, K).bfloat16(), "svdquant_lora_b": torch.ones(N, 2).bfloat16()},
    ),
    "mxfp8": (
        modelopt.scheme(fields({"quant_algo": "MXFP8"})),
        {"weight": torch.zeros(N, K).to(torch.float8_e4m3fn), "weight_scale": E8M0, "input_scale": ONE},
    ),
    "mxfp4": (modelopt.scheme(fields({"quant_algo": "mxfp4"})), {"weight": CODES, "weight_scale": E8M0}),
    "e8m0": (
        modelopt.scheme(fields({"quant_algo": "mxfp4"})),
        {"weight": CODES, "weight_scale": E8M0.view(torch.float8_e8m0fnu)},
    ),
    "float32": (
        Scheme("DeepSeek", "FP4", {LINEAR: deepseek.EXPERTS}),
        {"weight": CODES.view(torch.int8), "scale": torch.ones(N, K // 32)},
    ),
    "fp8": (
        modelopt.scheme(fields({"quant_algo": "FP8"})),
        {"weight": torch.full((N, K), torch.nan).to(torch.float8_e4m3fn), "weight_scale": torch.ones(N),
         "input_scale": ONE},
    ),
    "ct": (
        compressed_tensors.scheme(fields({"config_groups": {"group_0": DIVIDED}})),
        {"weight_packed": CODES, "weight_scale": E4M3, "weight_global_scale": ONE.view(1),
         "input_global_scale": ONE.view(1)},
    ),
}  # fmt: skip


def write(folder: Path, name: str, leaf: str, tensor: Tensor, inputs: bool = False) -> list[str]:
    """Writes two linears, of which the second has another tensor; what is wrong with them."""
    scheme, good = FORMATS[name]
    for path, tensors in (("a", good), ("b", {**good, leaf: tensor})):
        save_file({f"{path}.{leaf}": t.clone() for leaf, t in tensors.items()}, folder / f"{path}.safetensors")
    held = contents(files.entries(sorted(folder.glob("*.safetensors"))), scheme)
    assert not held.problems and list(held.layers) == ["a", "b"]
    return [str(problem) for problem in bad_values(held.layers.values(), inputs)]


def with_byte(scales: Tensor, byte: int) -> Tensor:
    made = scales.clone()
    made.view(torch.uint8)[1, 1] = byte
    return made


@pytest.mark.parametrize(
    "name, scales, byte, kind",
    [("nvfp4", E4M3, 0x7F, "e4m3"), ("nvfp4", E4M3, 0xFF, "e4m3"), ("ct", E4M3, 0xFF, "e4m3"),
     ("mxfp4", E8M0, 0xFF, "e8m0"), ("e8m0", E8M0.view(torch.float8_e8m0fnu), 0xFF, "e8m0")],
)  # fmt: skip
def test_a_scale_that_is_nan(name, scales, byte, kind, tmp_path):
    found = write(tmp_path, name, "weight_scale", with_byte(scales, byte))
    expected = f"b.safetensors: b.weight_scale: found NaN (byte {byte:#x}) at [1, 1], expected finite {kind} scales"
    assert found == [expected]


@pytest.mark.parametrize(
    "name, scales, bytes_", [("nvfp4", E4M3, (0, 1, 0x7E, 0x80, 0xFE)), ("mxfp4", E8M0, (0, 1, 0x7F, 254))]
)
def test_any_other_scale_is_fine(name, scales, bytes_, tmp_path):
    assert not any(write(tmp_path, name, "weight_scale", with_byte(scales, byte)) for byte in bytes_)


def test_a_scale_of_mxfp8_that_is_nan(tmp_path):
    (found,) = write(tmp_path, "mxfp8", "weight_scale", with_byte(E8M0, 0xFF))
    assert found == "b.safetensors: b.weight_scale: found nan, expected finite numbers"
    assert not any(write(tmp_path, "mxfp8", "weight_scale", with_byte(E8M0, byte)) for byte in (0, 127, 254))


NOT_ZERO = "finite numbers, not 0"
BAD = ["nan", "inf", "-inf"]


@pytest.mark.parametrize(
    "name, leaf, bad, fine, expected",
    [
        ("nvfp4", "weight_scale_2", BAD, [0, -1, 1e-45, 3e38], "finite numbers"),
        ("nvfp4", "input_scale", BAD, [0, 1e-45], "finite numbers"),
        ("nvfp4", "pre_quant_scale", BAD, [0, -2], "finite numbers"),
        ("fp8", "weight_scale", BAD, [0, 1e-45], "finite numbers"),
        ("svd", "svdquant_lora_a", BAD, [0, -3e38], "finite numbers"),
        ("svd", "svdquant_lora_b", BAD, [0, -3e38], "finite numbers"),
        ("ct", "weight_global_scale", [*BAD, 0, -0.0, 1e-40], [-1, 1e-38, 3e38], NOT_ZERO),
        ("ct", "input_global_scale", [*BAD, 0], [1, 3e38], NOT_ZERO),
    ],
)
def test_a_factor(name, leaf, bad, fine, expected, tmp_path):
    good, of_inputs = FORMATS[name][1][leaf], leaf.startswith("input")

    def one_element(value: float) -> Tensor:
        made = good.clone()
        made.reshape(-1)[-1] = float(value)
        return made

    for value in bad:
        (found,) = write(tmp_path, name, leaf, one_element(value), inputs=True)
        assert of_inputs != bool(write(tmp_path, name, leaf, one_element(value)))  # unless inputs are quantised
        where, _, said = found.partition(", expected ")
        assert where.startswith(f"b.safetensors: b.{leaf}: found ") and said == expected
        assert where.endswith(f"found {one_element(value).reshape(-1)[-1].item()}")
    assert not any(write(tmp_path, name, leaf, one_element(value), inputs=True) for value in fine)


@pytest.mark.parametrize("value", [0.0, 3.0, -1.0, 2.0**-128, 2.0**-149, *map(float, BAD)])
def test_a_float_that_is_no_byte_of_e8m0(value, tmp_path):
    scales = torch.ones(N, K // 32)
    scales[2, 1] = value
    (found,) = write(tmp_path, "float32", "scale", scales)
    value, expected = float(scales[2, 1]), "expected powers of two, 2**-127 to 2**127"
    assert found == f"b.safetensors: b.scale: found {value} at [2, 1], {expected}"


def test_every_other_float_of_e8m0_is_fine(tmp_path):
    for start in (-127, -1, 122):
        scales = torch.arange(start, start + 6).view(N, K // 32).double().exp2().float()
        assert write(tmp_path, "float32", "scale", scales) == []


def test_a_stack_with_a_nan(tmp_path):
    scales = E8M0.repeat(4, 1, 1)
    scales[3, 2, 1] = 0xFF
    stack = {
        "model.experts.up_proj_blocks": CODES.view(N, -1, 16).repeat(4, 1, 1, 1),
        "model.experts.up_proj_scales": scales,
    }
    save_file(stack, tmp_path / "a.safetensors")
    held = contents(files.entries([tmp_path / "a.safetensors"]), gpt_oss.scheme(fields({})))
    (found,) = bad_values(held.layers.values())
    assert str(found) == (
        "a.safetensors: model.experts.up_proj_scales: found NaN (byte 0xff) at [3, 2, 1], expected finite e8m0 scales"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_not_read(name, tmp_path, monkeypatch):
    asked, stacked = [], Reader.stacked

    def noted(reader, places, *device):
        asked.extend(place.name for place in places)
        return stacked(reader, places, *device)

    monkeypatch.setattr(Reader, "stacked", noted)
    of_inputs = {"input_scale", "input_global_scale"}
    small = FORMATS[name][1].keys() - {"weight", "weight_packed"}
    scales = "scale" if "scale" in small else "weight_scale"
    for inputs, leaves in ((False, small - of_inputs), (True, small)):
        asked.clear()
        assert write(tmp_path, name, scales, FORMATS[name][1][scales], inputs) == []
        assert sorted(asked) == sorted(f"{path}.{leaf}" for path in "ab" for leaf in leaves)


@pytest.mark.parametrize("at_a_time", [1, 12, 1 << 20])
def test_problems_are_told_in_the_order_of_layers(at_a_time, tmp_path, monkeypatch):
    """However many tensors are looked at together."""
    monkeypatch.setattr(values, "_AT_A_TIME", at_a_time)
    scheme, good = FORMATS["nvfp4"]
    bad = {"weight_scale": with_byte(E4M3, 0x7F), "input_scale": torch.tensor(torch.inf)}
    layers = {"a": {}, "b": bad, "c": {}, "d": {"weight_scale_2": torch.tensor(torch.nan)}, "e": bad}
    tensors = {f"{path}.{leaf}": t.clone() for path, more in layers.items() for leaf, t in {**good, **more}.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    held = contents(files.entries([tmp_path / "a.safetensors"]), scheme)
    found = [problem.tensor for problem in bad_values((held.layers[path] for path in "abcde"), inputs=True)]
    assert found == ["b.weight_scale", "b.input_scale", "d.weight_scale_2", "e.weight_scale", "e.input_scale"]


def test_some_tensors_are_read(tmp_path):
    write(tmp_path, "nvfp4", "weight_scale_2", torch.tensor(7.0))
    entries = files.entries(sorted(tmp_path.glob("*.safetensors")))
    found = read({name: entries[name] for name in ("b.weight_scale_2", "a.weight_scale_2", "a.weight_scale")})
    assert found["b.weight_scale_2"] == 7 and found["a.weight_scale_2"] == 0.5
    assert torch.equal(found["a.weight_scale"].view(torch.uint8), E4M3.view(torch.uint8)) and len(found) == 3
    assert read({}) == {}
