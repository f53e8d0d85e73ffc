"""The operations that a mixture may hold, each with what it makes of what is known of its arguments."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from marlin_w4a16.passes.mixture import operations
from marlin_w4a16.passes.mixture.call import Call
from marlin_w4a16.passes.mixture.pointwise import ARITHMETIC, POINTWISE, Bends
from marlin_w4a16.passes.mixture.positions import of_positions
from marlin_w4a16.passes.mixture.rows import MASKED, Rows
from marlin_w4a16.passes.mixture.shapes import CUTS, cut_axes, like, made, part
from marlin_w4a16.passes.mixture.values import (
    Between,
    Bias,
    Counts,
    Ids,
    NotUnderstood,
    Parts,
    Plain,
    Results,
    Scores,
    Value,
    Weights,
)

_WIDE = (torch.int32, torch.int64)
_CHOOSING = frozenset({"clamp", "clamp_min", "clamp_max", "minimum", "maximum", "where", "masked_fill"})
_SPREAD = frozenset({"sigmoid", "tanh", "exp", "relu", "add", "sub", "mul", "div"})


class Rules:
    """What operations make of values.

    Args:
        dynamic: the number of tokens is not fixed.
        trained: gradients of tokens or routing weights are asked for.
    """

    def __init__(self, rows: Rows, bends: Bends, dynamic: bool, trained: bool) -> None:
        self.rows, self.bends, self.dynamic, self.trained = rows, bends, dynamic, trained

    def apply(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], call: Call) -> Any:
        """What an operation gives.

        Raises:
            NotUnderstood: the operation, told by its name and what it is done to.
        """
        values = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Value)]
        found = self._applied(name, list(args), dict(kwargs), values, call)
        if found is None:
            what = " and ".join(dict.fromkeys(value.what for value in values)) or "numbers"
            raise NotUnderstood(f"{name} of {what}")
        return found

    def _applied(self, name: str, args: list[Any], kwargs: dict[str, Any], values: list[Value], call: Call) -> Any:
        if not values:
            return made(name, args, kwargs, call)
        if name in operations.SIZES or isinstance(args[0] if args else None, tuple):
            return part(name, args)
        if name in operations.LIKE:
            return like(name, args, kwargs, call)
        if name in operations.CASTS:
            return self._cast(args[0], call.example.dtype)
        indexed = self._indexed(name, args, kwargs)
        if indexed is not None:
            return indexed
        if name in operations.MOVES:
            return self._moved(name, args, kwargs, call)
        if all(isinstance(value, Plain) for value in values):
            return of_positions(name, args, kwargs, call.sized, self.rows.each if self.dynamic else None)
        if call.sized:
            raise NotUnderstood(f"{name} by a number that changes between calls")
        return self._of_data(name, args, kwargs, values)

    def _of_data(self, name: str, args: list[Any], kwargs: dict[str, Any], values: list[Value]) -> Any:
        """What is done to the elements of tokens, ids, routing weights and results."""
        if name in ARITHMETIC and (len(args) != 2 or kwargs):
            raise NotUnderstood(f"{name} with {', '.join(kwargs) or 'further arguments'}")
        kinds = {type(value) for value in values}
        if name in ("where", "masked_fill") and kinds & MASKED:
            mask, value, other = (args[1], args[0], args[2]) if name == "masked_fill" else (args[0], args[1], args[2])
            if name == "where" and type(value) not in MASKED:
                return self.rows.masked(other, mask, value, kept=False)
            return self.rows.masked(value, mask, other, kept=name == "where")
        if kinds <= {Ids, Plain} and name in operations.INTEGERS:
            return self._of_ids(name, args, kwargs)
        if name == "mul" and len(values) == 2 and kinds & {Weights, Scores}:
            return self.rows.weighted(*values)
        if name == "add" and len(values) == 2 and Bias in kinds and not kwargs:
            return self.rows.with_bias(*values)
        if name == "add" and kinds <= {Results, Parts} and args in ([values[0], 0], [0, values[0]]) and not kwargs:
            return values[0]  # where sum() begins
        if name == "add" and len(values) == 2 and kinds <= {Results, Parts, Plain} and not kwargs:
            return self.rows.plus(*values)
        if kinds <= {Between, Plain} and Between in kinds and name in POINTWISE:
            return self.bends.apply(name, [_number(x) for x in args], {k: _number(x) for k, x in kwargs.items()})
        if kinds == {Scores} and len(values) == 1 and name in _SPREAD and not kwargs:
            rest = getattr(torch, name)(*(x.rest if isinstance(x, Scores) else torch.as_tensor(x) for x in args))
            return Scores(at=values[0].at, order=values[0].order, rest=rest, of=object())
        return self._counted(name, args, kwargs)

    def _indexed(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What is gathered, sorted, written to places or added by index; None where this is none of it."""
        if name == "getitem":
            index = args[1]
            if isinstance(index, tuple) and any(isinstance(one, Value) for one in index):
                if not isinstance(index[0], Value) or any(one != slice(None) for one in index[1:]):
                    raise NotUnderstood(f"getitem of {args[0].what} by several indices")
                index = index[0]
            return self._gathered(args[0], index) if isinstance(index, Value) else None
        if name in ("sort", "argsort"):
            found = self.rows.sorted(args[0], kwargs, args[1:])
            return found if name == "sort" else found[1]
        if name == "setitem":
            index = args[1][0] if isinstance(args[1], tuple) and len(args[1]) == 1 else args[1]
            return self.rows.put(args[0], index, args[2])
        if name in ("index_select", "index_copy", "index_add", "scatter"):
            names = ("input", "dim", "index", "source" if name.startswith("index") else "src")
            if len(args) > len(names):
                raise NotUnderstood(f"{name} with {len(args)} arguments")
            given = dict(zip(names, args, strict=False)) | kwargs
            base, dim, index, source = (given.pop(name, None) for name in names)
            if given or isinstance(dim, Value):
                raise NotUnderstood(f"{name} with {', '.join(given)}=")
            if name == "scatter" and isinstance(source, Weights):
                return self._spread(base, dim, index, source)
            if dim != 0:
                raise NotUnderstood(f"{name} along axis {dim}")
            if name == "index_select":
                return self._gathered(base, index)
            return (self.rows.added if name == "index_add" else self.rows.put)(base, index, source)
        if name == "einsum" and not kwargs:
            operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
            ranked = sorted(operands, key=lambda x: not isinstance(x, Results)) if len(operands) < 3 else ()
            if ranked and ranked[0] is not operands[0]:
                terms, arrow, out = str(args[0]).partition("->")
                args[0] = ",".join(reversed(terms.split(","))) + arrow + out
            return self.rows.contracted(args[0], *ranked) if ranked else None
        if name == "sum":
            given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
            given.pop("dtype", None)
            value, dim, keepdim = (given.pop(name, default) for name, default in _SUM)
            return None if given or len(args) > 3 else self.rows.summed(value, dim, bool(keepdim))
        return None

    def _gathered(self, base: Value, index: Value) -> Value:
        """``base[index]``; of a table of as many tokens as are read, no more is known."""
        table = isinstance(base, Plain) and base.fixed and base.varies
        if self.dynamic and table and not (isinstance(index, Plain) and index.fixed):
            raise NotUnderstood(f"numbers of a table by {index.what}")
        return self.rows.gathered(base, index)

    def _moved(self, name: str, args: list[Any], kwargs: dict[str, Any], call: Call) -> Any:
        value, rest = args[0], args[1:]
        others = tree_leaves((rest, kwargs))
        if name == "detach" and self.trained:
            return None
        if not isinstance(value, Value) or any(isinstance(x, torch.dtype) for x in others):
            raise NotUnderstood(f"{name} of {getattr(value, 'what', 'a number')} as another type")
        if isinstance(value, Counts):
            return None
        table = isinstance(value, Plain) and value.fixed and not value.varies
        if name in CUTS and call.sized and not table:
            raise NotUnderstood(f"{name} of {value.what} by a number that changes between calls")
        if name in CUTS and not all(call.fixed[axis] for axis in cut_axes(name, rest, kwargs, len(call.fixed))):
            raise NotUnderstood(f"{name} of {value.what} along an axis whose size changes")
        rest, kwargs = tree_map(lambda x: x.at if isinstance(x, Value) else x, (rest, kwargs))
        if name == "getitem":
            return value.moved(lambda at: at[rest[0]])
        kwargs.pop("memory_format", None)
        move = getattr(torch.Tensor, {"view": "reshape", "view_as": "reshape_as"}.get(name, name))
        return value.moved(lambda at: move(at, *rest, **kwargs))

    def _cast(self, value: Value, dtype: torch.dtype) -> Value | None:
        if isinstance(value, Plain):
            whole = dtype in _WIDE and (value.fixed or not value.at.is_floating_point())
            if self.dynamic and not whole and not (dtype.is_floating_point and value.fixed):
                return None
            return replace(value, at=value.at.to(dtype))
        if isinstance(value, Ids):
            return replace(value, table=value.table.to(dtype))
        if isinstance(value, Counts):
            return value if dtype in (*_WIDE, torch.float32, torch.float64) else None
        return value.to(dtype) if isinstance(value, Between) else value

    def _of_ids(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Ids:
        """A function of each id, evaluated for every number that one may be: all that matter, where that is known."""
        ids = [x for x in args if isinstance(x, Ids)]
        if any(x.order is not ids[0].order or not torch.equal(x.at, ids[0].at) for x in ids) or not ids:
            raise NotUnderstood(f"{name} of the ids of several pairs")
        numbers = [x.table if isinstance(x, Ids) else _number(x) for x in args]
        if any(isinstance(x, Value) for x in kwargs.values()):
            raise NotUnderstood(f"{name} with {', '.join(kwargs)}= of {Ids.what}")
        table = getattr(torch, name)(*numbers, **kwargs)
        done = any(x.done for x in ids)
        if table.dtype != torch.bool and not self.rows.choices.sure and name not in _CHOOSING:
            if done or not self._is_followed(name, numbers):
                raise NotUnderstood(f"{name} of ids that may be of no expert")
            done = True
        return replace(ids[0], table=table, done=done)

    def _is_followed(self, name: str, numbers: Sequence[Any]) -> bool:
        """Whether arithmetic with ids that may be of no expert does nothing but at numbers that are looked at."""
        whole = all(isinstance(x, int) or (isinstance(x, Tensor) and not x.is_floating_point()) for x in numbers)
        if name == "remainder":
            return whole and isinstance(numbers[1], int) and numbers[1] == self.rows.choices.experts
        return whole and name in ("add", "sub") and self.rows.choices.apart

    def _counted(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Counts | None:
        """How many pairs each expert has, and the ends of their rows."""
        value = args[0] if args else None
        if name == "histc" and isinstance(value, Ids) and value.table.dtype != torch.bool:
            if not torch.equal(value.at.flatten().sort().values, torch.arange(self.rows.tokens * self.rows.each)):
                return None
            table = value.table.double()
            return Counts(
                at=torch.zeros(self.rows.choices.experts),
                table=torch.stack([torch.histc(number, *args[1:], **kwargs) for number in table[:, None]]).long(),
            )
        if name == "cumsum" and isinstance(value, Counts) and not value.ends:
            given = [*args[1:], *(x for key, x in kwargs.items() if key != "dtype")]
            return replace(value, ends=True) if given in ([0], [-1]) else None
        return None

    def _spread(self, base: Any, dim: Any, ids: Any, weights: Weights) -> Scores | None:
        """``base.scatter(1, ids, weights)`` over all experts."""
        tokens, experts = self.rows.tokens, self.rows.choices.experts
        if not (isinstance(base, Plain) and isinstance(ids, Ids) and dim in (1, -1)) or ids.order or weights.order:
            return None
        pairs = torch.arange(ids.at.numel()).view(tokens, -1)
        whole = torch.equal(ids.at, pairs) and torch.equal(weights.at, pairs) and not bool(weights.zero.any())
        rest = base.at.flatten()[:1]
        if not whole or tuple(base.at.shape) != (tokens, experts) or bool((base.at != rest).any()):
            return None
        if not self.rows.choices.are_right(ids.table):
            return None
        return Scores(at=torch.arange(tokens * experts).view(tokens, experts), rest=rest[0].float(), of=object())


_SUM = (("input", None), ("dim", None), ("keepdim", False))


def _number(x: Any) -> Any:
    """The number that a tensor holds everywhere."""
    if not isinstance(x, Plain):
        return x
    one = x.at.flatten()[:1]
    if not x.fixed or x.order is not None or not len(one) or bool((x.at != one).any()):
        raise NotUnderstood(f"numbers that differ from column to column, or that depend on {Plain.what}")
    return one.item()
