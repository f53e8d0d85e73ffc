"""Measures a checkpoint on this machine: loaded four bits wide, and beside it the same model dequantised.

Each is loaded by from_pretrained, then generates from random tokens with a static cache: once to compile, then three
times to be measured. On a GPU decode is compiled: by the backend marlin_w4a16, as the plugin sets it, and for the
dequantised model by Inductor, as transformers sets it, both in the mode reduce-overhead. On a CPU all is eager.

The first token is timed from handing over the prompt until the token is on the host: prefill, which runs eagerly, and
making the cache. A step of decode is timed from one token on the host to the next; the median of all steps is told, so
the first ones of each generate(), in which CUDA graphs are recorded anew, count in the whole generate() alone. Loading
includes reading the files, from the disk or from the system's cache; compiling finds what Inductor has kept on disk.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from marlin_w4a16.checkpoints import registry
from marlin_w4a16.checkpoints.files import HF_QUANT_CONFIG, CheckpointError
from marlin_w4a16.cli.inspection import Inspection, inspect, local
from marlin_w4a16.cli.measure import Result, Work, measure
from marlin_w4a16.cli.show import Cells, show_table, tell
from marlin_w4a16.report.data import Report
from marlin_w4a16.report.table import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = 1
PACKED, DENSE = "packed", "dequantised"
_TOO_BIG = "out of memory: the dequantised model does not fit on this GPU"
_RIGHT = {PACKED, DENSE, "ratio"}
Value = Callable[[Result], float | None]
# What is told: how to read it off a result, how to write it, and whether more of it is better; None: neither.
_ROWS: tuple[tuple[str, Value, Callable[[float], str], bool | None], ...] = (
    ("load", lambda r: r.load_s, lambda v: f"{v:.1f} s", False),
    ("peak memory meanwhile", lambda r: r.load_peak_bytes, lambda v: size(int(v)), False),
    ("model in memory", lambda r: r.model_bytes, lambda v: size(int(v)), False),
    ("compile", lambda r: r.compile_s if r.compiled else None, lambda v: f"{v:.1f} s", False),
    ("first token", lambda r: 1e3 * r.prefill_s, lambda v: f"{v:.1f} ms", False),
    ("step of decode", lambda r: 1e3 * r.step_s, lambda v: f"{v:.2f} ms", False),
    ("tokens a second", lambda r: r.tokens_per_s, lambda v: f"{v:.1f}", True),
    ("weights read at", lambda r: r.read_rate / 1e9, lambda v: f"{v:.4g} GB/s", None),
    ("whole generate()", lambda r: r.generate_s, lambda v: f"{v:.2f} s", False),
    ("peak memory in it", lambda r: r.peak_bytes, lambda v: size(int(v)), False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and what the model is to do."""
    parser.add_argument("path", help="folder of an FP4 checkpoint of a causal language model")
    parser.add_argument("--batch", type=_at_least(1), default=1, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--prompt", type=_at_least(1), default=512, help="their tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=_at_least(2), default=128, help="tokens to add (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--no-dense", action="store_true", help="leave out the dequantised model")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 0 also where the dequantised model does not fit."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: found no CUDA device: 'python -m marlin_w4a16 doctor' may say why")
    work = Work(args.batch, args.prompt, args.new_tokens, args.dtype, device)
    found = inspect(local(args.path))
    if not found.formats and not found.problems:
        raise CheckpointError(f"{args.path}: found no FP4 linear: 'python -m marlin_w4a16 inspect' says what there is")
    import_plugin(found.folder)
    results, notes = measure_both(found, work, not args.no_dense)
    if args.json:
        print(json.dumps(as_dict(found, work, results, notes), indent=2))
        return 0
    print(headline(found, work))
    show_table(
        ("", *(result.name for result in results), *["ratio"] * (len(results) > 1)), lines(results), right=_RIGHT
    )
    if len(results) > 1:
        print(f"ratio: how many times as fast, or as small, {PACKED} is")
    for note in notes:
        print(f"note: {note}")
    return 0


def measure_both(found: Inspection, work: Work, dense: bool) -> tuple[list[Result], list[str]]:
    """The packed model and, if asked for, the dequantised one, or a note that it does not fit."""
    results = [measure(PACKED, lambda: load(found, work, dequantize=False), work, tell)]
    if dense:
        try:
            results.append(measure(DENSE, lambda: load(found, work, dequantize=True), work, tell))
        except torch.OutOfMemoryError:
            return results, [_TOO_BIG]
    return results, []


def load(found: Inspection, work: Work, dequantize: bool) -> "PreTrainedModel":
    """The model of a checkpoint by from_pretrained."""
    from transformers import AutoModelForCausalLM

    from marlin_w4a16.hf import configs, mlx, producers

    choices: dict[str, Any] = {}
    if found.config == HF_QUANT_CONFIG:
        choices["quantization_config"] = configs.ModelOptConfig.of(str(found.folder), dequantize=dequantize)
    elif found.producer == "MLX":
        choices["config"] = mlx.mlx_config(found.folder, dequantize=dequantize)
    elif dequantize:
        options = next(row.options for row in registry.FORMATS if row.producer == found.producer)
        room = next(room for room in (producers, configs) if hasattr(room, options))
        choices["quantization_config"] = getattr(room, options)(dequantize=True)
    if work.device == "cuda":
        choices["device_map"] = "cuda"
    dtype = getattr(torch, work.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(found.folder, dtype=dtype, **choices)
    return model


def import_plugin(folder: Path) -> None:
    """Imports what loads the model, and its class, so that loading is not charged for that.

    Raises:
        ImportError: a package is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        import marlin_w4a16.hf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: bench needs transformers: pip install 'marlin_w4a16[hf]'") from error
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def as_dict(found: Inspection, work: Work, results: list[Result], notes: list[str]) -> dict[str, Any]:
    """For JSON, by the schema in docs/commands.md."""
    import transformers

    return {
        "schema": SCHEMA,
        "versions": {**Report.versions(), "transformers": transformers.__version__},
        "folder": str(found.folder),
        "producer": found.producer,
        "algorithm": found.algorithm,
        "device_name": device_name(work),
        "work": asdict(work),
        "results": [asdict(one) for one in results],
        "notes": notes,
    }


def headline(found: Inspection, work: Work) -> str:
    """What is measured where."""
    tokens = f"batch {work.batch}, {work.prompt} + {work.new_tokens} tokens, {work.dtype}"
    where = f"{device_name(work)}, torch {torch.__version__}"
    return f"{found.folder}: {found.producer} {found.algorithm}; {tokens}; {where}"


def device_name(work: Work) -> str:
    """The GPU's name, or what the CPU is called and how many threads it runs."""
    if work.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def lines(results: list[Result]) -> list[Cells]:
    """The table: a ratio above 1 says how many times as good the first model is."""
    others = len(results) > 1
    shown: list[Cells] = [("compiled by", *(one.compiled or "eager" for one in results), *[""] * others)]
    for name, value, write, more in _ROWS:
        values = [value(one) for one in results]
        if not any(values):
            continue
        first, last = values[0], values[-1]
        ratio = f"{first / last if more else last / first:.2f}" if first and last and more is not None else ""
        shown.append((name, *("-" if v is None else write(v) for v in values), *[ratio] * others))
    return shown


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of at least {least}")
        return int(text)

    return number
