"""The examples run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_quickstart_replaces_every_linear_of_both_models():
    done = subprocess.run([sys.executable, EXAMPLES / "quickstart.py"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = re.findall(r"replaced (\d+) of (\d+) FP4 linears", done.stderr)
    assert len(compiled) >= 2 and all(done == all_ for done, all_ in compiled)
    assert done.stdout.count("times smaller") == 2
    by_modelopt = torch.__version__ >= "2.13" and not torch.cuda.is_available()
    assert done.stdout.count("prepare() frees the originals: swapped 14 of 15 linears") == by_modelopt


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def agreeing(text: str) -> int:
    """How many tokens were the same compiled; all, where the GPU's 16 bits leave the choice open."""
    same, total = map(int, re.search(r"before the first that differs: (\d+) of (\d+)", text).groups())
    return total if torch.cuda.is_available() else same


def test_a_tiny_gpt_oss_generates_the_same_compiled():
    done = run("gpt_oss.py", "--new-tokens", "6")
    assert "4 in whole mixtures: 2 of 8 experts" in done.stderr, done.stderr
    assert agreeing(done.stdout) == 6


@pytest.mark.parametrize("name", ["deepseek_v4", "nemotron_h"])
def test_other_tiny_checkpoints_are_loaded_and_generate(name):
    done = run(f"{name}.py", "--new-tokens", "4", TORCH_COMPILE_DISABLE="1")
    assert agreeing(done.stdout) == 4


@pytest.mark.gpu
def test_decode_in_a_cuda_graph_is_as_exact_as_eager_mode_at_every_batch_size():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "cuda_graph_decode.py"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"batch +(\d+): 48 tokens in .* relative error (\S+), eager mode (\S+)", done.stdout)
    assert [int(batch) for batch, *_ in lines] == [1, 4, 16]
    assert all(float(ours) <= 1.25 * float(theirs) < 0.1 for _, ours, theirs in lines)
