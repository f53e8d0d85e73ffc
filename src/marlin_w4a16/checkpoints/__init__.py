"""Checkpoint readers: what a folder holds and how each of its linears is stored, told from configs and headers.

`files` reads headers, `modelopt` and `compressed_tensors` turn a quantisation config into a `Scheme`, `layers` holds
one against the other, `storage` says how the tensors of one linear decode, `values` reads what headers cannot tell.
Nothing here knows transformers or a GPU.
"""
