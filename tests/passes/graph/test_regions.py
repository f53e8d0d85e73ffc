import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from marlin_w4a16.passes.graph.constants import find_constants, needed_by, slice_of
from marlin_w4a16.passes.graph.nodes import storage, value_of
from marlin_w4a16.passes.graph.regions import Regions
from marlin_w4a16.passes.graph.torch_private import add_static_input, compile_graph, source_name
from narrow import wide

wrap = torch.ops.higher_order.wrap
region = torch.compiler.nested_compile_region
checkpoint = functools.partial(checkpoints.checkpoint, use_reentrant=False)


def is_higher_order(target: object) -> bool:
    """Whether a node's target takes whole subgraphs (torch.cond, checkpoint, ...)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def save_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op == torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(
    checkpoint, context_fn=functools.partial(create_selective_checkpoint_contexts, save_products)
)


def doubled(layer: nn.Linear, x: Tensor) -> Tensor:
    """A product whose weight is written in place, as some dequantisations are."""
    weight = torch.empty(8, 8)
    weight[:4] = layer.weight[:4] * 2
    weight[4:] = layer.weight[4:]
    return linear(x, weight, layer.bias)


def both(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    weight = layer.weight * 2
    return weight, linear(x, weight, layer.bias)


def outside(x: Tensor, a: nn.Linear) -> Tensor:
    weight = a.weight * 2
    return checkpoint(lambda y: linear(y, weight), x)


def returned(x: Tensor, a: nn.Linear, b: nn.Linear) -> Tensor:
    (weight, left), (_, right) = returning(a, x), returning(b, x)
    return linear(left, weight) + right


step = region(lambda layer, x: layer(x).sin())
block = region(lambda layer, x: checkpoint(lambda y: step(layer, y) + y, x) * 2)
in_place = region(doubled)
returning = region(both)

CASES: dict[str, Callable[..., Tensor]] = {
    "function": lambda x, a, b, c: checkpoint(lambda y: linear(y, a.weight, a.bias).sin(), x),
    "module": lambda x, a, b, c: checkpoint(a, x),
    "nested": lambda x, a, b, c: checkpoint(lambda y: checkpoint(a, y) + b(y), x),
    "two calls": lambda x, a, b, c: checkpoint(b, checkpoint(a, x)),
    "selective": lambda x, a, b, c: selective(a, x),
    "wrap": lambda x, a, b, c: wrap(lambda y: a(y), x),
    "one body": lambda x, a, b, c: step(c, step(b, step(a, x))),
    "one body of several": lambda x, a, b, c: block(c, block(b, block(a, x))),
    "one body within a region": lambda x, a, b, c: checkpoint(lambda y: step(b, step(a, y)), x),
    "one body that writes in place": lambda x, a, b, c: in_place(c, in_place(b, in_place(a, x))),
    "a weight from outside": lambda x, a, b, c: outside(x, a),
    "a weight out of a region": lambda x, a, b, c: linear(x, checkpoint(lambda w: w * 2, a.weight)),
    "a weight and more out of a region": lambda x, a, b, c: returned(x, a, b),
    "a weight used inside and outside": lambda x, a, b, c: checkpoint(a, x) + a(x),
}  # fmt: skip
PRODUCTS = {"nested": 2, "two calls": 2, "one body": 3, "one body of several": 3, "one body within a region": 2} | {
    "one body that writes in place": 3, "a weight and more out of a region": 3, "a weight used inside and outside": 2
}  # fmt: skip


@pytest.fixture
def layers() -> list[nn.Linear]:
    """Linears with frozen weights and trained biases."""
    layers = [nn.Linear(8, 8) for _ in range(3)]
    for layer in layers:
        layer.weight.requires_grad_(False)
    return layers


def example(rows: int = 3) -> Tensor:
    return torch.randn(rows, 8, requires_grad=True)


def bodies(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (module for module in gm.modules() if isinstance(module, fx.GraphModule))


def text(gm: fx.GraphModule) -> list[str]:
    return [str(body.graph) for body in bodies(gm)]


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for body in bodies(gm) for node in body.graph.nodes if is_higher_order(node.target)]


def transpose_weights(gm: fx.GraphModule, inputs: list[Any]) -> tuple[fx.GraphModule, list[Any], list[int]]:
    """Gives the linears with constant weights transposed copies as new inputs, much as the pass gives them packed ones.

    Returns the graph, the new inputs, and the positions of the old ones that are still used.
    """
    regions = Regions(gm)
    flat = regions.flatten()
    constants, placeholders = find_constants(flat.graph), list(flat.graph.find_nodes(op="placeholder"))
    last = flat.origin[placeholders[-1]]
    added: list[Tensor] = []
    for product in flat.graph.find_nodes(op="call_function", target=linear):
        weight = product.args[1]
        if weight not in constants.nodes | constants.leaves:
            continue
        nodes = slice_of(weight, product, constants)
        leaves = [node for node in nodes if node in constants.leaves]
        assert len(leaves) == 1
        live = dict(zip(placeholders, inputs, strict=True))
        added.append(value_of(weight, nodes, {leaves[0]: live[leaves[0]]}).t().contiguous())
        with regions.gm.graph.inserting_after(last):
            last, _ = add_static_input(regions.gm.graph, flat.origin[leaves[0]], f"t_{len(added)}", added[-1])
        replace(flat.origin[product], regions.reach(last, flat.origin[product].graph))
    after = regions.flatten()
    constants = find_constants(after.graph)
    roots = [n for n in after.graph.nodes if n.op != "placeholder" and n not in constants.nodes]
    copy = regions.finish({after.origin[n] for n in constants.nodes - needed_by(roots, constants)})
    old = list(copy.graph.find_nodes(op="placeholder"))[: len(inputs)]
    for node in old:
        if not node.users:
            copy.graph.erase_node(node)
    copy.recompile()
    return copy, added, [i for i, node in enumerate(old) if node.users]


def replace(product: fx.Node, weight: fx.Node) -> None:
    x, _, *bias = product.args
    with product.graph.inserting_before(product):
        new = product.graph.call_function(torch.matmul, (x, weight))
        new.meta.update(product.meta)
        if bias and bias[0] is not None:
            new = product.graph.call_function(operator.add, (new, bias[0]))
            new.meta.update(product.meta)
    product.replace_all_uses_with(new)
    product.graph.erase_node(product)


class Backend:
    """Compiles what `transpose_weights` makes of a graph, and keeps both."""

    def __init__(self, compile: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]) -> None:
        self.compile = compile

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = text(gm)
        self.traced, self.inputs = gm, inputs
        self.edited, added, self.kept = transpose_weights(gm, inputs)
        assert text(gm) == before
        compiled = self.compile(self.edited, [inputs[i] for i in self.kept] + added)
        return lambda *args: compiled(*[args[i] for i in self.kept], *added)


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)


def assert_trains(
    compiled: Callable[..., Tensor], function: Callable[..., Tensor], layers: list[nn.Linear], x: Tensor
) -> None:
    found, expected = compiled(x, *layers), function(x, *layers)
    torch.testing.assert_close(found, expected)
    biases = [layer.bias for layer in layers]
    torch.testing.assert_close(gradients(found, x, *biases), gradients(expected, x, *biases), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_flat_graph_computes_the_same_without_regions(trace, layers, name):
    gm, inputs = trace(CASES[name], example(), *layers)
    assert calls(gm)
    flat = Regions(gm).flatten()
    flat.graph.lint()
    assert not any(is_higher_order(n.target) for n in flat.graph.nodes)
    assert len(flat.graph.find_nodes(op="call_function", target=linear)) == PRODUCTS.get(name, 1)
    torch.testing.assert_close(fx.GraphModule(nn.Module(), flat.graph)(*inputs), gm(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_a_flat_graph_has_the_examples_and_sources_of_what_it_stands_for(trace, layers, name):
    gm, _ = trace(CASES[name], example(), *layers)
    flat = Regions(gm).flatten()
    assert set(flat.origin) == set(flat.graph.nodes)
    for node, origin in flat.origin.items():
        assert node.meta.get("example_value") is origin.meta.get("example_value")
    placeholders, traced = (g.find_nodes(op="placeholder") for g in (flat.graph, gm.graph))
    assert [source_name(n) for n in placeholders] == [source_name(n) for n in traced]
    assert [flat.origin[n].name for n in placeholders] == [n.name for n in traced]


@pytest.mark.parametrize("name", CASES)
def test_what_was_edited_in_regions_trains_alike(layers, name):
    backend = Backend(torch._dynamo.lookup_backend("aot_eager"))
    assert_trains(torch.compile(CASES[name], backend=backend, fullgraph=True), CASES[name], layers, example())
    assert not any(n.target is linear for body in bodies(backend.edited) for n in body.graph.nodes)
    weights = {layer.weight.data_ptr() for layer in layers}
    assert weights.isdisjoint(backend.inputs[i].data_ptr() for i in backend.kept)
    for call in calls(backend.edited):
        body = call.graph.owning_module.get_submodule(call.args[0].target)
        assert all(n.users for n in body.graph.find_nodes(op="placeholder"))


@pytest.mark.parametrize(
    "name, dynamic",
    [
        ("nested", True), ("a weight and more out of a region", False), wide("nested", False),
        wide("one body of several", False), wide("one body of several", True),
        wide("a weight and more out of a region", True),
    ],
)  # fmt: skip
def test_inductor_compiles_what_was_edited(layers, name, dynamic):
    backend = Backend(lambda gm, inputs: compile_graph(gm, inputs, {}))
    compiled, x = torch.compile(CASES[name], backend=backend, fullgraph=True), example()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    assert_trains(compiled, CASES[name], layers, x)
    if dynamic:
        graph = backend.edited
        assert_trains(compiled, CASES[name], layers, example(5))
        assert backend.edited is graph


@pytest.mark.parametrize("name", ["nested", "a weight and more out of a region"])
def test_inductor_compiles_what_was_edited_for_inference(layers, name):
    backend = Backend(lambda gm, inputs: compile_graph(gm, inputs, {}))
    with torch.no_grad():
        found = torch.compile(CASES[name], backend=backend, fullgraph=True)(x := torch.randn(3, 8), *layers)
        torch.testing.assert_close(found, CASES[name](x, *layers))


@pytest.mark.parametrize("name", CASES)
def test_an_edited_graph_runs_uncompiled(trace, layers, name):
    gm, inputs = trace(CASES[name], example(), *layers)
    edited, added, kept = transpose_weights(gm, inputs)
    torch.testing.assert_close(edited(*[inputs[i] for i in kept], *added), gm(*inputs))


@pytest.mark.parametrize("name, count, used", [("one body", 3, 1), ("one body of several", 3, 1), ("two calls", 2, 2)])
def test_calls_of_one_body_share_one_again(trace, layers, name, count, used):
    gm, inputs = trace(CASES[name], example(), *layers)
    edited, _, _ = transpose_weights(gm, inputs)
    for graph in (gm, edited):
        found = [n for n in graph.graph.nodes if is_higher_order(n.target)]
        assert len(found) == count and len({n.args[0].target for n in found}) == used
    names = {n.args[1] for n in found if n.target is torch.ops.higher_order.invoke_subgraph}
    assert len(names) == (name != "two calls")


def test_a_call_that_was_edited_alone_has_its_own_body(trace, layers):
    gm, inputs = trace(CASES["one body"], example(), *layers)
    regions = Regions(gm)
    flat = regions.flatten()
    _, second, _ = flat.graph.find_nodes(op="call_method", target="sin")
    flat.origin[second].target = "cos"
    edited = regions.finish(())
    modules = [edited.get_submodule(call.args[0].target) for call in calls(edited)]
    assert modules[0] is modules[2] is not modules[1]
    named = [call.args[1] for call in calls(edited)]
    assert named[0] == named[2] != named[1]
    compiled = torch._dynamo.lookup_backend("aot_eager")(edited, inputs)
    x = next(t for t in inputs if t.shape == (3, 8))
    a, b, c = layers
    torch.testing.assert_close(compiled(*inputs)[0], c(b(a(x).sin()).cos()).sin())


def test_regions_traced_apart_stay_apart(trace, layers):
    gm, _ = trace(lambda x, a: checkpoint(a, x) + selective(a, x), example(), layers[0])
    plain, chosen = list(bodies(gm))[1:]
    assert str(plain.graph) == str(chosen.graph) and plain.meta != chosen.meta
    edited, _, _ = transpose_weights(gm, [example(), layers[0].weight, layers[0].bias])
    assert [body.meta for body in bodies(edited)][1:] == [plain.meta, chosen.meta]


def test_calls_with_different_operands_do_not_share_a_body(trace, layers):
    gm, _ = trace(CASES["one body"], example(), *layers)
    regions = Regions(gm)
    flat = regions.flatten()
    fake_mode = next(iter(flat.graph.nodes)).meta["example_value"].fake_mode
    sines = flat.graph.find_nodes(op="call_method", target="sin")
    for name, shape, sine in zip("abc", [(8,), (1,), (8,)], sines, strict=True):
        with regions.gm.graph.inserting_before(next(iter(regions.gm.graph.nodes))):
            new = regions.gm.graph.placeholder(name)
        new.meta["example_value"] = fake_mode.from_tensor(torch.zeros(shape))
        inner = flat.origin[sine]
        inner.target, inner.args = "add", (*inner.args, regions.reach(new, inner.graph))
    first, second, third = (call.args[0].target for call in calls(regions.finish(())))
    assert first == third != second


def test_a_node_is_passed_into_a_region_once(trace, layers):
    gm, _ = trace(CASES["nested"], example(), *layers)
    regions = Regions(gm)
    flat = regions.flatten()
    inner, outer = sorted((flat.origin[n].graph for n in flat.graph.find_nodes(op="call_function", target=linear)),
                          key=lambda graph: len(graph.nodes))  # fmt: skip
    top = regions.gm.graph.placeholder("new")
    top.meta["example_value"] = object()
    seen = regions.reach(top, inner)
    assert seen.graph is inner and seen.meta["example_value"] is top.meta["example_value"]
    before = len(outer.nodes), len(inner.nodes)
    assert regions.reach(top, inner) is seen and regions.reach(top, outer).graph is outer
    assert (len(outer.nodes), len(inner.nodes)) == before


def test_an_operand_is_reached_as_such(trace, layers):
    gm, _ = trace(CASES["module"], example(), *layers)
    regions = Regions(gm)
    flat = regions.flatten()
    (product,) = flat.graph.find_nodes(op="call_function", target=linear)
    body = flat.origin[product].graph
    for operand, inner in zip(product.args, flat.origin[product].args, strict=True):
        assert regions.reach(flat.origin[operand], body) is inner


def test_calls_of_one_body_have_storages_of_their_own(trace, layers):
    gm, _ = trace(CASES["one body that writes in place"], example(), *layers)
    flat = Regions(gm).flatten()
    assert len({storage(n) for n in flat.graph.find_nodes(op="call_function", target=torch.empty)}) == 3
    items = flat.graph.find_nodes(op="call_function", target=operator.getitem)
    halves = [n for n in items if n.args[0].op == "placeholder"]
    assert len(halves) == 6 and all(storage(n) == storage(n.args[0]) for n in halves)
    assert len({storage(n) for n in halves}) == 3


def test_storages_are_the_same_on_both_sides_of_a_region(trace, layers):
    views = region(lambda y: (y.view(-1).sin(), y.cos()))

    def function(x: Tensor) -> Tensor:
        _, first = views(x)
        sine, second = views(first)
        return sine.view(8, 3) + second.view(8, 3)

    gm, _ = trace(function, torch.randn(3, 8))
    flat = Regions(gm).flatten()
    total = flat.graph.find_nodes(op="call_function", target=operator.add)[0]
    for view in total.args:
        assert storage(view) == storage(view.args[0])
    first, second = flat.graph.find_nodes(op="call_method", target="cos")
    assert second.args[0] is first
    inner = flat.graph.find_nodes(op="call_method", target="view")[1]
    assert inner.args[0] is first and storage(inner) == storage(first)
    assert len({storage(n) for n in (first, second, *total.args, *flat.graph.find_nodes(op="placeholder"))}) == 4


def test_other_higher_order_operators_stay_as_they_are(trace, layers):
    def function(x: Tensor, a: nn.Linear, b: nn.Linear) -> Tensor:
        y = checkpoint(a, x)
        return torch.cond(y.sum() > 0, lambda y: b(y), lambda y: y.sin(), (y,))

    gm, inputs = trace(function, torch.randn(3, 8), *layers[:2])
    edited, added, kept = transpose_weights(gm, inputs)
    (old,), (new,) = (g.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond) for g in (gm, edited))
    for before, after in zip(old.args[1:3], new.args[1:3], strict=True):
        assert edited.get_submodule(after.target) is gm.get_submodule(before.target)
    used = {inputs[i].data_ptr() for i in kept}
    assert layers[1].weight.data_ptr() in used and layers[0].weight.data_ptr() not in used
    torch.testing.assert_close(edited(*[inputs[i] for i in kept], *added), gm(*inputs))


def call_twice(call: fx.Node) -> None:
    with call.graph.inserting_after(call):
        call.graph.node_copy(call)


MANGLED: dict[str, Callable[[fx.Node], object]] = {
    "an operand too many": lambda call: setattr(call, "args", (*call.args, call.args[1])),
    "no example value": lambda call: call.meta.pop("example_value"),
    "an output too many": lambda call: call.meta.update(example_value=call.meta["example_value"] * 2),
    "two calls by one attribute": call_twice,
}


@pytest.mark.parametrize("name", MANGLED)
def test_what_is_laid_out_otherwise_is_no_region(trace, layers, name):
    gm, _ = trace(CASES["module"], example(), *layers)
    (call,) = calls(gm)
    MANGLED[name](call)
    flat = Regions(gm).flatten()
    assert flat.graph.find_nodes(op="call_function", target=call.target)
    assert not flat.graph.find_nodes(op="call_function", target=linear)


def test_a_region_that_nothing_needs_goes(trace, layers):
    gm, inputs = trace(CASES["a weight out of a region"], example(), *layers)
    edited, _, _ = transpose_weights(gm, inputs)
    assert calls(gm) and not calls(edited) and len(list(bodies(edited))) == 1


def test_outputs_that_nothing_needs_go(trace, layers):
    gm, inputs = trace(CASES["a weight and more out of a region"], example(), *layers)
    edited, _, _ = transpose_weights(gm, inputs)
    assert {len(call.meta["example_value"]) for call in calls(gm)} == {2}
    assert {len(call.meta["example_value"]) for call in calls(edited)} == {1}
    assert len({call.args[0].target for call in calls(edited)}) == 1
