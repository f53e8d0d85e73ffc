"""Which linears a scheme names, and which it leaves."""

import pytest

from marlin_w4a16.checkpoints import modelopt
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.scheme import LINEAR, Mismatch, Scheme

FIRST, SECOND, THIRD = (Mismatch(found, "another") for found in ("first", "second", "third"))
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def scheme(targets, ignore=(), patterns="glob") -> Scheme:
    return Scheme("ModelOpt", "NVFP4", targets, tuple(ignore), patterns)


@pytest.mark.parametrize(
    "pattern, patterns, matches, others",
    [
        (Q, "glob", [Q, f"{Q}.weight_quantizer"], [UP, f"{Q}2", f"{Q[:-1]}", f"x.{Q}"]),
        ("model.layers.1", "glob", [Q, UP, "model.layers.1"], ["model.layers.10.mlp.up_proj", "layers.1"]),
        ("model.layers.1.self_attn*", "glob", [Q, "model.layers.1.self_attn"], [UP, "model.layers.10.self_attn"]),
        ("*self_attn*", "glob", [Q], [UP]),
        ("model.layers.?.mlp.*", "glob", [UP], [Q, "model.layers.10.mlp.up_proj"]),
        ("lm_head", "glob", ["lm_head"], ["model.lm_head", "lm_head2", "LM_head"]),
        ("re:.*self_attn.*", "glob", [], [Q]),
        (Q, "re", [Q], [f"{Q}.weight_quantizer", f"{Q}2", UP]),
        ("model.layers.1*", "re", ["model.layers.1*"], [Q]),
        ("re:.*self_attn.*", "re", [Q], [UP]),
        ("re:model.layers.1", "re", [Q, "model.layers.10.mlp.up_proj"], [f"x.{Q}"]),  # anchored at its start only
        ("re:self_attn", "re", [], [Q]),
        ("re:.*proj$", "re", [Q, UP], [f"{Q}.weight"]),
        (".*self_attn.*", "re", [], [Q]),
    ],
)
def test_a_pattern(pattern, patterns, matches, others):
    targeted, ignoring = scheme({pattern: FIRST}, patterns=patterns), scheme({LINEAR: FIRST}, [pattern], patterns)
    for path in matches:
        assert targeted.storage(path) is FIRST
        assert ignoring.storage(path) is None and ignoring.ignored_by(path) == pattern
    for path in others:
        assert targeted.storage(path) is None
        assert ignoring.storage(path) is FIRST and ignoring.ignored_by(path) is None


@pytest.mark.parametrize("patterns", ["glob", "re"])
def test_linear_is_every_path(patterns):
    assert scheme({LINEAR: FIRST}, patterns=patterns).storage(Q) is FIRST


@pytest.mark.parametrize("patterns, mlp, every", [("glob", "*.mlp.*", "*_proj"), ("re", "re:.*mlp", "re:.*_proj")])
def test_a_path_goes_before_patterns_and_these_in_order(patterns, mlp, every):
    made = scheme({mlp: FIRST, every: SECOND, LINEAR: THIRD, UP: None}, patterns=patterns)
    paths = (UP, "model.layers.0.mlp.up_proj", Q, "lm_head")
    assert [made.storage(path) for path in paths] == [None, FIRST, SECOND, THIRD]


@pytest.mark.parametrize("patterns, some", [("glob", "*.self_attn.*"), ("re", "re:.*self_attn")])
def test_what_is_ignored_goes_before_patterns_and_after_names(patterns, some):
    for ignored in (Q, some):
        assert scheme({some: FIRST, LINEAR: SECOND}, ["lm_head", ignored], patterns).storage(Q) is None
        assert scheme({Q: FIRST, LINEAR: SECOND}, ["lm_head", ignored], patterns).storage(Q) is FIRST
    assert scheme({}).storage(Q) is None


def test_what_is_left_to_someone_else():
    made = scheme({"*.mlp.*": FIRST, Q: None, "x.*": None}, ["x.y"])
    assert [made.left(path) for path in (UP, Q, "x.z", "x.y", "lm_head")] == [False, True, True, False, False]
    every = scheme({"*.mlp.*": FIRST, LINEAR: None}, ["lm_head"])
    assert [every.left(path) for path in (UP, Q, "lm_head")] == [False, True, False]
    assert made.shares and every.shares and not scheme({LINEAR: FIRST}).shares


def test_how_weights_are_stored_of_which_the_config_does_not_say_it():
    nvfp4, mxfp4, fp8 = (modelopt.storage(name) for name in ("NVFP4", "MXFP4", "FP8"))
    made = Scheme("x", "y", {"a": fp8, "b": FIRST, "c": None, "d": nvfp4, "e": fp8}, known=(mxfp4, nvfp4))
    assert made.storages == (fp8, nvfp4, mxfp4)


@pytest.mark.parametrize(
    "name, joined, path, leaf",
    [
        (f"{UP}.weight", (), UP, "weight"), ("weight", (), "", "weight"), ("", (), "", ""),
        (f"{UP}_scales", (), *f"{UP}_scales".rsplit(".", 1)), (f"{UP}_scales", ("blocks", "scales"), UP, "scales"),
        (f"{UP}_blocks", ("blocks", "scales"), UP, "blocks"),
        (f"{UP}_bias", ("blocks", "scales"), *f"{UP}_bias".rsplit(".", 1)),
        (f"{UP}.weight", ("blocks", "scales"), UP, "weight"),
        (f"{UP}.quantizer._a", ("scales",), UP, "quantizer._a"), (f"{UP}._a", (), UP, "_a"),
        (f"{UP}scales", ("scales",), *f"{UP}scales".rsplit(".", 1)), ("up_scales", ("scales",), "up", "scales"),
    ],
)  # fmt: skip
def test_a_name_is_a_path_and_a_leaf(name, joined, path, leaf):
    assert Scheme("OpenAI", "MXFP4", {}, joined=joined, nested=("quantizer._a",)).split(name) == (path, leaf)


def test_patterns_that_cannot_be_matched_are_named_with_their_place():
    for targets, ignore, what in (({"re:(": FIRST}, (), "what is quantised"), ({}, ("re:(",), "what is ignored")):
        where = "^config.json: quantization_config"
        with pytest.raises(CheckpointError, match=rf"{where}: {what}: found 're:\(', expected a regular"):
            scheme(targets, ignore, "re")
