"""Single files of ComfyUI and Black Forest Labs, which diffusers loads with their FP4 weights packed."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf.by_hand import fp8, nvfp4
from hf.dense import exact, relative
from marlin_w4a16 import PackedLinear
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.kernels.scale_bytes import swizzle

diffusers = pytest.importorskip("diffusers")
from marlin_w4a16.diffusers import from_single_file  # noqa: E402

FLUX2 = dict(
    patch_size=1, in_channels=16, out_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=4, joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4],
)  # fmt: skip
Z_IMAGE = dict(
    in_channels=4, dim=64, n_layers=1, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
    axes_dims=[4, 4, 8], axes_lens=[64, 32, 32],
)  # fmt: skip
NAMES = {
    "Flux2Transformer2DModel": {
        r"^x_embedder\.": "img_in.", r"^context_embedder\.": "txt_in.", r"^proj_out\.": "final_layer.linear.",
        r"^time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
        r"^time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
        r"^time_guidance_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
        r"^time_guidance_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
        r"(stream_modulation\w*)\.linear": r"\1.lin", r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        r"^transformer_blocks": "double_blocks", r"^single_transformer_blocks": "single_blocks",
        r"(double.*)attn\.norm_q\.weight": r"\1img_attn.norm.query_norm.scale",
        r"(double.*)attn\.norm_k\.weight": r"\1img_attn.norm.key_norm.scale",
        r"(double.*)attn\.norm_added_q\.weight": r"\1txt_attn.norm.query_norm.scale",
        r"(double.*)attn\.norm_added_k\.weight": r"\1txt_attn.norm.key_norm.scale",
        r"(double.*)attn\.to_out\.0": r"\1img_attn.proj", r"(double.*)attn\.to_add_out": r"\1txt_attn.proj",
        r"ff\.linear_in": "img_mlp.0", r"ff\.linear_out": "img_mlp.2",
        r"ff_context\.linear_in": "txt_mlp.0", r"ff_context\.linear_out": "txt_mlp.2",
        r"(single.*)attn\.to_qkv_mlp_proj": r"\1linear1", r"(single.*)attn\.to_out": r"\1linear2",
        r"(single.*)attn\.norm_q\.weight": r"\1norm.query_norm.scale",
        r"(single.*)attn\.norm_k\.weight": r"\1norm.key_norm.scale",
        r"(double.*)attn\.to_q\.": r"\1img_attn.qkv.", r"(double.*)attn\.add_q_proj\.": r"\1txt_attn.qkv.",
    },
    "ZImageTransformer2DModel": {
        r"all_final_layer\.2-1\.": "final_layer.", r"all_x_embedder\.2-1\.": "x_embedder.",
        r"attention\.to_out\.0\.": "attention.out.", r"attention\.norm_(.)\.": r"attention.\1_norm.",
        r"attention\.to_q\.": "attention.qkv.",
    },
}  # fmt: skip
CONFIGS = {"Flux2Transformer2DModel": FLUX2, "ZImageTransformer2DModel": Z_IMAGE}


def inputs(name: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    if name == "ZImageTransformer2DModel":
        image, text = (torch.randn(*shape, generator=generator) for shape in ((4, 1, 4, 4), (8, 32)))
        return {"x": [image], "t": torch.tensor([0.3]), "cap_feats": [text]}
    hidden, text = (torch.randn(1, *shape, generator=generator) for shape in ((9, 16), (5, 32)))
    ids = torch.arange(36.0).view(9, 4), torch.arange(20.0).view(5, 4)
    return {"hidden_states": hidden, "encoder_hidden_states": text, "timestep": torch.tensor([0.3]),
            "img_ids": ids[0], "txt_ids": ids[1], "guidance": torch.tensor([4.0])}  # fmt: skip


@torch.no_grad()
def output(model) -> torch.Tensor:
    found = model(**inputs(type(model).__name__), return_dict=False)[0]
    return torch.cat([one.flatten() for one in found])


def original(name: str, state: dict) -> dict:
    """A state dict as those who trained the model have it."""
    found = dict(state)
    for path in [path for path in state if re.search(r"attn\.to_q\.|attention\.to_q\.|add_q_proj\.", path)]:
        others = [re.sub(r"to_q\.|add_q_proj\.", lambda m, to=to: m[0].replace("q", to), path) for to in "kv"]
        found[path] = torch.cat([state[path], *(found.pop(other) for other in others)])
    if name == "Flux2Transformer2DModel":
        found["norm_out.linear.weight"] = torch.cat(found["norm_out.linear.weight"].chunk(2)[::-1])
    renamed = {}
    for path, tensor in found.items():
        for pattern, become in NAMES[name].items():
            path = re.sub(pattern, become, path)
        renamed[path] = tensor
    return renamed


def as_comfy(stored: dict) -> dict:
    """The same weight as ComfyUI stores it."""
    codes, scales = stored["weight"], stored["weight_scale"].view(torch.uint8)
    rows = -len(codes) % 16
    codes, scales = (torch.nn.functional.pad(tensor, (0, 0, 0, rows)) for tensor in (codes, scales))
    shape = torch.Size((-(-len(scales) // 128) * 128, -(-scales.shape[1] // 4) * 4))
    scales = swizzle(scales, shape).view(torch.float8_e4m3fn)
    return {"weight": codes << 4 | codes >> 4, "weight_scale": scales, "weight_scale_2": stored["weight_scale_2"]}


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def write(name: str, producer: str, folder):
    """Writes the file and the dense one that it is exactly; the folder of the config."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**CONFIGS[name])
    model.save_config(folder)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.08 if parameter.ndim > 1 else 0.3)
    dense = original(name, model.state_dict())
    tensors, said = dict(dense), {}
    for path in [path for path, t in dense.items() if path.endswith(".weight") and t.ndim == 2]:
        rows, columns = dense[path].shape
        path = path.removesuffix(".weight")
        if columns % 16 or re.search(r"embedder|pad_token", path):
            continue
        if "linear2" in path or "feed_forward.w2" in path:
            stored, value = fp8(rows, columns, (rows, columns))
            scale = stored["weight_scale"].reshape(())
            stored, dense[f"{path}.weight"] = {**stored, "weight_scale": scale}, value.float()
            said[path] = "float8_e4m3fn"
        else:
            stored, said[path] = nvfp4(rows, columns), "nvfp4"
            dense[f"{path}.weight"] = exact({f"x.{leaf}": tensor for leaf, tensor in stored.items()}, "x").float()
            stored = stored if producer == "bfl" else as_comfy(stored)
        tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in stored.items()}
    header = {}
    if producer == "comfy":
        for path, form in said.items():
            tensors[f"{path}.comfy_quant"] = _bytes(json.dumps({"format": form}))
    elif producer == "comfy-header":
        layers = {path: {"format": form} for path, form in said.items()}
        header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    for file, held in (("fp4", tensors), ("dense", dense)):
        kept = {path: tensor.contiguous() for path, tensor in held.items()}
        save_file(kept, folder / f"{file}.safetensors", {"format": "pt", **(header if file == "fp4" else {})})
    return said


