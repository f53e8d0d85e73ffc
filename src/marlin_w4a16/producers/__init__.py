"""The producers of FP4 modules that `prepare` knows: one file each for linears and for experts, with three functions.

    read(module, recover) -> FoundLinear | FoundExperts | Rejected | None    None: not a module of this producer
    strip(module, kept)                                                lets the weights go; the rest of the module stays
    fill(module, weight, kept)                                         the inverse, bit for bit, on the weight's device

``recover`` allows a dense weight to be read back as the codes it was decoded from. ``fill`` of experts takes both
weights as a pair. compressed-tensors has no file for experts, since transformers decompresses them while it loads.
"""
