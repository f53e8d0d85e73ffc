"""Whole mixtures of experts of published shapes, random FP4 weights: loading, memory, and compiled decode against bf16.

python benchmarks/moe_decode.py --model gpt-oss-20b --json gpt_oss.json      # or qwen3-30b-a3b
python benchmarks/moe_decode.py --from gpt_oss.json                          # the tables of a run

Writes a checkpoint in the published layout, with weights made on the GPU; loads it by from_pretrained; then compiles
the step of decode with mode="reduce-overhead" and a static cache, once for each batch size. The other side is the model
of the same class in bfloat16, experts by grouped_mm, compiled by Inductor, in the same loop. On a CPU both are tiny.

A step is timed by CUDA events over all steps after those in which graphs are recorded, the host's work included, which
is told beside it. Each step is given random tokens, so that the experts of a layer are chosen about evenly: with 32
sequences nearly all of them are read. The floor is the time to read the weights that a step needs once, experts as they
were chosen in one eager step, at 4.68 TB/s; the cache is left out.
"""

import argparse
import gc
import json
import logging
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from cuda_graphs import recorded
from dense import failure, number, show, write
from mixture_checkpoints import DEVICE, MIXTURES
from mixture_checkpoints import write as write_checkpoint
from roofline import READ_BYTES_PER_US
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import marlin_w4a16.hf
from marlin_w4a16.tensors import held_tensors

CACHE, CONTEXT, CHUNK = 512, 256, 64  # tokens: room, filled before the first step, at a time
WARM_UP, STEPS = 8, 96
BACKENDS = {"ours": "marlin_w4a16", "bf16": "inductor"}
GPU = DEVICE == "cuda"

Row = dict[str, Any]


def ours(folder: Path, name: str, layers: int) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE)


def bf16(folder: Path, name: str, layers: int) -> PreTrainedModel:
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(MIXTURES[name].config(layers), dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    return model.eval()


SIDES: dict[str, Callable[[Path, str, int], PreTrainedModel]] = {"ours": ours, "bf16": bf16}


class Decoder:
    """One batch size: `step` runs the compiled step over the next random tokens."""

    def __init__(self, model: PreTrainedModel, backend: str, batch: int) -> None:
        def choose(token: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
            return model(token, position_ids=position, past_key_values=cache).logits.argmax(-1)

        generator = torch.Generator(DEVICE).manual_seed(batch)
        tokens = torch.randint(model.config.vocab_size, (batch, CACHE), generator=generator, device=DEVICE)
        self.prompt, self.rest = tokens[:, :CONTEXT], iter(tokens[:, CONTEXT:].split(1, 1))
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=CACHE)
        self.token, self.position = tokens[:, :1].clone(), torch.full((1, 1), CONTEXT, device=DEVICE)
        self.eager, self.compiled = choose, torch.compile(choose, backend=backend, mode="reduce-overhead")
        self.lengths: list[dict[str, int]] = []

    def prefill(self) -> None:
        """Fills the cache, eagerly."""
        for start in range(0, CONTEXT, CHUNK):
            chunk = self.prompt[:, start : start + CHUNK]
            position = torch.arange(start, start + CHUNK, device=DEVICE).unsqueeze(0)
            out = self.model(chunk, position_ids=position, past_key_values=self.cache, logits_to_keep=1)
        if not out.logits.isfinite().all():
            raise ValueError("the logits are not finite")
        # Sliding layers count tokens in Python too, which would be an input of the CUDA graph that changes with every
        # step; the layers are full, so that the count decides nothing any more.
        self.lengths = [{k: v for k, v in vars(layer).items() if type(v) is int} for layer in self.cache.layers]

    def step(self, choose: Callable[..., Tensor] | None = None) -> None:
        for layer, lengths in zip(self.cache.layers, self.lengths, strict=True):
            vars(layer).update(lengths)
        self.token.copy_(next(self.rest))
        torch.compiler.cudagraph_mark_step_begin()
        (choose or self.compiled)(self.token, self.position, self.cache)
        self.position.add_(1)


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in held_tensors(module))


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """How many experts of each module are chosen by the last call, by its path."""
    chosen: dict[str, int] = {}

    def count(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point())
            chosen[path] = index.unique().numel()

        return hook

    experts = [(path, module) for path, module in model.named_modules() if path.endswith(".experts")]
    handles = [module.register_forward_pre_hook(count(path), with_kwargs=True) for path, module in experts]
    yield chosen
    for handle in handles:
        handle.remove()


