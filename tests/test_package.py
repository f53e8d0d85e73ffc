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


def test_every_folder_is_installed():
    """An editable install has them all, whatever is listed."""
    root = Path(__file__).parents[1]
    files = [path for place in ("src", "passes", "kernels", "fake_impls") for path in root.glob(f"{place}/**/*.py")]
    names = {".".join(path.parent.relative_to(root).parts).removeprefix("src.") for path in files}
    expected = {name if name.startswith("marlin_w4a16") else f"marlin_w4a16.{name}" for name in names}
    listed = re.search(r"^packages = \[(.*?)\]", (root / "pyproject.toml").read_text(), re.M | re.S)[1]
    assert {*re.findall('"(.*?)"', listed)} == expected


def test_runtime_dependencies_are_torch_and_triton():
    required = [r for r in metadata.requires("marlin-w4a16") or [] if "extra ==" not in r]
    assert {re.match(r"[\w.-]+", r)[0] for r in required} == {"torch", "triton"}
    assert all("platform_system" in r for r in required if r.startswith("triton"))
