"""Writes docs/supported.md: what the code's tables and the matrix of forms say.

    PYTHONPATH=tests python -m programs.document

from the root of the repository. tests/test_supported.py says when the file is stale.
"""

import dataclasses
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import torch

from hf import matrix as checkpoints
from marlin_w4a16.fake_impls.library import DTYPES
from marlin_w4a16.kernels.fp4 import GROUP_SIZES, format_name
from marlin_w4a16.kernels.scale_bytes import SCALE_KINDS
from marlin_w4a16.kernels.target import Target
from marlin_w4a16.options import Options
from marlin_w4a16.passes.devices import serves
from marlin_w4a16.passes.find.spellings import CONSUMERS
from marlin_w4a16.passes.graph.torch_private import GROUPED_MM, region_operands
from marlin_w4a16.passes.judge import roundings as judged
from marlin_w4a16.passes.judge import tensors
from marlin_w4a16.passes.judge.recipe import CODINGS, SCALINGS
from marlin_w4a16.passes.outcome import Rejected
from programs import hand, producers
from programs.program import Program

COMMAND = "PYTHONPATH=tests python -m programs.document"
FILE = Path(__file__).parents[2] / "docs" / "supported.md"

INTRO = f"""This file is written by `{COMMAND}` from the code's own tables and from the forms that the tests hold
the backend to. A weight is recognised by its value, so another spelling of these forms is likely to be replaced too.
What becomes of your model, and why, says `marlin_w4a16.explain(model, ...)`: see [report.md](report.md)."""
CODES = {
    "low nibble first": "the even column in the low four bits of a byte",
    "high nibble first": "the even column in the high four bits of a byte",
    "a number each": "numbers from 0 to 15 of any dtype, such as those the model unpacks from bytes in its own order",
    "a value each": "the values of E2M1, such as those the model has looked up",
}
SCALES = {
    "e4m3 bytes": "`float8_e4m3fn`, or 8-bit integers of these bits",
    "e8m0 bytes": "`float8_e8m0fnu`, or 8-bit integers of these bits",
    "e4m3 floats": "floats that are E4M3 values times one factor a tensor or a row; each must come out again exactly",
    "e8m0 floats": "floats that are powers of two times one factor a row; each must come out again exactly",
}
REGIONS = {
    "wrap": "Dynamo's own regions",
    "tag_activation_checkpoint": "`torch.utils.checkpoint`",
    "wrap_activation_checkpoint": "the same with functionalised random numbers",
    "invoke_subgraph": "`torch.compiler.nested_compile_region`",
}
CHECKPOINTS = """After `import marlin_w4a16.hf`, `from_pretrained` loads checkpoints of NVIDIA ModelOpt, of
compressed-tensors, of gpt-oss and of DeepSeek-V4. The tests write one of each format from tiny models of the real
classes, with its producer's own code or, for the last two, in the layout that is published; and hold what is loaded to
a dense model that is made from the same files without the code under test."""
OUTCOMES = (
    ("replaced", "by default: the weight is rounded once, at the end"),
    ("replaced with `tolerance`", "left by default: the model itself rounds the weight more often"),
    ("left", "runs as traced; the reason in the report contains the words quoted, where there are some"),
    ("no candidate", "runs as traced; it has no constant weight made from bytes, so there is nothing to report"),
)
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def text() -> str:
    """The whole file."""
    parts = ["# What is supported", prose(INTRO), *code(), "## Forms written by hand"]
    parts += ["Weights are float32 where no dtype is named.", table(("outcome", "meaning"), OUTCOMES)]
    for section in hand.SECTIONS:
        name = section.FORMS[0].section
        parts += [f"### {name[0].upper()}{name[1:]}", prose(inspect.getdoc(section)), matrix(section.FORMS)]
    parts += [
        "## Forms of producers",
        "As their own code makes and runs them. ModelOpt's need the Dynamo of torch 2.13.",
    ]
    for name in dict.fromkeys(form.section for form in producers.FORMS):
        parts += [f"### {name}", matrix(form for form in producers.FORMS if form.section == name)]
    parts += ["### Right, replaced or not", "\n".join(f"- {name}" for name in producers.RIGHT)]
    parts += loaded()
    return "\n\n".join(parts) + "\n"


def loaded() -> list[str]:
    """What becomes of checkpoints: the cases of the tests of transformers."""
    steps = [(step.name, step.asserts) for step in checkpoints.STEPS]
    always = listed(step.name for step in checkpoints.ALWAYS).replace(" or ", " and ")
    return [
        "## Checkpoints in transformers",
        prose(CHECKPOINTS),
        table(("step", "what the tests assert"), steps),
        prose(f"""In the tables "all" is {always}; steps that are tested for some cases only are named, an empty cell
        is not tested. A refused checkpoint raises a `CheckpointError` with the words quoted, before any weight is
        loaded."""),
        *(table(*shown) for shown in checkpoints.tables()),
    ]


