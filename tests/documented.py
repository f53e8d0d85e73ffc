"""Holds JSON against the tables that document it."""

import re
from pathlib import Path

TYPES = {"int": int, "str": str, "float": float}


def tables(document: str, heading: str) -> dict[str, dict[str, str]]:
    """The tables under a heading: name -> key -> type."""
    text = (Path(__file__).parents[1] / "docs" / document).read_text().partition(f"\n## {heading}\n")[2]
    sections = re.split(r"^### ", text.partition("\n## ")[0], flags=re.M)[1:]
    keys = r"^\| `(\w+)` \| ([^|]+) \|"
    named = {part.split("\n", 1)[0]: dict(re.findall(keys, part, flags=re.M)) for part in sections}
    return {name: keys for name, keys in named.items() if keys}


def check(value: object, kind: str, schema: dict[str, dict[str, str]]) -> None:
    """A value is of a documented type, to the last key."""
    if kind.endswith(" or null"):
        if value is not None:
            check(value, kind.removesuffix(" or null"), schema)
    elif kind.startswith("list of "):
        assert isinstance(value, list)
        for item in value:
            check(item, kind.removeprefix("list of "), schema)
    elif kind == "[int, int]":
        assert [type(item) for item in value] == [int, int]
    elif kind == "ints":
        check(value, "list of int", schema)
    elif kind == "counts":
        assert isinstance(value, dict) and all(type(item) is int for item in value.values())
    elif kind in schema:
        assert isinstance(value, dict) and list(value) == list(schema[kind])
        for key, item in value.items():
            check(item, schema[kind][key], schema)
    else:
        assert type(value) is TYPES[kind], (value, kind)
