"""Entries of a JSON config, each read with the type that it must have."""

from collections.abc import Mapping
from typing import Any

from marlin_w4a16.checkpoints.files import CheckpointError

_WORDS = {dict: "an object", list: "a list", tuple: "a list", type(None): "null"}


class Fields:
    """An object of a config. What it does not hold, or holds as null, is None or empty.

    Args:
        values: the object.
        where: its file and place, for errors.

    Raises:
        CheckpointError: by every method, where an entry is of another type; it names file and entry.
    """

    def __init__(self, values: Any, where: str) -> None:
        self.where = where
        if not isinstance(values, Mapping):
            raise self.wrong(None, values, "an object")
        self.values: Mapping[str, Any] = values

    def wrong(self, name: str | None, found: Any, expected: str) -> CheckpointError:
        """What is wrong with an entry, or with the whole object."""
        at = self.where if name is None else f"{self.where}.{name}"
        shown = _WORDS.get(type(found), repr(found))
        return CheckpointError(f"{at}: found {shown[:100]}, expected {expected}")

    def has(self, name: str) -> bool:
        """Whether there is an entry that is not empty."""
        return bool(self.values.get(name))

    def text(self, name: str) -> str | None:
        """A string."""
        found = self.values.get(name)
        if found is not None and not isinstance(found, str):
            raise self.wrong(name, found, "a string")
        return found

    def number(self, name: str) -> int | None:
        """An integer."""
        found = self.values.get(name)
        if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
            raise self.wrong(name, found, "an integer")
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        found = self.values.get(name)
        if found is None:
            return ()
        if not isinstance(found, list | tuple):
            raise self.wrong(name, found, "a list of strings")
        for at, one in enumerate(found):
            if not isinstance(one, str):
                raise self.wrong(f"{name}[{at}]", one, "a string")
        return tuple(found)

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of integers."""
        found = self.values.get(name)
        if found is None:
            return ()
        if not isinstance(found, list | tuple) or not all(type(one) is int for one in found):
            raise self.wrong(name, found, "a list of integers")
        return tuple(found)

    def fields(self, name: str) -> "Fields":
        """An object."""
        found = self.values.get(name)
        return Fields({} if found is None else found, f"{self.where}.{name}")

    def each(self, name: str) -> "dict[str, Fields]":
        """An object of objects."""
        inner = self.fields(name)
        return {key: Fields(value, f"{inner.where}.{key}") for key, value in inner.values.items()}
