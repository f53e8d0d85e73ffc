"""Quantisation configs of ModelOpt, as its versions spell them."""

import pytest

from checkpoints.headers import fields
from marlin_w4a16.checkpoints import modelopt
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.fp8 import FP8Storage
from marlin_w4a16.checkpoints.scheme import Mismatch
from marlin_w4a16.checkpoints.storage import Activations, FP4Storage

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
PRODUCER = {"producer": {"name": "modelopt", "version": "0.47.0"}}
W4A4 = "ModelOpt quantises the inputs to FP4 (W4A4)"
W4A8 = "ModelOpt quantises the inputs to FP8 (W4A8)"
CACHE = ("its key/value cache was quantised; it is kept in 16 bits, its scales are not read",)
FLOATS = ("F32", "BF16", "F16")
NVFP4 = {"weight": ("U8",), "weight_scale": ("F8_E4M3",), "weight_scale_2": FLOATS}
MXFP4 = {"weight": ("U8",), "weight_scale": ("U8", "F8_E8M0")}


def config(algorithm: str | None, group: int | str | None = None, inputs: bool = False, **more) -> dict:
    """quantization_config of config.json; a group size makes a config group."""
    args = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": group}
    of_inputs = {"input_activations": args} if inputs else {}
    groups = {"group_0": {**of_inputs, "weights": args, "targets": ["Linear"]}}
    ignore = ["lm_head", "model.embed_tokens"]
    made = {"ignore": ignore, "quant_algo": algorithm, **PRODUCER, "quant_method": "modelopt", **more}
    return {"config_groups": groups, **made} if group else made


def other(algorithm: str | None, **more) -> dict:
    """hf_quant_config.json."""
    excluded = {"exclude_modules": ["lm_head", "model.embed_tokens"]}
    return {**PRODUCER, "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": None, **excluded, **more}}


AWQ = {"has_zero_point": False, "pre_quant_scale": True}
FP4_CONFIGS = [
    (config("NVFP4", 16, inputs=True), "NVFP4", NVFP4, "e4m3", (16,), Activations(W4A4, "e4m3", 16, "up")),
    (config("W4A16_NVFP4", 16), "W4A16_NVFP4", NVFP4, "e4m3", (16,), None),
    (config("W4A16_NVFP4", 32), "W4A16_NVFP4", NVFP4, "e4m3", (32,), None),
    (config("NVFP4", 32), "NVFP4", NVFP4, "e4m3", (32,), Activations(W4A4, "e4m3", 32, "up")),
    (config("NVFP4_AWQ"), "NVFP4_AWQ", NVFP4, "e4m3", (16, 32), Activations(W4A4, "e4m3", 0, "up")),
    (config("NVFP4_SVD", 16), "NVFP4_SVD", NVFP4, "e4m3", (16,), Activations(W4A4, "e4m3", 16, "up")),
    (config("W4A8_NVFP4_FP8"), "W4A8_NVFP4_FP8", NVFP4, "e4m3", (16, 32), Activations(W4A8)),
    (config("mxfp4"), "MXFP4", MXFP4, "e8m0", (32,), Activations(W4A4, "e8m0", 0, "up")),
    (config("W4A8_MXFP4_FP8"), "W4A8_MXFP4_FP8", MXFP4, "e8m0", (32,), Activations(W4A8)),
    (config("NVFP4", config_groups={"group_0": {"weights": None}}), "NVFP4", NVFP4, "e4m3", (16, 32),
     Activations(W4A4, "e4m3", 0, "up")),
    (other("NVFP4", group_size=16), "NVFP4", NVFP4, "e4m3", (16,), Activations(W4A4, "e4m3", 16, "up")),
    (other("NVFP4_AWQ", group_size=16, **AWQ), "NVFP4_AWQ", NVFP4, "e4m3", (16,),
     Activations(W4A4, "e4m3", 16, "up")),
    (other("W4A16_NVFP4", group_size=32), "W4A16_NVFP4", NVFP4, "e4m3", (32,), None),
    (other("mxfp4"), "MXFP4", MXFP4, "e8m0", (32,), Activations(W4A4, "e8m0", 0, "up")),
]  # fmt: skip


@pytest.mark.parametrize("values, algorithm, tensors, kind, groups, activations", FP4_CONFIGS)
def test_an_algorithm(values, algorithm, tensors, kind, groups, activations):
    scheme = modelopt.scheme(fields(values))
    assert (scheme.producer, scheme.algorithm, scheme.notes) == ("ModelOpt", algorithm, ())
    storage = scheme.storage(Q)
    assert isinstance(storage, FP4Storage) and storage.label == f"ModelOpt {algorithm}"
    assert (storage.kind, storage.groups, storage.activations) == (kind, groups, activations)
    assert {part.leaf: part.dtypes for part in storage.parts if not part.optional} == tensors
    optional = {part.leaf: (part.role, part.dtypes, part.shape) for part in storage.parts if part.optional}
    of_rank = {
        "svdquant_lora_a": ("low rank a", FLOATS, ("r", "k")),
        "svdquant_lora_b": ("low rank b", FLOATS, ("n", "r")),
    }
    assert optional == {
        "input_scale": ("input multiplier", FLOATS, ()),
        "pre_quant_scale": ("pre-quant scale", FLOATS, ("k",)),
        **(of_rank if algorithm == "NVFP4_SVD" else {}),
    }
    assert storage.leaf("codes") == "weight" and storage.leaf("scales") == "weight_scale"
    assert (storage.part("multiplier") is not None) == (tensors is NVFP4)
    assert scheme.storage("lm_head") is None and scheme.ignored_by("lm_head") == "lm_head"