def load(name: str, folder, file: str = "fp4"):
    cls, options = getattr(diffusers, name), {"config": str(folder), "torch_dtype": torch.float32}
    path = folder / f"{file}.safetensors"
    model = cls.from_single_file(str(path), **options) if file == "dense" else from_single_file(cls, path, **options)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("producer", ["bfl", "comfy", "comfy-header"])
def test_linears_are_packed_with_the_files_values(name, producer, tmp_path):
    said = write(name, producer, tmp_path)
    model, dense = load(name, tmp_path), load(name, tmp_path, "dense")
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) >= sum(form == "nvfp4" for form in said.values()) >= 5
    assert relative(output(model), output(dense)) <= 1e-5
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_it_is_compiled(tmp_path):
    write("Flux2Transformer2DModel", "bfl", tmp_path)
    model, dense = (load("Flux2Transformer2DModel", tmp_path, file) for file in ("fp4", "dense"))
    model.compile(backend="marlin_w4a16", fullgraph=True)
    assert relative(output(model), output(dense)) <= 1e-5


def _edit(folder, change, **header):
    path = folder / "fp4.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt", **header})


AT = "double_blocks.0.img_mlp.0"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda t: t.update({f"{AT}.comfy_quant": _bytes("{")}), r"comfy_quant: found '\{', expected JSON"),
        (lambda t: t.update({f"{AT}.comfy_quant": _bytes("[]")}), "comfy_quant: found list, expected an object"),
        (lambda t: t.update({f"{AT}.comfy_quant": _bytes('{"format": "mxfp8"}')}), "found 'mxfp8', expected nvfp4 or"),
        (lambda t: t.update({f"{AT}.comfy_quant": torch.ones(3)}), r"found F32 \[3\], expected bytes of JSON"),
        (lambda t: t.pop(f"{AT}.weight"), "weight: found no such tensor, expected a matrix"),
        (lambda t: t.pop(f"{AT}.weight_scale_2"), "weight_scale_2: found no such tensor, expected F32"),
        (lambda t: t.update({f"{AT}.weight_scale": t[f"{AT}.weight_scale"].mT.contiguous()}), "weight_scale: found F8"),
        (
            lambda t: t.update({f"{AT}.weight": t[f"{AT}.weight"][:-1].clone()}),
            r"weight: found U8 \[383, 32\], expected U8 \[384, 32\]",
        ),
    ],
)
def test_what_is_wrong_is_told_with_file_and_tensor(change, told, tmp_path):
    write("Flux2Transformer2DModel", "comfy", tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=told) as raised:
        load("Flux2Transformer2DModel", tmp_path)
    assert "fp4.safetensors" in str(raised.value) and AT in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 1}', '{"layers": {"a": {"format": 4}}}'])
def test_a_header_that_is_none(text, tmp_path):
    write("Flux2Transformer2DModel", "bfl", tmp_path)
    _edit(tmp_path, lambda tensors: None, _quantization_metadata=text)
    with pytest.raises(CheckpointError, match=r"fp4\.safetensors: _quantization_metadata.*expected"):
        load("Flux2Transformer2DModel", tmp_path)


def test_a_dense_file_is_refused(tmp_path):
    write("Flux2Transformer2DModel", "bfl", tmp_path)
    with pytest.raises(CheckpointError, match="found no FP4"):
        from_single_file(diffusers.Flux2Transformer2DModel, tmp_path / "dense.safetensors", config=str(tmp_path))


def test_comfys_own_tensors_are_read():
    """As its package quantises and decodes them."""
    kitchen = pytest.importorskip("comfy_kitchen")
    from marlin_w4a16.checkpoints.comfy import Stored

    weight = torch.randn(160, 96)
    scale = weight.abs().max() / (6 * 448)
    codes, scales = kitchen.quantize_nvfp4(weight, scale)
    expected = kitchen.dequantize_nvfp4(codes, scale, scales, torch.float32)
    tensors = {"weight": codes, "weight_scale": scales, "weight_scale_2": scale}
    found = Stored("x", "nvfp4", "ComfyUI", 160, 96).fp4(tensors).decode(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
