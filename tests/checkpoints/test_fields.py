"""Entries of a config have their types, or an error names them."""

from collections.abc import Callable

import pytest

from checkpoints.headers import fields
from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.files import CheckpointError

AT = "config.json: quantization_config"
HELD = {
    "text": "NVFP4",
    "number": 16,
    "texts": ["a", "b"],
    "numbers": (128, 128),
    "fields": {"x": 1},
    "each": {"a": {}},
}


def read(made: Fields, method: str, name: str) -> object:
    """The value of an entry; of objects, what they hold."""
    found = getattr(made, method)(name)
    if isinstance(found, Fields):
        return found.values
    return {key: value.values for key, value in found.items()} if isinstance(found, dict) else found


@pytest.mark.parametrize(
    "method, nothing", [("text", None), ("number", None), ("texts", ()), ("numbers", ()), ("fields", {}), ("each", {})]
)
def test_an_entry(method, nothing):
    expected = tuple(HELD[method]) if isinstance(HELD[method], list) else HELD[method]
    assert read(fields(HELD), method, method) == expected
    for missing in ({}, {method: None}):
        assert read(fields(missing), method, method) == nothing and not fields(missing).has(method)
    assert fields(HELD).has(method)


@pytest.mark.parametrize("empty", ["", 0, [], {}, False])
def test_an_empty_entry_is_none(empty):
    assert not fields({"x": empty}).has("x")


@pytest.mark.parametrize(
    "read, values, said",
    [
        (lambda f: f.text("x"), 3, ".x: found 3, expected a string"),
        (lambda f: f.text("x"), ["a"], ".x: found a list, expected a string"),
        (lambda f: f.number("x"), "16", ".x: found '16', expected an integer"),
        (lambda f: f.number("x"), 16.0, ".x: found 16.0, expected an integer"),
        (lambda f: f.number("x"), True, ".x: found True, expected an integer"),
        (lambda f: f.texts("x"), "ab", ".x: found 'ab', expected a list of strings"),
        (lambda f: f.texts("x"), {"a": 1}, ".x: found an object, expected a list of strings"),
        (lambda f: f.texts("x"), ["a", None], ".x[1]: found null, expected a string"),
        (lambda f: f.numbers("x"), 128, ".x: found 128, expected a list of integers"),
        (lambda f: f.numbers("x"), [128, True], ".x: found a list, expected a list of integers"),
        (lambda f: f.fields("x"), [1], ".x: found a list, expected an object"),
        (lambda f: f.fields("x").number("y"), {"y": "a"}, ".x.y: found 'a', expected an integer"),
        (lambda f: f.fields("x").fields("y"), {"y": 4}, ".x.y: found 4, expected an object"),
        (lambda f: f.each("x"), {"a": {}, "b": None}, ".x.b: found null, expected an object"),
        (lambda f: f.each("x")["a"].text("y"), {"a": {"y": {}}}, ".x.a.y: found an object, expected a string"),
        (lambda f: f.text("x"), 10**200, f".x: found {10**99}, expected a string"),
    ],
)  # fmt: skip
def test_an_entry_of_another_type(read: Callable[[Fields], object], values: object, said: str):
    with pytest.raises(CheckpointError) as caught:
        read(fields({"x": values}))
    assert str(caught.value) == f"{AT}{said}"


@pytest.mark.parametrize("values, shown", [(None, "null"), ([], "a list"), ("NVFP4", "'NVFP4'"), (4, "4")])
def test_what_is_no_object(values, shown):
    with pytest.raises(CheckpointError) as caught:
        Fields(values, "hf_quant_config.json")
    assert str(caught.value) == f"hf_quant_config.json: found {shown}, expected an object"
