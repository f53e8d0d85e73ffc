import pytest
import torch
from torch import nn

from marlin_w4a16.passes.graph.names import module_path
from marlin_w4a16.passes.graph.torch_private import source_name

PATHS = {
    "L['self']._modules['fc']._buffers['scale']": "fc.scale",
    "L['self']._modules['layers']._modules['0']._modules['mlp']._parameters['codes']": "layers.0.mlp.codes",
    "G['model']._modules['0']._buffers['codes']": "0.codes",
    "G['holder'].model._modules['fc'].codes": "model.fc.codes",
    "L['self'].tables['e2m1']": "tables.e2m1",
    "L['self'].tables[0]": "tables.0",
    "G['TABLE']": "TABLE",
    "L['x']": "x",
    "G['__import_modelopt_dot_torch'].e2m1_values": "e2m1_values",
    "L['self']._modules['up'].__dict__['_modules']['quantizer']._buffers['_scale']": "up.quantizer._scale",
    "dict.__getitem__(L['self']._modules['up'].__dict__['_parameters'], "
    "list(dict.keys(L['self']._modules['up'].__dict__['_parameters']))[0])": "up",
    "arg0_1": "arg0_1",
}


@pytest.mark.parametrize("source, path", PATHS.items())
def test_an_expression_becomes_a_path(source, path):
    assert module_path(source) == path


def test_paths_are_those_of_the_model(trace, fp4_linear):
    model = nn.Sequential(fp4_linear(64, 64), nn.Sequential(fp4_linear(64, 64)))
    gm, _ = trace(model, torch.randn(3, 64))
    paths = {module_path(source_name(n)) for n in gm.graph.find_nodes(op="placeholder")}
    named = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert paths >= named and len(paths - named) == 1
