"""The tables of tiles in Triton's interpreter, against lists made in Python."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from marlin_w4a16.kernels.blocks.experts import local_experts
from marlin_w4a16.kernels.decode.tiles import Tiles, most_tiles
from narrow import matrix, wide

BLOCKS = (16, 32, 64)


def assert_tiles(tiles: Tiles, groups: list[Tensor], block_m: int) -> None:
    """Every pair of every expert is in one tile of that expert, in order; what is past the last says so."""
    wanted = [(expert, part) for expert, pairs in enumerate(groups) if len(pairs) for part in pairs.split(block_m)]
    used = len(wanted)
    assert tiles.count.tolist() == [used] and tiles.block_m == block_m
    assert tiles.experts.tolist() == [expert for expert, _ in wanted] + [-1] * (len(tiles.experts) - used)
    for (_, pairs), start, stop in zip(wanted, tiles.starts.tolist(), tiles.stops.tolist(), strict=False):
        places = torch.arange(start, min(start + block_m, stop))
        assert torch.equal(places if tiles.order is None else tiles.order[places], pairs)
    if tiles.order is not None:
        order = torch.cat(groups)
        assert tiles.order.tolist() == order.tolist() + [-1] * (len(tiles.order) - len(order))
        if tiles.places is not None:
            places = torch.full_like(tiles.places, -1)
            places[order] = torch.arange(len(order), dtype=torch.int32)
            assert torch.equal(tiles.places, places)


def groups_of(ids: Tensor, expert_map: Tensor | None, experts: int) -> list[Tensor]:
    local = local_experts(ids, expert_map, experts)
    return [(local == expert).nonzero()[:, 0] for expert in range(experts)]


def random_ids(tokens: int, k: int, experts: int, how: str) -> Tensor:
    g = torch.Generator().manual_seed(tokens * k + experts)
    if how == "distinct":
        return torch.rand(tokens, experts, generator=g).topk(k).indices
    if how == "few":  # all on two experts, the same one twice
        return torch.randint(2, (tokens, k), generator=g) * (experts - 1)
    if how == "any":
        return torch.randint(-2, experts + 2, (tokens, k), generator=g)
    return torch.full((tokens, k), {"one": experts - 1, "none": -1, "beyond": 1 << 31}[how])


SIZES = [(1, 1, 1), (3, 2, 5), (33, 4, 32), (300, 8, 16), (1030, 2, 3)]
HOWS = ["distinct", "few", "any", "one", "none", "beyond"]


@pytest.mark.parametrize("tokens, k, experts", SIZES)
def test_every_local_pair_is_in_one_place_in_order(tokens, k, experts, interpret):
    ids = [random_ids(tokens, k, experts, how) for how in HOWS if how != "distinct" or k <= experts]
    cases = [(i, None, experts, BLOCKS[number % 3]) for number, i in enumerate(ids)]
    cases += [(ids[-4].int(), None, experts, 16), (ids[-5].t().contiguous().t(), None, experts, 16)]
    for found, case in zip(interpret(*(("tiles_of_experts", case) for case in cases)), cases, strict=True):
        assert_tiles(found, groups_of(*case[:3]), case[3])


def test_many_experts_and_choices(interpret):
    ids = random_ids(3, 22, 512, "distinct")
    (found,) = interpret(("tiles_of_experts", (ids, None, 512, 16)))
    assert_tiles(found, groups_of(ids, None, 512), 16)


@pytest.mark.parametrize("known", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_map_gives_the_place_of_an_expert(known, dtype, interpret):
    experts = 6
    expert_map = (torch.randperm(known + experts)[:known] - 3).to(dtype)  # some below, some past the end
    ids = torch.randint(-2, known + 2, (50, 3))
    (found,) = interpret(("tiles_of_experts", (ids, expert_map, experts, 16)))
    assert_tiles(found, groups_of(ids, expert_map, experts), 16)


@pytest.mark.parametrize(
    "dtype, experts",
    [
        (torch.uint8, 256), wide(torch.int16, 200), wide(torch.uint8, 200), wide(torch.int16, 256),
    ],
    ids=str,
)  # fmt: skip
def test_narrow_ids_of_many_experts(dtype, experts, interpret):
    """Pairs that are no whole block: what lies past the last has no expert, not even the last of a byte."""
    ids = torch.arange(0, 256, 5).view(13, 4).to(dtype)
    (found,) = interpret(("tiles_of_experts", (ids, None, experts, 16)))
    assert_tiles(found, groups_of(ids, None, experts), 16)


@pytest.mark.parametrize("with_map, tokens", matrix(lambda *at: sum(at) % 2 == 0, [False, True], [1, 3, 8, 60]))
def test_rows_of_tokens_stand_in_the_order_of_their_experts(tokens, with_map, interpret):
    ids = [random_ids(tokens, 3, 7, how) for how in HOWS]
    expert_map, x = torch.randperm(9) - 1 if with_map else None, torch.randn(70, tokens).half().T
    found = interpret(*(("sorted_tokens", (x, i, expert_map, 7, 8)) for i in ids))
    for (tiles, rows), i in zip(found, ids, strict=True):
        groups = groups_of(i, expert_map, 7)
        assert_tiles(tiles, groups, 8)
        order = torch.cat(groups)
        assert torch.equal(rows[: len(order)], x[order // 3])


def of_offsets(offsets: Tensor, rows: int) -> list[Tensor]:
    ends = [0, *(min(end, rows) for end in offsets.tolist()), rows]
    return [torch.arange(start, stop) for start, stop in pairwise(ends)]


OFFSETS = {
    "even": ([20, 40, 60, 80], 80), "empty groups": ([0, 0, 33, 33, 34], 34), "a tail": ([5, 5, 21], 60),
    "only a tail": ([0, 0], 40), "past the rows": ([10, 50], 40), "one group": ([129], 129), "one row": ([0, 1], 1),
}  # fmt: skip


@pytest.mark.parametrize("offsets, rows", OFFSETS.values(), ids=OFFSETS)
def test_rows_of_offsets_are_in_one_place_in_order(offsets, rows, interpret):
    offsets = torch.tensor(offsets)
    cases = [(of, rows, block) for of, block in product((offsets, offsets.int()), BLOCKS)]
    for found, case in zip(interpret(*(("tiles_of_offsets", case) for case in cases)), cases, strict=True):
        assert_tiles(found, of_offsets(offsets, rows), case[2])


def test_rows_of_many_groups(interpret):
    offsets = torch.randint(3, (270,)).cumsum(0)
    rows = int(offsets[-1]) + 37
    (found,) = interpret(("tiles_of_offsets", (offsets.int(), rows, 16)))
    assert_tiles(found, of_offsets(offsets, rows), 16)


@pytest.mark.parametrize("block_m", BLOCKS)
@pytest.mark.parametrize("experts", [1, 2, 7, 64])
def test_there_is_room_for_any_division_and_no_more(block_m, experts):
    g = torch.Generator().manual_seed(experts)
    for pairs in (1, 2, 5, 63, 64, 65, 200, 1000):
        most = most_tiles(pairs, experts, block_m)
        for _ in range(20):
            share = torch.rand(experts, generator=g).pow(4)
            counts = torch.multinomial(share, pairs, replacement=True, generator=g).bincount(minlength=experts)
            assert (-(-counts // block_m)).sum() <= most
        chosen = min(pairs, experts)  # all experts but one have one pair more than whole tiles
        whole = (pairs - chosen) // block_m
        assert most == whole + chosen
