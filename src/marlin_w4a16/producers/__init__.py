"""The producers of FP4 linears that `prepare` knows: one file each, with three functions.

    read(module, recover) -> Found | Rejected | None    None: not a module of this producer
    strip(module, kept)                                  lets the weight go; the rest of the module stays
    fill(module, weight, kept)                           the inverse, bit for bit, on the weight's device

``recover`` allows a dense weight to be read back as the codes it was decoded from.
"""
