"""The benchmark of mixtures: its tables and misses from made-up rows, its peers and checks on the CPU."""

import pytest
import torch

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.blocks.experts import moe_by_blocks

SWIGLU = Activation("silu", True, 1.702, 7.0, 7.0, 1.0)


@pytest.fixture
def moe(benchmark):
    return benchmark("moe")


@pytest.fixture
def small(benchmark, moe, monkeypatch):
    """Small models, ours on the CPU, and times that are made up."""
    peers, mixture = benchmark("expert_peers"), benchmark("expert_models").Mixture
    models = {
        "clamped": mixture(4, 2, 64, 32, SWIGLU, "interleaved", True),
        "gated": mixture(8, 3, 32, 96, Activation(), "gate_up"),
        "plain": mixture(5, 2, 64, 64, Activation("relu2", False), None),
    }
    monkeypatch.setattr(moe, "MODELS", models)
    monkeypatch.setattr(peers, "copies_for", lambda nbytes: 2)
    monkeypatch.setattr(peers, "moe", moe_by_blocks)
    monkeypatch.setattr(moe, "time_graph", lambda call, copies, repeats: (call(copies - 1), 3.0)[1])
    return models


def rows_of(tokens: int, model: str = "gpt-oss-20b", **us: float) -> list[dict]:
    place = {"format": "nvfp4", "model": model, "tokens": tokens, "status": "ok", "error": 1e-3, "floor_us": 16.0}
    return [{**place, "peer": peer, "us": value, "rounds": [value] * 2} for peer, value in us.items()]


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("model", ["clamped", "gated", "plain"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_ours_and_the_dense_experts_agree_with_the_exact_mixture(name, model, dtype, moe, small, benchmark):
    peers = benchmark("expert_peers")
    some = [peers.Ours(), peers.GroupedMM()] if dtype == "bf16" else [peers.Ours()]  # as grouped_mm is on the CPU
    rows = moe.measure(model, name, (1, 11), dtype, some, rounds=2, device="cpu")
    assert [(row["peer"], row["tokens"]) for row in rows] == [(peer.name, t) for t in (1, 11) for peer in some]
    for row in rows:
        assert row["status"] == "ok", row
        assert (row["us"], row["rounds"]) == (3.0, [3.0, 3.0]) and row["floor_us"] > 1.8


def test_the_floor_is_that_of_the_experts_touched(moe, small, benchmark):
    peers, models = benchmark("expert_peers"), benchmark("expert_models")
    weights = models.draw(small["gated"], "nvfp4", torch.bfloat16, "cpu")
    routing = models.choose(1, small["gated"], torch.bfloat16, "cpu")
    assert routing.touched == 3 and routing.weights.float().sum() == pytest.approx(1, abs=1e-2)
    ready = peers.Ours().prepare(weights, [routing])
    x = torch.randn(1, 32, dtype=torch.bfloat16)
    found = moe.timed({"ours": ready}, x, routing, weights, {"ours": 1.0}, 1)["ours"]
    assert found["floor_us"] == pytest.approx(1.8 + ready.nbytes * 3 / 8 / 4.68e6, rel=1e-3)


def test_what_is_wrong_or_fails_is_not_timed(moe, small, benchmark):
    peers, models = benchmark("expert_peers"), benchmark("expert_models")
    weights = models.draw(small["gated"], "nvfp4", torch.bfloat16, "cpu")
    routing = models.choose(20, small["gated"], torch.bfloat16, "cpu")
    x = torch.randn(20, 32, dtype=torch.bfloat16)
    right = models.exact(x, weights, routing)

    def fails(i, x, routing):
        raise RuntimeError("no kernel\nfor this")

    calls = {"ours": lambda i, x, r: right, "grouped_mm": lambda i, x, r: right * 1.1, "humming": fails}
    ready = {peer: peers.Ready(call, 2, 100) for peer, call in calls.items()}
    found = moe.timed(ready, x, routing, weights, dict.fromkeys(ready, 1e-2), rounds=3)
    assert found["ours"]["us"] == 3.0
    assert found["grouped_mm"]["status"] == "wrong: relative error 1.0e-01"
    assert found["humming"]["status"] == "failed: RuntimeError: no kernel"
    assert "us" not in found["grouped_mm"]


def test_a_peer_that_cannot_be_prepared_has_a_row_for_every_number_of_tokens(moe, small, benchmark, monkeypatch):
    peers = benchmark("expert_peers")

    def fails(weights, routings):
        raise ImportError("no humming")

    humming = peers.Humming()
    monkeypatch.setattr(humming, "prepare", fails)
    rows = moe.measure("plain", "nvfp4", (1, 4), "bf16", [humming], 1, device="cpu")
    assert [(row["tokens"], row["status"]) for row in rows] == [(t, "failed: ImportError: no humming") for t in (1, 4)]


def test_report_shows_ratios_floors_misses_and_what_was_wrong(moe, capsys):
    rows = rows_of(1, ours=50.0, grouped_mm=132.0) + rows_of(64, ours=109.0, grouped_mm=216.0)
    rows += rows_of(1024, ours=900.0, grouped_mm=850.0)
    rows.append({**rows[0], "peer": "humming", "status": "wrong: relative error 2.0e-01"})
    moe.report(rows)
    text = capsys.readouterr().out
    assert "50.0 (16.0)" in text and "2.64" in text
    assert "0.94" in text
    assert "humming nvfp4 gpt-oss-20b T=1: wrong: relative error 2.0e-01" in text
    assert "up to T=64: 1 of 2\n  nvfp4 gpt-oss-20b T=64: 1.98 times as fast as grouped_mm, bar 2.0" in text
