"""Flash attention in plain array operations (arXiv 2205.14135, 2307.08691): scores exist a block at a time.

Queries and keys are cut into blocks. For each block of queries a loop goes over the blocks of keys that
any of them sees, and over no other, with a running maximum and sum of the softmax; the backward pass goes
the same way and computes the scores again from the logarithm of that sum. Memory grows with the length, not
with its square; work grows with the blocks that see each other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stack.kernels.attention.dropout import Dropout, keep
from stack.kernels.attention.island import on_each_device
from stack.kernels.attention.mask import Mask
from stack.kernels.attention.request import Request
from stack.parallel.rules import Layout


@dataclass(frozen=True)
class BlockSizes:
    """How large blocks are."""

    longest: int
    """Queries and keys of a block, at most."""
    scores: int
    """That exist at once: while they are fewer, several rows are taken together."""

    def __str__(self) -> str:
        """`256 tokens, 262,144 scores`."""
        return f"{self.longest} tokens, {self.scores:,} scores"


BLOCKS = {"cpu": BlockSizes(256, 2**18), "gpu": BlockSizes(512, 2**24)}
"""By platform. A processor's fit its cache (docs/decisions.md); a GPU's keep it busy."""
_LOWEST = float(jnp.finfo(jnp.float32).min)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    layout: Layout,
    *,
    bias: jax.Array | None,
    scale: float | None,
    softcap: float | None,
    dropout: Dropout | None,
    tiles: BlockSizes | None = None,
) -> jax.Array:
    """See `stack.kernels.attention.attend`. Scores and sums are in float32.

    Inside `shard_map`, as how many blocks see each other is each device's own.
    """
    blocks = BLOCKS[_platform(layout)] if tiles is None else tiles
    local = partial(_attend_local, scale=scale, softcap=softcap, blocks=blocks)
    return on_each_device(local, query, key, value, mask, layout, bias=bias, dropout=dropout)


def obstacles(_: Request) -> list[str]:
    """It has none."""
    return []


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How an attention is cut into blocks, and what is done to its scores."""

    rows: int
    """Of the batch, taken together."""
    queries: int
    """Of a block."""
    keys: int
    """Of a block."""
    scale: float
    softcap: float | None
    heads: tuple[int, int]
    """Of keys, and queries that share each."""


class Visits(NamedTuple):
    """Which blocks of keys each block of queries looks at."""

    number: jax.Array
    """[parts, query blocks] int32; a part is so many rows of the batch as are taken together."""
    order: jax.Array
    """[parts, query blocks, key blocks] int32: the first `number` are looked at, in their order."""


def visits(mask: Mask, cut: Cut) -> Visits:
    """The blocks in which some query sees some key, and no other."""
    queries, keys = _cut_mask(mask, cut)

    def sees(queries: dict[str, jax.Array], keys: dict[str, jax.Array]) -> jax.Array:
        return _allowed(mask, queries, keys).any()

    each = jax.vmap(jax.vmap(sees, in_axes=(None, 0)), in_axes=(0, None))
    seen = jax.vmap(each)(queries, keys)
    return Visits(seen.sum(-1, dtype=jnp.int32), jnp.argsort(~seen, axis=-1).astype(jnp.int32))


