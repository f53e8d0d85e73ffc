"""Writes docs/files.md: every file of the product by room and storey, with the first sentence of its docstring.

    PYTHONPATH=tests python -m house

from the root of the repository. tests/test_documents.py says when it is stale.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "files.md"
COMMAND = "PYTHONPATH=tests python -m house"
PACKAGE = "src/marlin_w4a16"
# Folders from the front door down; files beside folders are the top of a room or its ground (tests/test_imports.py).
ROOMS = {
    PACKAGE: "the front door",
    f"{PACKAGE}/cli": "the commands of `python -m marlin_w4a16`",
    f"{PACKAGE}/hf": "the transformers plugin",
    f"{PACKAGE}/hf/experts": "its mixtures of experts",
    f"{PACKAGE}/quantize": "dense models become FP4",
    f"{PACKAGE}/producers": "FP4 modules of other libraries, read and given back",
    f"{PACKAGE}/modules": "modules that own packed weights",
    f"{PACKAGE}/report": "what is told to people",
    f"{PACKAGE}/checkpoints": "files of checkpoints, read by their headers, without transformers",
    "passes": "the pass",
    "passes/fuse": "ops become fewer",
    "passes/replace": "products and mixtures become ops",
    "passes/live": "packed copies follow the live weights",
    "passes/mixture": "whole mixtures of experts, proved",
    "passes/judge": "is a value the decode of FP4 codes?",
    "passes/find": "products and their weights",
    "passes/graph": "what a traced graph is",
    "fake_impls": "the ops: schema, shapes, fake, CPU implementation, gradients",
    "kernels": "numerics, layout, launches; one launcher an op",
    "kernels/hopper": "Gluon, for SM90",
    "kernels/portable": "Triton, for SM80 to SM90",
    "kernels/blocks": "plain torch, block by block, for every device",
    "kernels/decode": "what kernels share inside",
}


def text() -> str:
    """The page."""
    parts = [
        "# Every file",
        f"Written by `{COMMAND}` from the files themselves. The folders of a room stand in the order in which "
        "they may import each other, downwards; files beside folders are the top of a room or its ground: "
        "[the order in full](../tests/test_imports.py).",
    ]
    for room, what in ROOMS.items():
        parts.append(f"## `{room}/`: {what}")
        parts.append("\n".join(f"- `{file.name}`: {first_sentence(file)}" for file in files_of(room)))
    return "\n\n".join(parts) + "\n"


def files_of(room: str) -> Iterator[Path]:
    """The files of a folder, those that say nothing left out."""
    return (file for file in sorted((ROOT / room).glob("*.py")) if ast.get_docstring(parsed(file)))


def first_sentence(file: Path) -> str:
    """How a file's docstring begins, without the dot."""
    return (
        (ast.get_docstring(parsed(file)) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`").rstrip(".")
    )


def parsed(file: Path) -> ast.Module:
    """A file as Python sees it."""
    return ast.parse(file.read_text())


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"wrote {FILE}")
