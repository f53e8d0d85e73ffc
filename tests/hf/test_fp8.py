"""FP8 of ModelOpt in blocks: dense while a model runs, and FP8 again, bit for bit, when it is saved."""

import pytest
import torch
import transformers

from hf.by_hand import SMALL, Written
from hf.dense import tensors_of
from hf.loading import read, same
from marlin_w4a16.hf.linear import FP8Linear


@pytest.mark.parametrize(
    "algorithm, block, leaf",
    [
        ("FP8_PB_WO", (128, 128), "weight_scale"),
        ("FP8_PB_WO", (128, 128), "of ModelOpt"),
        ("FP8_BLOCK_SCALES", (128, 128), "weight_scale_inv"),
        ("MXFP8", (1, 32), "weight_scale"),
    ],
)
def test_blocks_are_decoded_and_come_back(algorithm, block, leaf, tmp_path):
    made = Written(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SMALL, "intermediate_size": 160}))
    paths = [f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("up", "down")]
    for path in paths:
        made.decode(path, algorithm, block)
        scales = made.tensors.pop(f"{path}.weight_scale")
        if leaf == "of ModelOpt":  # with its axes of blocks
            made.tensors[f"{path}.weight_scale"] = scales[:, None, :, None]
        else:
            made.tensors[f"{path}.{leaf}"] = scales
    made.save(tmp_path / "before")
    model, tokens = read(tmp_path / "before"), torch.arange(3, 19).view(2, 8)
    for path in paths:
        module, expected = model.get_submodule(path), made.model.get_submodule(path).weight.detach()
        assert isinstance(module, FP8Linear) and same(module.weight.detach(), expected)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, made.model(tokens).logits)
    model.save_pretrained(tmp_path / "after")
    before, after = (tensors_of(tmp_path / name) for name in ("before", "after"))
    assert before.keys() == after.keys() and all(same(after[key], tensor) for key, tensor in before.items())
