"""Equations of labelled axes: each spelling is what torch computes, and so are its matrices."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from marlin_w4a16.passes.find import equation
from marlin_w4a16.passes.find.equation import Equation, Matrices, matrices

SPELLINGS: dict[str, tuple[Callable, Callable]] = {
    "linear": (linear, equation.linear), "matmul": (torch.matmul, equation.matmul),
    "matmul left": (lambda x, w: torch.matmul(w, x), equation.matmul_left), "inner": (torch.inner, equation.inner),
    "conv1d": (torch.conv1d, equation.conv1d), "conv2d": (torch.conv2d, equation.conv2d),
}  # fmt: skip
CASES = [
    ("linear", (5,), (3, 5), "k,nk->n"), ("linear", (2, 5), (3, 5), "Ak,nk->An"),
    ("linear", (4, 2, 5), (3, 5), "ABk,nk->ABn"), ("matmul", (5,), (5, 3), "k,kn->n"),
    ("matmul", (2, 5), (5, 3), "mk,kn->mn"), ("matmul", (4, 2, 5), (5, 3), "Amk,kn->Amn"),
    ("matmul", (4, 2, 5), (4, 5, 3), "Amk,Akn->Amn"), ("matmul", (2, 5), (4, 5, 3), "mk,Akn->Amn"),
    ("matmul", (5,), (4, 5, 3), "k,Akn->An"), ("matmul", (7, 4, 2, 5), (4, 5, 3), "ABmk,Bkn->ABmn"),
    ("matmul", (4, 2, 5), (7, 4, 5, 3), "Bmk,ABkn->ABmn"), ("matmul", (4, 2, 5), (1, 5, 3), "Amk,kn->Amn"),
    ("matmul left", (5,), (3, 5), "k,nk->n"), ("matmul left", (5, 2), (3, 5), "km,nk->nm"),
    ("matmul left", (4, 5, 2), (3, 5), "Akm,nk->Anm"), ("matmul left", (4, 5, 2), (4, 3, 5), "Akm,Ank->Anm"),
    ("matmul left", (5, 2), (4, 3, 5), "km,Ank->Anm"), ("matmul left", (5,), (4, 3, 5), "k,Ank->An"),
    ("inner", (5,), (3, 5), "z,az->a"), ("inner", (2, 5), (3, 5), "Az,az->Aa"),
    ("inner", (4, 2, 5), (3, 7, 5), "ABz,abz->ABab"), ("conv1d", (5, 7), (3, 5, 1), "kl,nk->nl"),
    ("conv1d", (2, 5, 7), (3, 5, 1), "bkl,nk->bnl"), ("conv2d", (5, 7, 6), (3, 5, 1, 1), "khw,nk->nhw"),
    ("conv2d", (2, 5, 7, 6), (3, 5, 1, 1), "bkhw,nk->bnhw"),
]  # fmt: skip


def operands(x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(x, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)


def by_matrices(axes: Equation, seen: Matrices, x: Tensor, weight: Tensor) -> Tensor:
    """The product as one matmul for each index of the batch."""
    order = axes.batch + axes.free + axes.columns
    ordered = x.permute([axes.x.index(label) for label in order])
    sizes = dict(zip(axes.x, x.shape, strict=True)) | dict(zip(axes.batch + axes.rows, seen.sizes, strict=True))
    rows = seen(weight)
    assert rows.shape == (seen.batch * seen.n, seen.k)
    y = ordered.reshape(seen.batch, -1, seen.k) @ rows.view(seen.batch, seen.n, seen.k).mT
    order = axes.batch + axes.free + axes.rows
    return y.reshape([sizes[label] for label in order]).permute([order.index(label) for label in axes.out])


@pytest.mark.parametrize("name, x, weight, expected", CASES, ids=[f"{case[0]} {case[3]}" for case in CASES])
def test_a_spelling_is_its_equation(name, x, weight, expected):
    function, spelled = SPELLINGS[name]
    x, weight = operands(x, weight)
    axes, seen = matrices(spelled(x.ndim, weight.ndim), weight)
    assert str(axes) == expected and axes.refusal() is None
    y = function(x, weight)
    torch.testing.assert_close(torch.einsum(str(axes), x, weight.squeeze()), y)
    torch.testing.assert_close(by_matrices(axes, seen, x, weight), y)


EINSUMS = [
    ("bk,nk->bn", (2, 5), (3, 5), "bk,nk->bn"), (" b k , n k -> n b ", (2, 5), (3, 5), "bk,nk->nb"),
    ("kb,kn->bn", (5, 2), (5, 3), "kb,kn->bn"), ("...k,nk->...n", (4, 2, 5), (3, 5), "abk,nk->abn"),
    ("...k,nk->n...", (4, 2, 5), (3, 5), "abk,nk->nab"), ("...k,nk->...n", (5,), (3, 5), "k,nk->n"),
    ("bk...,nk->b...n", (2, 5, 4), (3, 5), "bka,nk->ban"), ("bk,nk", (2, 5), (3, 5), "bk,nk->bn"),
    ("nk,bk", (2, 5), (3, 5), "nk,bk->bn"), ("Bk,nk", (2, 5), (3, 5), "Bk,nk->Bn"),
    ("...k,nk", (4, 2, 5), (3, 5), "abk,nk->abn"), ("dcbk,ak", (4, 2, 6, 5), (3, 5), "dcbk,ak->abcd"),
    ("...a,ba->...b", (4, 2, 5), (3, 5), "cda,ba->cdb"), ("bek,enk->ben", (2, 4, 5), (4, 3, 5), "bek,enk->ben"),
    ("bij,nji->bn", (2, 5, 7), (3, 7, 5), "bij,nji->bn"), ("bk,hnk->bhn", (2, 5), (4, 3, 5), "bk,hnk->bhn"),
    ("bk,hnk->nbh", (2, 5), (4, 3, 5), "bk,hnk->nbh"),
    ("ghbk,hgnk->bhng", (6, 4, 2, 5), (4, 6, 3, 5), "ghbk,hgnk->bhng"),
]  # fmt: skip


@pytest.mark.parametrize("x_first", [True, False])
@pytest.mark.parametrize("spelled, x, weight, expected", EINSUMS, ids=[case[0] for case in EINSUMS])
def test_an_einsum_is_read_as_torch_reads_it(spelled, x, weight, expected, x_first):
    x, weight = operands(x, weight)
    if not x_first:
        terms, arrow, out = spelled.partition("->")
        spelled = ",".join(reversed(terms.split(","))) + arrow + out
    axes = equation.einsum(spelled, x.ndim, weight.ndim, x_first)
    y = torch.einsum(spelled, *((x, weight) if x_first else (weight, x)))
    assert str(axes) == expected and axes.refusal() is None
    torch.testing.assert_close(torch.einsum(str(axes), x, weight), y)
    torch.testing.assert_close(by_matrices(*matrices(axes, weight), x, weight), y)


@pytest.mark.parametrize(
    "spelled, x, weight, why",
    [
        ("bk->b", 2, 2, "'bk->b' has 1 operands, expected 2"),
        ("bk,nk,k->bn", 2, 2, "'bk,nk,k->bn' has 3 operands, expected 2"),
        ("bk,...nk->b...n", 2, 3, "'bk,...nk->b...n' does not name the axes of operands of 2 and 3 dimensions"),
        ("bk,nk->bn", 3, 2, "'bk,nk->bn' does not name the axes of operands of 3 and 2 dimensions"),
    ],
)
def test_an_einsum_that_is_not_read_says_why(spelled, x, weight, why):
    assert equation.einsum(spelled, x, weight, x_first=True) == why


@pytest.mark.parametrize("x_first", [True, False])
@pytest.mark.parametrize(
    "x, weight, of_x, of_weight",
    [
        ((2, 5), (5, 3), [1], [0]), ((2, 5), (3, 5), [1], [1]), ((2, 5), (3, 5), [-1], [-1]),
        ((4, 2, 5), (3, 5), [2], [1]), ((5, 4, 2), (3, 5, 7), [0], [1]), ((2, 5, 7), (3, 5, 7), [1, 2], [1, 2]),
        ((2, 5, 7), (7, 3, 5), [1, 2], [2, 0]),
    ],
)  # fmt: skip
def test_a_tensordot_is_read_as_torch_reads_it(x, weight, of_x, of_weight, x_first):
    x, weight = operands(x, weight)
    dims = (of_x, of_weight) if x_first else (of_weight, of_x)
    y = torch.tensordot(*((x, weight) if x_first else (weight, x)), dims=dims)
    axes = equation.tensordot(dims, x.ndim, weight.ndim, x_first)
    assert axes.refusal() is None
    torch.testing.assert_close(torch.einsum(str(axes), x, weight), y)
    torch.testing.assert_close(by_matrices(*matrices(axes, weight), x, weight), y)


@pytest.mark.parametrize("dims", [1, 2])
def test_a_tensordot_of_so_many_axes(dims):
    x, weight = operands((2, 5, 7), (5, 7, 3) if dims == 2 else (7, 3))
    axes = equation.tensordot(dims, x.ndim, weight.ndim, x_first=True)
    torch.testing.assert_close(torch.einsum(str(axes), x, weight), torch.tensordot(x, weight, dims))


def test_a_tensordot_of_other_dims_is_not_read():
    assert equation.tensordot(([1], [0, 1]), 2, 2, x_first=True) == "dims ([1], [0, 1])"
    assert equation.tensordot(([1],), 2, 2, x_first=True) == "dims ([1],)"


@pytest.mark.parametrize(
    "spelled, why",
    [
        ("bk,n->bn", "is no matrix product"),  # nothing is summed with the weight
        ("bk,bk->b", "is no matrix product"),  # the weight has no rows
        ("bkk,nk->bn", "has an axis twice"),
        ("bk,nkn->bn", "has an axis twice"),
        ("bk,nk->bnn", "has an axis twice"),
        ("bk,nk->n", "sums x alone"),
        ("bk,nkj->bn", "sums the weight alone"),
        ("bk,nk->bnz", "has an axis of neither operand"),
    ],
)
def test_what_is_no_product_by_matrices_is_refused(spelled, why):
    x, weight, out = spelled.replace("->", ",").split(",")
    assert Equation(x, weight, out).refusal() == f"{spelled} {why}"


def test_the_kinds_of_axes():
    axes = Equation("ghbk", "hgnk", "bhng")
    assert (axes.rows, axes.columns, axes.batch, axes.free) == ("n", "k", "hg", "b")


def seen_as(spelled: str, weight: Tensor) -> tuple[str, Matrices]:
    x, labels, out = spelled.replace("->", ",").split(",")
    axes, seen = matrices(Equation(x, labels, out), weight)
    return str(axes), seen


@pytest.mark.parametrize(
    "spelled, shape, expected, seen",
    [
        ("bk,nk->bn", (3, 5), "bk,nk->bn", Matrices((), (0, 1), 1, 3, 5, (3,))),
        ("bk,kn->bn", (5, 3), "bk,kn->bn", Matrices((), (1, 0), 1, 3, 5, (3,))),
        ("bkl,nko->bnl", (3, 5, 1), "bkl,nk->bnl", Matrices((2,), (0, 1), 1, 3, 5, (3,))),
        ("bkl,nko->bnl", (3, 5, 2), "bkl,nko->bnl", Matrices((), (0, 1), 1, 3, 5, (3,))),  # refused later
        ("Amk,Akn->Amn", (1, 5, 3), "Amk,kn->Amn", Matrices((0,), (1, 0), 1, 3, 5, (3,))),
        ("Amk,Akn->Amn", (2, 5, 3), "Amk,Akn->Amn", Matrices((), (0, 2, 1), 2, 3, 5, (2, 3))),
        ("mk,Akn->Amn", (1, 5, 3), "mk,Akn->Amn", Matrices((), (0, 2, 1), 1, 3, 5, (1, 3))),  # out has that axis
        ("bk,nk->bn", (3, 1), "bk,nk->bn", Matrices((), (0, 1), 1, 3, 1, (3,))),
        ("bij,hnji->bhn", (2, 3, 5, 7), "bij,hnji->bhn", Matrices((), (0, 1, 2, 3), 1, 6, 35, (2, 3))),
        ("efbk,efnk->efbn", (2, 4, 3, 5), "efbk,efnk->efbn", Matrices((), (0, 1, 2, 3), 8, 3, 5, (2, 4, 3))),
    ],
)
def test_a_weight_is_seen_as_matrices(spelled, shape, expected, seen):
    assert seen_as(spelled, torch.randn(shape)) == (expected, seen)


def test_axes_along_which_a_weight_is_expanded_say_nothing():
    weight = torch.randn(3, 5)
    axes, seen = seen_as("efbk,efnk->efbn", weight.expand(2, 4, 3, 5))
    assert (axes, seen) == ("efbk,nk->efbn", Matrices((0, 1), (0, 1), 1, 3, 5, (3,)))
    assert torch.equal(seen(weight.expand(2, 4, 3, 5)), weight)


@pytest.mark.parametrize("spelled", ["bk,nk->bn", "mk,ank->amn"])
def test_rows_and_columns_that_are_expanded_stay(spelled):
    weight = torch.randn(1, 5).expand(3, 5) if spelled.startswith("b") else torch.randn(3, 5).expand(2, 3, 5)
    axes, seen = seen_as(spelled, weight)
    assert axes == spelled and seen.first == () and torch.equal(seen(weight), weight.reshape(-1, 5))


def test_matrices_stand_below_each_other():
    weight = torch.arange(2 * 4 * 5 * 3).view(2, 4, 5, 3)
    _, seen = seen_as("efbk,efkn->efbn", weight)
    assert torch.equal(seen(weight), torch.cat([m.T for m in weight.flatten(0, 1)]))


@pytest.mark.parametrize("spelled", [partial(f, 2) for name, (_, f) in SPELLINGS.items() if "conv" not in name])
def test_labels_suffice_for_many_axes(spelled):
    weight = 2 if spelled.func is equation.linear else 8
    assert spelled(weight).refusal() is None
