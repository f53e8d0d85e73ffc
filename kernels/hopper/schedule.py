"""The order of the Hopper kernel for more tokens: what its producer, its consumers and its sums agree on.

The product is cut into tiles of ``rows`` weight rows and ``block_m`` tokens, and the columns of each into k-blocks of
``64 * tiles``. Programs take whole tiles in turn. The k-blocks of a last wave that is too small for all of them are
shared out evenly (stream-K after a data-parallel part: Osama et al., 2023).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Work(NamedTuple):
    """What there is to do, and how it is divided (`launch.division`); integers or scalars of a kernel.

    Attributes:
        tiles_n, tiles_m: tiles along the rows of the weight and along the tokens.
        k_blocks: of a tile.
        whole: tiles that are taken whole.
        rest: tiles after them, whose k-blocks are shared.
        sharers: programs that share them.
        programs: all programs.
    """

    tiles_n: Any
    tiles_m: Any
    k_blocks: Any
    whole: Any
    rest: Any
    sharers: Any
    programs: Any


@gluon.jit
def share(pid, work):
    """How many whole tiles a program has, and its first and last k-block of the rest."""
    own = (work.whole - pid + work.programs - 1) // work.programs
    total = (work.rest * work.k_blocks).to(gl.int64)
    first = (gl.minimum(pid, work.sharers) * total // work.sharers).to(gl.int32)
    last = (gl.minimum(pid + 1, work.sharers) * total // work.sharers).to(gl.int32)
    return own, first, last


@gluon.jit
def place(tile, tiles_n, tiles_m):
    """Row and token block of a tile: bands of eight token blocks, so that what runs at one time shares its operands."""
    band = tile // (8 * tiles_n)
    wide = gl.minimum(tiles_m - band * 8, 8)
    at = tile - band * 8 * tiles_n
    return at // wide, band * 8 + at % wide


@gluon.jit
def k_block(step, pid, own, first, work):
    """Row block, token block and k-block of a step."""
    shared = step >= own * work.k_blocks
    at = gl.where(shared, first + step - own * work.k_blocks, step)
    tile = at // work.k_blocks
    tile_of = gl.where(shared, work.whole + tile, pid + tile * work.programs)
    block_n, block_m = place(tile_of, work.tiles_n, work.tiles_m)
    return block_n, block_m, at - tile * work.k_blocks
