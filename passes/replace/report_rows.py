"""The rows of the report."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from marlin_w4a16.fake_impls.library import packed_of, split_weight
from marlin_w4a16.fake_impls.moe import Arguments, activation_args, arguments_of
from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.layout import packed_nbytes
from marlin_w4a16.passes.devices import serves
from marlin_w4a16.passes.graph.names import module_path, producer_of
from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.graph.torch_private import inner_tensors, number_hint, size_hint, source_name
from marlin_w4a16.passes.judge.recipe import FromSources
from marlin_w4a16.passes.judge.verdict import Found, Verdict
from marlin_w4a16.passes.judge.weights import Weight
from marlin_w4a16.passes.mixture.trial import Proved
from marlin_w4a16.passes.outcome import Mixture, Owned, Rejected, Replaced, Row

_OPS = torch.ops.marlin_w4a16


def row_of(weight: Weight, found: Verdict, whole: Proved | Rejected | None, error: float | None = None) -> Row:
    """What became of a weight, with its mixture or why it is none; None where it is not about any."""
    path, seen, experts = weight.path, weight.decode.matrices, None
    if isinstance(found, Found):
        if isinstance(found.recipe, FromSources) and found.recipe.window.total > weight.decode.rows:
            rows = found.recipe.window.rows(weight.decode.rows)
            path = f"{path}[{rows.start}:{rows.stop}{f':{rows.step}' if rows.step > 1 else ''}]"
        if isinstance(whole, Proved):
            experts = Mixture(whole.mixture.experts, whole.mixture.chosen, str(whole.activation))
    return Row(
        path=path,
        spelling=weight.products[0].spelling.name,
        shape=(seen.n, seen.k) if seen.batch == 1 else (seen.batch, seen.n, seen.k),
        format=found.format if isinstance(found, Found) else None,
        outcome=_replaced(weight, found, whole, error) if isinstance(found, Found) else found,
        nbytes=sum(t.numel() * t.element_size() for value in weight.values for t in inner_tensors(value)),
        uses=len(weight.products),
        producer=next(filter(None, map(producer_of, weight.values)), None),
        experts=experts,
    )


def _replaced(weight: Weight, found: Found, whole: Proved | Rejected | None, error: float | None) -> Replaced:
    op = "moe" if isinstance(whole, Proved) else "grouped_linear" if weight.routed else "linear"
    served, seen = serves(example(weight.decode.value).device), weight.decode.matrices
    nbytes = seen.batch * packed_nbytes(seen.n, seen.k, found.recipe.group)
    dropped = "the quantisation of its input is left out" if weight.quantised else None
    why, more = (whole.why, whole.detail) if isinstance(whole, Rejected) else (None, None)
    note = "; ".join(filter(None, (found.note, dropped, why))) or None
    detail = "; ".join(filter(None, (found.detail, more))) or None
    return Replaced(f"marlin_w4a16::{op}", str(served), nbytes, note, error, detail)


def owned(graph: fx.Graph) -> Iterator[Row]:
    """The weights that their modules own packed."""
    linears: dict[fx.Node, list[fx.Node]] = {}
    mixtures: dict[tuple[fx.Node, fx.Node], list[Arguments]] = {}
    for node in graph.nodes:
        if node.target in (_OPS.linear, _OPS.linear.default):
            linears.setdefault(node.args[1], []).append(node)
        elif node.target in (_OPS.moe, _OPS.moe.default):
            call = arguments_of(node.args)
            mixtures.setdefault((call.w13[0], call.w2[0]), []).append(call)
    for calls in linears.values():
        yield _owned("linear", split_weight(calls[0].args[1:])[0], len(calls), None)
    for (words, _), same in mixtures.items():
        count, chosen = example(words).shape[0], size_hint(example(same[0].topk_ids).shape[1])
        activation = Activation(*map(number_hint, activation_args(same[0].activation)))
        for weight in (same[0].w13, same[0].w2):
            yield _owned("moe", weight, len(same), Mixture(int(count), chosen, str(activation)))


def _owned(op: str, weight: tuple[Any, ...], uses: int, experts: Mixture | None) -> Row:
    packed = packed_of(fx.map_arg(weight, example))
    module, _, name = module_path(source_name(weight[0])).rpartition(".")
    path = f"{module}.w{name.removeprefix('words')}" if op == "moe" else module
    served = serves(packed.words.device)
    kernel = "blocks" if isinstance(served, Rejected) else served  # the op runs everywhere
    shape = (*map(int, packed.multiplier.shape[:-1]), packed.n, packed.k)
    outcome = Owned(f"marlin_w4a16::{op}", kernel, packed.nbytes)
    return Row(path, "packed", shape, packed.format, outcome, 0, uses, experts=experts)
