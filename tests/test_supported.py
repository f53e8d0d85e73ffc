"""docs/supported.md says what the code and its tests say."""

import subprocess
import sys
from pathlib import Path

from programs.document import COMMAND, FILE, text

TESTS = Path(__file__).parent
PRODUCERS = ("modelopt", "torchao", "compressed_tensors", "transformers")


def test_the_file_is_what_the_code_says():
    assert FILE.read_text() == text(), f"docs/supported.md is stale: run {COMMAND}"


def test_it_is_written_without_the_packages_of_producers():
    """A machine that lacks one writes the same file."""
    code = "import sys; from programs.document import text; text(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True, check=True)
    assert not set(PRODUCERS) & set(done.stdout.split())
