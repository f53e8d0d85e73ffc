"""Configs that are not what their producers write: they are read, left, or refused by the name of what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from checkpoints import packed, packed_mlx
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.fp8 import Storage
from marlin_w4a16.checkpoints.registry import scheme_of
from marlin_w4a16.checkpoints.scheme import Mismatch

CONFIGS = {
    "quark": packed.quark()[0],
    "quark-nvfp4": packed.quark(e4m3=True)[0],
    "quark-rows": packed.quark(rows=8)[0],
    "auto-round": packed.auto_round()[0],
    "fp-quant": packed.fp_quant()[0],
    "torchao": packed.torchao()[0],
    "mlx": packed_mlx.mlx()[0],
}
ODD = [None, True, 0, 4, -1, 2.5, "x", "", [], ["x"], [1], [[]], {}, {"x": 1}, {"x": None}, {"x": {"x": []}}]


def places(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands."""
    entries = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in entries:
        if key != "quant_method":
            yield (*path, key)
            yield from places(value, (*path, key))


@pytest.mark.parametrize("name", CONFIGS)
def test_anything_may_stand_anywhere(name):
    for place in places(CONFIGS[name]):
        for odd in ODD:
            config = copy.deepcopy(CONFIGS[name])
            *way, last = place
            at = config
            for key in way:
                at = at[key]
            at[last] = copy.deepcopy(odd)
            try:
                scheme = scheme_of(config, {})
            except CheckpointError as error:
                assert str(error).startswith("config.json: quantization_config") and ", expected " in str(error)
            else:
                found = None if scheme is None else scheme.storage("model.layers.0.mlp.up_proj")
                assert found is None or isinstance(found, Storage | Mismatch)


@pytest.mark.parametrize(
    "name, entries, said",
    [
        ("quark", {"layer_quant_config": []}, "layer_quant_config: found '[]', expected an object"),
        ("quark", {"exclude": "lm_head"}, "exclude: found 'lm_head', expected a list of names"),
        ("quark", {"layer_quant_config": {"*": {"weight": 4}}}, "weight: found '4', expected an object"),
        ("auto-round", {"bits": "4"}, "bits: found '4', expected a whole number"),
        ("auto-round", {"extra_config": {"x": 1}}, "x: found '1', expected an object"),
        ("fp-quant", {"modules_to_not_convert": [1]}, "modules_to_not_convert: found '[1]', expected a list of names"),
    ],
)
def test_what_is_wrong_is_named(name, entries, said):
    with pytest.raises(CheckpointError) as raised:
        scheme_of(CONFIGS[name] | entries, {})
    assert str(raised.value) == f"config.json: quantization_config.{said}"
