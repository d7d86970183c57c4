"""Weights onto the mesh: every process reads what lies on its devices."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from stack.layers.adapter import magnitudes
from stack.step import state as states
from stack.step.program import Program
from stack.train.checkpoint.agreement import all_or_none
from stack.train.checkpoint.boxes import box_of
from stack.train.checkpoint.checkpoints import named_leaves
from stack.train.weights.match import Match
from stack.train.weights.source import Source

_CHUNK = 64 << 20  # Bytes of a table read at one time to sum its rows.


def load(program: Program, match: Match, source: Source) -> dict[str, Any]:
    """All parameters of a program: those of the weights, the others from its seed.

    The rows of new words are the mean of those of old ones (Hewitt, Initializing new word embeddings for
    pretrained language models, 2021), summed in float64; padding is zero. Every mesh gives the same bits.

    Raises:
      DamagedError: a file of a checkpoint is not as it was written.
      StackError: weights that are not finite, or cannot be read.
    """
    paths = {".".join(path): path for path in flatten_dict(program.parameters)}
    likes = named_leaves(program.parameters)
    arrays = _read(source, {name: likes[name] for name in match.loaded})
    initial = {paths[name] for name in (*match.missing, *match.longer)}
    others = named_leaves(states.init_params(program, initial)) if initial else {}
    arrays |= {name: others[name] for name in match.missing}
    means = {name: _mean(source, name, match.old_rows) for name in match.tables}

    def resize() -> None:
        for name, mean in means.items():
            arrays[name] = _with_words(source, name, likes[name], match, mean)
        for name in match.longer:
            arrays[name] = _with_rows(source, name, others[name])

    all_or_none(resize)
    for name in (*match.tables, *match.longer):
        arrays[name] = _cast(arrays[name], likes[name])
    arrays |= _magnitudes(program, match, arrays)
    return unflatten_dict({path: arrays[name] for name, path in paths.items()})


def _read(source: Source, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Parameters as they are wanted; those that are to be narrower one after another."""
    arrays = source.read({name: like for name, like in wanted.items() if like.dtype == np.float32})
    for name, like in wanted.items():
        if like.dtype != np.float32:
            wide = jax.ShapeDtypeStruct(like.shape, np.float32, sharding=like.sharding)
            arrays[name] = _cast(source.read({name: wide})[name], like)
    return arrays


def _cast(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return array if array.dtype == like.dtype else jax.jit(lambda wide: wide.astype(like.dtype))(array)


def _magnitudes(program: Program, match: Match, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The lengths that adapters begin with: those of the weights, in the dtype of their products.

    A host makes them of one layer after another in float64, so that they are the same bits on any mesh.
    """
    likes = named_leaves(program.parameters)
    axes: dict[str, Any] = dict(flatten_dict(program.axes, sep="."))
    dtype = jax.numpy.dtype(program.config.model.dtype)
    found: dict[str, jax.Array] = {}
    for name in match.missing:
        owner, _, last = name.rpartition(".")
        if last != "dora_magnitude":
            continue
        kernel, like = arrays[f"{owner}.kernel"], likes[name]
        layers = range(kernel.shape[0]) if axes[name][0] == "layers" else [None]
        inputs = tuple(range(kernel.ndim - len(like.shape)))
        lengths = [magnitudes(states.to_host(kernel, layer).astype(dtype), inputs) for layer in layers]
        values = np.concatenate(lengths).reshape(like.shape)
        found[name] = jax.make_array_from_callback(like.shape, like.sharding, values.__getitem__)
    return found


def _mean(source: Source, name: str, rows: np.ndarray) -> np.ndarray:
    """The mean of some rows of a table, float32; process 0 reads it for all."""
    shape = source.shapes[name]
    mean = np.zeros(shape[1:], np.float32)

    def read() -> None:
        nonlocal mean
        if jax.process_index() == 0:
            total = np.zeros(shape[1:], np.float64)
            step = max(1, _CHUNK // (4 * max(1, mean.size)))
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                box = ((start, start + len(some)), *((0, size) for size in shape[1:]))
                total += source.read_box(name, box)[some].sum(0, dtype=np.float64)
            mean = (total / max(1, rows.sum())).astype(np.float32)

    all_or_none(read)
    return mean if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(mean))


def _with_words(
    source: Source, name: str, like: jax.ShapeDtypeStruct, match: Match, mean: np.ndarray
) -> jax.Array:
    """A table of words: old rows, new ones at the mean, and padding."""

    @cache
    def make(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        (first, last), *rest = box_of(index, like.shape)
        table = np.zeros((last - first, *(stop - start for start, stop in rest)), np.float32)
        end = min(last, len(match.old_rows))
        if first < end:
            table[: end - first] = source.read_box(name, ((first, end), *rest))
        here = match.new_words[(match.new_words >= first) & (match.new_words < last)]
        table[here - first] = mean[index[1:]]
        return table

    return jax.make_array_from_callback(like.shape, like.sharding, make)


def _with_rows(source: Source, name: str, initial: jax.Array) -> jax.Array:
    """A table of positions: as many rows as there are, then the initial ones."""
    shards = {box_of(shard.index, initial.shape): shard.data for shard in initial.addressable_shards}
    rows = source.shapes[name][0]

    @cache
    def make(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        (first, last), *rest = box = box_of(index, initial.shape)
        table = np.array(shards[box])
        end = min(last, rows)
        if first < end:
            table[: end - first] = source.read_box(name, ((first, end), *rest))
        return table

    return jax.make_array_from_callback(initial.shape, initial.sharding, make)
