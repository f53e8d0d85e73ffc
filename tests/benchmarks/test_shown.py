"""What the benchmarks of linears and of mixtures do without a GPU: they show a run that was written."""

import json
import sys

import pytest
import torch

RUN = {"format": "nvfp4", "status": "ok", "error": 1e-3, "rounds": [60.0] * 3}
ROWS = {
    "dense": [RUN | {"n": 4096, "k": 4096, "m": 1, "nbytes": 9_500_000, "peer": peer, "us": us}
              for peer, us in (("ours", 6.0), ("cublas", 12.0))],
    "moe": [RUN | {"model": "gpt-oss-20b", "tokens": 1, "floor_us": 16.0, "peer": peer, "us": us}
            for peer, us in (("ours", 60.0), ("grouped_mm", 120.0))],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_written_run_is_shown_without_a_gpu(name, benchmark, tmp_path, capsys, monkeypatch):
    module, file = benchmark(name), tmp_path / "run.json"
    result = {"machine": {"device": "A GPU"}, "dtype": "bf16", "absent": {}, "rows": ROWS[name]}
    module.write(result, str(file))
    assert json.loads(file.read_text()) == result
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--from", str(file)])
    module.main()
    text = capsys.readouterr().out
    assert text.startswith("A GPU, bf16") and "2.00" in text


@pytest.mark.parametrize("name", ROWS)
def test_without_a_gpu_the_command_says_so(name, benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        benchmark(name).main()
