"""Sizes of the blocks of the kernels for Hopper: which there can be, which fit, and which are the default."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

COMPUTE = 2
"""Warpgroups that compute; one more copies."""

WIDEST_OF_BOTH = 128
"""Of heads of which one kernel holds the sums of both keys' and values' gradients."""

SHARED_BYTES = 227 * 1024
"""Shared memory that a block of threads of compute capability 9.0 may have."""

_ALIGNMENT = 1024
"""Of every array there (`SMEM_ALIGNMENT` of jax 0.11.2)."""
_SCRATCH = 2048
"""What sums and maxima of rows take besides (`reduction_scratch_bytes`)."""

Kernel = Literal["forward", "query_gradient", "key_gradients"]

_ROWS = 128
"""Rows are padded to a multiple of it, whatever the tiles."""
_M = 64
"""Rows of a product of the tensor cores (`wgmma`): a warpgroup's queries, or its keys where it owns these."""
_REGISTERS = 224
"""Of a thread's 240, what the matrices of tiles that are tried may take: more would leave the registers."""


@dataclass(frozen=True)
class Tile:
    """What a warpgroup works on at a time."""

    queries: int
    keys: int
    stages: int
    """Blocks that shared memory holds of what is copied while others are used."""

    def __str__(self) -> str:
        """`64x128x2`."""
        return f"{self.queries}x{self.keys}x{self.stages}"


@dataclass(frozen=True)
class Tiles:
    """Those of the three kernels."""

    forward: Tile
    query_gradient: Tile
    key_gradients: Tile

    def __str__(self) -> str:
        """`forward 64x128x2, query_gradient ...`."""
        return ", ".join(f"{name} {tile}" for name, tile in self.by_kernel().items())

    def by_kernel(self) -> dict[Kernel, Tile]:
        """The same by name."""
        return {
            "forward": self.forward,
            "query_gradient": self.query_gradient,
            "key_gradients": self.key_gradients,
        }


def tiles_of(width: int, *, plain: bool) -> Tiles:
    """Tiles that fit into shared memory and hardly leave the registers.

    Args:
      width: of a head, a multiple of 16 up to 256.
      plain: whether the scores have neither soft cap nor dropout, whose numbers need registers too.
    """
    if width <= 64:
        return Tiles(Tile(64, 128, 4), Tile(64, 128 if plain else 64, 4), Tile(64, 64, 4))
    if width <= 128:
        return Tiles(Tile(64, 128, 2), Tile(64, 128 if plain else 64, 2), Tile(64 if plain else 32, 64, 3))
    if width <= 192:
        return Tiles(Tile(64, 64, 3), Tile(64, 64, 2), Tile(64 if plain else 32, 64, 2))
    return Tiles(Tile(64, 64, 2), Tile(64, 32, 2), Tile(32, 64, 2))


def padded(width: int) -> int:
    """The width of a head as the kernels have it."""
    return -(-width // 16) * 16


def row_multiple(tiles: Tiles) -> int:
    """What rows are padded to a multiple of: that of every tile."""
    sizes = [size for tile in tiles.by_kernel().values() for size in (tile.queries, tile.keys)]
    return math.lcm(_ROWS, *sizes)


def shared_bytes(kernel: Kernel, tile: Tile, width: int, *, dropout: bool) -> int:
    """Shared memory of a block of threads, barriers and all.

    Args:
      kernel: which of the three.
      tile: its sizes.
      width: of a head, a multiple of 16.
      dropout: whether weights are dropped.
    """
    owned, met = (tile.keys, tile.queries) if kernel == "key_gradients" else (tile.queries, tile.keys)
    own = [2 * COMPUTE * owned * width] * (1 if kernel == "forward" else 2)
    ring = [2 * tile.stages * met * width] * 2
    # Of each query what it sees; its log-sum-exp, and behind it the sum with the cotangent; random words.
    copies = tile.stages if kernel == "key_gradients" else COMPUTE
    pair = 4 * 2 * copies * tile.queries
    vectors = [pair, pair // 2 if kernel == "forward" else pair, *([pair] if dropout else [])]
    scratch = _SCRATCH if kernel == "forward" else 0
    barriers = 8 * (COMPUTE + 4 * tile.stages + 1)
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in (*own, *ring, *vectors, scratch)) + barriers


def obstacle(tiles: Tiles, width: int, *, dropout: bool) -> str | None:
    """Why the kernels cannot take these tiles; None: they can."""
    for kernel, tile in tiles.by_kernel().items():
        owned, met = (tile.keys, tile.queries) if kernel == "key_gradients" else (tile.queries, tile.keys)
        if owned != _M or met % 16 or not 16 <= met <= 256 or not 2 <= tile.stages <= 8:
            return f"{kernel} {tile}: there is no such tile"
        if (taken := shared_bytes(kernel, tile, padded(width), dropout=dropout)) > SHARED_BYTES:
            return f"{kernel} {tile} takes {taken:,} bytes of shared memory, over {SHARED_BYTES:,}"
    return None


def candidates(kernel: Kernel, tiles: Tiles, width: int, *, dropout: bool) -> Sequence[Tiles]:
    """What is worth a trial of one kernel, the others as they are: what fits, and stays in the registers.

    Args:
      kernel: which of the three.
      tiles: the best so far, which come first.
      width: of a head.
      dropout: whether weights are dropped.
    """
    found = [tiles]
    for met in (32, 64, 128, 256):
        if _registers(kernel, met, padded(width)) > _REGISTERS:
            continue
        for stages in (2, 3, 4):
            tile = Tile(met, _M, stages) if kernel == "key_gradients" else Tile(_M, met, stages)
            other = dataclasses.replace(tiles, **{kernel: tile})
            if other != tiles and obstacle(other, width, dropout=dropout) is None:
                found.append(other)
    return found


def _registers(kernel: Kernel, met: int, width: int) -> int:
    """Of a thread, what its scores, weights and sums take: 128 threads share 64 rows of each matrix."""
    sums = width // 2
    if kernel == "forward":
        return sums + met // 2 + met // 4
    if kernel == "key_gradients" and width <= WIDEST_OF_BOTH:
        sums *= 2
    return sums + met
