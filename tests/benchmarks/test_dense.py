"""The benchmarks' tables, bars, picture and checks, from made-up rows and on the CPU."""

import sys
from types import ModuleType

import pytest
import torch

SHAPE = {"format": "nvfp4", "n": 4096, "k": 4096}
PACKED = 9_500_000


@pytest.fixture
def dense(benchmark) -> ModuleType:
    return benchmark("dense")


@pytest.fixture
def peers(benchmark, monkeypatch) -> ModuleType:
    module = benchmark("peers")
    monkeypatch.setattr(module, "copies_for", lambda nbytes: 2)
    return module


def rows_of(m: int, shape=SHAPE, **us: float) -> list[dict]:
    common = {**shape, "m": m, "status": "ok", "error": 1e-3, "nbytes": PACKED}
    return [{**common, "peer": peer, "us": value, "rounds": [value] * 3} for peer, value in us.items()]


def test_a_case_that_reaches_its_bars_has_no_misses(dense):
    (case,) = dense.cases(rows_of(8, ours=7.0, cublas=13.0, humming=7.5))
    assert case.misses() == [] and case.ratio("humming") == pytest.approx(7.5 / 7)
    assert case.ratio("marlin") is None
    assert case.fraction == pytest.approx((1.8 + PACKED / 4.68e6) / 7)


@pytest.mark.parametrize(
    ("m", "shape", "us", "expected"),
    [
        (16, {}, {"ours": 7.6, "cublas": 13.0}, "7.6 us, bar 7.5 us"),
        (48, {}, {"ours": 9.1, "cublas": 13.0}, "9.1 us, bar 9 us"),
        (64, {}, {"ours": 8.0, "cublas": 7.9}, "0.988 of cublas, bar 1.0"),
        (1024, {}, {"ours": 100.0, "cublas": 96.0}, "0.960 of cublas, bar 0.97"),
        (1, {"n": 1024}, {"ours": 9.0, "cublas": 13.0, "humming": 10.0}, "1.111 of humming, bar 1.15"),
        (1, {"format": "mxfp4"}, {"ours": 9.0, "cublas": 13.0, "humming": 10.0}, "1.111 of humming, bar 1.15"),
    ],
)
def test_a_miss_is_listed(dense, m, shape, us, expected):
    (case,) = dense.cases(rows_of(m, {**SHAPE, **shape}, **us))
    (miss,) = case.misses()
    assert miss.startswith(f"{case.format} {case.n}x{case.k} M={m}: ")
    assert miss.endswith(expected)


def test_humming_sets_no_bar_at_large_m(dense):
    (case,) = dense.cases(rows_of(2048, ours=100.0, cublas=100.0, humming=90.0))
    assert case.misses() == []
    assert case.fraction == pytest.approx(2 * 2048 * 4096 * 4096 / 100e6 / 778)


def test_the_geomean_beyond_256_tokens_is_a_bar_of_its_own(dense):
    rows = [row for m in (512, 1024) for row in rows_of(m, ours=100.0, cublas=98.0)]
    (miss,) = dense.all_misses(dense.cases(rows))
    assert "geomean 0.980 of cublas" in miss
    assert dense.all_misses(dense.cases(rows + rows_of(2048, ours=100.0, cublas=120.0))) == []


def test_every_shape_has_a_bar_for_every_m_of_decode(dense):
    roofline = sys.modules["roofline"]
    assert all(len(bars) == len(roofline.BAR_TOKENS) for bars in roofline.BARS.values())
    assert roofline.BAR_TOKENS[-1] == roofline.DECODE and not set(roofline.BARS) & set(roofline.OTHER)


