"""What the examples of checkpoints share: arguments, a prompt, timed generation, and the comparison of two runs."""

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")
for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoTokenizer, PreTrainedModel  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)


def arguments(doc: str) -> argparse.Namespace:
    """The command line; lines of the logger of this project are shown."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="a checkpoint: a folder, or a name on the hub (default: a tiny one)")
    parser.add_argument("--prompt", default="The four bits of a weight are")
    parser.add_argument("--new-tokens", type=int, default=64 if GPU else 16)
    logging.basicConfig(format="   %(name)s: %(message)s")
    logging.getLogger("marlin_w4a16").setLevel(logging.INFO)
    return parser.parse_args()


@contextmanager
def checkpoint(path: str | None, write_tiny: Callable[[Path], Path]) -> Iterator[str]:
    """The path, or a folder with a tiny random checkpoint for as long as it is used."""
    if path is not None:
        yield path
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        print("No checkpoint was given: a tiny one with random weights is made")
        yield str(write_tiny(Path(folder)))


def prompt(path: str | None, text: str, model: PreTrainedModel) -> Tensor:
    """The text in tokens, or random tokens for a checkpoint that has no tokenizer."""
    if path is None:
        tokens = torch.randint(model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    else:
        tokens = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    return tokens.to(model.device)


def generate(title: str, model: PreTrainedModel, tokens: Tensor, count: int, runs: int = 1, **options) -> list[int]:
    """Greedy tokens of the last run, which is timed; what an earlier one took beyond it is compilation."""
    chosen = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0, **options}
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **chosen)
        new = found[0, tokens.shape[1] :].tolist()
        seconds.append(time.perf_counter() - start)
    compiling = f", after compiling for {max(0.0, seconds[0] - seconds[-1]):.0f} s" if runs > 1 else ""
    print(f"{title}: {count / seconds[-1]:.1f} tokens a second with the prompt{compiling}")
    return new


@torch.no_grad()
def eager_then_compiled(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Generates eagerly, then with decode compiled, which needs a static cache."""
    tokens = prompt(args.path, args.prompt, model)
    eager = generate("eager", model, tokens, args.new_tokens)
    # The plugin has set this backend for decode with a static cache; on CPUs transformers compiles only if told so.
    model.generation_config.compile_config._compile_all_devices = True
    compiled = generate("compiled", model, tokens, args.new_tokens, runs=2, cache_implementation="static")
    compare(eager, compiled, args.path, model)


def compare(eager: list[int], compiled: list[int], path: str | None, model: PreTrainedModel) -> None:
    """In float32 all tokens must agree; in 16 bits two right programs round differently, and may part somewhere."""
    same = next((i for i, pair in enumerate(zip(eager, compiled, strict=True)) if pair[0] != pair[1]), len(eager))
    print(f"tokens that agree before the first that differs: {same} of {len(eager)}")
    print(compiled if path is None else AutoTokenizer.from_pretrained(path).decode(compiled))
    if model.dtype == torch.float32 and same < len(eager):
        raise SystemExit(f"the compiled model differs in float32: found {compiled}, expected {eager}")
