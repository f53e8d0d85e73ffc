"""The matrix of checkpoint formats, model classes and steps: what the tests of this folder run, and docs/supported.md
says. Nothing here imports transformers or a producer.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from checkpoints.formats import CASES, DENSE_FAMILIES, FORMATS
from narrow import case

Case = tuple[str, str]

FAMILIES = {
    "llama": "Llama", "llama-tied": "Llama, tied", "llama-bias": "Llama, biases",
    "llama-zeros": "Llama, blocks of zeros", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3-tied": "Qwen3, tied",
    "mistral": "Mistral", "mistral-tied": "Mistral, tied", "gemma3": "Gemma-3", "gemma3-tied": "Gemma-3, tied",
    "qwen3moe": "Qwen3-MoE", "mixtral": "Mixtral", "glm4moe": "GLM-4-MoE", "deepseekv3": "DeepSeek-V3",
    "nemotronh": "NemotronH", "gptoss": "gpt-oss", "deepseekv4": "DeepSeek-V4",
}  # fmt: skip
# A head of its own beside the embedding, under a config that ties them: both producers write that.
OWN_HEADS = [(name, family) for name in ("modelopt-head", "ct-head") for family in ("llama-tied", "gemma3-tied")]
# The words of the error, by format and family.
REFUSED: dict[Case, str] = {
    ("ct-embedding", "llama"): "expected a linear in the model, not Embedding",
}
# Mixtures of experts: those that every step is tested for, and those that some are.
MIXTURES: list[Case] = [
    ("modelopt-w4a16", "qwen3moe"), ("modelopt-nvfp4", "mixtral"), ("modelopt-nemotron", "nemotronh"),
    ("ct-nvfp4a16", "mixtral"), ("ct-nvfp4a16", "glm4moe"), ("ct-mxfp4a16", "deepseekv3"), ("gpt-oss", "gptoss"),
    ("deepseek-v4", "deepseekv4"),
]  # fmt: skip
MORE_MIXTURES: list[Case] = [
    *((name, "qwen3moe") for name in ("modelopt-nvfp4", "modelopt-mxfp4", "ct-nvfp4a16", "ct-nvfp4", "ct-mxfp4a16")),
    *((name, "mixtral") for name in ("modelopt-w4a16", "ct-mxfp4a16")),
    *((name, "glm4moe") for name in ("modelopt-nvfp4", "ct-mxfp4a16")), ("ct-nvfp4a16", "deepseekv3"),
    ("modelopt-w4a16", "nemotronh"), ("modelopt-nemotron-0.47", "nemotronh"),
    *((f"modelopt-{name}", "gptoss") for name in ("w4a16", "nvfp4")),
    *((f"deepseek-{name}", "deepseekv4") for name in ("v4.1", "v4-fp32", "v4-inv", "v4-weight-scale")),
]  # fmt: skip
# Without a layer in FP4 there is nothing for this package to do.
LEFT = "ct-fp8"
LOADED: list[Case] = [case for case in [*CASES, *OWN_HEADS] if case not in REFUSED]
OWN = [case for case in LOADED if case[0] != LEFT]
ON_LLAMA = [case for case in OWN if case[1] == "llama"]
# What runs without --wide: every format, most classes, each kind of mixture, tied heads and heads of their own.
NARROW: set[Case] = {
    *((made.name, made.family) for made in FORMATS.values()), *MIXTURES, ("modelopt-awq", "gemma3-tied"),
    ("modelopt-nvfp4", "gptoss"),
    ("modelopt-nvfp4", "llama-zeros"), ("modelopt-nvfp4", "mistral"), ("modelopt-w4a16", "qwen2"),
    ("ct-nvfp4a16", "llama-tied"), ("ct-nvfp4", "qwen3"), ("ct-mxfp4a16", "llama-bias"),
    ("ct-mxfp4a16", "llama-zeros"),
    ("modelopt-head", "gemma3-tied"), ("ct-head", "llama-tied"),
}  # fmt: skip
# What runs without --wide of steps that read no files, so that formats whose modules are alike are alike to them.
PARTLY: set[Case] = {
    *((f"modelopt-{name}", "llama") for name in ("mixed", "kv-fp8", "awq", "group32", "mixed-fp4")),
    *((f"ct-{name}", "llama") for name in ("nvfp4", "mxfp4a16", "kv", "nvfp4-mxfp4", "nvfp4-fp8")),
    *MIXTURES, ("modelopt-awq", "gemma3-tied"), ("ct-head", "llama-tied"), ("ct-mxfp4a16", "llama-bias"),
    ("modelopt-nvfp4", "llama-zeros"), ("ct-mxfp4a16", "llama-zeros"),
}  # fmt: skip
KEPT = ["modelopt-nvfp4", "modelopt-mixed", "modelopt-mixed-fp4", "modelopt-awq", "modelopt-svdquant", "modelopt-mxfp4",
        "modelopt-fp8", "ct-nvfp4", "ct-mxfp4", "ct-two-groups"]  # fmt: skip
# Formats that differ most, for what is alike for all others.
FEW = ["modelopt-mixed", "modelopt-kv-fp8", "modelopt-awq", "ct-nvfp4", "ct-mxfp4a16", "ct-kv", "ct-nvfp4-fp8"]
FEW_ON_LLAMA = [(name, "llama") for name in FEW]
FULLY = [*OWN, *MIXTURES]
LARGELY = [*FULLY, *MORE_MIXTURES]
# Classes whose attention has caches of its own, none of them static.
OWN_CACHES = ["deepseekv4"]
# compressed-tensors' own FP8 layers break the graph.
TRACED = [case for case in ON_LLAMA if case[0] != "ct-nvfp4-fp8"] + MIXTURES
COMPILED: list[Case] = [
    *((n, "llama") for n in ("ct-nvfp4a16", "ct-mxfp4a16", "modelopt-group32", "modelopt-mixed", "modelopt-awq")),
    *(("ct-nvfp4a16", family) for family in DENSE_FAMILIES if family not in ("llama", "llama-zeros")),
    ("modelopt-w4a16", "qwen3moe"), ("modelopt-nemotron", "nemotronh"), ("gpt-oss", "gptoss"),
]  # fmt: skip


def params(cases: Iterable[tuple[Any, ...]], narrow: Container[Case] = NARROW) -> list[Any]:
    """Cases for parametrize, each of a format, a family and more: those that are not in the narrow set are wide."""
    return [case(*values, narrow=values[:2] in narrow) for values in cases]


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of a loaded model, as tests assert it.

    Attributes:
        name: in a word.
        asserts: what holds.
        cases: format and family of each case.
    """

    name: str
    asserts: str
    cases: list[Case]


