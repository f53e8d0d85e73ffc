"""Quantisation configs of compressed-tensors, as it and its users spell them."""

import itertools

import pytest

from checkpoints.headers import fields
from marlin_w4a16.checkpoints import compressed_tensors
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.scheme import Mismatch
from marlin_w4a16.checkpoints.storage import Activations, FP4Storage

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
NVFP4, MXFP4, FP8, MIXED = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized", "mixed-precision"
CODES = ("weight_packed", "codes", ("U8",), ("n", "k/2"), False)
TENSORS = {
    NVFP4: [
        CODES,
        ("weight_scale", "scales", ("F8_E4M3",), ("n", "k/g"), False),
        ("weight_global_scale", "divisor", ("F32", "BF16", "F16"), (), False),
        ("input_global_scale", "input divisor", ("F32", "BF16", "F16"), (), True),
    ],
    MXFP4: [CODES, ("weight_scale", "scales", ("U8", "F8_E8M0"), ("n", "k/g"), False)],
}
TOLD = "compressed-tensors quantises the inputs to {} bit {}"


def args(group: int | None, bits: int = 4, kind: str = "float", **more) -> dict:
    return {"dynamic": False, "group_size": group, "num_bits": bits, "symmetric": True, "type": kind, **more}


def group(group_format: str | None, weights: dict, *targets: str, **more) -> dict:
    empty = {"input_activations": None, "output_activations": None}
    return {"format": group_format, **empty, "targets": list(targets) or ["Linear"], "weights": weights, **more}


def config(top: str | None, *groups: dict, **more) -> dict:
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    given = {"ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors"}
    return {"config_groups": named, "format": top, **given, **more}


def storage(values: dict, path: str = Q):
    return compressed_tensors.scheme(fields(values)).storage(path)


@pytest.mark.parametrize("top, own", [(NVFP4, NVFP4), (NVFP4, None), (None, NVFP4), (MIXED, NVFP4)])
@pytest.mark.parametrize("name, size, kind", [(NVFP4, 16, "e4m3"), (MXFP4, 32, "e8m0")])
def test_a_format_of_the_group_or_of_the_whole(name, size, kind, top, own):
    top, own = (name if spelling == NVFP4 else spelling for spelling in (top, own))
    values = config(top, group(own, args(size)))
    assert compressed_tensors.is_fp4(fields(values)) and compressed_tensors.fp4_groups(fields(values)) == {"group_0"}
    scheme = compressed_tensors.scheme(fields(values))
    assert (scheme.producer, scheme.algorithm, scheme.notes) == ("compressed-tensors", name, ())
    found = scheme.storage(Q)
    assert isinstance(found, FP4Storage) and found.label == f"compressed-tensors {name}"
    assert (found.kind, found.groups, found.activations) == (kind, (size,), None)
    assert [(p.leaf, p.role, p.dtypes, p.shape, p.optional) for p in found.parts] == TENSORS[name]
    assert scheme.storage("lm_head") is None


@pytest.mark.parametrize(
    "inputs, expected",
    [
        (None, None), ({}, None),
        (args(16, dynamic="local"), Activations(f"{TOLD.format(4, 'float')} (W4A4)", "e4m3", 16)),
        (args(32, dynamic=True), Activations(f"{TOLD.format(4, 'float')} (W4A4)", "e8m0", 32)),
        (args(128, 8, dynamic=True), Activations(TOLD.format(8, "float"))),
        (args(16, 8), Activations(TOLD.format(8, "float"))), (args(16, 4, "int"), Activations(TOLD.format(4, "int"))),
        (args(64), Activations(TOLD.format(4, "float"))), (args(None, 8), Activations(TOLD.format(8, "float"))),
    ],
)  # fmt: skip
def test_inputs(inputs, expected):
    assert storage(config(NVFP4, group(NVFP4, args(16), input_activations=inputs))).activations == expected


MLP, ATTENTION, ALL = "re:.*mlp.*_proj$", "re:.*self_attn.*_proj$", "Linear"


@pytest.mark.parametrize("top", [MIXED, FP8])
def test_groups_of_several_formats(top):
    values = config(top, group(FP8, args(None, 8), ATTENTION), group(NVFP4, args(16), MLP), group(MXFP4, args(32), "o"))
    assert compressed_tensors.is_fp4(fields(values))
    assert compressed_tensors.fp4_groups(fields(values)) == {"group_1", "group_2"}
    scheme = compressed_tensors.scheme(fields(values))
    assert scheme.algorithm == f"{FP8} + {NVFP4} + {MXFP4}"
    assert [getattr(scheme.storage(path), "kind", None) for path in (Q, UP, "o", "x")] == [None, "e4m3", "e8m0", None]


