"""Which passages are nearest to queries: all of them compared on the mesh, or FAISS's graph walked."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack.config.errors import StackError
from stack.parallel import mesh as meshes
from stack.parallel.processes import first
from stack.storage import durable

SCORES_BYTES = 1 << 26
"""Of the scores that a device holds at a time."""
_MOST_QUERIES = 256
"""That are compared at a time."""
_MARGIN = 16
"""Passages beside those asked for that are compared in float64."""
_BLOCK = 1 << 14
"""Vectors that are read at a time."""
_NEIGHBORS, _BUILDING, _WALKING = 32, 200, 256
"""Of HNSW (arXiv 1603.09320): edges of a node, and nodes that are kept in view, M and ef."""


class Finder(Protocol):
    """Finds candidates."""

    def __call__(self, queries: np.ndarray, number: int) -> np.ndarray:
        """Numbers of passages that are among the nearest, [queries, number]; -1: there are no more.

        Args:
          queries: [queries, width] float32, of length 1.
          number: of candidates.
        """
        ...


class Nearest(NamedTuple):
    """Of each query, the nearest first."""

    numbers: np.ndarray
    """[queries, top] int64; -1: there are no more."""
    scores: np.ndarray
    """[queries, top] float64, cosines."""


def nearest(finder: Finder, vectors: np.ndarray, queries: np.ndarray, top: int) -> Nearest:
    """The passages with the highest cosines; of equal ones those of lower number first.

    Candidates are compared in float64, so that the order does not hang on how a device rounds.

    Args:
      finder: of candidates.
      vectors: [passages, width] float32, of length 1 each or as they were cut.
      queries: [queries, width] float32, of length 1.
      top: of passages.
    """
    top = min(top, len(vectors))
    numbers, scores = np.full((len(queries), top), -1), np.full((len(queries), top), -np.inf)
    candidates = finder(queries, min(2 * top + _MARGIN, len(vectors)))
    for place, query in enumerate(normalized(queries.astype(np.float64))):
        some = np.unique(candidates[place][candidates[place] >= 0])
        cosines = (normalized(vectors[some].astype(np.float64)) * query).sum(-1)
        order = np.argsort(-cosines, kind="stable")[:top]
        numbers[place, : len(order)], scores[place, : len(order)] = some[order], cosines[order]
    return Nearest(numbers, scores)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, along the last axis; of 0 as it is."""
    return vectors / np.maximum(np.sqrt((vectors**2).sum(-1, keepdims=True)), 1e-12)


class Exact:
    """Compares each query with every passage; these lie over all devices, row by row."""

    def __init__(self, mesh: Mesh, vectors: np.ndarray) -> None:
        """Lays them out.

        Args:
          mesh: of all devices.
          vectors: [passages, width] float32, which may lie on disk.
        """
        self._mesh = mesh
        self._number = len(vectors)
        self._rows = -(-len(vectors) // mesh.size)
        self._everywhere = NamedSharding(mesh, P())
        shape = (self._rows * mesh.size, vectors.shape[1])

        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(shape[0])
            filled = np.zeros((stop - start, shape[1]), np.float32)
            for place in range(start, min(stop, len(vectors)), _BLOCK):
                some = normalized(np.asarray(vectors[place : min(place + _BLOCK, stop)]))
                filled[place - start : place - start + len(some)] = some
            return filled

        self._vectors = jax.make_array_from_callback(shape, NamedSharding(mesh, P(mesh.axis_names)), rows)
        self._find = jax.jit(partial(_find, mesh, self._number), static_argnums=2)

    def __call__(self, queries: np.ndarray, number: int) -> np.ndarray:
        """See `Finder`."""
        most = max(1, min(_MOST_QUERIES, SCORES_BYTES // (4 * self._rows)))
        most = 1 << (most.bit_length() - 1)
        found = []
        with meshes.use(self._mesh):
            for start in range(0, len(queries), most):
                some = queries[start : start + most]
                # Few sizes are compiled.
                filled = np.zeros((1 << (len(some) - 1).bit_length(), queries.shape[1]), np.float32)
                filled[: len(some)] = some
                given = jax.make_array_from_callback(filled.shape, self._everywhere, filled.__getitem__)
                found.append(np.asarray(self._find(given, self._vectors, number))[: len(some)])
        return np.concatenate(found).astype(np.int64)


def _find(mesh: Mesh, passages: int, queries: jax.Array, vectors: jax.Array, number: int) -> jax.Array:
    """The numbers of the best, [queries, number] int32, on every device."""
    axes = mesh.axis_names

    def best(queries: jax.Array, mine: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the passages of a device."""
        rows = len(mine)
        numbers = jax.lax.axis_index(axes) * rows + jnp.arange(rows)
        scores = jnp.einsum("qw,rw->qr", queries, mine, precision=jax.lax.Precision.HIGHEST)
        scores, places = jax.lax.top_k(jnp.where(numbers < passages, scores, -jnp.inf), min(number, rows))
        return scores, numbers[places]

    scores, numbers = jax.shard_map(
        best, mesh=mesh, in_specs=(P(), P(axes)), out_specs=(P(None, axes), P(None, axes)), check_vma=False
    )(queries, vectors)
    scores, numbers = jax.reshard((scores, numbers), P())
    _, places = jax.lax.top_k(scores, number)
    return jnp.take_along_axis(numbers, places, axis=1)


class Approximate:
    """Walks a graph of neighbours (HNSW, arXiv 1603.09320), by FAISS; it finds nearly all of the nearest."""

    def __init__(self, vectors: np.ndarray, file: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        """Reads the graph where it is kept, or builds it.

        Args:
          vectors: [passages, width] float32, which may lie on disk.
          file: where it is kept, with its digest beside; in the folder of the index, and gone with it.
          tell: is told of one that is damaged.

        Raises:
          StackError: FAISS is not installed.
        """
        faiss = load_faiss()
        digest = file.with_name(f"{file.name}.digest")
        if file.exists() and digest.exists() and digest.read_text("utf-8", "replace") == _digest(file):
            self._index = faiss.read_index(str(file))
            return
        if file.exists():
            tell(f"{file} is damaged; it is built anew")
        self._index = faiss.IndexHNSWFlat(vectors.shape[1], _NEIGHBORS, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = _BUILDING
        for start in range(0, len(vectors), _BLOCK):
            self._index.add(normalized(np.asarray(vectors[start : start + _BLOCK])))
        if first():
            part = file.with_name(f"{file.name}.part")
            faiss.write_index(self._index, str(part))
            durable.write_text(digest, _digest(part))
            part.replace(file)

    def __call__(self, queries: np.ndarray, number: int) -> np.ndarray:
        """See `Finder`."""
        self._index.hnsw.efSearch = max(_WALKING, 2 * number)
        return self._index.search(np.ascontiguousarray(queries, np.float32), number)[1]


def _digest(file: Path) -> str:
    told = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            told.update(block)
    return told.hexdigest()


def load_faiss() -> Any:
    """The library.

    Raises:
      StackError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise StackError(
            "--approximate needs FAISS, which is not installed; install it: pip install 'stack[search]'"
        ) from None
    return faiss
