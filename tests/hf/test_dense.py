"""The oracle of this folder against what transformers and the producers themselves make of the same files."""

import pytest
import torch
from torch import Tensor

from checkpoints.formats import written
from checkpoints.models import FAMILIES
from checkpoints.names import published, renamed
from checkpoints.published import each_expert
from hf.dense import codes_of, exact, relative, tensors_of
from hf.loading import logits, reference, same, stored

DEEPSEEK = ["deepseek-v4", "deepseek-v4.1", "deepseek-v4-fp32", "deepseek-v4-inv"]


@pytest.fixture
def upstream(monkeypatch):
    """Loads by transformers' own quantizer, in bfloat16 or float32."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
    from transformers.utils import quantization_config as configs

    own = {
        "compressed-tensors": (CompressedTensorsHfQuantizer, configs.CompressedTensorsConfig),
        "fp8": (FineGrainedFP8HfQuantizer, configs.FineGrainedFP8Config),
        "mxfp4": (Mxfp4HfQuantizer, configs.Mxfp4Config),
    }
    for name, (quantizer, config) in own.items():
        monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, name, quantizer)
        monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, name, config)

    def load(name: str, family: str, **options):
        return AutoModelForCausalLM.from_pretrained(written(name, family), **options)

    return load


def expect_the_same_state(found, name: str, family: str, dtype: torch.dtype) -> None:
    """In values: the quantizer of FP8 leaves tensors in the dtype of the files."""
    found, expected = found.state_dict(), reference(name, family, dtype).state_dict()
    assert found.keys() == expected.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(found[key].to(tensor.dtype), tensor)] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", DEEPSEEK)
def test_deepseek_v4_as_transformers_dequantises_it(name, dtype, upstream):
    expect_the_same_state(upstream(name, "deepseekv4", dtype=dtype), name, "deepseekv4", dtype)


def test_gpt_oss_as_transformers_dequantises_it(upstream):
    from transformers import Mxfp4Config

    model = upstream("gpt-oss", "gptoss", dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))
    expect_the_same_state(model, "gpt-oss", "gptoss", torch.bfloat16)


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_gpt_oss_by_transformers_convert_function(projection):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, path = stored("gpt-oss", "gptoss"), f"model.layers.1.mlp.experts.{projection}"
    found = convert_moe_packed_tensors(tensors[f"{path}_blocks"], tensors[f"{path}_scales"])
    assert same(found, reference("gpt-oss", "gptoss", torch.bfloat16).get_parameter(path).detach().contiguous())


@pytest.mark.parametrize("name, family", [("ct-mxfp4a16", "deepseekv3"), ("ct-mxfp4a16", "mixtral")])
def test_mxfp4_as_compressed_tensors_dequantises_it(name, family, upstream):
    model, expected = upstream(name, family, dtype=torch.bfloat16), reference(name, family, torch.bfloat16)
    assert relative(logits(model), logits(expected)) <= 1e-2
    for key, tensor in expected.state_dict().items():
        if ".experts." in key:
            assert same(model.state_dict()[key], tensor)


@pytest.mark.parametrize("name, family", [("modelopt-w4a16", "qwen3moe"), ("modelopt-nemotron", "nemotronh")])
def test_nvfp4_as_modelopt_dequantises_it(name, family):
    tensors = stored(name, family)
    paths = [path for path, codes in codes_of(tensors).items() if codes.dtype == torch.uint8]
    assert any(".experts." in path for path in paths)
    for path in paths:
        found, expected = of_modelopt(tensors, path).double(), exact(tensors, path)
        assert torch.allclose(found, expected, rtol=2**-23, atol=0), path  # it rounds the product of scales


def of_modelopt(tensors: dict[str, Tensor], path: str) -> Tensor:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    codes, scale, factor = (tensors[f"{path}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2"))
    packed = NVFP4QTensor((codes.shape[0], 2 * codes.shape[1]), torch.float32, codes)
    return packed.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16})


@pytest.mark.parametrize("name, family", [("modelopt-w4a16", "mixtral"), ("ct-nvfp4a16", "qwen3moe")])
def test_no_two_experts_share_a_global_scale(name, family):
    """But the gate and up projections of one, which ModelOpt gives the larger."""
    tensors = stored(name, family)
    ends = ("weight_scale_2", "weight_global_scale")
    scales = [t.item() for key, t in tensors.items() if ".experts." in key and key.endswith(ends)]
    assert len(scales) == 24 and len(set(scales)) >= (15 if name.startswith("modelopt") else 20)


def test_names_of_deepseek_v4_go_back_and_forth():
    names = each_expert(FAMILIES["deepseekv4"]().state_dict())
    assert all(renamed(published(name), "deepseek_v4") == name for name in names)
    assert {*map(published, names)} >= {"embed.weight", "hc_head_fn", "layers.1.attn.indexer.wq_b.weight"}
    assert all(path in tensors_of(written("deepseek-v4", "deepseekv4")) for path in map(published, names))