def read_by_a_step(model: PreTrainedModel, chosen: dict[str, int]) -> tuple[int, float]:
    """Bytes of weights that a step reads, and the mean of the experts chosen in a layer."""
    total = getattr(model.config, "num_local_experts", None) or model.config.num_experts
    nbytes = bytes_of(model) - bytes_of(model.get_input_embeddings())
    for path, count in chosen.items():
        nbytes -= bytes_of(model.get_submodule(path)) * (total - count) // total
    return nbytes, sum(chosen.values()) / max(1, len(chosen))


def synchronize() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def forget() -> None:
    """Frees compiled code, CUDA graphs and what they hold."""
    torch._dynamo.reset()
    if GPU:
        cudagraph_trees.reset_cudagraph_trees()
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    counters.clear()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if GPU else 0


def load(side: str, folder: Path, name: str, layers: int) -> tuple[PreTrainedModel, Row]:
    """The model, and the seconds and memory that loading it took."""
    forget()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("marlin_w4a16")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    start = synchronize()
    model = SIDES[side](folder, name, layers)
    seconds = synchronize() - start
    log.removeHandler(handler)
    log.setLevel(level)
    found = re.search(r"packed in ([\d.]+) s", "\n".join(messages))
    packing = float(found[1]) if found else None
    return model, {"load_s": seconds, "packing_s": packing, "held": bytes_of(model), "load_peak": peak()}


@torch.no_grad()
def decode(model: PreTrainedModel, side: str, batch: int) -> Row:
    """Compiles and times a batch size."""
    forget()
    decoder = Decoder(model, BACKENDS[side], batch)
    start = synchronize()
    decoder.prefill()
    with counting(model) as chosen:
        decoder.step(decoder.eager)
    nbytes, touched = read_by_a_step(model, chosen)
    prefill_s = synchronize() - start
    decoder.step()
    compile_s = synchronize() - start - prefill_s
    for _ in range(WARM_UP - 1):
        decoder.step()
    us, host_us = timed(decoder)
    return {
        "step_us": us,
        "host_us": host_us,
        "tokens_per_s": batch * 1e6 / us,
        "floor_us": nbytes / READ_BYTES_PER_US,
        "touched": touched,
        "prefill_s": prefill_s,
        "compile_s": compile_s,
        "dynamo_graphs": counters["stats"]["unique_graphs"],
        "graphs": recorded() if GPU else 0,
        "skips": counters["inductor"]["cudagraph_skips"],
        "decode_peak": peak(),
    }


def timed(decoder: Decoder) -> tuple[float, float]:
    """Microseconds of a step, and of the host to launch one; where these are equal the GPU waits for the host."""
    if GPU:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
    begin = time.perf_counter()
    for _ in range(STEPS):
        decoder.step()
    host_us = (time.perf_counter() - begin) / STEPS * 1e6
    if not GPU:
        return host_us, host_us
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / STEPS * 1e3, host_us


