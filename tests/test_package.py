import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def test_the_entry_point_names_the_backend():
    found = {e.value for e in metadata.entry_points(group="torch_dynamo_backends", name="marlin_w4a16")}
    assert found == {"marlin_w4a16.backend:marlin_w4a16"}


def test_dynamo_lists_the_backend_without_importing_it(tmp_path: Path):
    code = """
import sys
import torch._dynamo
print("marlin_w4a16" in torch._dynamo.list_backends(), "marlin_w4a16" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "False"], run.stderr


def test_runtime_dependencies_are_torch_and_triton():
    required = [r for r in metadata.requires("marlin-w4a16") or [] if "extra ==" not in r]
    assert {re.match(r"[\w.-]+", r)[0] for r in required} == {"torch", "triton"}
    assert all("platform_system" in r for r in required if r.startswith("triton"))
