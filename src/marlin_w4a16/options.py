"""The options of the backend, parsed once into a frozen value."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from marlin_w4a16.passes.graph.torch_private import modes
from marlin_w4a16.passes.settings import ActivationQuant, Rules, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``torch.compile(..., options={...})`` may hold for this backend.

    Attributes:
        linear: replace FP4 linears.
        moe: replace whole mixtures of experts: sorting, both products, what stands between them, the weighted sum.
        grouped: replace a product with a stack of FP4 matrices, such as a grouped product, that is part of no whole
            mixture.
        include: globs; where given, only weights whose path, or whose module's path, matches one are looked at.
        exclude: globs; weights that match one are left alone.
        strict: raise `NotReplaced` if an FP4 weight is refused; the message lists every refusal.
        verify: run each replaced product once beside its traced form, on random input; the report has the worst error.
        tolerance: replace also weights that the model rounds more than once on the way, if every element is within
            this relative difference of the exact decode, and zeros are zero: 2**-7 for two roundings to bfloat16,
            3 * 2**-8 for three. The op then computes with the exact decode.
        recover: replace also dense weights whose values are MXFP4.
        activation_quant: what happens to the quantisation of the input of a linear (W4A4): ``"keep"`` runs it as
            traced (where a tensor's class does it out of sight, the linear is refused), ``"drop"`` leaves it out,
            ``"refuse"`` leaves such linears as traced. `prepare`, which cannot keep it, refuses by default.
        mode: a torch.compile mode, since torch refuses ``mode=`` beside ``options=``.
        inductor: settings for Inductor, as in ``options=`` of its own backend; they go over those of the mode.
    """

    linear: bool = True
    moe: bool = True
    grouped: bool = True
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()
    strict: bool = False
    verify: bool = False
    tolerance: float = 0.0
    recover: bool = False
    activation_quant: ActivationQuant = "keep"
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("linear", "moe", "grouped", "strict", "verify", "recover"):
            _expect_type(name, getattr(self, name), bool)
        _expect_type("mode", self.mode, str | None)
        _expect_type("inductor", self.inductor, Mapping)
        _expect_type("tolerance", self.tolerance, float | int)
        if not (0 <= self.tolerance < 1) or math.isnan(self.tolerance):
            raise ValueError(f"marlin_w4a16: option 'tolerance': found {self.tolerance}, expected from 0 to below 1")
        for name in ("include", "exclude"):
            globs(name, getattr(self, name))
        _expect_type("exclude", self.exclude, Sequence)
        if self.activation_quant not in get_args(ActivationQuant):
            raise ValueError(unknown("activation_quant", self.activation_quant, list(get_args(ActivationQuant))))
        if self.mode is not None and self.mode not in modes():
            raise ValueError(unknown("mode", self.mode, list(modes())))

    @property
    def patches(self) -> dict[str, Any]:
        """The settings Inductor compiles with."""
        return {**(modes()[self.mode] if self.mode else {}), **self.inductor}

    @property
    def settings(self) -> Settings:
        """The settings of the pass."""
        rules = Rules(float(self.tolerance), self.recover, self.activation_quant == "drop")
        include, exclude = globs("include", self.include), globs("exclude", self.exclude) or ()
        kinds = self.linear, self.moe, self.grouped
        return Settings(rules, include, exclude, self.verify, self.activation_quant, *kinds)


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
            raise ValueError(unknown("option", name, names))
    if mode is not None:
        given.setdefault("mode", mode)
    return Options(**given)


def globs(name: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """What was given as one glob or several.

    Raises:
        TypeError: something else was; ``name`` is that of the option.
    """
    if value is None:
        return None
    if not isinstance(value, Sequence):
        raise TypeError(f"marlin_w4a16: option {name!r}: found {value!r}, expected a glob or a list of globs")
    given = (value,) if isinstance(value, str) else tuple(value)
    for glob in given:
        _expect_type(name, glob, str)
    return given


def unknown(what: str, name: str, known: list[str]) -> str:
    """The words for a name that is none of the known ones, with the nearest of these if one is near."""
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"marlin_w4a16: unknown {what} {name!r}.{hint} Known: {', '.join(sorted(known))}."


def _expect_type(name: str, value: object, expected: Any) -> None:
    if not isinstance(value, expected):
        shown = getattr(expected, "__name__", str(expected))
        raise TypeError(f"marlin_w4a16: option {name!r}: found {value!r}, expected {shown}")
