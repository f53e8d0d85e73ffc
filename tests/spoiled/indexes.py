"""Spoils the index of a checkpoint in two files."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from spoiled.configs import ODD, Words
from spoiled.parts import INDEX, Parts


def _map(parts: Parts) -> dict[str, Any]:
    if not isinstance(parts.index, dict) or not isinstance(parts.index.get("weight_map"), dict):
        parts.index = parts.true_index()
    return parts.index["weight_map"]


def gone(parts: Parts, rng: Random) -> Words:
    parts.index = None
    return (INDEX, *parts.shards)


def stale(parts: Parts, rng: Random) -> Words:
    """It names tensors that are not there, or others where they are not."""
    held = _map(parts)
    for name in rng.sample(sorted(held), min(3, len(held))):
        way = rng.choice(["gone", "moved", "new"])
        file = held.pop(name)
        if way == "moved":
            held[name] = next((other for other in parts.shards if other != file), file)
        elif way == "new":
            held[f"{name}.x"] = file
    return (INDEX, *parts.shards)


def outside(parts: Parts, rng: Random) -> Words:
    """Files are named that lie elsewhere, or are none."""
    held = _map(parts)
    name = rng.choice(sorted(held) or ["x"])
    held[name] = rng.choice([
        "../x.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "", "a/../../x.safetensors", "~/x.safetensors",
        "file:///x.safetensors", "\0", "x" * 5000, "con\n.safetensors", "../" * 200, "é.safetensors", "\ud800",
    ])  # fmt: skip
    return (INDEX, name, held[name], "x.safetensors")


def absent(parts: Parts, rng: Random) -> Words:
    held, file = _map(parts), rng.choice(["model-00003-of-00002.safetensors", "x", "pytorch_model.bin"])
    held[rng.choice(sorted(held) or ["x"])] = file
    return (INDEX, file)


def itself(parts: Parts, rng: Random) -> Words:
    """It names itself, a folder, or links that lead in a circle."""
    held, file = _map(parts), rng.choice([INDEX, "config.json", "a.safetensors", "b.safetensors", "c.safetensors"])
    held[rng.choice(sorted(held) or ["x"])] = file

    def change(folder: Path) -> None:
        if file == "a.safetensors":
            (folder / file).symlink_to(folder / "b.safetensors")
            (folder / "b.safetensors").symlink_to(folder / file)
        elif file == "b.safetensors":
            (folder / file).mkdir()
        elif file == "c.safetensors":
            (folder / file).symlink_to(folder / next(iter(parts.shards)))

    parts.after.append(change)
    return (INDEX, file)


def types(parts: Parts, rng: Random) -> Words:
    held, odd = _map(parts), rng.choice(ODD)
    way = rng.choice(["all", "map", "file", "metadata", "size", "deep"])
    if way == "all":
        parts.index = odd
    elif way == "map":
        parts.index["weight_map"] = odd
    elif way == "file":
        held[rng.choice(sorted(held) or ["x"])] = odd
    elif way == "metadata":
        parts.index["metadata"] = odd
    elif way == "size":
        parts.index["metadata"] = {"total_size": odd}
    else:
        parts.index["metadata" if rng.random() < 0.5 else "weight_map"] = "@objects@"
    return (INDEX, "weight_map")


def huge(parts: Parts, rng: Random) -> Words:
    held = _map(parts)
    file = sorted(parts.shards)[0]
    new = "x{}.safetensors" if rng.random() < 0.5 else file
    held.update({f"model.layers.{i}.x": new.format(i) for i in range(100_000)})
    return (INDEX, "x")


def of_text(parts: Parts, rng: Random) -> Words:
    _map(parts)
    made = rng.choice([b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"weight_map":', b"\0" * 100])
    parts.after.append(lambda folder: (folder / INDEX).write_bytes(made))
    return (INDEX,)


SPOILERS = {
    f"index: {function.__name__.replace('_', ' ')}": function
    for function in (gone, stale, outside, absent, itself, types, huge, of_text)
}
