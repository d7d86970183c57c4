"""The sizes of blocks that an implementation can be told to take: which there are, and which to try."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
from pydantic import TypeAdapter, ValidationError

from stack.kernels.attention import xla_chunked
from stack.kernels.attention.mosaic_gpu import sizes as mosaic_gpu
from stack.kernels.attention.request import Problem
from stack.kernels.attention.xla_chunked import BlockSizes

Tiles = mosaic_gpu.Tiles | BlockSizes


class Tiled(NamedTuple):
    """An implementation with tiles that are not its own."""

    kernel: str
    tiles: Tiles


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tiles that are tried together, and what is timed of each."""

    name: str
    passes: Literal["forward", "with gradients"]
    candidates: Callable[[Problem, Any], Sequence[Any]]
    """(problem, the best tiles so far) -> those to try, the best so far first."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Of one implementation."""

    kind: type[Tiles]
    default: Callable[[Problem], Tiles]
    """What it takes if it is not told."""
    obstacle: Callable[[Any, Problem], str | None]
    """Why it cannot take some tiles; None: it can."""
    parts: tuple[Part, ...]
    """One after another: each goes on with the best of the one before."""

    def plain(self, tiles: Tiles) -> dict[str, Any]:
        """As JSON holds them."""
        return dataclasses.asdict(tiles)

    def read(self, plain: Any, problem: Problem) -> Tiles:
        """The way back.

        Raises:
          ValueError: there are no such tiles, or they do not fit; in one line.
        """
        try:
            tiles = TypeAdapter(self.kind).validate_python(plain)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"tiles: {place}: {first['msg']}") from None
        if self.plain(tiles) != plain:
            raise ValueError(f"tiles {plain} are not {self.plain(tiles)}")
        if (told := self.obstacle(tiles, problem)) is not None:
            raise ValueError(told)
        return tiles


_MOST_SCORES = 2**26
_LONGEST = {"cpu": (64, 128, 256, 512, 1024), "gpu": (128, 256, 512, 1024, 2048)}
_SCORES = {"cpu": (2**16, 2**18, 2**20), "gpu": (2**22, 2**24, 2**25)}


def _platform(problem: Problem) -> str:
    return "cpu" if problem.request.platform == "cpu" else "gpu"


def _blocks_of(problem: Problem) -> BlockSizes:
    return xla_chunked.BLOCKS[_platform(problem)]


def _blocks_to_try(problem: Problem, best: BlockSizes) -> Sequence[BlockSizes]:
    """Those that cut the rows of a problem differently."""
    platform, found = _platform(problem), {_cut(problem, best): best}
    for longest, scores in itertools.product(_LONGEST[platform], _SCORES[platform]):
        sizes = BlockSizes(longest, scores)
        found.setdefault(_cut(problem, sizes), sizes)
    return list(found.values())


def _cut(problem: Problem, blocks: BlockSizes) -> xla_chunked.Cut:
    asked, length = problem.request, problem.request.length
    assert length is not None
    query, key = (
        jax.ShapeDtypeStruct((problem.rows, length, heads, asked.head_dim), asked.dtype)
        for heads in (problem.heads, problem.kv_heads)
    )
    bias = jax.ShapeDtypeStruct((1, problem.heads, length, length), "float32") if asked.bias else None
    return xla_chunked.cut_of(query, key, bias, blocks, scale=None, softcap=None)


def _misfit_of_blocks(blocks: BlockSizes, _: Problem) -> str | None:
    if blocks.longest < 8 or blocks.longest % 8:
        return f"blocks of {blocks.longest} tokens are no multiple of 8"
    if not 1 <= blocks.scores <= _MOST_SCORES:
        return f"{blocks.scores:,} scores at once are not from 1 to {_MOST_SCORES:,}"
    return None


def _tiles_of(problem: Problem) -> mosaic_gpu.Tiles:
    asked = problem.request
    plain = asked.softcap is None and not asked.dropout
    return mosaic_gpu.tiles_of(mosaic_gpu.padded(asked.head_dim), plain=plain)


def _misfit_of_tiles(tiles: mosaic_gpu.Tiles, problem: Problem) -> str | None:
    asked = problem.request
    return mosaic_gpu.obstacle(tiles, asked.head_dim, dropout=asked.dropout > 0)


def _tiles_to_try(kernel: mosaic_gpu.Kernel) -> Callable[[Problem, Any], Sequence[Any]]:
    def candidates(problem: Problem, best: mosaic_gpu.Tiles) -> Sequence[mosaic_gpu.Tiles]:
        asked = problem.request
        return mosaic_gpu.candidates(kernel, best, asked.head_dim, dropout=asked.dropout > 0)

    return candidates


TILINGS = {
    "mosaic_gpu": Tiling(
        kind=mosaic_gpu.Tiles,
        default=_tiles_of,
        obstacle=_misfit_of_tiles,
        parts=(
            Part(name="forward", passes="forward", candidates=_tiles_to_try("forward")),
            Part(name="query's", passes="with gradients", candidates=_tiles_to_try("query_gradient")),
            Part(name="keys'", passes="with gradients", candidates=_tiles_to_try("key_gradients")),
        ),
    ),
    "xla_chunked": Tiling(
        kind=BlockSizes,
        default=_blocks_of,
        obstacle=_misfit_of_blocks,
        parts=(Part(name="blocks", passes="with gradients", candidates=_blocks_to_try),),
    ),
}
"""By implementation; those that have none cannot be tuned."""
