"""The producers of FP4 modules that `prepare` knows: one file each for linears and for experts.

Each file is a `Producer` (see `found`). That of ModelOpt says why none of its experts can be swapped;
compressed-tensors has no file for experts, since transformers decompresses them while it loads.
"""