def measure(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs all that was asked for; what exists is printed and written at once."""
    begin = time.perf_counter()
    layers = args.layers or (MIXTURES[args.model].layers if GPU else 2)
    result = {"machine": machine(), "model": args.model, "layers": layers, "loads": [], "rows": []}
    sides = ("ours", "bf16") if args.side == "both" else (args.side,)

    def note(text: str) -> None:
        tell(f"[{time.perf_counter() - begin:5.0f} s] {text}")
        write(result, args.json)

    if "ours" in sides and not (args.folder / "config.json").is_file():
        nbytes = write_checkpoint(args.folder, args.model, layers)
        note(f"{args.model}, {layers} layers: wrote {nbytes / 2**30:.1f} GiB to {args.folder}")
    for side in sides:
        model, found = load(side, args.folder, args.model, layers)
        result["loads"].append({"side": side, **found})
        note(f"{side}: loaded, {json.dumps(found)}")
        for batch in args.batch:
            if time.perf_counter() - begin > args.stop_after:
                note(f"{side}, batch {batch}: left out, {args.stop_after} s are over")
                continue
            try:
                row = {"status": "ok", **decode(model, side, batch)}
            except Exception as error:
                traceback.print_exc()
                row = {"status": failure(error)}
            result["rows"].append({"side": side, "batch": batch, **row})
            note(json.dumps(result["rows"][-1]))
        del model
        forget()
    return result


def report(result: dict[str, Any]) -> None:
    """Prints the tables."""
    print(", ".join(result["machine"].values()))
    sides = [row["side"] for row in result["loads"]]
    columns = ["", *sides]
    gib = {"held": "held, GiB", "load_peak": "peak of loading, GiB"}
    lines = [[title, *(number(row[key] / 2**30) for row in result["loads"])] for key, title in gib.items()]
    seconds = {"load_s": "loading, s", "packing_s": "of it packing, s"}
    lines += [[title, *(number(row[key], 1) for row in result["loads"])] for key, title in seconds.items()]
    show(f"{result['model']}, {result['layers']} layers", columns, lines)
    right = {(row["side"], row["batch"]): row for row in result["rows"] if row["status"] == "ok"}
    lines = [line(row, right.get(("bf16", row["batch"]))) for row in right.values()]
    show("decode, compiled", COLUMNS, lines)
    print("experts: chosen in a layer by one step over random tokens, which choose about evenly")
    for row in result["rows"]:
        if row["status"] != "ok":
            print(f"{row['side']} batch {row['batch']}: {row['status']}")


COLUMNS = (
    "", "batch", "step, us", "host, us", "floor, us", "tokens/s", "to bf16", "experts", "compile, s", "peak, GiB",
    "CUDA graphs", "skips",
)  # fmt: skip


def line(row: Row, other: Row | None) -> Sequence[str]:
    ratio = other["step_us"] / row["step_us"] if other else None
    return [
        row["side"],
        str(row["batch"]),
        number(row["step_us"], 0),
        number(row.get("host_us"), 0),
        number(row["floor_us"], 0),
        number(row["tokens_per_s"], 0),
        number(ratio),
        number(row["touched"], 1),
        number(row["compile_s"], 0),
        number(row["decode_peak"] / 2**30, 1),
        str(row["graphs"]),
        str(row["skips"]),
    ]


def machine() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if GPU else "CPU",
        "torch": f"torch {torch.__version__}",
        "transformers": f"transformers {transformers.__version__}",
        "marlin_w4a16": f"marlin_w4a16 {marlin_w4a16.__version__}",
    }


def a_folder(name: str) -> Path:
    """In memory where that is large enough for the weights."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > (40 << 30 if GPU else 40 << 20)
    return (memory if roomy else Path("/tmp")) / f"marlin_w4a16_{name}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MIXTURES, default="gpt-oss-20b")
    parser.add_argument("--side", choices=(*SIDES, "both"), default="both")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--layers", type=int, help="fewer than the model has; 2 on a CPU")
    parser.add_argument("--folder", type=Path, help="of the checkpoint; one that is there is loaded as it is")
    parser.add_argument("--stop-after", type=float, default=1e9, metavar="S", help="start no batch size after that")
    parser.add_argument("--json", help="written after each result")
    parser.add_argument("--from", dest="source", help="show a written run")
    args = parser.parse_args()
    args.folder = args.folder or a_folder(args.model)
    return args


def main() -> None:
    args = arguments()
    if args.source:
        report(json.loads(Path(args.source).read_text()))
        return
    logging.basicConfig(format="   %(message)s", stream=sys.stdout)
    logging.getLogger("marlin_w4a16").setLevel(logging.INFO)
    report(measure(args, lambda text: print(text, flush=True)))


if __name__ == "__main__":
    main()
