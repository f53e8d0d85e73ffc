"""The producers of FP4 modules that `prepare` knows: a file each, and one more for experts of torchao.

Each file is a `Producer` (see `found`). That of ModelOpt says why none of its experts can be swapped;
compressed-tensors has no file for experts, since transformers decompresses them while it loads.
"""