@pytest.mark.parametrize(
    "spelling, block, scales",
    [
        ("FP8", None, FLOATS), ("fp8", None, FLOATS), ("FP8_PER_CHANNEL_PER_TOKEN", None, FLOATS),
        ("FP8_PB_WO", (128, 128), FLOATS), ("FP8_BLOCK_SCALES", (128, 128), FLOATS),
        ("MXFP8", (1, 32), ("U8", "F8_E8M0")),
    ],
)  # fmt: skip
def test_fp8(spelling, block, scales):
    storage = modelopt.scheme(fields(config(spelling))).storage(Q)
    assert isinstance(storage, FP8Storage) and storage.label == f"ModelOpt {spelling.upper()}"
    assert storage.block == block
    assert {part.leaf: part.dtypes for part in storage.parts} == {
        "weight": ("F8_E4M3",), "weight_scale": scales, "input_scale": FLOATS
    }  # fmt: skip
    assert [part.leaf for part in storage.parts if part.optional] == ["input_scale"]


MIXED = {
    f"{Q}": {"quant_algo": "FP8"},
    "model.layers.0.mlp.gate_proj": {"quant_algo": "NVFP4", "group_size": 16},
    "model.layers.0.mlp.up_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 32},
    "model.layers.0.self_attn.k_proj": {"quant_algo": "INT4_AWQ", "group_size": 128},
}


@pytest.mark.parametrize(
    "values",
    [
        config("MIXED_PRECISION", 16, quantized_layers=MIXED, ignore=[]),
        {"quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": MIXED}},
    ],
    ids=["config.json", "hf_quant_config.json"],
)
def test_mixed_precision(values):
    scheme = modelopt.scheme(fields(values))
    found = {path: scheme.storage(path) for path in (*MIXED, DOWN, "lm_head", "model.embed_tokens")}
    assert isinstance(found[Q], FP8Storage)
    up, gate = found["model.layers.0.mlp.up_proj"], found["model.layers.0.mlp.gate_proj"]
    assert (up.label, up.groups, up.activations) == ("ModelOpt W4A16_NVFP4", (32,), None)
    assert (gate.label, gate.groups, gate.activations.told) == ("ModelOpt NVFP4", (16,), W4A4)
    assert found["model.layers.0.self_attn.k_proj"].found == "ModelOpt's INT4_AWQ"
    assert not any(found[path] for path in (DOWN, "lm_head", "model.embed_tokens"))
    assert (scheme.algorithm, scheme.ignore) == ("MIXED_PRECISION", ())


def test_mixed_precision_by_groups():
    """As ModelOpt's exporter for compressed-tensors writes it; what quantized_layers names goes before."""
    four, eight = {"num_bits": 4, "group_size": 16}, {"num_bits": 8}
    groups = {
        "group_0": {"weights": four, "input_activations": four, "targets": [f"{DOWN}*", "Linear"]},
        "group_1": {"weights": four, "targets": ["*.up_proj"]},
        "group_2": {"weights": eight, "targets": [Q, "*.o_proj"]},
        "group_3": {"weights": {"num_bits": 3}, "targets": ["*.k_proj"]},
    }
    named = {Q: {"quant_algo": "W4A16_NVFP4", "group_size": 32}}
    scheme = modelopt.scheme(fields(config("MIXED_PRECISION", config_groups=groups, quantized_layers=named)))
    found = [scheme.storage(path) for path in (DOWN, "x.up_proj", "x.o_proj", Q, "x.k_proj", "x.v_proj")]
    labels = ["NVFP4", "W4A16_NVFP4", "FP8", "W4A16_NVFP4"]
    assert [storage.label for storage in found[:4]] == [f"ModelOpt {label}" for label in labels]
    assert (found[3].groups, found[4:]) == ((32,), [None, None])


def test_a_mark_of_modelopt_behind_a_name_is_left_out():
    """ModelOpt 0.47 puts a NUL and words of its own behind names of experts that it had to rename."""
    named = {f"{Q}.\0renamed": {"quant_algo": "NVFP4"}, f"{DOWN}\0": {"quant_algo": "NVFP4"}}
    scheme = modelopt.scheme(fields(config("MIXED_PRECISION", quantized_layers=named, ignore=["lm_head.\0x"])))
    assert scheme.targets.keys() == {Q, DOWN} and scheme.ignore == ("lm_head",)


