"""The options of the backend, parsed once into a frozen value."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from marlin_w4a16.passes.torch_private import mode_patches, modes


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``torch.compile(..., options={...})`` may hold for this backend.

    Attributes:
        linear: replace FP4 linears.
        mode: a torch.compile mode, since torch refuses ``mode=`` beside ``options=``.
        inductor: settings for Inductor, as in ``options=`` of its own backend; they go over those of the mode.
    """

    linear: bool = True
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _expect_type("linear", self.linear, bool)
        _expect_type("mode", self.mode, str | None)
        _expect_type("inductor", self.inductor, Mapping)
        if self.mode is not None and self.mode not in modes():
            raise ValueError(_unknown("mode", self.mode, modes()))

    @property
    def patches(self) -> dict[str, Any]:
        """The settings Inductor compiles with."""
        return {**(mode_patches(self.mode) if self.mode else {}), **self.inductor}


def parse(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """The options of one torch.compile call.

    Raises:
        ValueError: an unknown option or mode; the message has the nearest name and the whole list.
        TypeError: an option of another type.
    """
    names = [f.name for f in fields(Options)]
    given = dict(options or {})
    for name in given:
        if name not in names:
            raise ValueError(_unknown("option", name, names))
    if mode is not None:
        given.setdefault("mode", mode)
    return Options(**given)


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"marlin_w4a16: unknown {what} {name!r}.{hint} Known: {', '.join(sorted(known))}."


def _expect_type(name: str, value: object, expected: Any) -> None:
    if not isinstance(value, expected):
        shown = getattr(expected, "__name__", str(expected))
        raise TypeError(f"marlin_w4a16: option {name!r}: found {value!r}, expected {shown}")
