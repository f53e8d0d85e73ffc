"""The order of the Hopper kernel for more tokens: what its producer, its consumers and its sums agree on.

The product is cut into tiles of ``rows`` weight rows and ``block_m`` tokens, and these into units of ``64 * tiles``
columns. Programs take whole tiles in turn. The units of a last wave that is too small for all of them are shared out
evenly (stream-K after a data-parallel part: Osama et al., 2023).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def share(pid, units, whole, rest, sharers, programs):
    """How many whole tiles a program has, and its first and last unit of the rest, ``rest`` tiles."""
    own = (whole - pid + programs - 1) // programs
    total = (rest * units).to(gl.int64)
    first = (gl.minimum(pid, sharers) * total // sharers).to(gl.int32)
    last = (gl.minimum(pid + 1, sharers) * total // sharers).to(gl.int32)
    return own, first, last


@gluon.jit
def place(tile, tiles_n, tiles_m):
    """Row and token block of a tile: bands of eight token blocks, so that what runs at one time shares its operands."""
    band = tile // (8 * tiles_n)
    wide = gl.minimum(tiles_m - band * 8, 8)
    at = tile - band * 8 * tiles_n
    return at // wide, band * 8 + at % wide


@gluon.jit
def unit(step, pid, own, first, tiles_n, tiles_m, units, whole, programs):
    """Row block, token block and unit of the columns of a step."""
    shared = step >= own * units
    at = gl.where(shared, first + step - own * units, step)
    tile = at // units
    block_n, block_m = place(gl.where(shared, whole + tile, pid + tile * programs), tiles_n, tiles_m)
    return block_n, block_m, at - tile * units