def code() -> list[str]:
    """What the tables of the code say."""
    formats = [(format_name(kind, group), kind.upper(), str(group)) for kind in SCALE_KINDS for group in GROUP_SIZES]
    return [
        "## Formats",
        f"Codes are E2M1. Inputs and outputs are {listed(map(short, DTYPES))}.",
        table(("format", "block scales", "group"), formats),
        "## Devices",
        table(("device", "linears run in"), devices()),
        "## Products",
        "Of a symmetric product the weight may be either operand.",
        table(("product", "spelled", "only with"), products()),
        "Products inside these regions of a graph count too.",
        table(("operator", "of"), regions()),
        "## How codes stand",
        prose("""In a tensor of the model or in one that its operations make on the way, rows first or columns first; in
        some rows of a bigger tensor; in parts that are put below or beside each other."""),
        table(("codes", "as"), glossed(CODINGS, CODES)),
        "## How scales stand",
        table(("scales", "as"), glossed(SCALINGS, SCALES)),
        "## Tensor classes",
        f"torchao's {listed(f'`{name}`' for name in tensors._NAMES)} with E2M1 elements, read by their class.",
        "## Roundings",
        prose("""A weight that is rounded once, to its own dtype, is exact. One that is computed in 16 bits is rounded
        more often; it is replaced under `tolerance`, of which this much is usually enough. So is one that holds values
        below float16's normal range where the model rounds it to float16."""),
        table(("what is rounded", "times", "to bfloat16", "to float16"), roundings()),
        "## Options",
        table(("option", "default", "meaning"), options()),
    ]


def devices() -> list[tuple[str, str]]:
    """Kernels or refusals, as the pass decides on them."""
    found = [("CPU", served(torch.device("cpu")))]
    for capability in CAPABILITIES:
        with patch.object(Target, "of", lambda _, of=capability: Target(of, 1)):
            found.append(("CUDA, capability {}.{}".format(*capability), served(torch.device("cuda"))))
    return [*found, ("another, such as xpu", served(torch.device("xpu")))]


def served(device: torch.device) -> str:
    found = serves(device)
    return f"left: {found.reason}" if isinstance(found, Rejected) else found


def products() -> list[tuple[str, str, str]]:
    spelled: dict[str, list[str]] = {}
    only = {}
    for target, form in CONSUMERS.items():
        spelled.setdefault(form.name, []).append(spelling(target))
        only[form.name] = ", ".join(f"`{name}` {values_of(values)}" for name, values in form.fixed.items())
    return [(name, ", ".join(f"`{way}`" for way in dict.fromkeys(ways)), only[name]) for name, ways in spelled.items()]


def spelling(target: Callable | str) -> str:
    if target in (operator.matmul, "__matmul__"):
        return "@"
    if target is torch.nn.functional.linear:
        return "F.linear"
    if target is GROUPED_MM:
        return "F.grouped_mm"
    if isinstance(target, str) and "." in target:
        return f"torch.ops.{target}"
    return f"Tensor.{target}" if isinstance(target, str) else f"torch.{target.__name__}"


def values_of(values: tuple) -> str:
    """What an argument may be; sequences of a number say what the number says."""
    return listed(f"`{value!r}`" for value in values if isinstance(value, int | str | None))


def regions() -> list[tuple[str, str]]:
    region_operands(None)  # imports them
    every = dict(torch._ops._higher_order_ops)
    return glossed((name for name, op in every.items() if region_operands(op) is not None), REGIONS)


def roundings() -> list[tuple[str, ...]]:
    rows = []
    for form in judged.roundings_of(torch.float32, {torch.bfloat16}, divides=True):
        if not form.exact:
            times = len(form.rounds.split(", "))
            bounds = (f"`{power(times * torch.finfo(dtype).eps / 2)}`" for dtype in (torch.bfloat16, torch.float16))
            rows.append((form.rounds, str(times), *bounds))
    return rows


def options() -> list[tuple[str, str, str]]:
    meanings, fields = attributes(Options), dataclasses.fields(Options)
    defaults = [f.default if f.default is not dataclasses.MISSING else f.default_factory() for f in fields]
    return [(f"`{f.name}`", f"`{default!r}`", meanings[f.name]) for f, default in zip(fields, defaults, strict=True)]


def attributes(of: type) -> dict[str, str]:
    """What a docstring says under ``Attributes:``, by name."""
    listed = inspect.cleandoc(of.__doc__).partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", listed, re.MULTILINE)
    return {name: " ".join(meaning.split()).replace("``", "`") for name, meaning in entries}


def matrix(of: Iterable[Program]) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for form in of:
        rows.setdefault((title(form), outcome(form)), []).append(short(form.dtype))
    shown = [(name, ", ".join(dtypes) if dtypes != ["float32"] else "", what) for (name, what), dtypes in rows.items()]
    return table(("form", "dtype", "outcome"), shown)


def title(form: Program) -> str:
    """The name without the dtype, which has a column of its own."""
    dtype = short(form.dtype)
    return form.name.removeprefix(f"{dtype}: ").removesuffix(f", {dtype}")


def outcome(form: Program) -> str:
    if form.outcome == "tolerance":
        return f'replaced with `options={{"tolerance": {power(form.tolerance)}}}`'
    if form.outcome == "refused":
        return f'left: "{form.reason}"' if form.reason else "left"
    return form.outcome


def power(number: float) -> str:
    """A number such as 3 / 256 as a user writes it."""
    over, under = number.as_integer_ratio()
    return f"{'' if over == 1 else f'{over} * '}2**-{under.bit_length() - 1}"


def prose(words: str) -> str:
    return textwrap.fill(" ".join(words.split()), 120, break_on_hyphens=False)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def glossed(names: Iterable[str], words: dict[str, str]) -> list[tuple[str, str]]:
    """Names of a table of the code and what they mean; a name that is new wants a meaning here."""
    found = set(names)
    if found != set(words):
        raise KeyError(f"the code has {sorted(found)}, {__file__} tells of {sorted(words)}")
    return list(words.items())


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    first, *lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in (head, *rows)]
    return "\n".join((first, f"|{'---|' * len(head)}", *lines))


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"wrote {FILE}")
