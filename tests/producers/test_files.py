"""What is read of checkpoints, held against the packages of their producers: `make test-producers` installs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.models import FAMILIES
from hf.dense import tensors_of
from hf.loading import logits, read, same
from marlin_w4a16.checkpoints import auto_round, mlx
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.hf import report

UP = "model.layers.0.mlp.up_proj"


def dense_of(model: Any, path: str = UP) -> Tensor:
    return model.get_submodule(path).dense(torch.float32).weight.detach()


def saved_again(model: Any, folder: Path, again: Path) -> bool:
    """Bit for bit."""
    model.save_pretrained(again)
    before, after = tensors_of(folder), tensors_of(again)
    return before.keys() == after.keys() and all(same(after[name], tensor) for name, tensor in before.items())


def specs(e4m3: bool) -> Any:
    from quark.torch.quantization.config import config

    if not e4m3:
        return config.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
    block = config.FP4PerGroupSpec(ch_axis=-1, group_size=16, is_dynamic=False)
    whole = config.FP8E4M3PerTensorSpec(is_dynamic=False)
    return config.ScaleQuantSpec(first_stage=block, second_stage=whole).to_quantization_spec()


@pytest.mark.parametrize("e4m3", [False, True], ids=["MXFP4", "NVFP4"])
def test_quark(e4m3, tmp_path):
    pytest.importorskip("quark.torch")
    from quark.torch import ModelQuantizer
    from quark.torch.export.api import export_safetensors
    from quark.torch.quantization.config.config import QConfig, QLayerConfig
    from quark.torch.utils.pack import Pack_fp4

    model = FAMILIES["llama"](dtype=torch.float32)
    model.config.architectures = ["LlamaForCausalLM"]
    quantizer = ModelQuantizer(QConfig(global_quant_config=QLayerConfig(weight=specs(e4m3)), exclude=["lm_head"]))
    tokens = [torch.arange(64).view(2, 32)]
    with torch.no_grad():
        export_safetensors(quantizer.freeze(quantizer.quantize_model(model, tokens)), str(tmp_path / "made"))
    found, tensors = read(tmp_path / "made"), load_file(tmp_path / "made" / "model.safetensors")
    assert report(found).scheme.producer == "Quark" and len(report(found).layers) == 14
    scale = tensors[f"{UP}.weight_scale"]
    scale = scale.double() if e4m3 else (scale.double() - 127).exp2()
    values = Pack_fp4("per_group", "fp4").unpack(tensors[f"{UP}.weight"], True).double()
    exact = values * scale.repeat_interleave(16 if e4m3 else 32, -1)
    exact = exact * tensors[f"{UP}.weight_scale_2"].double() if e4m3 else exact
    torch.testing.assert_close(dense_of(found), exact.float(), rtol=1e-7, atol=0)
    assert saved_again(found, tmp_path / "made", tmp_path / "again")


def test_auto_round():
    pytest.importorskip("auto_round")
    from auto_round.data_type.nvfp import calculate_gparam, ref_nvfp4_quant
    from auto_round.export.export_to_autoround.qlinear_fp import QuantLinear

    linear = nn.Linear(96, 48, bias=False)
    divisor = calculate_gparam(linear.weight.data, 16, "cpu")
    values, scales = ref_nvfp4_quant(linear.weight.data.reshape(-1, 16), divisor)
    packed = QuantLinear(4, 16, 96, 48, False, data_type="nv_fp", act_bits=16)
    packed.pack(linear, scales.view(48, 6), global_scale=divisor)
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "data_type": "nv_fp"}
    storage = auto_round.scheme(config).storage("x")
    assert isinstance(storage, FP4Storage)
    weight = storage.read({name: tensor for name, tensor in packed.named_buffers()}, "x")
    torch.testing.assert_close(weight.decode(torch.float32), values.view(48, 96), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode, group, scaled", [("mxfp4", 32, False), ("nvfp4", 16, False), ("nvfp4", 16, True)])
def test_mlx(mode, group, scaled):
    mx, numpy = pytest.importorskip("mlx.core"), pytest.importorskip("numpy")
    dense = mx.array(torch.randn(48, 96).numpy())
    more = {"global_scale": mx.max(mx.abs(dense))} if scaled else {}
    words, scales = mx.quantize(dense, group, 4, mode=mode, **more)
    expected = mx.dequantize(words, scales, group_size=group, bits=4, mode=mode, dtype=mx.float32, **more)
    tensors = {"weight": words, "scales": scales, **more}
    storage = mlx.scheme({"group_size": group, "bits": 4, "mode": mode}).storage("x")
    assert isinstance(storage, FP4Storage)
    weight = storage.read({name: torch.from_numpy(numpy.array(tensor)) for name, tensor in tensors.items()}, "x")
    torch.testing.assert_close(weight.decode(torch.float32), torch.from_numpy(numpy.array(expected)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_mlx_quantises_otherwise(bits):
    mx, numpy = pytest.importorskip("mlx.core"), pytest.importorskip("numpy")
    parts = mx.quantize(mx.array(torch.randn(48, 128).numpy()), 64, bits)
    expected = torch.from_numpy(numpy.array(mx.dequantize(*parts, group_size=64, bits=bits)))
    tensors = dict(zip(("weight", "scales", "biases"), (torch.from_numpy(numpy.array(p)) for p in parts), strict=True))
    torch.testing.assert_close(mlx.decode(tensors, 128, torch.float32, "x"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", ["NVFP4WeightOnlyConfig", "MXDynamicActivationMXWeightConfig"])
def test_torchao(config, tmp_path):
    flows = pytest.importorskip("torchao.prototype.mx_formats.inference_workflow")
    from transformers import TorchAoConfig

    fp4 = {"activation_dtype": torch.float4_e2m1fn_x2, "weight_dtype": torch.float4_e2m1fn_x2}
    chosen = TorchAoConfig(getattr(flows, config)(**(fp4 if config.startswith("MX") else {})))
    FAMILIES["llama"]().save_pretrained(tmp_path / "dense")
    theirs = read(tmp_path / "dense", quantization_config=chosen)
    theirs.save_pretrained(tmp_path / "made")
    found, expected = read(tmp_path / "made"), theirs.get_submodule(UP).weight.dequantize(torch.float32)
    assert report(found).scheme.producer == "torchao" and len(report(found).layers) == 14
    torch.testing.assert_close(dense_of(found), expected, rtol=1e-2, atol=0)  # torchao rounds to bfloat16 on the way
    assert saved_again(found, tmp_path / "made", tmp_path / "again") and logits(found).isfinite().all()
