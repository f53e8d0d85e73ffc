"""What a quantisation config says under a name, of the type that is expected there."""

from collections.abc import Mapping
from typing import Any

from marlin_w4a16.checkpoints.files import CheckpointError

Config = Mapping[str, Any]


def mapping(config: Config, name: str) -> Config:
    """An object, empty where there is none.

    Raises:
        CheckpointError: it is something else.
    """
    found = config.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise _wrong(name, found, "an object")
    return found


def objects(config: Config, name: str) -> dict[str, Config]:
    """An object of objects by name, of which those that are null are empty.

    Raises:
        CheckpointError: it is something else.
    """
    found = mapping(config, name)
    return {key: mapping(found, key) for key in found}


def names(config: Config, name: str) -> tuple[str, ...]:
    """A list of names, empty where there is none.

    Raises:
        CheckpointError: it is something else.
    """
    found = config.get(name)
    if found is None:
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        raise _wrong(name, found, "a list of names")
    return tuple(found)


def number(config: Config, name: str, default: int) -> int:
    """A whole number.

    Raises:
        CheckpointError: it is something else.
    """
    found = config.get(name)
    if found is None:
        return default
    if not isinstance(found, int) or isinstance(found, bool):
        raise _wrong(name, found, "a whole number")
    return found


def _wrong(name: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config.{name}: found {str(found)[:80]!r}, expected {expected}")
