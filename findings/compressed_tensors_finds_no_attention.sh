#!/usr/bin/env bash
# compressed-tensors 0.20.1 with transformers 5.24.0: a config that asks for an FP8 key/value cache quantises none, and
# says nothing. compressed-tensors takes a module for cached attention if its forward has an argument past_key_value or
# past_key_values; transformers 5.24 calls it cache. The scheme is dropped in silence, and the config that is rebuilt
# from the model says that there is no quantised cache. With transformers 5.23.0 every attention has its scales.
#
# Expected: scales of keys and values on each attention, or an error that none was found.
# Seen: 0 of 2 attentions have k_scale, kv_cache_scheme of the rebuilt config is None.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy compressed-tensors==0.20.1 transformers==5.24.0
cat > "$folder/quantise.py" <<'CODE'
import sys

import compressed_tensors
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization import preset_name_to_scheme

sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)
groups = {"group_0": preset_name_to_scheme("NVFP4A16", ["Linear"])}
apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], kv_cache_scheme=cache))
scaled = sum(hasattr(layer.self_attn, "k_scale") for layer in model.model.layers)
linears = sum(hasattr(module, "weight_scale") for module in model.modules())
rebuilt = QuantizationConfig.from_pretrained(model)
print(f"transformers {transformers.__version__}: {linears} linears and {scaled} of 2 attentions have scales,")
print(f"  the rebuilt config has kv_cache_scheme {rebuilt.kv_cache_scheme and rebuilt.kv_cache_scheme.num_bits}")
assert linears == 14, "linears are not quantised as before"
assert (scaled, rebuilt.kv_cache_scheme is None) == ((0, True) if sys.argv[1] == "none" else (2, False)), "changed"
CODE
"$folder/venv/bin/python" "$folder/quantise.py" none
"$folder/venv/bin/pip" install -q transformers==5.23.0
"$folder/venv/bin/python" "$folder/quantise.py" all
