"""Checkpoint readers: what a folder holds and how each of its linears is stored, told from configs and headers.

`files` reads headers; `registry` chooses the file of the format, such as `modelopt`, that turns a quantisation config
into a `Scheme`; `layers` holds one against the other. `storage` says how the tensors of one weight decode, `experts`
what makes the stacks of a mixture, `values` reads what headers cannot tell.
Nothing here knows transformers or a GPU.
"""
