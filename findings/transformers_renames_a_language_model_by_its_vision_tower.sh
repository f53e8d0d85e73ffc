#!/usr/bin/env bash
# transformers 5.24.0: saving a Kimi-K2.5 model renames its language model. The published checkpoints call the layers of
# the vision tower "blocks" and those of the language model "layers"; both are "layers" in transformers. The renaming of
# the one is bound to no place when it is turned around, so save_pretrained writes "blocks" for both. Who reads the
# published names finds no language model then, and the quantisation configs of the NVFP4 releases, whose patterns name
# language_model.model.layers, match nothing.
#
# Expected: save_pretrained(save_original_format=True, the default) gives back the names of the original format.
# Seen: every tensor of a layer of the language model is language_model.model.blocks.N...
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
"$folder/venv/bin/python" - "$folder" <<'CODE'
import sys
from pathlib import Path

import transformers
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
text = dict(model_type="deepseek_v3", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
            qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            n_group=1, topk_group=1, first_k_dense_replace=1, tie_word_embeddings=False)
vision = dict(hidden_size=48, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
              pos_emb_height=4, pos_emb_width=4)
config = transformers.Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=64)
model = transformers.Kimi_K25ForConditionalGeneration(config)
model.save_pretrained(folder / "first")
tensors = load_file(folder / "first" / "model.safetensors")
# as published: layers in the language model, blocks in the vision tower
published = {name.replace("language_model.model.blocks.", "language_model.model.layers."): t for name, t in tensors.items()}
save_file(published, folder / "first" / "model.safetensors", {"format": "pt"})
again = type(model).from_pretrained(folder / "first")
again.save_pretrained(folder / "second")
saved = load_file(folder / "second" / "model.safetensors")
layers = [name for name in published if name.startswith("language_model.model.layers.")]
renamed = [name for name in saved if name.startswith("language_model.model.blocks.")]
print(f"transformers {transformers.__version__}: {len(layers)} tensors of layers of the language model in the files,")
print(f"  {len(renamed)} of them are saved as blocks, such as {sorted(renamed)[0]}")
assert layers and len(renamed) == len(layers) and not set(layers) & set(saved), "changed"
CODE