@pytest.mark.parametrize("rich", [True, False])
def test_report_shows_ratios_misses_and_what_was_wrong(dense, capsys, monkeypatch, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    rows = rows_of(16, ours=7.6, cublas=13.3) + rows_of(1024, ours=40.0, cublas=44.0)
    wrong = {"peer": "humming", "status": "wrong: relative error 2.0e-01", "error": 0.2}
    rows += [{**SHAPE, "m": m, **wrong} for m in (16, 1024)]
    dense.report(rows)
    text = capsys.readouterr().out
    assert "7.6!" in text and "1.75" in text
    assert "1.100" in text
    assert "humming nvfp4 4096x4096 M=16,1024: wrong: relative error 2.0e-01" in text
    assert "misses: 1\n  nvfp4 4096x4096 M=16: 7.6 us, bar 7.5 us" in text


def test_report_counts_ours_as_a_miss_where_it_was_not_timed(dense, capsys):
    dense.report([{**SHAPE, "m": 1, "peer": "ours", "status": "failed: RuntimeError: no"}])
    assert "misses: 1\n  ours nvfp4 4096x4096 M=1: failed: RuntimeError: no" in capsys.readouterr().out


def test_an_unknown_peer_is_named(dense, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dense.py", "--peers", "ours", "marlim"])
    with pytest.raises(SystemExit, match="found marlim, expected some of ours, cublas"):
        dense.chosen_peers(dense.arguments())


def test_the_picture_is_written(dense, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row for m in (1, 16, 512) for row in rows_of(m, ours=7.0 + m / 16, cublas=13.0 + m / 16)]
    rows += [{**SHAPE, "m": 1, "peer": "humming", "status": "failed: ImportError: no"}]
    dense.picture({"machine": {"device": "A GPU"}, "dtype": "bf16", "rows": rows}, str(tmp_path / "roof.svg"))
    text = (tmp_path / "roof.svg").read_text()
    assert "this project" in text and "4096 x 4096" in text


def test_a_run_without_times_has_no_picture(dense):
    rows = [{**SHAPE, "m": 1, "peer": "ours", "status": "failed: ImportError: no"}]
    with pytest.raises(SystemExit, match="nothing to draw"):
        dense.picture({"machine": {"device": "A GPU"}, "dtype": "bf16", "rows": rows}, "unused.svg")


def test_roofs(benchmark):
    roofline = benchmark("roofline")
    assert roofline.floor_us(4_680_000) == pytest.approx(2.8)
    assert roofline.tflops(1, 1000, 1000, 1.0) == pytest.approx(2.0)
    assert roofline.read_roof(1 << 20, 4096, 4096, PACKED) == 778


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_plain_and_dense_peers_agree_with_the_exact_product(peers, name):
    weight = peers.random_weight(48, 64, *peers.FORMATS[name], device="cpu")
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    exact = peers.exact_product(x, weight)
    prepared = peers.CuBLAS().prepare(weight, torch.bfloat16)
    assert (prepared.copies, prepared.nbytes) == (2, 48 * 64 * 2)
    factor, table = peers.global_scale(weight), torch.tensor(peers.E2M1_VALUES)
    scales = peers.scales_of(weight) if name == "nvfp4" else weight.scales
    plain = peers.plain_linear(x, weight.codes, scales, factor, table)
    for out in (prepared.call(1, x), plain):
        assert (out.double() - exact).norm() <= 6e-3 * exact.norm()


def test_every_peer_has_its_place_in_the_picture(peers, benchmark):
    drawn, names = benchmark("roofline"), [peer.name for peer in peers.peers([1])]
    assert list(drawn.NAMES) == list(drawn.COLOURS) == names and len(set(drawn.COLOURS.values())) == len(names)


def test_copies_are_apart(peers):
    packed = peers.pack(peers.random_weight(64, 64, "e4m3", 16, device="cpu"))
    first, second = peers.copies_of(packed)
    assert first.words.data_ptr() != second.words.data_ptr() != packed.words.data_ptr()
    assert torch.equal(first.unpack().codes, packed.unpack().codes)


def test_peers_of_one_global_scale_refuse_several(peers):
    weight = peers.random_weight(4, 16, "e4m3", 16, device="cpu")
    weight.multiplier[1] *= 2
    with pytest.raises(ValueError, match="expected one global scale"):
        peers.marlin_layer(weight, torch.bfloat16)


def test_only_peers_that_are_right_are_timed(dense, peers, monkeypatch):
    weight, x = peers.random_weight(16, 32, "e4m3", 16, device="cpu"), torch.randn(300, 32)
    right = peers.exact_product(x, weight).float()

    def fails(i, x):
        raise RuntimeError("no kernel\nfor this")

    calls = {"ours": lambda i, x: right, "cublas": lambda i, x: right * 1.1, "humming": fails}
    times = iter((3.0, 9.0, 4.0))
    monkeypatch.setattr(dense, "time_graph", lambda call, copies, repeats: (call(copies - 1), next(times))[1])
    found = dense.timed({peer: peers.Prepared(call, 4, 100) for peer, call in calls.items()}, x, weight, rounds=3)
    assert (found["ours"]["us"], found["ours"]["rounds"]) == (4.0, [3.0, 9.0, 4.0])
    assert found["cublas"]["status"] == "wrong: relative error 1.0e-01"
    assert found["humming"] == {"nbytes": 100, "status": "failed: RuntimeError: no kernel"}
    assert "us" not in found["cublas"]
