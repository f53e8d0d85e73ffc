"""Which functions a call of a model may run: a graph by names, which holds rather too many than too few."""

import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_ENTRIES = ("forward", "__call__", "generate")
_BEFORE = {"__init__", "_init_weights", "init_weights", "reset_parameters", "post_init", "from_pretrained"}  # any call
_KNOWN = {"torch", "builtins", "functools", "typing", "collections", "numpy", "einops"}  # no code around modules


@dataclass(frozen=True, slots=True)
class Function:
    """One that may run.

    Attributes:
        name: such as ``"Attention.forward"``.
        function: the one that was written, without its decorators.
        owner: the class that defines it, if its first argument is an instance of that.
    """

    name: str
    function: FunctionType
    owner: type | None


def reached(model: nn.Module) -> list[Function]:
    """The functions that calls of a model's modules may run, and those that these mention by name.

    A method, a property or a class method of any class of the model counts as soon as a function that runs mentions its
    name, in whatever way; so do functions and objects that modules hold as attributes, functions that stand in the same
    package, and those that a decorator has closed over.
    """
    classes, held = _classes(model)
    members: dict[str, list[Function]] = {}
    owners = dict.fromkeys(owner for cls in classes for owner in cls.__mro__ if owner not in (nn.Module, object))
    for owner in owners:  # whichever way the bases of a class stand
        for name, value in vars(owner).items():
            members.setdefault(name, []).extend(_written(value, owner))
    todo = [function for name in _ENTRIES for function in members.get(name, ())]
    todo += [function for value in held for function in _written(value, None)]
    found: dict[CodeType, Function] = {}
    named = set(_BEFORE)
    while todo:
        one = todo.pop()
        if one.function.__code__ in found:
            continue
        found[one.function.__code__] = one
        mentioned = set(names_in(one.function.__code__))
        for name in mentioned - named:
            todo += members.get(name, ())
        named |= mentioned
        todo += _beside(one.function, mentioned)
    return list(found.values())


def names_in(code: CodeType) -> Iterator[str]:
    """The names that code mentions, those in strings and in functions within too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
        yield from (c for c in (constant if isinstance(constant, tuple) else (constant,)) if _is_name(c))


def _is_name(constant: Any) -> bool:
    return isinstance(constant, str) and constant.isidentifier()


def _classes(model: nn.Module) -> tuple[dict[type, None], list[Any]]:
    """The classes of modules and of what they hold that can be called, and the functions that they hold."""
    classes: dict[type, None] = {}
    functions: list[Any] = []
    for module in model.modules():
        classes[type(module)] = None
        for value in vars(module).values():
            if callable(value) and not isinstance(value, type | nn.Module):
                functions.append(value)
                if type(value).__module__.partition(".")[0] not in _KNOWN:
                    classes[type(value)] = None
    return classes, functions


def _written(value: Any, owner: type | None) -> Iterator[Function]:
    """The functions behind an attribute of a class or of a module: what decorators, properties and partials wrap."""
    if isinstance(value, property):
        parts: Iterable[Any] = (value.fget,)
    elif isinstance(value, functools.partial | functools.partialmethod | functools.cached_property):
        parts = (value.func,)
    else:
        owner = None if isinstance(value, staticmethod) else owner
        parts = (getattr(value, "__func__", value),)
    for part in parts:
        if isinstance(part, functools.partial):
            yield from _written(part, owner)
        elif callable(part) and not isinstance(part, type):
            function = inspect.unwrap(part)
            if isinstance(function, FunctionType):
                owner_name = f"{owner.__name__}." if owner is not None else ""
                yield Function(f"{owner_name}{function.__name__}", function, owner)


def _beside(function: FunctionType, mentioned: set[str]) -> Iterator[Function]:
    """Functions that one has closed over, and those that it calls by a name of its file."""
    cells: list[Any] = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # empty
            continue
    for value in (*cells, *(function.__globals__.get(name) for name in mentioned)):
        package = (getattr(value, "__module__", None) or "").partition(".")[0]
        if callable(value) and package not in _KNOWN:
            yield from _written(value, None)
