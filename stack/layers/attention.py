"""Multi-head attention with grouped keys and values (arXiv 1706.03762, 2305.13245)."""

import math
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Key

from stack.config import BlockConfig, RopeConfig
from stack.kernels.attention import Mask, Tiled, attend
from stack.kernels.attention.dropout import draw
from stack.layers.dropout import ATTENTION, CROSS, layer_keys
from stack.layers.linear import Linear
from stack.layers.mlp import matrix_std, residual_std
from stack.layers.norm import Norm
from stack.layers.rotary import amplitude, frequencies, rotate
from stack.parallel.rules import Layout


class Cache(NamedTuple):
    """Keys and values of one layer for tokens seen, [batch, slots, kv_heads, head_dim] each."""

    key: Float[Array, "*layers batch slots kv_heads head_dim"]
    value: Float[Array, "*layers batch slots kv_heads head_dim"]


class Projections(nnx.Module):
    """Queries, keys and values, attention, and the way back."""

    place: ClassVar[int] = ATTENTION
    """Of the bits that drop weights."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Weights normal, of `matrix_std`; `out` writes to the residual stream."""
        embed, width = (("embed", config.embed_dim),), ("head_dim", config.head_width)
        heads, kv_heads = (("heads", config.num_heads), width), (("kv_heads", config.kv_heads), width)
        linear = partial(Linear, bias=config.qkv_bias, rngs=rngs)
        std = matrix_std(config, config.embed_dim)
        self.config = config
        self.query = linear(embed, heads, std=std * _query_share(config))
        self.key = linear(embed, kv_heads, std=std)
        self.value = linear(embed, kv_heads, std=std)
        inputs = config.num_heads * config.head_width
        self.out = Linear(heads, embed, std=residual_std(config, inputs), bias=config.out_bias, rngs=rngs)
        norm = partial(Norm, "rmsnorm" if config.norm == "layernorm" else config.norm, width)
        self.query_norm = norm(config.norm_epsilon) if config.qk_norm else None
        self.key_norm = norm(config.norm_epsilon) if config.qk_norm else None

    def queries(
        self, x: Float[Array, "batch length embed"], layout: Layout
    ) -> Float[Array, "batch length heads head_dim"]:
        """What asks: [batch, length, embed] -> [batch, length, heads, head_dim]."""
        query = self.query(x, layout, ("batch", "length", "heads", "head_dim"))
        return query if self.query_norm is None else self.query_norm(query)

    def keys(self, x: Float[Array, "batch length embed"], layout: Layout) -> Cache:
        """What answers: [batch, length, embed] -> [batch, length, kv_heads, head_dim], twice."""
        key = self.key(x, layout, ("batch", "length", "kv_heads", "head_dim"))
        value = self.value(x, layout, ("batch", "length", "kv_heads", "head_dim"))
        return Cache(key if self.key_norm is None else self.key_norm(key), value)

    def mix(
        self,
        query: Float[Array, "batch length heads head_dim"],
        seen: Cache,
        mask: Mask,
        layout: Layout,
        *,
        kernel: str | Tiled,
        bias: Float[Array, "groups heads length keys"] | None = None,
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Attention to what is seen, and the way back; see `Attention`."""
        config = self.config
        dropout = None
        if keys is not None and config.attention_dropout:
            dropout = draw(
                layer_keys(keys, self.place),
                rate=config.attention_dropout,
                heads=config.num_heads,
                queries=query.shape[1],
                layout=layout,
            )
        y = attend(
            query,
            seen.key,
            seen.value,
            mask,
            layout,
            kernel=kernel,
            bias=bias,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            dropout=dropout,
        )
        return self.out(y, layout, ("batch", "residual_length", "embed"))


class Attention(Projections):
    """Attention of a text to itself."""

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        mask: Mask,
        layout: Layout,
        *,
        kernel: str | Tiled,
        bias: Float[Array, "groups heads length keys"] | None = None,
        keys: Key[Array, " batch"] | None = None,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[Float[Array, "batch length embed"], Cache | None]:
        """[batch, length, embed] -> [batch, residual_length, embed], and the cache with x written at `slot`.

        Args:
          x: normalised residual stream.
          mask: who sees whom, and the positions of the tokens of x.
          layout: how things lie on the mesh.
          kernel: as `choose_attention` said.
          bias: of the scores, as `attend` takes it, or None.
          keys: [batch] dropout keys of this layer, or None.
          cache: tokens seen before, or None.
          slot: where in the cache x goes.
        """
        config = self.config
        query, (key, value) = self.queries(x, layout), self.keys(x, layout)
        if config.position == "rotary":
            radians, factor = _rotation(config, mask)
            turn = partial(rotate, positions=mask.query_positions, radians=radians, amplitude=factor)
            query, key = turn(query), turn(key)
        query, key, value = (checkpoint_name(projected, "qkv_proj") for projected in (query, key, value))
        if cache is not None:
            update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
            cache = Cache(update(cache.key, key), update(cache.value, value))
            key, value = cache
        return self.mix(query, Cache(key, value), mask, layout, kernel=kernel, bias=bias, keys=keys), cache


class CrossAttention(Projections):
    """Attention to another text, whose keys and values are given; it knows no positions."""

    place: ClassVar[int] = CROSS

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        seen: Cache,
        mask: Mask,
        layout: Layout,
        *,
        kernel: str | Tiled,
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """[batch, length, embed] -> [batch, residual_length, embed].

        Args:
          x: normalised residual stream.
          seen: of `keys`, of the other text.
          mask: who sees whom of it.
          layout: how things lie on the mesh.
          kernel: as `choose_attention` said.
          keys: [batch] dropout keys of this layer, or None.
        """
        query, key, value = (checkpoint_name(each, "qkv_proj") for each in (self.queries(x, layout), *seen))
        return self.mix(query, Cache(key, value), mask, layout, kernel=kernel, keys=keys)


def _query_share(config: BlockConfig) -> float:
    """Deviation of queries over that of keys: scores are as large whatever they are multiplied by."""
    if config.init != "fan_in" or config.attention_scale is None:
        return 1.0
    return 1 / (math.sqrt(config.head_width) * config.attention_scale)


def _rotation(config: BlockConfig, mask: Mask) -> tuple[Float32[Array, " half"], jax.Array | float]:
    """Radians per position and amplitude of a layer, by whether its mask has a window."""
    whole = frequencies(config.rope, config.head_width), amplitude(config.rope)
    if config.local_rope_theta is None or mask.window is None:
        return whole
    local = frequencies(RopeConfig(theta=config.local_rope_theta), config.head_width), 1.0
    return local if mask.local is None else jax.tree.map(partial(jnp.where, mask.local), local, whole)
