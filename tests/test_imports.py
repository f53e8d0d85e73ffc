"""Imports go down only, from storey to storey, and no room knows what it must not."""

import ast
import os
import sys
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "marlin_w4a16"
_NUMERICS = (
    "private",
    "record",
    "recording",
    "replay",
    "target",
    "scale_bytes",
    "fp4",
    "quantize",
    "inputs",
    "layout",
    "packing",
    "launch",
    "grad_launch",
    "hopper_launch",
    "activation",
    "expert_order",
    "experts",
)
ROOMS = ("kernels", "fake_impls", "passes")  # from the bottom up; the front door is above them
# The storeys from the bottom up. A file may import what stands on lower storeys, or with it on one line; lines of one
# storey stand apart. The longest name that fits tells where a file is.
STOREYS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (tuple(f"kernels.{name}" for name in _NUMERICS),),
    (("kernels.decode",), ("kernels.blocks",)),
    (("kernels.portable",), ("kernels.hopper",)),
    (("kernels",),),
    (("fake_impls",),),
    (("passes.outcome", "passes.settings", "passes.devices"),),
    (("passes.graph",),),
    (("passes.find",),),
    (("passes.judge",),),
    (("passes.mixture",),),
    (("passes.live",),),
    (("passes.replace",),),
    (("passes.fuse",),),
    (("passes",),),
    (("version", "options", "tensors", "refresh"), ("checkpoints",)),
    (("report",),),
    (("modules",), ("backend",)),
    (("producers",),),
    (("prepare",), ("quantize",)),
    (("hf",),),
    (("cli",),),
    (("",),),
)
NEVER = {"kernels": ("torch.fx", "torch.library"), "fake_impls": ("torch.fx",), "passes": ("triton",)}
ALLOWED = {"marlin_w4a16", "torch", "triton", *sys.stdlib_module_names}
ALLOWED_IN = {
    "marlin_w4a16.hf": {"transformers", "safetensors", "accelerate"},
    "marlin_w4a16.checkpoints": {"safetensors"},
    "marlin_w4a16.diffusers": {"diffusers"},
}
ALLOWED_IN_FUNCTIONS = {"rich", "depyf"}
ALLOWED_IN_FUNCTIONS_OF = {
    "marlin_w4a16.cli": {"transformers"},
    "marlin_w4a16.checkpoints.names": {"regex"},
    "marlin_w4a16.checkpoints.gguf_header": {"gguf"},
    "marlin_w4a16.hf.gguf_placing": {"gguf"},
}


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def place_of(name: str) -> tuple[int, tuple[str, ...]]:
    """The storey of a dotted name, as an index, and its line there."""
    found = [
        (len(prefix), storey, line)
        for storey, lines in enumerate(STOREYS)
        for line in lines
        for prefix in line
        if not prefix or within(name, f"marlin_w4a16.{prefix}")
    ]
    _, storey, line = max(found)
    return storey, line


def is_above(name: str, module: str) -> bool:
    """Whether a module must not import a name."""
    (storey, line), (own_storey, own_line) = place_of(name), place_of(module)
    return storey > own_storey or (storey == own_storey and line != own_line)


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def runs_later(node: ast.AST) -> bool:
    """Whether what stands inside is not imported with the module."""
    checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def named_at_import(file: Path) -> Iterator[str]:
    """What a file imports when it is imported."""
    tree = ast.parse(file.read_text())
    later = {n for block in ast.walk(tree) if runs_later(block) for n in ast.walk(block) if n is not block}
    for node in ast.walk(tree):
        if node not in later:
            yield from imported(node)


def longest(name: str, modules: Collection[str]) -> list[str]:
    """The file that a dotted name is, or is defined in."""
    return [m for m in (name, name.rpartition(".")[0]) if m in modules][:1]


def problems(module: str, source: str) -> Iterator[str]:
    """What is wrong with the imports of ``module``, a dotted name, given its source."""
    tree, room = ast.parse(source), module.split(".")[1]
    lazy = {n for block in ast.walk(tree) if runs_later(block) for n in ast.walk(block) if n is not block}
    for node in ast.walk(tree):
        used = imported(node)
        for name in used:
            top = name.partition(".")[0]
            if not top:
                yield f"{name} is relative"
            elif top == "marlin_w4a16" and is_above(name, module):
                yield f"{name} is above {module}"
            elif not (
                top in ALLOWED
                or any(top in names and within(module, package) for package, names in ALLOWED_IN.items())
                or (top in ALLOWED_IN_FUNCTIONS and node in lazy)
                or any(top in n and within(module, p) and node in lazy for p, n in ALLOWED_IN_FUNCTIONS_OF.items())
                or (module == f"marlin_w4a16.producers.{top}" and node in lazy)
                or (module == "marlin_w4a16.hf.quantizer" and top == "compressed_tensors" and node in lazy)
            ):
                yield f"{name} is no runtime dependency"
        if isinstance(node, ast.Attribute):
            used = [ast.unparse(node)]  # torch.library needs no import of its own
        for name in used:
            yield from (f"{name} has no place in {room}" for never in NEVER.get(room, ()) if within(name, never))


