"""Equal problems of many tensors are one line."""

from marlin_w4a16.checkpoints.layers import Problem
from marlin_w4a16.report.problems import problem_lines, told

MANY = [Problem(f"{i}.safetensors", f"layers.{i}.up.weight_scale", "U8", "F8_E4M3") for i in range(3)]


def test_equal_problems_are_one_line():
    assert list(problem_lines(MANY)) == ["layers.{0..2}.up.weight_scale: found U8, expected F8_E4M3 (3 times)"]
    assert list(problem_lines(MANY[:1])) == ["0.safetensors: layers.0.up.weight_scale: found U8, expected F8_E4M3"]
    one_file = [Problem("x", problem.tensor, problem.found, problem.expected) for problem in MANY]
    assert list(problem_lines(one_file)) == ["x: layers.{0..2}.up.weight_scale: found U8, expected F8_E4M3 (3 times)"]


def test_others_are_not():
    other, shorter = Problem("0.x", "layers.4.up.weight_scale", "I8", "F8_E4M3"), Problem(None, "a", "b", "c")
    assert [*problem_lines([*MANY, other, shorter])][1:] == [str(other), str(shorter)]


def test_twenty_lines_are_told():
    every = [Problem(None, f"a{chr(i)}", "b", "c") for i in range(ord("A"), ord("A") + 23)]
    first, *lines = told("folder", every).split("\n")
    assert first == "folder cannot be loaded:"
    assert lines == [*(f"  {problem}" for problem in every[:20]), "  and 3 more"]
    assert told("folder", MANY).split("\n")[1:] == [f"  {line}" for line in problem_lines(MANY)]