def test_mixed_precision_without_fp4():
    assert modelopt.scheme(fields(config("MIXED_PRECISION"))).storage(Q) is None


@pytest.mark.parametrize("key, wrap", [("ignore", config), ("exclude_modules", other)])
def test_ignored_names_and_prefixes(key, wrap):
    scheme = modelopt.scheme(fields(wrap("NVFP4", **{key: ["lm_head", "model.layers.0.self_attn*"]})))
    assert scheme.storage(Q) is None and scheme.storage("lm_head") is None
    assert scheme.ignored_by(Q) == "model.layers.0.self_attn*"
    assert scheme.storage(DOWN) is not None and scheme.storage("model.embed_tokens") is not None
    assert modelopt.scheme(fields(wrap("NVFP4", **{key: None}))).storage("lm_head") is not None


@pytest.mark.parametrize(
    "values",
    [
        config("NVFP4", 16, kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"}),
        config("NVFP4", 16, kv_cache_scheme="NVFP4"),
        other("NVFP4", kv_cache_quant_algo="FP8"),
    ],
)
def test_a_quantised_cache_is_noted(values):
    assert modelopt.scheme(fields(values)).notes == CACHE


KNOWN = (
    "NVFP4, W4A16_NVFP4, NVFP4_AWQ, NVFP4_SVD, W4A8_NVFP4_FP8, MXFP4, W4A8_MXFP4_FP8, FP8, "
    "FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, FP8_BLOCK_SCALES, MXFP8"
)
AT = "config.json: quantization_config"


@pytest.mark.parametrize("algorithm", ["INT4_AWQ", "W4A8_AWQ", "NVFP4_NEW", "nf4"])
def test_an_algorithm_that_is_not_supported(algorithm):
    values = config(algorithm, 16, **AWQ)
    assert modelopt.scheme(fields(values)).storage(Q) == Mismatch(f"ModelOpt's {algorithm.upper()}", f"one of {KNOWN}")


@pytest.mark.parametrize(
    "algorithm, group, sizes",
    [*(("NVFP4", group, (16, 32)) for group in (8, 64, 128)), *(("MXFP4", group, (32,)) for group in (8, 16, 64))],
)
def test_a_group_size_that_is_not_supported(algorithm, group, sizes):
    expected = Mismatch(f"ModelOpt's {algorithm} with group_size {group}", f"one of {sizes}")
    assert modelopt.scheme(fields(config(algorithm, group))).storage(Q) == expected
    assert modelopt.scheme(fields(other(algorithm, group_size=group))).storage(Q) == expected


@pytest.mark.parametrize(
    "values, at",
    [
        ({}, AT), ({"quant_method": "modelopt"}, AT), (config(None), AT), (config(""), AT),
        (other(None), f"{AT}.quantization"),
    ],
)  # fmt: skip
def test_no_algorithm(values, at):
    with pytest.raises(CheckpointError) as caught:
        modelopt.scheme(fields(values))
    assert str(caught.value) == f"{at}.quant_algo: found null, expected one of {KNOWN}, MIXED_PRECISION"


@pytest.mark.parametrize(
    "values, entry, found, expected",
    [
        (config(["NVFP4"]), "quant_algo", "a list", "a string"),
        (config("NVFP4", ignore="lm_head"), "ignore", "'lm_head'", "a list of strings"),
        (config("NVFP4", ignore=["lm_head", None]), "ignore[1]", "null", "a string"),
        (config("NVFP4", exclude_modules={"lm_head": True}), "exclude_modules", "an object", "a list of strings"),
        (config("NVFP4", "16"), "config_groups.group_0.weights.group_size", "'16'", "an integer"),
        (config("NVFP4", group_size=16.0), "group_size", "16.0", "an integer"),
        (config("NVFP4", group_size=True), "group_size", "True", "an integer"),
        (config("NVFP4", config_groups=[]), "config_groups", "a list", "an object"),
        (config("NVFP4", config_groups={"g": None}), "config_groups.g", "null", "an object"),
        (config("MIXED_PRECISION", quantized_layers=[Q]), "quantized_layers", "a list", "an object"),
        (config("MIXED_PRECISION", quantized_layers={Q: "NVFP4"}), f"quantized_layers.{Q}", "'NVFP4'", "an object"),
        (config("MIXED_PRECISION", quantized_layers={Q: {"quant_algo": 4}}), f"quantized_layers.{Q}.quant_algo", "4",
         "a string"),
        ({"quantization": "NVFP4"}, "quantization", "'NVFP4'", "an object"),
        (other("NVFP4", group_size="16"), "quantization.group_size", "'16'", "an integer"),
    ],
)  # fmt: skip
def test_an_entry_of_another_type_is_named(values, entry, found, expected):
    with pytest.raises(CheckpointError) as caught:
        modelopt.scheme(fields(values))
    assert str(caught.value) == f"{AT}.{entry}: found {found}, expected {expected}"
