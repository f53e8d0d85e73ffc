"""What documents say of files is true: docs/files.md is what the files say, and every file that is named is there."""

import re

import pytest
from house import COMMAND, FILE, PACKAGE, ROOMS, ROOT, files_of, text

DOCUMENTS = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]
PLACES = ("", f"{PACKAGE}/", "tests/", "docs/")


def test_the_table_of_files_is_what_they_say():
    assert FILE.read_text() == text(), f"docs/files.md is stale: run {COMMAND}"


def test_every_folder_has_a_place():
    roots = (ROOT / "passes", ROOT / "fake_impls", ROOT / "kernels", ROOT / PACKAGE)
    folders = {file.parent.relative_to(ROOT).as_posix() for root in roots for file in root.rglob("*.py")}
    links = {f"{PACKAGE}/{name}" for name in ("passes", "fake_impls", "kernels")}
    assert {folder for folder in folders if not folder.startswith(tuple(links))} == set(ROOMS)


def test_every_file_says_what_it_is():
    assert [f for room in ROOMS for f in (ROOT / room).glob("*.py") if f not in set(files_of(room))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_files_that_are_named_are_there(document):
    named = set(re.findall(r"(?<![\w/.-])((?:[\w-]+/)+[\w-]+\.py)\b", document.read_text()))
    assert [name for name in sorted(named) if not any((ROOT / place / name).exists() for place in PLACES)] == []
