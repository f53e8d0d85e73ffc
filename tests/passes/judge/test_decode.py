"""What computes a weight: what it reads, its parts, its windows, and its values on live tensors."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.judge.decode import Window

N, K = 6, 32


def scaled(codes: Tensor, factor: Tensor) -> Tensor:
    return codes.float() * factor


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def node_of(decode, target) -> int:
    (index,) = (i for i, node in enumerate(decode.nodes) if node.target == target)
    return index


def test_it_is_evaluated_on_live_tensors(decode_of):
    decode = decode_of(scaled, *tensors((N, K), (1,)))
    assert (decode.rows, decode.matrices.k, decode.lift) == (N, K, None)
    for live in (tensors((N, K), (1,)), tensors((N, K), (1,))):
        assert torch.equal(decode.traced(live), scaled(*live))
        assert torch.equal(decode.weight(live), scaled(*live))


def test_the_weight_is_seen_as_the_product_sees_it(decode_of):
    live = tensors((2, K, N), (1,))
    decode = decode_of(scaled, *live, multiply=lambda x, w: x.expand(2, 1, K) @ w)
    assert decode.rows == 2 * N and (decode.matrices.batch, decode.matrices.k) == (2, K)
    assert torch.equal(decode.traced(live), scaled(*live))
    assert torch.equal(decode.weight(live), torch.cat([m.T for m in scaled(*live)]))


def written(codes: Tensor, factor: Tensor) -> Tensor:
    scales = factor.clone()
    scales.mul_(3)
    weight = torch.empty_like(codes)
    weight.copy_(codes * scales)
    weight[1:].neg_()
    return weight


def test_sources_are_read_after_the_last_write_to_them(decode_of):
    live = tensors((N, K), (1,))
    decode = decode_of(written, *live)
    assert torch.equal(decode.weight(live), written(*live))
    assert torch.equal(decode.source(node_of(decode, "clone"), live), live[1] * 3)
    assert torch.equal(decode.source(node_of(decode, torch.empty_like), live), written(*live))
    for index, leaf in enumerate(live):
        assert decode.source(decode.nodes.index(decode.leaves[index]), live) is leaf


def test_sources_together_are_those_one_by_one(decode_of):
    live = tensors((N, K), (1,))
    decode = decode_of(written, *live)
    others = [i for i in range(len(decode.nodes)) if i not in decode.leaf_indices]
    values = dict(decode.sources(others, live))
    assert values.keys() == set(others)
    for index, value in values.items():
        found = decode.source(index, live)
        assert value is found if found is None else torch.equal(value, found)


def test_what_is_written_after_the_product_is_no_part_of_it(decode_of):
    live = tensors((N, K), (1,))

    def product(x: Tensor, weight: Tensor) -> Tensor:
        y = linear(x, weight)
        weight.mul_(2)
        return y

    decode = decode_of(scaled, *live, multiply=product, k=K)
    assert torch.equal(decode.weight(live), scaled(*live))
    assert torch.equal(decode.source(decode.nodes.index(decode.value), live), scaled(*live))


def test_roots_are_the_leaves_that_a_node_is_computed_from(decode_of):
    decode = decode_of(lambda a, b, c: a.neg() + c.abs() * b, *tensors((N, K), (1,), (N, 1)))
    assert decode.roots(node_of(decode, "neg")) == [0] and decode.roots(node_of(decode, "abs")) == [2]
    assert decode.roots(decode.nodes.index(decode.value)) == [0, 1, 2]
    assert decode.roots(decode.nodes.index(decode.leaves[1])) == [1]


def test_an_expression_is_what_a_node_computes_whatever_stands_around_it(decode_of):
    live = tensors((N, K), (1,))
    one, two = decode_of(lambda a, b: a.neg() * b, *live), decode_of(lambda a, b: (a.neg() + 1) * b.abs(), *live)
    other = decode_of(lambda a, b: a.neg().abs() * b, *live)
    assert one.expression(node_of(one, "neg")) == two.expression(node_of(two, "neg"))
    assert one.expression(node_of(one, "neg")) != two.expression(node_of(two, "abs"))
    assert other.expression(node_of(other, "abs")) not in (
        other.expression(node_of(other, "neg")), two.expression(node_of(two, "abs")),
    )  # fmt: skip


def test_decodes_agree_if_they_compute_the_same_from_tensors_of_one_layout(decode_of):
    live = tensors((N, K), (1,))
    signature = decode_of(scaled, *live).signature
    assert decode_of(lambda c, f: scaled(c, f), *tensors((N, K), (1,))).signature == signature
    assert hash(signature) == hash(decode_of(scaled, *live).signature)
    differ = [
        decode_of(lambda c, f: c.float() * f * 2.0, *live), decode_of(lambda c, f: f * c.float(), *live),
        decode_of(scaled, *tensors((N, 2 * K), (1,))), decode_of(scaled, *tensors((2 * N, K), (1,))),
        decode_of(scaled, *tensors((N, K), (1, 1))), decode_of(scaled, live[0].double(), live[1]),
        decode_of(scaled, live[0].T.contiguous().T, live[1]),
        decode_of(scaled, *tensors((K, N), (1,)), multiply=lambda x, w: x @ w),
    ]  # fmt: skip
    assert signature not in [decode.signature for decode in differ]


def test_what_the_product_makes_of_it_is_a_part_of_the_signature(decode_of):
    (live,) = tensors((K, K))
    by_rows, by_columns = (decode_of(lambda w: w + 1, live, multiply=f) for f in (linear, lambda x, w: x @ w))
    assert by_rows.signature != by_columns.signature


def test_literals_are_a_part_of_the_signature(decode_of):
    live = tensors((N, K))
    signatures = {decode_of(lambda w, by=by: w * by, *live).signature for by in (2.0, 3.0, 2)}
    assert len(signatures | {decode_of(lambda w, by=by: w.mul(other=by), *live).signature for by in (2.0, 3.0)}) == 5


def test_tensors_are_its_values_leaves_first_each_memory_once(decode_of):
    live = tensors((N, K), (N, 1))
    decode = decode_of(lambda a, b: (a.view(N, K).abs().view(N, 2, -1) * b[:, None]).flatten(1), *live)
    found = [(decode.nodes[i], value) for i, value in decode.tensors]
    assert [node for node, _ in found[:2]] == decode.leaves
    assert all(example(node) is value for node, value in found)
    targets = [node.target for node, _ in found[2:]]
    assert targets[0] == "abs" and "view" not in targets and "getitem" not in [str(t) for t in targets]


def test_views_that_turn_or_cut_are_tensors_of_their_own(decode_of):
    (live,) = tensors((K, N))
    decode = decode_of(lambda a: (a + 0).t()[1:].abs(), live)
    assert [tuple(value.shape) for _, value in decode.tensors] == [(K, N), (K, N), (N, K), (N - 1, K), (N - 1, K)]
    assert decode.leaf_indices == {decode.nodes.index(decode.leaves[0])}


def test_the_first_view_of_a_leaf_is_a_tensor_of_its_own(decode_of):
    (live,) = tensors((K, N))
    decode = decode_of(lambda a: a.t().abs(), live)
    assert [tuple(value.shape) for _, value in decode.tensors] == [(K, N), (N, K), (N, K)]


def test_other_bytes_of_one_memory_are_tensors_of_their_own(decode_of):
    def function(a: Tensor) -> Tensor:
        b = a + 0
        first, second = b.split(N)
        turned = b.view(N, 2, K).transpose(0, 1), b.view(2, K, N).transpose(1, 2)
        return first * second + b.view(torch.float32)[:N] + turned[0][0] + turned[1][0].T.reshape(N, K)

    decode = decode_of(function, torch.randint(0, 99, (2 * N, K), dtype=torch.int32))
    found = [(tuple(v.shape), v.storage_offset(), v.dtype, v.is_contiguous()) for _, v in decode.tensors]
    for expected in (
        ((N, K), N * K, torch.int32, True),
        ((N, K), 0, torch.int32, True),
        ((2 * N, K), 0, torch.float32, True),
        ((2, N, K), 0, torch.int32, False),
        ((2, N, K), 0, torch.int32, False),
    ):
        assert expected in found
    assert found.count(((2, N, K), 0, torch.int32, False)) == 2


def test_numbers_are_the_floats_of_its_operations(decode_of):
    def function(a: Tensor) -> Tensor:
        return torch.where(a > 0.5, torch.tensor([0.25, 3.0, 0.0]).sum(), a * 0.5).mul(other=1.5) / 7 + float("inf")

    assert decode_of(function, *tensors((N, K))).numbers == [0.5, 0.25, 3.0, 1.5]


def written_beside(a: Tensor) -> Tensor:
    a = a * 2.0
    a[3:].mul_(3)
    return a[1:3]


WINDOWS = {
    "all": (lambda a: a * 2.0, (N, K), []),
    "slice": (lambda a: (a * 2.0)[2:5], (N, K), [(2, N)]),
    "slice of a leaf": (lambda a: a[2:5], (N, K), [(2, N)]),
    "every other row": (lambda a: (a * 2.0)[1::2], (N, K), [(1, N, 2)]),
    "some of every third row": (lambda a: (a * 2.0)[1:5:3], (N, K), [(1, N, 3)]),
    "slice of a slice": (lambda a: (a * 2.0)[1:][2:4], (N, K), [(2, N - 1), (3, N)]),
    "slice before another": (written_beside, (N, K), [(1, N)]),
    "narrow": (lambda a: (a * 2.0).narrow(0, 1, 4), (N, K), [(1, N)]),
    "chunk": (lambda a: (a * 2.0).chunk(2)[1], (N, K), [(3, N)]),
    "split": (lambda a: (a * 2.0).split([2, 4])[1], (N, K), [(2, N)]),
    "last rows": (lambda a: (a * 2.0)[-2:], (N, K), [(N - 2, N)]),
    "slice, then cast": (lambda a: (a * 2.0)[2:5].to(torch.bfloat16).float(), (N, K), [(2, N)]),
    "cast, then slice": (lambda a: (a * 2.0).to(torch.bfloat16)[2:5], (N, K), [(2, N)]),
    "slice, then contiguous": (lambda a: (a * 2.0)[2:5].contiguous(), (N, K), [(2, N)]),
    "index of a stack": (lambda a: (a * 2.0)[1], (3, N, K), [(N, 3 * N)]),
    "slice of an index of a stack": (lambda a: (a * 2.0)[1][2:4], (3, N, K), [(N + 2, 3 * N)]),
    "unbind": (lambda a: (a * 2.0).unbind()[2], (3, N, K), [(2 * N, 3 * N)]),
    "cut by arithmetic": (lambda a: (a * 2.0)[2:5] + 0.0, (N, K), []),
}


@pytest.mark.parametrize("function, shape, expected", WINDOWS.values(), ids=WINDOWS)
def test_windows_are_the_rows_of_what_it_is_a_view_of(decode_of, function, shape, expected):
    (live,) = tensors(shape)
    decode, rows = decode_of(function, live), function(live).shape[0]
    first, *found = decode.windows
    assert first == Window(0, rows) and {Window(*window) for window in expected} <= set(found)
    for window in found:
        assert len(range(window.total)[window.rows(rows)]) == rows and window.start >= 0
    assert len(set(found)) == len(found)
    if not expected:
        assert not found


def test_windows_of_columns_that_were_turned(decode_of):
    """Rows of the weight are columns of what it is cut from."""
    (live,) = tensors((K, N))
    decode = decode_of(lambda a: (a * 2.0)[:, 2:5], live, multiply=lambda x, w: x @ w)
    assert Window(2, N) in decode.windows


def cat(dim: int):
    return lambda a, b: torch.cat((a.abs(), b.neg()), dim)


TIMES = {"linear": linear, "matmul": lambda x, w: x @ w}
PARTS = {
    "cat of rows": (cat(0), ((2, K), (4, K)), "linear", 0),
    "cat of columns": (cat(1), ((N, K), (N, 2 * K)), "linear", 1),
    "cat of the last axis": (cat(-1), ((N, K), (N, 2 * K)), "linear", 1),
    "concat": (lambda a, b: torch.concat((a.abs(), b.neg())), ((2, K), (4, K)), "linear", 0),
    "cat by keywords": (lambda a, b: torch.cat(tensors=[a.abs(), b.neg()], dim=1), ((N, K), (N, K)), "linear", 1),
    "cat by axis": (lambda a, b: torch.cat((a.abs(), b.neg()), axis=1), ((N, K), (N, 2 * K)), "linear", 1),
    "cat, transposed": (lambda a, b: cat(0)(a, b).T, ((2, K), (4, K)), "matmul", 0),
    "cat, turned twice": (lambda a, b: cat(0)(a, b).T.t(), ((2, K), (4, K)), "linear", 0),
    "cat of columns, transposed": (lambda a, b: cat(1)(a, b).t(), ((N, K), (N, K)), "matmul", 1),
    "cat, transposed by keywords": (
        lambda a, b: torch.transpose(input=cat(0)(a, b), dim0=0, dim1=1), ((2, K), (4, K)), "matmul", 0,
    ),
    "cat of [k, n]": (cat(1), ((K, 2), (K, 4)), "matmul", 0),
    "cat of [k, n] along k": (cat(0), ((K, N), (2 * K, N)), "matmul", 1),
    "cat, then cast": (lambda a, b: cat(0)(a, b).to(torch.bfloat16), ((2, K), (4, K)), "linear", 0),
    "cat, transposed, then cast": (lambda a, b: cat(0)(a, b).T.bfloat16(), ((2, K), (4, K)), "matmul", 0),
    "stack": (lambda a, b: torch.stack((a.abs(), b.neg())), ((K, N), (K, N)), "matmul", 0),
    "cat of a batch": (cat(0), ((1, K, N), (3, K, N)), "matmul", 0),
    "cat of the columns of a batch": (cat(1), ((2, K, N), (2, K, N)), "matmul", 1),
}  # fmt: skip


@pytest.mark.parametrize("function, shapes, multiply, expected", PARTS.values(), ids=PARTS)
def test_parts_are_what_a_concatenation_is_made_of(decode_of, function, shapes, multiply, expected):
    live = tensors(*shapes)
    decode = decode_of(function, *live, multiply=TIMES[multiply])
    axis, parts = decode.parts
    assert (axis, len(parts)) == (expected, 2)
    assert [[decode.leaves.index(leaf) for leaf in part.leaves] for part in parts] == [[0], [1]]
    values = [part.weight([leaf]) for part, leaf in zip(parts, live, strict=True)]
    whole = decode.weight(live)
    assert torch.equal(torch.cat(values, axis).to(whole.dtype), whole)
    assert [(part.rows, part.matrices.k) for part in parts] == [value.shape for value in values]


WHOLE = {
    "arithmetic after": lambda a, b: cat(0)(a, b) * 2.0,
    "arithmetic": lambda a, b: a + b,
    "slice after": lambda a, b: cat(0)(a, b)[1:],
}


@pytest.mark.parametrize("function", WHOLE.values(), ids=WHOLE)
def test_what_is_no_concatenation_has_no_parts(decode_of, function):
    assert decode_of(function, *tensors((N, K), (N, K))).parts == (0, [])


def test_a_concatenation_of_inner_rows_has_no_parts(decode_of):
    """The rows of each matrix of a batch would come from both."""
    decode = decode_of(cat(2), *tensors((2, K, N), (2, K, N)), multiply=lambda x, w: x @ w)
    assert decode.parts == (0, [])


def test_a_concatenation_of_kernels_has_no_parts(decode_of):
    live = tensors((2, K, 1), (4, K, 1))
    assert decode_of(cat(0), *live, multiply=lambda x, w: torch.conv1d(x.T, w), k=K).parts == (0, [])


def test_parts_of_a_stack_have_no_parts(decode_of):
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack((torch.cat((a, a * 2.0)), b))

    decode = decode_of(function, *tensors((K // 2, N), (K, N)), multiply=lambda x, w: x @ w)
    _, (first, _) = decode.parts
    assert first.lift == 0 and first.parts == (0, [])
