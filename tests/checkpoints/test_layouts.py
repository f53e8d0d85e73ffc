"""What is stored in any layout is read as rows, low nibble first, and comes back."""

import pytest
import torch

from checkpoints.packed import in_tiles
from marlin_w4a16.checkpoints.layouts import ROWS, Layout

N, K, GROUP = 130, 96, 32  # neither fills its tiles of scales
CODES = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SCALES = torch.randint(0, 255, (N, K // GROUP), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_words_are_little_endian():
    words = Layout("words").write_codes(CODES, GROUP)
    held = words.to(torch.int64)
    assert words.shape == (N, K // 8)
    assert torch.equal(torch.stack([held >> 8 * i & 255 for i in range(4)], -1).flatten(-2), CODES.long())
    assert torch.equal(Layout("words").read_codes(words), CODES)


def test_blocks_are_an_axis_of_their_own():
    blocks = Layout("blocks").write_codes(CODES, GROUP)
    assert blocks.shape == (N, K // GROUP, GROUP // 2) and torch.equal(blocks[:, 1], CODES[:, 16:32])
    assert torch.equal(Layout("blocks").read_codes(blocks), CODES)


@pytest.mark.parametrize("rows", [1, 7, 32, 130, 200])
def test_rows_share_their_scales(rows):
    layout, shared = Layout(rows=rows), SCALES[torch.arange(N) // rows * rows]
    stored = layout.write_scales(shared)
    assert stored.shape == layout.scales_shape(N, K // GROUP) == (-(-N // rows), K // GROUP)
    assert torch.equal(layout.read_scales(stored, N, K // GROUP), shared)


def test_scales_lie_in_tiles():
    layout = Layout(tiles=True)
    stored = layout.write_scales(SCALES)
    assert torch.equal(stored, in_tiles(SCALES)) and stored.shape == layout.scales_shape(N, K // GROUP)
    assert torch.equal(layout.read_scales(stored, N, K // GROUP), SCALES)


def test_tiles_that_are_not_padded_with_zeros_would_not_come_back():
    stored = in_tiles(SCALES)
    stored[-1, -1] = 1
    with pytest.raises(ValueError, match="found tiles of scales that are not padded with zeros, expected zeros"):
        Layout(tiles=True).read_scales(stored, N, K // GROUP)


def test_what_shapes_tell():
    assert ROWS.plain and Layout("blocks").plain
    assert not any(layout.plain for layout in (Layout("words"), Layout(tiles=True), Layout(rows=2)))
    assert [layout.columns(12) for layout in (ROWS, Layout("words"))] == [24, 96]
    assert Layout(rows=4).told("32") == "[n / 4, k / 32]"
    assert Layout(tiles=True).told("16") == "[ceil(n / 128) * 32, ceil(k / 16 / 4) * 16], tiles of 128 by 4"
