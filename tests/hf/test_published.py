"""Published checkpoints, small: they are loaded with the exact values and saved as they were; `inspect` agrees."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf.dense import relative
from hf.families import FAMILIES, write
from hf.loading import same
from marlin_w4a16 import PackedExperts, PackedLinear
from marlin_w4a16.__main__ import main
from marlin_w4a16.hf import report

TOKENS = torch.arange(3, 19).view(2, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_loaded_and_saved(name, tmp_path: Path):
    family, folder, again = FAMILIES[name], tmp_path / "model", tmp_path / "again"
    if not hasattr(transformers, family.model):
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}")
    write(family, folder, tmp_path / "dense")
    load = getattr(transformers, family.model).from_pretrained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, dense = (load(path, dtype=torch.float32).eval() for path in (folder, tmp_path / "dense"))
    with torch.no_grad():
        assert relative(model(TOKENS).logits, dense(TOKENS).logits) <= 1e-5
    packed = [module for module in model.modules() if isinstance(module, PackedLinear | PackedExperts)]
    assert packed and len(packed) <= len(report(model).layers)
    model.save_pretrained(again)
    before, after = (load_file(path / "model.safetensors") for path in (folder, again))
    assert {tensor for tensor in before if not re.fullmatch(family.surplus, tensor)} == after.keys()
    assert all(same(after[tensor], before[tensor]) for tensor in after)
    assert main(["inspect", str(folder)]) == 0


def test_llama_4_is_dense_again(tmp_path: Path):
    """Its Experts modules have a forward of their own."""
    write(FAMILIES["Llama-4-Scout"], tmp_path / "model", tmp_path / "dense")
    load = transformers.Llama4ForCausalLM.from_pretrained
    model, dense = (load(tmp_path / name, dtype=torch.float32).eval() for name in ("model", "dense"))
    model.dequantize()
    assert type(model.model.layers[0].feed_forward.experts) is type(dense.model.layers[0].feed_forward.experts)
    assert all(same(held, dense.state_dict()[name]) for name, held in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, dense(TOKENS).logits)
