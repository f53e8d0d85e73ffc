"""Patterns match what they name, in bounded time whatever they are."""

import time

import pytest

from marlin_w4a16.checkpoints import names
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.names import LONGEST, MOST, REPEATS, Names

UP = "model.layers.0.mlp.up_proj"
SLOW = "re:(a|a)*$"  # 2**40 ways not to match
LONG = "a" * 40 + "!"


def error(*patterns: str, kind: str = "re", path: str = LONG) -> str:
    """Why some patterns are refused, in a second at most."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        Names(patterns, kind, "config.json: ignore").find(path)
    assert time.process_time() - start < 1
    said = str(caught.value)
    assert said.startswith("config.json: ignore: found ")
    return said.removeprefix("config.json: ignore: found ")


@pytest.mark.parametrize(
    "kind, patterns, path, found",
    [
        ("glob", ["*up*", "model*", "model.layers.0"], UP, "model.layers.0"),  # names, beginnings, others
        ("glob", ["*up*", "model*"], UP, "model*"), ("glob", ["*.x", "*up*", "*.up_proj"], UP, "*up*"),
        ("glob", ["model.layers.0.ml*", "model*"], UP, "model*"), ("glob", ["*"], UP, "*"), ("glob", [""], UP, None),
        ("glob", ["model.layers.[0-3].*"], UP, "model.layers.[0-3].*"), ("glob", ["layers.0"], UP, None),
        ("re", ["re:.*up", "re:model", UP], UP, UP), ("re", ["re:.*up", "re:model"], UP, "re:.*up"),
        ("re", ["model.layers.0", "model*", "re:layers", ""], UP, None), ("re", ["re:"], UP, "re:"),
        ("transformers", ["mlp", "up_proj"], UP, "up_proj"), ("transformers", ["mlp", ".*mlp"], UP, ".*mlp"),
        ("transformers", ["model.layers"], UP, "model.layers"), ("transformers", ["layers", "model.up"], UP, None),
    ],
)  # fmt: skip
def test_which_pattern_matches(kind, patterns, path, found):
    assert Names(patterns, kind, "x").find(path) == found


def test_a_name_is_exact():
    made = Names(["model.layers.0", UP, "model*"], "glob", "x")
    assert [made.exact(path) for path in (UP, f"{UP}.x", "model.layers.0.mlp", "model*")] == [UP, None, None, None]


def test_nothing_is_matched_by_no_pattern():
    assert Names((), "re", "x").find(UP) is None


def test_hundreds_of_thousands_of_names_are_looked_up():
    """A MIXED_PRECISION config of a mixture of experts names each linear; globs with a star at their end, too."""
    paths = [f"model.layers.{i // 1000}.experts.{i % 1000}.up" for i in range(300_000)]
    start = time.process_time()
    made = Names((path if i % 2 else f"{path}*" for i, path in enumerate(paths)), "glob", "x")
    assert all(made.find(path) is not None for path in paths[::100]) and made.find("model.layers.x") is None
    assert time.process_time() - start < 2  # 0.6


@pytest.mark.parametrize("pattern", [SLOW, "re:(?R)", "re:(a{0,9}){0,9}(a|a)*$"])
def test_a_pattern_that_takes_too_long(pattern):
    assert error(pattern).startswith(f"{pattern!r}, which takes too long to match {LONG!r}, expected ")


def test_a_pattern_that_python_would_match_for_years():
    start = time.process_time()
    for pattern in ("re:(a+)+$", "re:(.*)*x$", "re:(?:.*a){20}b", "re:^(([a-z])+.)+[A-Z]([a-z])+$"):
        assert Names([pattern], "re", "x").find(LONG) is None
    assert Names(["*a" * 400], "glob", "x").find(LONG * 10) is None
    assert time.process_time() - start < 1


def test_many_patterns_that_take_a_while_each(monkeypatch):
    monkeypatch.setattr(names, "SECONDS", 10)
    monkeypatch.setattr(names, "_GRACE", 0.05)
    assert "takes too long to match" in error(*(f"{SLOW}(?#{i})" for i in range(MOST)), path="a" * 12 + "!")


def test_many_quick_matches_may_take_longer(monkeypatch):
    monkeypatch.setattr(names, "_GRACE", 0.0)
    monkeypatch.setattr(names, "_EACH", 1.0)
    made = Names((f"re:x{i}" for i in range(MOST)), "re", "x")
    assert made.find(UP) is None


@pytest.mark.parametrize("kind, pattern", [("glob", "*{}*x"), ("re", "re:{}"), ("transformers", "{}")])
def test_more_patterns_than_are_matched(kind, pattern):
    every = [pattern.format(i) for i in range(MOST + 1)]
    assert error(*every, kind=kind) == f"{MOST + 1} patterns, expected at most {MOST} beside plain names"
    plain = [f"a.{i}" for i in range(MOST)] if kind != "transformers" else []
    assert Names([*every[1:], *plain, *every[1:]], kind, "x").find("b") is None  # each counts once


@pytest.mark.parametrize("kind, start", [("glob", "*a*"), ("re", "re:"), ("transformers", "")])
def test_a_pattern_that_is_too_long(kind, start):
    pattern = start + "a" * (LONGEST + 1 - len(start))
    found = f"a pattern of {LONGEST + 1} characters ({pattern[:40]!r}...), expected at most {LONGEST}"
    assert error(pattern, kind=kind) == found
    assert Names([pattern[:-1]], kind, "x").find("b") is None


@pytest.mark.parametrize(
    "pattern, times",
    [
        ("(?:a{1000}){1000}", 10**6), ("(?:(?:(?:a{100}){100}){100}){100}", 10**8), ("a{10001}", 10001),
        ("(?x)(?:a{10 0}){ 100 }", 10**4), ("(?:a{20,}){0,60}", 1200), ("a{99999999999}", 10**9 - 1),
    ],
)  # fmt: skip
def test_a_pattern_that_repeats_too_much(pattern, times):
    """regex writes it out before it matches anything."""
    expected = f"which may repeat a part {times} times, expected at most {REPEATS}"
    for kind, given in (("re", f"re:{pattern}"), ("transformers", pattern)):
        assert error(given, kind=kind) == f"{given!r}, {expected}"


@pytest.mark.parametrize(
    "pattern, path", [(r"re:.*\.\d{1,3}\.", "x.12.y"), ("re:a{1000}", "a" * 1000), ("re:(?:a{5}){2,}", "a" * 10)]
)
def test_a_pattern_that_repeats_less(pattern, path):
    assert Names([pattern], "re", "x").find(path) == pattern
    assert Names(["model.{1000}{1000}*x"], "glob", "x").find("model.{1000}{1000}.x") is not None


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "*", "a**b", "(?<n", "(?P<a>x", r"\8", r"\p{nosuch}", r"\N{nosuch}", r"\L<x>", "(?(1)a", "(?&x)",
     "a{1<=e<=9999999999}", "(?aL)x", "(" * 900, "[a" * 300],
)  # fmt: skip
def test_what_is_no_regular_expression(pattern):
    for kind, given in (("re", f"re:{pattern}"), ("transformers", pattern)):
        assert error(given, kind=kind).startswith(f"{given!r}, expected a regular expression: ")
