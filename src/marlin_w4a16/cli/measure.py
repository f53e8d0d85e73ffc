"""What `bench` measures of one model: loading, memory, the first token, a step of decode."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marlin_w4a16.tensors import held_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNS = 3


@dataclass(frozen=True, slots=True)
class Work:
    """What is done with a model.

    Attributes:
        batch, prompt: shape of the random tokens that it is given.
        new_tokens: how many it adds to each; at least 2.
        dtype: of its activations, such as ``"bfloat16"``.
        device: ``"cuda"``, where decode is compiled, or ``"cpu"``, where all is eager.
    """

    batch: int
    prompt: int
    new_tokens: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one model.

    Attributes:
        name: of the model.
        compiled: the backend that compiled decode, or None: it ran eagerly.
        load_s: seconds of from_pretrained, with reading the files from disk or from the system's cache.
        model_bytes: parameters, buffers and packed tensors.
        read_bytes: of them, what a step of decode reads: all but an embedding of its own.
        compile_s: seconds that the first generate() took beyond a later one; where nothing is compiled, to warm up.
        generate_s: seconds of a later one, median.
        prefill_s: seconds from handing over the prompt to its first new token, median.
        step_s: seconds of a step of decode, median of all steps of all runs.
        tokens_per_s: new tokens of all sequences a second in such steps.
        load_peak_bytes, peak_bytes: most CUDA memory allocated while it was loaded and while it generated; None on
            the CPU.
    """

    name: str
    compiled: str | None
    load_s: float
    model_bytes: int
    read_bytes: int
    compile_s: float
    generate_s: float
    prefill_s: float
    step_s: float
    tokens_per_s: float
    load_peak_bytes: int | None
    peak_bytes: int | None

    @property
    def read_rate(self) -> float:
        """Bytes of weights read a second."""
        return self.read_bytes / self.step_s


class Clock:
    """A streamer for generate() that notes when each of its tokens is on the host; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        """Called by generate()."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by generate()."""


def measure(name: str, load: Callable[[], "PreTrainedModel"], work: Work, tell: Callable[[str], None]) -> Result:
    """Loads a model, lets it generate, and forgets it; ``tell`` is called with what is about to happen."""
    forget()
    _reset_peak(work)
    before = torch.cuda.memory_allocated() if work.device == "cuda" else 0
    tell(f"{name}: loading ...")
    start = _now(work)
    model = load()
    load_s, load_peak = _now(work) - start, _peak(work, before)
    tell(f"{name}: first generate(){', which compiles' if work.device == 'cuda' else ''} ...")
    tokens = prompt(model, work)
    first_s, _ = generate(model, tokens, work)
    _reset_peak(work)
    runs = []
    for run in range(RUNS):
        tell(f"{name}: generate(), {run + 1} of {RUNS} ...")
        runs.append(generate(model, tokens, work))
    generate_s = median(seconds for seconds, _ in runs)
    step_s = median(after - at for _, times in runs for at, after in pairwise(times[1:]))
    prefill_s, compile_s = median(times[1] - times[0] for _, times in runs), max(0.0, first_s - generate_s)
    seconds, peaks = (compile_s, generate_s, prefill_s, step_s), (load_peak, _peak(work, before))
    return Result(name, _backend(model), load_s, *bytes_of(model), *seconds, work.batch / step_s, *peaks)


def generate(model: "PreTrainedModel", tokens: Tensor, work: Work) -> tuple[float, list[float]]:
    """The seconds of one generate(), with a static cache where a model can have one, and when prompt and tokens passed.

    Each token is copied to the host as it comes; that adds no wait, since generate() asks after each step whether all
    sequences have ended.
    """
    clock = Clock()
    start = _now(work)
    model.generate(  # type: ignore[operator]
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=work.new_tokens,
        min_new_tokens=work.new_tokens,
        do_sample=False,
        # transformers says so of DeepSeek-V4, whose cache grows; decode is eager then
        cache_implementation="static" if getattr(model, "_can_compile_fullgraph", True) else None,
        disable_compile=work.device != "cuda",
        pad_token_id=0,
        streamer=clock,
    )
    seconds = _now(work) - start
    if len(clock.times) != 1 + work.new_tokens:
        raise RuntimeError(f"generate() gave {len(clock.times) - 1} tokens, expected {work.new_tokens}")
    return seconds, clock.times


def prompt(model: "PreTrainedModel", work: Work) -> Tensor:
    """Random tokens, the same for each model of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (work.batch, work.prompt), generator=generator).to(work.device)


def bytes_of(model: "PreTrainedModel") -> tuple[int, int]:
    """Bytes of the tensors of a model, each once, and of those that a step of decode reads."""
    total = sum(tensor.nbytes for tensor in held_tensors(model))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight: Any = getattr(embedding, "weight", None)
    shared = weight is None or weight is getattr(head, "weight", None)
    return total, total if shared else total - weight.nbytes


def forget() -> None:
    """Frees models and compiled code that nobody holds."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _backend(model: "PreTrainedModel") -> str | None:
    """What generate() has compiled the model by, or None."""
    if not hasattr(model, "_compiled_call"):
        return None
    config = getattr(model.generation_config, "compile_config", None)
    return str(config.backend) if config is not None else "inductor"


def _now(work: Work) -> float:
    if work.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(work: Work) -> None:
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(work: Work, before: int) -> int | None:
    return torch.cuda.max_memory_allocated() - before if work.device == "cuda" else None
