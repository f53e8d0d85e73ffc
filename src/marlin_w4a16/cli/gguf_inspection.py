"""What `inspect` tells of a GGUF file, by its own names."""

import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from marlin_w4a16.checkpoints import gguf
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.gguf_header import Header, header
from marlin_w4a16.checkpoints.layers import Contents, Problem, contents
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.values import bad_values
from marlin_w4a16.cli.inspection import Inspection, Line, collapsed, line_of, other_lines

_FLOATS = {"F64", "F32", "F16", "BF16"}


def inspect_gguf(file: Path, values: bool = False) -> Inspection:
    """Reads the header of a file, and with ``values`` looks for scales that cannot be decoded.

    Raises:
        CheckpointError: it is no whole GGUF file.
    """
    found = header(file)
    scheme = gguf.scheme(found)
    held = contents(gguf.entries(found), scheme)
    quantised = {name: entry for name, entry in held.others.items() if entry.dtype not in _FLOATS}
    rest = {name: entry for name, entry in held.others.items() if name not in quantised}
    problems, notes = _fit(found, held, scheme)
    return Inspection(
        file,
        file.name,
        scheme.producer,
        scheme.algorithm or None,
        1,
        len(found.tensors),
        tuple(held.layers.values()),
        (
            *collapsed(line_of(layer) for layer in held.layers.values()),
            *collapsed(_decoded(quantised, left=not scheme.algorithm)),
            *other_lines(Contents(held.layers, rest, held.problems), scheme, quantised=False),
        ),
        (*scheme.notes, *held.notes, *notes),
        (*held.problems, *problems, *(bad_values(held.layers.values()) if values else ())),
    )


def _fit(found: Header, held: Contents, scheme: Scheme) -> tuple[Sequence[Problem], Sequence[str]]:
    """What is wrong when a file with FP4 is held against its model, and what else there is to be told."""
    if held.problems or not gguf.fp4(found):
        return (), ()
    if find_spec("transformers") is None:
        return (), ("not held against a model: transformers is not installed",)
    from marlin_w4a16.hf.fit import notes_of, problems_of
    from marlin_w4a16.hf.gguf_fit import fit

    placement = fit(found, scheme)
    return tuple(problems_of(placement)), tuple(notes_of(placement))


def _decoded(quantised: dict[str, Entry], left: bool) -> Iterator[Line]:
    """What is in ggml's other types, or in FP4 and no matrix."""
    for name, entry in quantised.items():
        dense, path = 2 * math.prod(entry.shape), name.removesuffix(".weight")
        sizes = entry.nbytes, dense, dense
        if left:
            yield Line(path, 1, entry.shape, entry.dtype, "left", None, *sizes)
        else:
            yield Line(path, 1, entry.shape, entry.dtype, "dense", "decoded", *sizes)