def cut_of(
    query: jax.Array | jax.ShapeDtypeStruct,
    key: jax.Array | jax.ShapeDtypeStruct,
    bias: jax.Array | jax.ShapeDtypeStruct | None,
    blocks: BlockSizes,
    *,
    scale: float | None,
    softcap: float | None,
) -> Cut:
    """How [batch, queries, heads, head_dim] and [batch, keys, kv_heads, head_dim] are cut; see `BLOCKS`."""
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = query.shape, key.shape
    queries, keys = _even(queries, blocks.longest), _even(keys, blocks.longest)
    # Rows that share a bias can be taken together.
    rows = batch if bias is None else batch // bias.shape[0]
    most = max(1, blocks.scores // (heads * queries * keys))
    return Cut(
        rows=max(number for number in range(1, min(rows, most) + 1) if rows % number == 0),
        queries=queries,
        keys=keys,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap,
        heads=(kv_heads, heads // kv_heads),
    )


def _even(length: int, longest: int) -> int:
    """The length of blocks of equal size, a multiple of 8 where there are several."""
    blocks = -(-length // longest)
    return length if blocks == 1 else min(longest, -(-length // (8 * blocks)) * 8)


def _platform(layout: Layout) -> str:
    """`cpu`, or `gpu` for whatever else the mesh is of."""
    mesh = layout.mesh
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    return "cpu" if platform == "cpu" else "gpu"


def _attend_local(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    dropout: Dropout | None,
    *,
    scale: float | None,
    softcap: float | None,
    blocks: BlockSizes,
) -> jax.Array:
    cut = cut_of(query, key, bias, blocks, scale=scale, softcap=softcap)
    return _flash(query, key, value, mask, bias, dropout, cut)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    dropout: Dropout | None,
    cut: Cut,
) -> jax.Array:
    return _forward(query, key, value, mask, bias, dropout, cut)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    dropout: Dropout | None,
    cut: Cut,
) -> tuple[jax.Array, Any]:
    """What is attended, and what the backward pass is given."""
    looks = visits(mask, cut)
    blocks = _Blocks(query, key, value, mask, bias, dropout, looks, cut)

    def attend(_: None, place: "_Place") -> tuple[None, tuple[jax.Array, jax.Array]]:
        def look(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, norm, top = state
            other = blocks.other(place, step)
            scores, _, allowed = blocks.scores(place, other)
            higher = jnp.maximum(top, jnp.where(allowed, scores, _LOWEST).max(-1))
            weights = jnp.where(allowed, jnp.exp(scores - higher[..., None]), 0.0)
            shrink = jnp.exp(top - higher)
            norm = norm * shrink + weights.sum(-1)
            kept = blocks.dropped(weights, place, other).astype(value.dtype)
            total = total * shrink[..., None] + _product("rhgqk,rhkd->rhgqd", kept, other.value)
            return total, norm, higher

        nothing = jnp.zeros(place.query.shape, jnp.float32)
        start = (nothing, nothing[..., 0], nothing[..., 0] + _LOWEST)
        with jax.named_scope(blocks.expected):
            total, norm, top = jax.lax.fori_loop(0, place.number, look, start)
        some = norm > 0  # A query that sees no key gets zeros.
        norm = jnp.where(some, norm, 1.0)
        return None, ((total / norm[..., None]).astype(query.dtype), top + jnp.log(norm))

    _, (output, log_sum) = _each(attend, None, blocks.places)
    output = blocks.uncut(output)
    return output, (query, key, value, mask, bias, dropout, looks, output, log_sum)


def _backward(cut: Cut, saved: Any, slope: jax.Array) -> tuple[Any, ...]:
    query, key, value, mask, bias, dropout, looks, output, log_sum = saved
    blocks = _Blocks(query, key, value, mask, bias, dropout, looks, cut)
    # What the softmax takes off: the sum of weights times their slopes (arXiv 2205.14135, appendix B.2).
    common = (slope.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1, keepdims=True)
    slopes, common = blocks.cut_queries(slope), blocks.cut_queries(common)[..., 0]

    def attend(sums: Any, inputs: Any) -> tuple[Any, jax.Array]:
        place, slope, common, log_sum = inputs

        def look(step: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
            to_query, to_key, to_value, to_bias = state
            other = blocks.other(place, step)
            scores, bend, allowed = blocks.scores(place, other)
            weights = jnp.where(allowed, jnp.exp(scores - log_sum[..., None]), 0.0)
            kept = blocks.dropped(weights, place, other).astype(value.dtype)
            to_weights = blocks.dropped(_product("rhgqd,rhkd->rhgqk", slope, other.value), place, other)
            to_scores = weights * (to_weights - common[..., None])
            to_bias = blocks.add_to_bias(to_bias, to_scores, place, other)
            to_scores = to_scores if bend is None else to_scores * bend
            to_scores = (to_scores * cut.scale).astype(query.dtype)
            to_query += _product("rhgqk,rhkd->rhgqd", to_scores, other.key)
            to_key = _add(to_key, _product("rhgqk,rhgqd->rhkd", to_scores, place.query), other.at)
            to_value = _add(to_value, _product("rhgqk,rhgqd->rhkd", kept, slope), other.at)
            return to_query, to_key, to_value, to_bias

        to_query = jnp.zeros(place.query.shape, jnp.float32)
        with jax.named_scope(blocks.expected):
            to_query, *sums = jax.lax.fori_loop(0, place.number, look, (to_query, *sums))
        return tuple(sums), to_query.astype(query.dtype)

    nothing = jnp.zeros(blocks.keys.shape, jnp.float32)
    start = (nothing, nothing, blocks.nothing_of_bias())
    inputs = (blocks.places, slopes, common, log_sum)
    (to_key, to_value, to_bias), to_query = _each(attend, start, inputs)
    if bias is not None and to_bias is not None:
        to_bias = to_bias[..., : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
    to_key, to_value = blocks.uncut_keys(to_key), blocks.uncut_keys(to_value)
    return blocks.uncut(to_query), to_key.astype(key.dtype), to_value.astype(value.dtype), None, to_bias, None


_flash.defvjp(_forward, _backward)


class _Place(NamedTuple):
    """A block of queries."""

    index: jax.Array
    """Among all of them: part x blocks + block."""
    number: jax.Array
    """Of the blocks of keys that it looks at."""
    order: jax.Array
    query: jax.Array
    """[rows, kv_heads, group, queries, head_dim]."""
    mask: dict[str, jax.Array]
    """The queries' side, [rows, queries]."""
    dropout: jax.Array | None
    """[rows, kv_heads, group, queries, 2]."""


class _Other(NamedTuple):
    """A block of keys."""

    block: jax.Array
    """Among those of its rows."""
    at: jax.Array
    """Among all."""
    key: jax.Array
    """[rows, kv_heads, keys, head_dim]."""
    value: jax.Array
    mask: dict[str, jax.Array]
    """The keys' side, [rows, keys]."""


class _Blocks:
    """The arrays of an attention, cut."""

    def __init__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: Mask,
        bias: jax.Array | None,
        dropout: Dropout | None,
        looks: Visits,
        cut: Cut,
    ):
        self.cut, self.mask, self.dropout = cut, mask, dropout
        self.batch, self.length, self.other_length = *query.shape[:2], key.shape[1]
        queries, keys = _cut_mask(mask, cut)
        self.per_row, self.others = looks.order.shape[1:]
        rows = None if dropout is None else self.cut_queries(dropout.rows.swapaxes(1, 2))
        flat: Callable[[Any], Any] = partial(jax.tree.map, lambda array: array.reshape(-1, *array.shape[2:]))
        index = jnp.arange(looks.number.size, dtype=jnp.int32)
        number, order = flat(looks.number), flat(looks.order)
        self.places = _Place(index, number, order, self.cut_queries(query), flat(queries), rows)
        self.keys, self.values, self.key_masks = self.cut_keys(key), self.cut_keys(value), flat(keys)
        self.groups = 1 if bias is None else bias.shape[0]
        self.bias = bias
        if bias is not None:
            ends = [
                blocks * size - length if length > 1 else 0
                for blocks, size, length in zip(
                    (self.per_row, self.others), (cut.queries, cut.keys), bias.shape[2:], strict=True
                )
            ]
            self.bias = jnp.pad(bias, ((0, 0), (0, 0), *((0, end) for end in ends)))

    @property
    def expected(self) -> str:
        """The name of the loop over keys: how often it runs where a row is one document, in the middle.

        What reads the compiled program has it from there, as a count from data stands nowhere in it.
        """
        blocks = self.others / 2 + 0.5 if self.mask.kind != "full" else self.others
        if self.mask.window is not None and self.mask.local is None:
            sides = 2 if self.mask.kind == "full" else 1
            blocks = min(blocks, sides * self.mask.window / self.cut.keys + 1)
        return f"about_{math.ceil(blocks)}_times"

    def cut_queries(self, array: jax.Array) -> jax.Array:
        """[batch, queries, heads, ...] -> [places, rows, kv_heads, group, queries, ...]."""
        array = _blocks(array, self.cut.rows, self.cut.queries)
        array = array.reshape(-1, *array.shape[2:4], *self.cut.heads, *array.shape[5:])
        return jnp.moveaxis(array, 2, 4)

    def uncut(self, array: jax.Array) -> jax.Array:
        """[places, rows, kv_heads, group, queries, head_dim] -> [batch, queries, heads, head_dim]."""
        array = jnp.moveaxis(array, 4, 2).reshape(
            -1, self.per_row, *array.shape[1:2], self.cut.queries, math.prod(self.cut.heads), array.shape[-1]
        )
        return array.swapaxes(1, 2).reshape(self.batch, -1, *array.shape[4:])[:, : self.length]

    def cut_keys(self, array: jax.Array) -> jax.Array:
        """[batch, keys, kv_heads, head_dim] -> [others, rows, kv_heads, keys, head_dim]."""
        array = _blocks(array, self.cut.rows, self.cut.keys)
        return array.reshape(-1, *array.shape[2:]).swapaxes(2, 3)

    def uncut_keys(self, array: jax.Array) -> jax.Array:
        """The way back."""
        array = array.swapaxes(2, 3)
        array = array.reshape(-1, self.others, *array.shape[1:]).swapaxes(1, 2)
        return array.reshape(self.batch, -1, *array.shape[4:])[:, : self.other_length]

    def other(self, place: _Place, step: jax.Array) -> _Other:
        """The block of keys that a block of queries looks at in a step."""
        block = place.order[step]
        at = place.index // self.per_row * self.others + block
        take = partial(jax.lax.dynamic_index_in_dim, index=at, keepdims=False)
        return _Other(block, at, *jax.tree.map(take, (self.keys, self.values, self.key_masks)))

    def scores(self, place: _Place, other: _Other) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """[rows, kv_heads, group, queries, keys] float32, the soft cap's derivative, and who sees whom."""
        scores = _product("rhgqd,rhkd->rhgqk", place.query, other.key) * self.cut.scale
        bend, cap = None, self.cut.softcap
        if cap is not None:
            share = jnp.tanh(scores / cap)
            scores, bend = cap * share, 1 - share * share
        if self.bias is not None:
            block = jax.lax.dynamic_slice(self.bias, *self._of_bias(place, other)).astype(jnp.float32)
            heads = self.cut.heads if block.shape[1] > 1 else (1, 1)
            scores += block.reshape(1, *heads, *block.shape[2:])
        allowed = _allowed(self.mask, place.mask, other.mask)
        return scores, bend, allowed[:, None, None]

    def dropped(self, weights: jax.Array, place: _Place, other: _Other) -> jax.Array:
        """Weights, or their slopes, after dropout."""
        if self.dropout is None or place.dropout is None:
            return weights
        keys = other.block * self.cut.keys + jnp.arange(self.cut.keys, dtype=jnp.int32)
        rate = self.dropout.rate
        return jnp.where(keep(place.dropout, keys, rate), weights / (1 - rate), 0.0)

    def nothing_of_bias(self) -> jax.Array | None:
        """Where the bias's gradient is summed."""
        return None if self.bias is None else jnp.zeros(self.bias.shape, jnp.float32)

    def add_to_bias(
        self, to_bias: jax.Array | None, to_scores: jax.Array, place: _Place, other: _Other
    ) -> jax.Array | None:
        """A block's slopes of scores, added to those of the bias where it lies."""
        if to_bias is None:
            return None
        start, shape = self._of_bias(place, other)
        slopes = to_scores.sum(0).reshape(1, -1, *to_scores.shape[3:])
        whole = [axis for axis, (size, own) in enumerate(zip(slopes.shape, shape, strict=True)) if size > own]
        slopes = slopes.sum(whole, keepdims=True)
        old = jax.lax.dynamic_slice(to_bias, start, shape)
        return jax.lax.dynamic_update_slice(to_bias, old + slopes, start)

    def _of_bias(self, place: _Place, other: _Other) -> tuple[list[Any], tuple[int, ...]]:
        """Where a block of the bias begins, and its shape."""
        assert self.bias is not None
        _, heads, queries, keys = self.bias.shape
        part, block = place.index // self.per_row, place.index % self.per_row
        group = part * self.cut.rows // (self.batch // self.groups)
        sizes = (min(queries, self.cut.queries), min(keys, self.cut.keys))
        # One row or column for all of them begins where it must lie, at 0.
        start = [
            group,
            0,
            block * self.cut.queries if queries > 1 else 0,
            other.block * self.cut.keys if keys > 1 else 0,
        ]
        return start, (1, heads, *sizes)


def _cut_mask(mask: Mask, cut: Cut) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """A mask's arrays by block, [parts, blocks, rows, ...]: those of queries, those of keys."""
    of_queries = {"query_positions": mask.query_positions, "query_segments": mask.query_segments}
    of_keys = {"key_positions": mask.key_positions, "key_segments": mask.key_segments, "prefix": mask.prefix}
    # What fills up the last block of queries sees what the last query sees.
    queries, keys = (
        {
            name: _blocks(array, cut.rows, size, mode="edge")
            for name, array in side.items()
            if array is not None
        }
        for side, size in ((of_queries, cut.queries), (of_keys, cut.keys))
    )
    length, blocks = mask.key_positions.shape[1], keys["key_positions"].shape[1]
    lengths = mask.lengths
    if lengths is None and length % cut.keys:
        lengths = jnp.full(mask.key_positions.shape[:1], length, jnp.int32)
    if lengths is not None:
        starts = cut.keys * jnp.arange(blocks, dtype=lengths.dtype)[:, None]
        keys["lengths"] = jnp.minimum(lengths, length).reshape(-1, 1, cut.rows) - starts
    return queries, keys


def _allowed(mask: Mask, queries: dict[str, jax.Array], keys: dict[str, jax.Array]) -> jax.Array:
    """[rows, queries, keys] bool, of a block."""
    sides: dict[str, Any] = queries | keys
    return Mask(kind=mask.kind, window=mask.window, local=mask.local, **sides).allowed()


def _blocks(array: jax.Array, rows: int, size: int, *, mode: Any = "constant") -> jax.Array:
    """[batch, length, ...] -> [parts, blocks, rows, size, ...], filled up."""
    batch, length = array.shape[:2]
    blocks = -(-length // size)
    padding = [(0, 0), (0, blocks * size - length), *[(0, 0)] * (array.ndim - 2)]
    array = jnp.pad(array, padding, mode=mode) if blocks * size > length else array
    return array.reshape(batch // rows, rows, blocks, size, *array.shape[2:]).swapaxes(1, 2)


def _each(body: Callable[[Any, Any], Any], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, whose length the compiler is not told.

    XLA:GPU of jaxlib 0.11 aborts ("Call graph must have been flattened") where it pipelines the collectives
    of a loop over layers around a loop of known length with another loop inside.
    """
    number = jax.tree.leaves(inputs)[0].shape[0]

    def take(place: jax.Array) -> Any:
        return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, place, keepdims=False), inputs)

    def step(place: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, outputs = state
        carry, output = body(carry, take(place))
        put = partial(jax.lax.dynamic_update_index_in_dim, index=place, axis=0)
        return carry, jax.tree.map(put, outputs, output)

    start = jnp.int32(0)
    _, shapes = jax.eval_shape(lambda carry: body(carry, take(start)), carry)
    outputs = jax.tree.map(lambda shape: jnp.zeros((number, *shape.shape), shape.dtype), shapes)
    end = jax.lax.optimization_barrier(jnp.int32(number))
    with jax.named_scope(f"about_{number}_times"):
        return jax.lax.fori_loop(start, end, step, (carry, outputs))


def _product(axes: str, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.einsum(axes, one, other, preferred_element_type=jnp.float32)


def _add(sums: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_index_in_dim(sums, at, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(sums, old + block, at, 0)
