"""The examples run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from narrow import wide

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*names: str, arguments: tuple[str, ...] = (), before: str = "", **environment: str) -> CompletedProcess:
    """Runs examples one after the other in a fresh process."""
    code = f"import runpy, sys; {before}"
    for name in names:
        path = str(EXAMPLES / f"{name}.py")
        code += f"\nsys.argv = {[path, *arguments]}; runpy.run_path({path!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(EXAMPLES), *sys.path)), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# what stands in the place of Inductor
INSTEAD = "import marlin_w4a16.backend as backend; backend.compile_graph = lambda gm, *_: gm.forward"
WITHOUT_MODELOPT = "sys.modules['modelopt'] = None"  # whose modules take Dynamo longest


def agreeing(text: str) -> list[int]:
    """How many tokens of each run were the same compiled; all, where the GPU's 16 bits leave the choice open."""
    found = re.findall(r"before the first that differs: (\d+) of (\d+)", text)
    return [int(total if torch.cuda.is_available() else same) for same, total in found]


@pytest.mark.parametrize(
    "before", [pytest.param(f"{INSTEAD}; {WITHOUT_MODELOPT}", id="not compiled"), wide("", id="compiled")]
)
def test_the_demo(before):
    """The quickstart replaces every linear of both models, and a tiny gpt-oss generates the same."""
    done = run("quickstart", "gpt_oss", arguments=("--new-tokens", "6"), before=before)
    compiled = re.findall(r"replaced (\d+) of (\d+) FP4 linears", done.stderr)
    assert len(compiled) >= 2 and all(done == all_ for done, all_ in compiled)
    assert done.stdout.count("times smaller") == 2
    by_modelopt = torch.__version__ >= "2.13" and WITHOUT_MODELOPT not in before and not torch.cuda.is_available()
    assert done.stdout.count("prepare() frees the originals: swapped 14 of 15 linears") == by_modelopt
    assert "4 in whole mixtures: 2 of 8 experts" in done.stderr, done.stderr
    assert agreeing(done.stdout) == [6]


def test_other_tiny_checkpoints_are_loaded_and_generate():
    done = run("deepseek_v4", "nemotron_h", arguments=("--new-tokens", "4"), TORCH_COMPILE_DISABLE="1")
    assert agreeing(done.stdout) == [4, 4]


@pytest.mark.gpu
def test_decode_in_a_cuda_graph_is_as_exact_as_eager_mode_at_every_batch_size():
    done = run("cuda_graph_decode")
    lines = re.findall(r"batch +(\d+): 48 tokens in .* relative error (\S+), eager mode (\S+)", done.stdout)
    assert [int(batch) for batch, *_ in lines] == [1, 4, 16]
    assert all(float(ours) <= 1.25 * float(theirs) < 0.1 for _, ours, theirs in lines)
