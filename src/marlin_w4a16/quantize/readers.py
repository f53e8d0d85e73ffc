"""Which code of a model reads parameters of its modules past their calls, such as ``self.child.weight``."""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from marlin_w4a16.quantize.reached import Function, names_in, reached

# The way to a module from where code starts: names of children, or ANY of them.
Way = tuple[str, ...]
ANY, SELF, UNKNOWN = "*", "self", "?"
_Seen = set[tuple[str, Way]]  # where it starts (SELF, a parameter's name, or UNKNOWN), and the way from there
_CONTAINERS = ("values", "children", "items", "named_children", "modules", "named_modules")


@dataclass(frozen=True, slots=True)
class Read:
    """``name`` of a module is read, and of that ``of`` alone, such as ``"dtype"``, if it is not None."""

    start: str
    way: Way
    name: str
    of: str | None


class Readers:
    """What calls of a model read of its modules. Holds no module.

    Names are followed through assignments, loops and calls inside a function; where it is not known what a name stands
    for, all modules count that may be meant.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, list[tuple[str, str, str | None]]] = {}
        modules = list(model.modules())
        names = {name for module in modules for name in module._parameters}
        children = {name for module in modules for name in module._modules}
        mentioned = {function: set(names_in(function.function.__code__)) for function in reached(model)}
        bodies = {one: _Body(one, names, children) for one, said in mentioned.items() if said & names}
        takers = _takers(mentioned, bodies)
        if any(takers.values()):  # or it does not matter who hands modules over
            others = (one for one, said in mentioned.items() if said & children and one not in bodies)
            bodies.update((one, _Body(one, names, children)) for one in others)
        for function, body in bodies.items():
            for read in (*body.reads, *_handed_over(body, takers)):
                self._add(function, read, modules)

    def _add(self, function: Function, read: Read, modules: Sequence[nn.Module]) -> None:
        owner = function.owner if read.start == SELF else None
        is_known = owner is not None and issubclass(owner, nn.Module)
        if not read.way or (read.way[-1] == ANY and not is_known):
            return  # its own, or of whatever
        starts = (module for module in modules if not is_known or isinstance(module, owner or nn.Module))
        for target in {id(found): found for start in starts for found in _led(start, read.way)}:
            told = (function.name, read.name, read.of)
            if told not in self._found.setdefault(target, []):
                self._found[target].append(told)

    def reads(self, module: nn.Module, names: Sequence[str], held: Sequence[str] = ()) -> tuple[str, str] | None:
        """The first function that reads one of these parameters of a module, and which.

        Reading no more of it than what is ``held`` by what takes the module's place is left out.
        """
        found = self._found.get(id(module), ())
        return next(((who, name) for who, name, of in found if name in names and of not in held), None)


def _led(start: nn.Module, way: Way) -> Iterator[nn.Module]:
    """The modules to which a way leads."""
    if not way:
        yield start
        return
    children = start._modules.values() if way[0] == ANY else (start._modules.get(way[0]),)
    for child in children:
        if child is not None:
            yield from _led(child, way[1:])


# The functions that read what is handed over to them, by name, each with the place of its first such argument.
_Takers = dict[str, list[tuple[int, "_Body"]]]


def _takers(functions: Iterable[Function], bodies: "Mapping[Function, _Body]") -> _Takers:
    found: _Takers = {function.function.__name__: [] for function in functions}
    for function, body in bodies.items():
        first = 0 if function.owner is None else 1
        if any(read.start in body.parameters[first:] for read in body.reads):
            found[function.function.__name__].append((first, body))
    return found


def _handed_over(body: "_Body", takers: _Takers) -> Iterator[Read]:
    """What functions read of modules that another one hands over to them, one that is itself a module's too."""
    modules = [*takers.get("forward", ()), *takers.get("__call__", ())]
    for called, at, start, way in body.handed:
        for first, other in takers.get(called, modules):
            taken = at if isinstance(at, str) else next(iter(other.parameters[first + at :]), None)
            yield from (Read(start, (*way, *r.way), r.name, r.of) for r in other.reads if r.start == taken)