def test_groups_that_name_no_format():
    """As a config is that was saved as its user gave it: the group size tells."""
    others = [group(None, args(None, 8), "a"), group(None, args(16, kind="int"), "b"), group(None, args(64), "c")]
    values = config(MIXED, group(None, args(16), MLP), group(None, args(32), ATTENTION), *others)
    assert compressed_tensors.fp4_groups(fields(values)) == {"group_0", "group_1"}
    kinds = [getattr(storage(values, path), "kind", None) for path in (UP, Q, "a", "b", "c")]
    assert kinds == ["e4m3", "e8m0", None, None, None]


PRIORITY = [(Q, 16), ("re:.*attn", 32), ("re:.*q_proj", None), (ALL, 64)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_names_go_before_patterns_and_these_before_classes(order):
    """Whichever group they stand in; patterns in alphabetical order (compressed_tensors.utils.match_targets)."""
    groups = [group(NVFP4 if size else FP8, args(size), target) for target, size in PRIORITY]
    scheme = compressed_tensors.scheme(fields(config(MIXED, *(groups[i] for i in order))))
    paths = (Q, "model.self_attn.k_proj", "model.q_proj", "model.up_proj")
    found = [scheme.storage(path) for path in paths]
    assert isinstance(found[0], FP4Storage) and found[2] is None
    assert [found[i].found for i in (1, 3)] == [f"{NVFP4} with group_size 32", f"{NVFP4} with group_size 64"]


def test_order_is_that_of_compressed_tensors():
    from compressed_tensors.utils.match import match_targets
    from torch import nn

    targets = ["Linear", "re:.*z", "re:.*q_proj", Q, "re:.*attn"]
    expected = match_targets(Q, nn.Linear(1, 1), targets)
    groups = [group(FP8, args(None, 8), target) for target in targets]
    assert expected == [Q, "re:.*attn", "re:.*q_proj", "Linear"]
    assert [t for t in compressed_tensors.scheme(fields(config(FP8, *groups))).targets if t != "re:.*z"] == expected


def test_a_target_of_several_groups_belongs_to_the_last():
    assert storage(config(MIXED, group(NVFP4, args(16), ALL), group(MXFP4, args(32), ALL))).kind == "e8m0"


@pytest.mark.parametrize(
    "ignore, dense",
    [
        (["lm_head", "re:.*self_attn.*"], {Q, "lm_head"}), (["lm_head", Q], {Q, "lm_head"}),
        (["re:lm", "re:self_attn"], {"lm_head"}), ([], set()), (None, set()),
    ],
)  # fmt: skip
def test_ignored(ignore, dense):
    values = config(NVFP4, group(NVFP4, args(16)), ignore=ignore)
    assert {path for path in (Q, UP, "lm_head") if storage(values, path) is None} == dense


def test_targets_that_are_names_or_other_classes():
    values = config(NVFP4, group(NVFP4, args(16), UP, "Embedding"), ignore=[])
    assert [storage(values, path) is None for path in (UP, Q, "model.embed_tokens")] == [False, True, True]


@pytest.mark.parametrize("name, size", [(NVFP4, 32), (NVFP4, 64), (MXFP4, 16), (MXFP4, 128)])
def test_a_group_size_that_does_not_belong(name, size):
    found = storage(config(name, group(name, args(size))))
    assert found == Mismatch(f"{name} with group_size {size}", f"group_size {32 if name == MXFP4 else 16}")


def test_a_group_size_that_is_not_said():
    for weights in (None, {"num_bits": 4}, args(None)):
        assert storage(config(NVFP4, group(NVFP4, weights))).groups == (16,)


def test_quantised_outputs():
    found = storage(config(NVFP4, group(NVFP4, args(16), output_activations=args(16))))
    assert found == Mismatch(f"{NVFP4} with quantised outputs", "none")


def test_a_quantised_cache_is_noted():
    values = config(NVFP4, group(NVFP4, args(16)), kv_cache_scheme=args(None, 8))
    (note,) = compressed_tensors.scheme(fields(values)).notes
    assert note == "its key/value cache was quantised; it is kept in 16 bits, its scales are not read"


@pytest.mark.parametrize(
    "values",
    [
        {}, config(FP8), config(FP8, group(FP8, args(None, 8))),
        config("pack-quantized", group(None, args(16, kind="int"))), config(MIXED, group(None, None)),
        config(None, group(None, args(16))), {"config_groups": {"FP8": [ALL]}, "format": NVFP4},
    ],
)  # fmt: skip
def test_nothing_is_fp4(values):
    assert not compressed_tensors.is_fp4(fields(values)) and compressed_tensors.fp4_groups(fields(values)) == set()
    assert compressed_tensors.scheme(fields(values)).storage(Q) is None


def test_a_format_alone_says_it_of_all_linears():
    values = config(NVFP4)
    assert compressed_tensors.is_fp4(fields(values)) and not compressed_tensors.fp4_groups(fields(values))
    found = storage(values)
    assert (found.kind, found.groups, found.activations) == ("e4m3", (16,), None)
    assert storage(values, "lm_head") is None


@pytest.mark.parametrize(
    "preset, name, kind, size, inputs",
    [
        ("NVFP4A16", NVFP4, "e4m3", 16, None), ("nvfp4", NVFP4, "e4m3", 16, "e4m3"),
        ("MXFP4A16", MXFP4, "e8m0", 32, None), ("MXFP4", MXFP4, "e8m0", 32, "e8m0"),
    ],
)  # fmt: skip
def test_a_preset_in_place_of_a_group(preset, name, kind, size, inputs):
    """As a config is that was saved as its user gave it."""
    values = {"config_groups": {preset: [UP], "FP8": [Q]}, "ignore": []}
    assert compressed_tensors.is_fp4(fields(values)) and compressed_tensors.fp4_groups(fields(values)) == {preset}
    found = storage(values, UP)
    assert (found.label, found.kind, found.groups) == (f"compressed-tensors {name}", kind, (size,))
    assert getattr(found.activations, "kind", None) == inputs and storage(values) is None


AT = "config.json: quantization_config"


@pytest.mark.parametrize("name", ["nvfp4-e5m3-pack-quantized", "mxfp4-new"])
def test_a_format_of_fp4_that_is_not_known(name):
    for values, at in (
        (config(name), f"{AT}.format"), (config(NVFP4, group(name, args(16))), f"{AT}.config_groups.group_0.format")
    ):  # fmt: skip
        assert compressed_tensors.is_fp4(fields(values))
        with pytest.raises(CheckpointError) as caught:
            compressed_tensors.scheme(fields(values))
        assert str(caught.value) == f"{at}: found {name!r}, expected one of {NVFP4}, {MXFP4}"


def rotated(*apply) -> dict:
    transforms = {"config_groups": {"u": {"type": "hadamard", "apply": list(apply)}}}
    return config(NVFP4, group(NVFP4, args(16)), transform_config=transforms)


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache", "new"])
def test_rotated_inputs_are_refused(location):
    fused = {"location": "weight_input", "targets": ["Linear"]}
    with pytest.raises(CheckpointError) as caught:
        storage(rotated(fused, {"location": location, "targets": ["Linear"]}))
    message = str(caught.value)
    where = f"{AT}.transform_config.config_groups.u.apply[1].location"
    assert message.startswith(f"{where}: found {location!r}, expected none but weight_input and weight_output: ")
    assert "Hadamard" in message


def test_rotations_that_the_weights_hold_already_are_fine():
    values = rotated({"location": "weight_input"}, {"location": "weight_output", "inverse": True})
    assert storage(values).kind == "e4m3"
    for nothing in (None, {}, {"config_groups": {}}):
        assert storage(config(NVFP4, group(NVFP4, args(16)), transform_config=nothing)).kind == "e4m3"


@pytest.mark.parametrize(
    "values, entry, found, expected",
    [
        (config(4, group(NVFP4, args(16))), "format", "4", "a string"),
        (config(NVFP4, group([NVFP4], args(16))), "config_groups.group_0.format", "a list", "a string"),
        (config(NVFP4, config_groups=[group(NVFP4, args(16))]), "config_groups", "a list", "an object"),
        (config(NVFP4, config_groups={"a": None}), "config_groups.a", "null", "an object"),
        (config(NVFP4, config_groups={"NVFP4A16": [3]}), "config_groups.NVFP4A16.targets[0]", "3", "a string"),
        (config(NVFP4, group(NVFP4, args(16), targets="Linear")), "config_groups.group_0.targets", "'Linear'",
         "a list of strings"),
        (config(NVFP4, group(NVFP4, args(16), targets=[])), "config_groups.group_0.targets", "a list",
         "a list of modules, such as ['Linear']"),
        (config(NVFP4, group(NVFP4, args(16), targets=None)), "config_groups.group_0.targets", "null",
         "a list of modules, such as ['Linear']"),
        (config(NVFP4, group(NVFP4, args("16"))), "config_groups.group_0.weights.group_size", "'16'", "an integer"),
        (config(NVFP4, group(NVFP4, "W4A16")), "config_groups.group_0.weights", "'W4A16'", "an object"),
        (config(NVFP4, group(NVFP4, args(16), input_activations="FP8")), "config_groups.group_0.input_activations",
         "'FP8'", "an object"),
        (config(NVFP4, group(NVFP4, args(16)), ignore="lm_head"), "ignore", "'lm_head'", "a list of strings"),
        (config(NVFP4, group(NVFP4, args(16)), ignore=[["lm_head"]]), "ignore[0]", "a list", "a string"),
        (config(NVFP4, group(NVFP4, args(16)), transform_config=["h"]), "transform_config", "a list", "an object"),
        (config(NVFP4, group(NVFP4, args(16)), transform_config={"config_groups": {"u": {"apply": "all"}}}),
         "transform_config.config_groups.u.apply", "'all'", "a list of objects"),
    ],
)  # fmt: skip
def test_an_entry_of_another_type_is_named(values, entry, found, expected):
    with pytest.raises(CheckpointError) as caught:
        compressed_tensors.scheme(fields(values))
    assert str(caught.value) == f"{AT}.{entry}: found {found}, expected {expected}"
