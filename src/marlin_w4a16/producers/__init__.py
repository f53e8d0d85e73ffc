"""The producers of FP4 modules that `prepare` knows: one file each for linears and for experts.

Each file is a `marlin_w4a16.producers.found.Producer`; that of ModelOpt's experts only a `Reader`, which says why none
can be swapped. compressed-tensors has no file for experts, since transformers decompresses them while it loads.
"""