class _Body(ast.NodeVisitor):
    """What one function reads of modules, and which of them it hands over."""

    def __init__(self, function: Function, names: set[str], children: set[str]) -> None:
        code = function.function.__code__
        self.reads: list[Read] = []
        self.handed: list[tuple[str, int | str, str, Way]] = []  # the function's name, the argument's place or name
        self.parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self._names, self._values, self._harmless = names, dict[str, _Seen](), set[ast.AST]()
        self._self = self.parameters[0] if function.owner is not None and self.parameters else None
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function.function)))
        except (OSError, SyntaxError, TypeError):  # made at run time, or a lambda in the middle of a line
            mentioned = set(names_in(code))
            ways = [(child,) for child in mentioned & children]
            self.reads += [Read(UNKNOWN, way, name, None) for way in ways for name in mentioned & names]
            return
        for _ in range(2):  # a loop may use what is assigned at its end
            for node in ast.walk(tree):
                self._assign(node)
        self.visit(tree)

    def _assign(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            self._bind(node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            items = node.iter.args if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name) else []
            found = {(start, (*way, ANY)) for item in items or [node.iter] for start, way in self._seen(item) if way}
            self._give(node.target, found)

    def _bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._bind(one, other)
        else:
            self._give(target, {found for found in self._seen(value) if found[1] or found[0] != UNKNOWN})

    def _give(self, target: ast.AST, found: _Seen) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and found:
                self._values.setdefault(node.id, set()).update(f for f in found if len(f[1]) < 8)

    def _seen(self, node: ast.AST) -> _Seen:
        """The modules that an expression may be."""
        if isinstance(node, ast.Name):
            own: _Seen = {(SELF, ())} if node.id == self._self else set()
            given: _Seen = {(node.id, ())} if node.id in self.parameters and not own else set()
            return self._values.get(node.id, set()) | own | given or {(UNKNOWN, ())}
        if isinstance(node, ast.Attribute):
            return {(start, (*way, node.attr)) for start, way in self._seen(node.value)}
        if isinstance(node, ast.Subscript):
            return {(start, (*way, ANY)) for start, way in self._seen(node.value)}
        if isinstance(node, ast.IfExp):
            return self._seen(node.body) | self._seen(node.orelse)
        if isinstance(node, ast.BoolOp):
            return {found for value in node.values for found in self._seen(value)}
        if isinstance(node, ast.Call):
            asked = _asked_by_name(node)
            if asked is not None:
                return {(start, (*way, asked)) for start, way in self._seen(node.args[0])}
            if isinstance(node.func, ast.Attribute) and node.func.attr in _CONTAINERS:
                return self._seen(node.func.value)
        return {(UNKNOWN, ())}

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """``x.weight.dtype`` and ``x.weight``."""
        inner = node.value
        if isinstance(inner, ast.Attribute) and inner.attr in self._names:
            self._read(inner, inner.attr, inner.value, node.attr)
            self._harmless.add(inner)
        if isinstance(node.ctx, ast.Load) and node.attr in self._names:
            self._read(node, node.attr, node.value, None)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        """What only training runs is left out (fused kernels of Mamba): packed weights are not trained."""
        asked = any(isinstance(part, ast.Attribute) and part.attr == "training" for part in ast.walk(node.test))
        if not asked or isinstance(node.test, ast.UnaryOp):
            self.generic_visit(node)
            return
        for other in node.orelse:
            self.visit(other)

    def visit_Compare(self, node: ast.Compare) -> None:
        """``x.weight is None`` reads nothing of it."""
        if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            self._harmless.add(node.left)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """``isinstance(x.weight, Tensor)`` reads nothing; ``getattr(x, "weight")`` does; modules may be handed over."""
        func = node.func
        called = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else None
        if called == "isinstance" and node.args:
            self._harmless.add(node.args[0])
        asked = _asked_by_name(node)
        if asked in self._names:
            self._read(node, str(asked), node.args[0], None)
        arguments: list[tuple[int | str, ast.AST]] = list(enumerate(node.args))
        arguments += [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg is not None]
        for at, argument in arguments if called is not None else ():
            found = {seen for seen in self._seen(argument) if seen[1]}
            self.handed += [(str(called), at, start, way) for start, way in found]
        self.generic_visit(node)

    def _read(self, node: ast.AST, name: str, module: ast.AST, of: str | None) -> None:
        if node not in self._harmless:
            self.reads += [Read(start, way, name, of) for start, way in self._seen(module)]


def _asked_by_name(node: ast.Call) -> str | None:
    """The name in ``getattr(x, "name")``."""
    if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
        name = node.args[1]
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None
    return None
