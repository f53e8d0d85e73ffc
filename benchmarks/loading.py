"""What loading FP4 checkpoints costs, part by part, side by side with an older source tree.

python benchmarks/loading.py [--models llama-8b qwen3-30b-a3b] [--layers 4] [--against FOLDER] [--repeat 3]

Writes random NVFP4 checkpoints of published shapes (tiny ones on a CPU) to a temporary folder and loads each from the
page cache in processes of their own, this tree and the other in turns. ``FOLDER`` is the root of a source tree.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).parents[1]
LAYERS = {"llama-8b": 32, "qwen3-30b-a3b": 48}
PARTS = ("checking", "transformers", "reading", "packing", "in all")


def write(folder: Path, model: str, layers: int) -> None:
    """Writes a checkpoint, one file a layer."""
    if model == "llama-8b":
        from load import write as write_llama

        write_llama(folder, "nvfp4", layers)
    else:
        from mixture_checkpoints import write as write_mixture

        write_mixture(folder, model, layers)


class Clock:
    """Seconds inside methods of classes, by what they are called here."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def on(self, owner: Any, method: str, name: str) -> None:
        """Counts the calls of a method from now on."""
        inner: Callable[..., Any] = getattr(owner, method)
        self.seconds.setdefault(name, 0.0)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - start

        setattr(owner, method, timed)


def measure(folder: Path) -> dict[str, float]:
    """Loads a checkpoint with the tree that is imported: seconds of the parts, bytes."""
    from transformers import AutoModelForCausalLM

    import marlin_w4a16.hf  # noqa: F401, the plugin
    from marlin_w4a16.hf.experts.load import Reader
    from marlin_w4a16.hf.loading import FP4Loading
    from marlin_w4a16.tensors import held_tensors

    try:
        from marlin_w4a16.hf.ahead import Ahead
    except ImportError:  # an older tree
        Ahead = None
    clock, cuda = Clock(), DEVICE == "cuda"
    clock.on(FP4Loading, "_process_model_before_weight_loading", "checking")
    clock.on(FP4Loading, "_process_model_after_weight_loading", "after")
    if cuda:
        torch.empty(1, device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    # what reads experts is counted once the checks, which read by it too, are done
    reads = "stacked" if hasattr(Reader, "stacked") else "tensor"
    inner = FP4Loading._process_model_after_weight_loading

    def after(*args: Any, **options: Any) -> Any:
        clock.on(Reader, reads, "reading")
        if Ahead is not None:
            clock.on(Ahead, "take", "reading")  # waits for what another thread reads
        return inner(*args, **options)

    FP4Loading._process_model_after_weight_loading = after
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE)
    if cuda:
        torch.cuda.synchronize()
    found = {**clock.seconds, "in all": time.perf_counter() - start}
    found["packing"] = found.pop("after") - found["reading"]
    found["transformers"] = found["in all"] - sum(found[part] for part in ("checking", "reading", "packing"))
    held = sum(tensor.nbytes for tensor in held_tensors(model))
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {**found, "held": held, "peak": peak}


def measured(tree: Path, folder: Path) -> dict[str, float]:
    """`measure` in a process of its own, which imports another tree."""
    command = [sys.executable, __file__, "--measure", str(folder)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree / "src")}, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{tree} cannot load {folder}:\n{run.stderr[-3000:]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def compare(folder: Path, model: str, layers: int, trees: dict[str, Path], repeat: int, table: Any) -> None:
    """Writes a checkpoint, loads it by each tree in turns, and adds what the fastest loads took."""
    write(folder, model, layers)
    files = list(folder.glob("*.safetensors"))
    for file in files:  # into the page cache
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(repeat):
        for name, tree in trees.items():
            runs[name].append(measured(tree, folder))
    for name, found in runs.items():
        best = min(found, key=lambda one: one["in all"])
        seconds = [f"{best[part]:.2f}" for part in PARTS]
        mib = [f"{number / 2**20:.0f}" for number in (sum(f.stat().st_size for f in files), best["held"], best["peak"])]
        table.add_row(model, str(layers), name, *seconds, *mib)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--layers", type=int, help="fewer layers than the models have")
    parser.add_argument("--against", type=Path, help="the root of another source tree")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return
    from rich.console import Console
    from rich.table import Table

    trees = {"here": HERE, **({"against": args.against.resolve()} if args.against else {})}
    table = Table(title=f"loading on {DEVICE}, torch {torch.__version__}: seconds, MiB")
    for column in ("model", "layers", "tree", *PARTS, "files", "held", "peak"):
        table.add_column(column)
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            layers = args.layers or (LAYERS[model] if DEVICE == "cuda" else 2)
            compare(Path(folder), model, layers, trees, args.repeat, table)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
