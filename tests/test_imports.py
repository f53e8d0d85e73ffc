"""Imports go down only, front door -> passes -> fake_impls -> kernels, and no room knows what it must not."""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "marlin_w4a16"
ROOMS = ("kernels", "fake_impls", "passes")  # from the bottom up; the front door is above them
NEVER = {
    "kernels": ("torch.fx", "torch.library"),
    "fake_impls": ("torch.fx",),
    "passes": ("triton",),
}
ALLOWED = {"marlin_w4a16", "torch", "triton", *sys.stdlib_module_names}
ALLOWED_IN = {
    "marlin_w4a16.hf": {"transformers", "safetensors", "accelerate"},
    "marlin_w4a16.checkpoints": {"safetensors"},
}
ALLOWED_IN_FUNCTIONS = {"rich", "depyf"}
ALLOWED_IN_FUNCTIONS_OF = {"marlin_w4a16.cli": {"transformers"}}


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def level(name: str) -> int:
    """The room of a dotted name as an index; what is in no room belongs to the front door."""
    return next((i for i, room in enumerate(ROOMS) if within(name, f"marlin_w4a16.{room}")), len(ROOMS))


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


def problems(module: str, source: str) -> Iterator[str]:
    """What is wrong with the imports of ``module``, a dotted name, given its source."""
    tree = ast.parse(source)
    room = module.split(".")[1]
    lazy = {n for block in ast.walk(tree) if runs_later(block) for n in ast.walk(block) if n is not block}
    for node in ast.walk(tree):
        used = imported(node)
        for name in used:
            top = name.partition(".")[0]
            if not top:
                yield f"{name} is relative"
            elif top == "marlin_w4a16" and level(name) > level(module):
                yield f"{name} is above {room}"
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


def test_every_room_is_checked():
    assert {level(module) for module, _ in sources()} == set(range(len(ROOMS) + 1))


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
        ("marlin_w4a16.passes.x", "import triton.language as tl"),
        ("marlin_w4a16.passes.x", "from ..kernels.fp4 import FP4Weight"),
        ("marlin_w4a16.backend", "import transformers"),
        ("marlin_w4a16.backend", "import numpy as np"),
        ("marlin_w4a16.report", "from rich.table import Table"),
        ("marlin_w4a16.cli.bench", "import transformers"),
        ("marlin_w4a16.cli.bench", "if SLOW:\n    import transformers"),
        ("marlin_w4a16.backend", "def f():\n    import transformers"),
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
        ("marlin_w4a16.report", "def show():\n    import rich"),
        ("marlin_w4a16.hf.plugin", "import transformers"),
        ("marlin_w4a16.cli.bench", "def f():\n    import transformers"),
        ("marlin_w4a16.cli.bench", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("marlin_w4a16.producers.torchao", "def f():\n    import torchao"),
    ],
)
def test_a_good_import_is_not(module: str, source: str):
    assert not list(problems(module, source))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_link_to_a_namespace(room: str):
    """A package ``kernels`` in the root would shadow Hugging Face's of that name."""
    assert os.readlink(PACKAGE / room) == f"../../{room}"
    assert not list((ROOT / room).rglob("__init__.py"))


def test_pytest_imports_nothing_from_the_root():
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