def sources() -> list[tuple[str, Path]]:
    """Every module of the package by its dotted name; the rooms are links, which are followed."""
    files = sorted(Path(d, f) for d, _, names in os.walk(PACKAGE, followlinks=True) for f in names if f.endswith(".py"))
    return [(".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts), f) for f in files]


@pytest.mark.parametrize("module, file", [pytest.param(*s, id=s[0]) for s in sources()])
def test_imports_go_down(module: str, file: Path):
    assert not list(problems(module, file.read_text()))


def test_every_storey_has_files():
    found = {place_of(module) for module, _ in sources()}
    assert found == {(storey, line) for storey, lines in enumerate(STOREYS) for line in lines}


def test_no_files_import_each_other():
    """Storeys leave room for circles on one line; at import time there are none."""
    modules = {name.removesuffix(".__init__"): file for name, file in sources()}
    after = {
        name: {m for n in named_at_import(file) for m in longest(n, modules)} - {name} for name, file in modules.items()
    }
    TopologicalSorter(after).prepare()


@pytest.mark.parametrize(
    "module, source",
    [
        ("marlin_w4a16.kernels.x", "from marlin_w4a16.fake_impls.linear import linear"),
        ("marlin_w4a16.kernels.x", "from marlin_w4a16 import passes"),
        ("marlin_w4a16.kernels.x", "from torch import fx"),
        ("marlin_w4a16.kernels.x", "import torch\nlib = torch.library.Library('x', 'DEF')"),
        ("marlin_w4a16.kernels.x", "def f():\n    import transformers"),
        ("marlin_w4a16.fake_impls.x", "from marlin_w4a16.passes import linear"),
        ("marlin_w4a16.fake_impls.x", "from torch.fx import Graph"),
        ("marlin_w4a16.passes.x", "from marlin_w4a16.options import Options"),
        ("marlin_w4a16.passes.find.x", "from marlin_w4a16.passes.judge.decode import Decode"),
        ("marlin_w4a16.passes.judge.x", "from marlin_w4a16.passes import rewrite"),
        ("marlin_w4a16.kernels.portable.x", "from marlin_w4a16.kernels.hopper.rows import by_rows"),
        ("marlin_w4a16.kernels.fp4", "from marlin_w4a16.kernels.linear import linear"),
        ("marlin_w4a16.modules.x", "from marlin_w4a16.prepare import prepare"),
        ("marlin_w4a16.modules.x", "from marlin_w4a16.producers.compressed_tensors import Hook"),
        ("marlin_w4a16.quantize.x", "from marlin_w4a16.prepare import prepare"),
        ("marlin_w4a16.report.x", "import marlin_w4a16"),
        ("marlin_w4a16.passes.x", "import triton.language as tl"),
        ("marlin_w4a16.passes.x", "from ..kernels.fp4 import FP4Weight"),
        ("marlin_w4a16.backend", "import transformers"),
        ("marlin_w4a16.backend", "import numpy as np"),
        ("marlin_w4a16.report.data", "from rich.table import Table"),
        ("marlin_w4a16.cli.bench", "import transformers"),
        ("marlin_w4a16.cli.bench", "if SLOW:\n    import transformers"),
        ("marlin_w4a16.backend", "def f():\n    import transformers"),
        ("marlin_w4a16.checkpoints.names", "import regex"),
        ("marlin_w4a16.checkpoints.scheme", "def f():\n    import regex"),
        ("marlin_w4a16.producers.torchao", "import torchao"),
        ("marlin_w4a16.producers.torchao", "def f():\n    import modelopt"),
    ],
)
def test_a_bad_import_is_caught(module: str, source: str):
    assert list(problems(module, source))


@pytest.mark.parametrize(
    "module, source",
    [
        ("marlin_w4a16.kernels.x", "import triton\nfrom marlin_w4a16.kernels.fp4 import FP4Weight"),
        ("marlin_w4a16.fake_impls.x", "import torch.library\nfrom marlin_w4a16.kernels.fp4 import FP4Weight"),
        ("marlin_w4a16.passes.x", "import torch.fx\nfrom marlin_w4a16.fake_impls import linear"),
        ("marlin_w4a16.report.data", "def show():\n    import rich"),
        ("marlin_w4a16.hf.plugin", "import transformers"),
        ("marlin_w4a16.cli.bench", "def f():\n    import transformers"),
        ("marlin_w4a16.cli.bench", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("marlin_w4a16.checkpoints.names", "def f():\n    import regex"),
        ("marlin_w4a16.producers.torchao", "def f():\n    import torchao"),
    ],
)
def test_a_good_import_is_not(module: str, source: str):
    assert not list(problems(module, source))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_link_to_a_namespace(room: str):
    """A package ``kernels`` in the root would shadow Hugging Face's of that name."""
    assert os.readlink(PACKAGE / room) == f"../../{room}" and not list((ROOT / room).rglob("__init__.py"))


def test_pytest_imports_nothing_from_the_root():
    assert not (ROOT / "conftest.py").exists() and not list((ROOT / "tests").rglob("__init__.py"))
