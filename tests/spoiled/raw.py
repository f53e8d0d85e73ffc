"""Spoils bytes of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from spoiled.configs import ODD, Words
from spoiled.parts import Parts, text

Header = dict[str, Any]
DTYPES = [
    "F32",
    "F64",
    "U8",
    "I64",
    "F4",
    "F8_E8M0",
    "F6_E2M3",
    "BOOL",
    "C64",
    "X",
    "",
    "f32",
    "U32",
    "F8_E4M3",
    "BF16",
]


def _split(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def _joined(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def _file(change: Callable[[bytes, Random], bytes]) -> Callable[[Parts, Random], Words]:
    """Of the bytes of a file."""

    def spoil(parts: Parts, rng: Random) -> Words:
        file, own = parts.file(rng), Random(rng.random())

        def apply(folder: Path) -> None:
            path = folder / file
            if path.is_file():
                path.write_bytes(change(path.read_bytes(), own))

        parts.after.append(apply)
        return (file, "in any file")

    return spoil


def _header(change: Callable[[Header, Random], Any]) -> Callable[[Parts, Random], Words]:
    """Of the JSON of a header."""

    def changed(data: bytes, rng: Random) -> bytes:
        header, rest = _split(data)
        try:
            held = json.loads(header)
        except (ValueError, RecursionError):  # spoiled before
            return data
        if not isinstance(held, dict) or not held:
            return data
        change(held, rng)
        return _joined(text(held).encode(), rest)

    return _file(changed)


def _one(header: Header, rng: Random) -> Any:
    return header[rng.choice(sorted(name for name in header if name != "__metadata__") or sorted(header))]


def truncated(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice([0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1])]


def length(data: bytes, rng: Random) -> bytes:
    """The header is shorter or longer than it says."""
    size = int.from_bytes(data[:8], "little")
    lie = rng.choice([0, 1, size - 1, size + 1, size * 2, 2**31, 2**63, 2**64 - 1, 10**8, len(data)])
    return lie.to_bytes(8, "little") + data[8:]


def more(data: bytes, rng: Random) -> bytes:
    return data + b"\0" * rng.choice([1, 8, 1000])


def junk(data: bytes, rng: Random) -> bytes:
    """The header is no JSON."""
    header, rest = _split(data)
    made = [b"", b"{", b"[]", b"null", b"\xff" * 40, b" " * 100, header[:-1], header[1:], b'{"a":1}', header[::-1]]
    return _joined(rng.choice([*made, text("@lists@").encode(), text("@objects@").encode()]), rest)


def bits(data: bytes, rng: Random) -> bytes:
    """Some bits of the header are others."""
    header, rest = (bytearray(part) for part in _split(data))
    for _ in range(rng.choice([1, 3, 20])):
        if header:
            header[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
    return _joined(bytes(header), bytes(rest))


def offsets(header: Header, rng: Random) -> None:
    """They overlap, leave gaps, run backwards, are no numbers, or lie past the end."""
    one = _one(header, rng)
    if isinstance(one, dict) and isinstance(one.get("data_offsets"), list) and len(one["data_offsets"]) == 2:
        start, stop = one["data_offsets"]
        one["data_offsets"] = rng.choice([
            [start - 1, stop - 1], [start + 8, stop + 8], [stop, start], [0, stop - start], [start], [], [-1, 5],
            [start, 2**63], [2**64 - 1, 2**64], [start, stop, stop], ["0", "1"], [0.0, 1.5], None, 5, {"a": 1},
        ])  # fmt: skip


def dtypes(header: Header, rng: Random) -> None:
    one = _one(header, rng)
    if isinstance(one, dict):
        one["dtype"] = rng.choice([*DTYPES, *ODD])


def shapes(header: Header, rng: Random) -> None:
    one = _one(header, rng)
    if isinstance(one, dict):
        old = one.get("shape")
        swapped = [old[::-1], [*old, 1]] if isinstance(old, list) else []
        one["shape"] = rng.choice([[2**62, 4], [2**32] * 3, [-1, -1], [0], [1.5], ["1"], None, 7, [1] * 5000, *swapped])


def entries(header: Header, rng: Random) -> None:
    """An entry is something else, or has another key."""
    name = rng.choice(sorted(header))
    way = rng.choice(["odd", "lost", "new", "metadata", "renamed"])
    if way == "odd":
        header[name] = rng.choice([*ODD, "@lists@"])
    elif way == "lost" and isinstance(header[name], dict) and header[name]:
        del header[name][rng.choice(sorted(header[name]))]
    elif way == "new":
        header[rng.choice(["x", "", "\0", "__metadata__ "])] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    elif way == "metadata":
        header["__metadata__"] = rng.choice([*ODD, {"format": 1}, {"format": "tf"}, {"a": {"b": "c"}}])
    else:
        header[f"{name}_"] = header.pop(name)


SPOILERS = {
    **{f"file: {f.__name__}": _file(f) for f in (truncated, length, more, junk, bits)},
    **{f"header: {f.__name__}": _header(f) for f in (offsets, dtypes, shapes, entries)},
}
