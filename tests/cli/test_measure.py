from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from checkpoints.models import FAMILIES
from marlin_w4a16 import PackedLinear, quantize
from marlin_w4a16.cli import measure
from marlin_w4a16.cli.measure import RUNS, Result, Work, bytes_of

WORK = Work(2, 6, 5, "bfloat16", "cpu")
STEPS = ["loading", "first generate()", *(f"generate(), {run + 1} of {RUNS}" for run in range(RUNS))]


class Clocked(nn.Module):
    """A model whose steps take times that the test sets: a tick for the cache, then one for each token."""

    def __init__(self, clock: SimpleNamespace, ticks: list[list[float]], tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.zeros(3))
        self.clock, self.ticks, self.calls = clock, iter(ticks), []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))
        self.generation_config = SimpleNamespace(compile_config=None)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def generate(self, tokens: Tensor, streamer, **choices) -> None:
        self.calls.append((tokens, choices))
        before, *ticks, after = next(self.ticks)
        self.clock.now += before
        streamer.put(tokens)
        for tick in ticks:
            self.clock.now += tick
            streamer.put(tokens[:, 0])
        streamer.end()
        self.clock.now += after


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


# before the prompt is handed over, prefill, four steps of decode, and after the last
TICKS = [
    [1.0, 500.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 20.0, 7.0, 3.0, 3.0, 3.0, 1.0], [1.0, 10.0, 9.0, 3.0, 4.0, 6.0, 1.0],
    [1.0, 40.0, 8.0, 3.0, 6.0, 7.0, 1.0],
]  # fmt: skip


def measured(clock, ticks=TICKS, **choices) -> tuple[Result, Clocked, list[str]]:
    model, told = Clocked(clock, ticks, **choices), []

    def load():
        clock.now += 12.0
        return model

    return measure.measure("it", load, WORK, told.append), model, told


def test_times_are_medians_of_later_runs(clock):
    result, _, told = measured(clock)
    assert result == Result("it", None, 12.0, 3212, 1612, 506.0 - 38.0, 38.0, 20.0, 5.0, 0.4, None, None)
    assert result.read_rate == 1612 / 5.0 and told == [f"it: {step} ..." for step in STEPS]


def test_warming_up_takes_no_negative_time(clock):
    assert measured(clock, [TICKS[1], *[TICKS[0]] * 3])[0].compile_s == 0.0


def test_every_run_is_the_same(clock):
    _, model, _ = measured(clock)
    assert len(model.calls) == 4
    tokens, choices = model.calls[0]
    assert tokens.shape == (2, 6) and int(tokens.max()) < 50 and len(tokens.unique()) > 6
    mask = choices.pop("attention_mask")
    assert mask.shape == tokens.shape and mask.all()
    assert choices == {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": "static",
        "disable_compile": True, "pad_token_id": 0,
    }  # fmt: skip
    assert all(torch.equal(other, tokens) for other, _ in model.calls)
    assert torch.equal(measured(clock)[1].calls[0][0], tokens)


def test_a_model_that_stops_early_is_not_measured(clock):
    with pytest.raises(RuntimeError, match="gave 3 tokens, expected 5"):
        measured(clock, [ticks[:5] for ticks in TICKS])


def test_what_compiled_it_is_told(clock):
    model = Clocked(clock, [])
    assert measure._backend(model) is None
    model._compiled_call = model.forward
    assert measure._backend(model) == "inductor"
    model.generation_config.compile_config = SimpleNamespace(backend="marlin_w4a16")
    assert measure._backend(model) == "marlin_w4a16"


def test_a_tied_embedding_is_read_in_each_step(clock):
    assert bytes_of(Clocked(clock, [])) == (3212, 1612)
    assert bytes_of(Clocked(clock, [], tied=True)) == (1612, 1612)
    assert bytes_of(FAMILIES["llama"]())[1] == bytes_of(FAMILIES["llama-tied"]())[1]


def test_packed_weights_are_counted():
    model = FAMILIES["llama"]()
    swaps, before = quantize(model, "nvfp4", progress=False).done, bytes_of(FAMILIES["llama"]())
    packed = sum(module.packed.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    assert len(swaps) > 2 and packed == sum(swap.after for swap in swaps)
    let_go = sum(swap.before - swap.after for swap in swaps)
    assert bytes_of(model) == (before[0] - let_go, before[1] - let_go)
