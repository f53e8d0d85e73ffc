"""Files of GGUF, which llama.cpp reads: tensors in MXFP4 and NVFP4 of ggml; read in gguf 0.19.

A file names its tensors as llama.cpp does (``blk.0.attn_q.weight``, of all experts ``blk.0.ffn_up_exps.weight``).
Beside a weight in NVFP4 may stand ``blk.0.attn_q.scale``, by which llama.cpp multiplies the product: one number, or one
for each expert; and ``input_scale``, which belongs to quantised inputs.
"""

from collections.abc import Iterator, Mapping

from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.gguf_blocks import BLOCKS, Blocks, Placed
from marlin_w4a16.checkpoints.gguf_header import Header, Tensor
from marlin_w4a16.checkpoints.scheme import Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import STORED_SCALES, FP4Storage, Part

PRODUCER, SCALE, INPUT_SCALE = "GGUF", "scale", "input_scale"
BLOCK_SCALE = "block_scale"  # no leaf of a file: the scales in a weight's blocks
INPUTS_NOTE = "its inputs were quantised (input_scale), which is left out"


def fp4(header: Header) -> dict[str, Tensor]:
    """The tensors of a file that are FP4, by name."""
    return {name: tensor for name, tensor in header.tensors.items() if tensor.type in BLOCKS}


def matrices(header: Header) -> dict[str, Tensor]:
    """Those that are matrices, or stacks of some, and not embeddings."""
    found = fp4(header).items()
    return {n: t for n, t in found if n.endswith(".weight") and len(t.shape) in (2, 3) and "token_embd" not in n}


def storage(number: int, stacked: bool = False) -> FP4Storage:
    """How a matrix of a type of blocks is stored, by leaf: what reading makes of its blocks, and its scale."""
    block, first = BLOCKS[number], ("e",) if stacked else ()
    parts = [
        Part("weight", "codes", ("U8",), (*first, "n", "k/2")),
        Part(BLOCK_SCALE, "scales", STORED_SCALES[block.kind], (*first, "n", "k/g")),
    ]
    if block.kind == "e4m3":
        parts.append(Part(SCALE, "multiplier", ("F32",), first, optional=True))
    return FP4Storage(f"GGUF {block.name}", block.kind, (block.group,), tuple(parts), stacked=stacked)


def scheme(header: Header) -> Scheme:
    """What the file holds, by its own names."""
    targets: dict[str, FP4Storage | Mismatch | None] = {}
    for name, tensor in matrices(header).items():
        targets[name.removesuffix(".weight")] = storage(tensor.type, len(tensor.shape) == 3)
    names = dict.fromkeys(BLOCKS[tensor.type].name for tensor in fp4(header).values())
    inputs = any(name.removesuffix(INPUT_SCALE) + "weight" in fp4(header) for name in header.tensors)
    notes = (INPUTS_NOTE,) if inputs else ()
    where = f"{header.file.name}: the types of its tensors"
    return Scheme(PRODUCER, " + ".join(names), targets, notes=notes, where=where)


def entries(header: Header) -> dict[str, Entry]:
    """The tensors of a file by its own names; a matrix in FP4 is its codes and its scales.

    Raises:
        CheckpointError: beside a weight in FP4 stands something that is not known.
    """
    found: dict[str, Entry] = {}
    mine = matrices(header)
    for name, tensor in header.tensors.items():
        if name in mine:
            found |= dict(of_blocks(header, name, tensor))
        elif not _is_of_inputs(name, mine):
            found[name] = plain(header, tensor)
    for name in header.tensors:  # some write the scale so
        if name.endswith(f".{SCALE}") and name.removesuffix(f".{SCALE}") in mine:
            stem = name.removesuffix(f".weight.{SCALE}")
            raise CheckpointError(f"{header.file}: {name}: found it beside FP4, expected {stem}.{SCALE}")
    return found


def plain(header: Header, tensor: Tensor) -> Placed:
    """A tensor as it lies in the file."""
    return Placed(header.file, tensor.type_name, tensor.shape, tensor.start, tensor.nbytes)


def of_blocks(header: Header, name: str, tensor: Tensor) -> Iterator[tuple[str, Entry]]:
    """The codes and the scales of a matrix or a stack by name."""
    block, path = BLOCKS[tensor.type], name.removesuffix(".weight")
    *lead, n, k = tensor.shape
    starts, rest = (tensor.start,), (n, k, lead[0] if lead else 0)
    yield name, Blocks(header.file, "U8", (*lead, n, k // 2), starts, block, "codes", *rest)
    shape, dtype = (*lead, n, k // block.group), STORED_SCALES[block.kind][0]
    yield f"{path}.{BLOCK_SCALE}", Blocks(header.file, dtype, shape, starts, block, "scales", *rest)


def part_of(entry: Entry, expert: int) -> Entry:
    """What a tensor of all experts holds of one of them."""
    if isinstance(entry, Blocks):
        start = entry.starts[0] + expert * entry.matrix_nbytes
        fields = (entry.block, entry.part, entry.rows, entry.columns)
        return Blocks(entry.file, entry.dtype, entry.shape[1:], (start,), *fields)
    if isinstance(entry, Placed):
        size = entry.size // entry.shape[0]
        return Placed(entry.file, entry.dtype, (), entry.start + expert * size, size)
    raise TypeError(f"{entry}: found no tensor of GGUF")


def _is_of_inputs(name: str, mine: Mapping[str, Tensor]) -> bool:
    path = name.removesuffix(f".{INPUT_SCALE}")
    return path != name and f"{path}.weight" in mine