LOAD = Step(
    "load",
    "quantised linears and experts are packed, or dense where they are FP8; every other tensor is as stored; none is "
    "missing",
    LARGELY,
)
FLOAT32 = Step(
    "float32", "logits within 1e-5 of the dense model that the exact decode gives, all tokens equal", LARGELY
)
BFLOAT16 = Step(
    "bfloat16",
    "32 teacher-forced steps of 8 prompts: logits no further from the exact model than those of the dense model in "
    "bfloat16; tokens equal wherever the two best logits differ by more than 4 times the error; "
    "experts are those that float32 chooses",
    FULLY,
)
GENERATE = Step(
    "generate", "greedy tokens with a static cache, in DeepSeek-V4 with its own, equal those of the dense model", FULLY
)
SAVE = Step(
    "save", "every tensor bit for bit, config.json equal, in any dtype, whole or in shards; loads again", LARGELY
)
DENSE = Step(
    "dequantize",
    "`dequantize=True` and `dequantize()` give plain linears and experts with the exact weight rounded once",
    FULLY,
)
ADAPTERS = Step(
    "LoRA",
    "gradients of adapters (beside experts, not on them) and inputs equal the dense model's within 1e-5; the base does "
    "not change",
    FULLY,
)
TRACE = Step("trace", "`torch.compile` sees one graph, which gives the logits of eager", TRACED)
COMPILE = Step("compile", "that graph compiled by Inductor: logits within 1e-5 of eager in float32", COMPILED)
KEEP = Step(
    "keep", "with `activation_quant=\"keep\"` inputs are what the producer's own code makes of them",
    [(name, "llama") for name in KEPT],
)  # fmt: skip
STEPS = [LOAD, FLOAT32, BFLOAT16, TRACE, GENERATE, SAVE, DENSE, ADAPTERS, COMPILE, KEEP]
ALWAYS = [step for step in STEPS if {*OWN} <= {*step.cases}]


def cell(name: str, family: str) -> str:
    """What holds for a format in a model class: empty where nothing is tested."""
    case = name, family
    if case in REFUSED:
        return f'refused: "{REFUSED[case]}"'
    if name == LEFT and case in LOADED:
        return "left to transformers"
    steps = [step for step in STEPS if case in step.cases]
    missing = [step.name for step in ALWAYS if step not in steps]
    if len(missing) > 1 or not steps:
        return ", ".join(step.name for step in steps)
    but = f"all but {missing[0]}" if missing else "all"
    return ", ".join([but, *(step.name for step in steps if step not in ALWAYS)])


def rows(names: Iterable[str], families: Iterable[str]) -> list[tuple[str, ...]]:
    """Lines of a table: a format, and what holds for it in each class."""
    columns = list(families)
    return [(f"`{name}`", FORMATS[name].about, *(cell(name, family) for family in columns)) for name in names]


def tables() -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Every format in one class, then the main ones in all classes without experts, then all classes with experts."""
    mixtures = {family for _, family in LARGELY if family not in DENSE_FAMILIES}
    others = [family for family in FAMILIES if family != "llama" and family not in mixtures]
    with_experts = [family for family in FAMILIES if family in mixtures]
    shown = [name for name in FORMATS if any(cell(name, family) for family in others)]
    of_llama = [name for name in FORMATS if cell(name, "llama")]
    of_experts = [name for name in FORMATS if any(cell(name, family) for family in with_experts)]
    return [
        (("format", "what is special", FAMILIES["llama"]), rows(of_llama, ["llama"])),
        (("class", *(f"`{name}`" for name in shown)), [
            (FAMILIES[family], *(cell(name, family) for name in shown)) for family in others
        ]),
        (("format", "what is special", *(FAMILIES[family] for family in with_experts)),
         rows(of_experts, with_experts)),
    ]  # fmt: skip
