"""The benchmark of loading on the CPU: its parts are all there is, and both trees load the same checkpoint."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch) -> None:
    """What is timed is put back."""
    from marlin_w4a16.checkpoints.reader import Reader
    from marlin_w4a16.hf.loading import FP4Loading

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for owner, name in (
        (Reader, "stacked"),
        (FP4Loading, "_process_model_before_weight_loading"),
        (FP4Loading, "_process_model_after_weight_loading"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])


def test_the_parts_of_a_load_are_all_of_it(benchmark, tmp_path):
    loading = benchmark("loading")
    loading.write(tmp_path, "qwen3-30b-a3b", 1)
    found = loading.measure(tmp_path)
    assert all(found[part] > 0 for part in loading.PARTS)
    assert sum(found[part] for part in loading.PARTS[:-1]) == pytest.approx(found["in all"])
    assert found["held"] > 100_000 and found["peak"] == 0


def test_trees_take_turns_and_the_fastest_loads_are_shown(benchmark, tmp_path, monkeypatch):
    loading = benchmark("loading")
    turns, rows = [], []

    def measured(tree: Path, folder: Path) -> dict[str, float]:
        assert (folder / "config.json").is_file()
        turns.append(tree)
        return {**dict.fromkeys(loading.PARTS, 10.0 - len(turns)), "held": 2**20, "peak": 2**21}

    monkeypatch.setattr(loading, "measured", measured)
    table = type("Table", (), {"add_row": lambda self, *cells: rows.append(cells)})()
    trees = {"here": Path("a"), "against": Path("b")}
    loading.compare(tmp_path, "llama-8b", 1, trees, 2, table)
    assert turns == [Path("a"), Path("b")] * 2
    assert [(row[:4], row[-2:]) for row in rows] == [
        (("llama-8b", "1", "here", "7.00"), ("1", "2")), (("llama-8b", "1", "against", "6.00"), ("1", "2")),
    ]  # fmt: skip
