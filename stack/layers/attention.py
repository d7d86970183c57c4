"""Multi-head self-attention with grouped keys and values (arXiv 1706.03762, 2305.13245)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Key

from stack.config import BlockConfig, RopeConfig
from stack.kernels.attention import Choice, Mask, Request, attend, choose
from stack.layers.dropout import ATTENTION, dropout
from stack.layers.linear import Linear
from stack.layers.mlp import residual_std
from stack.layers.norm import Norm
from stack.layers.rotary import amplitude, frequencies, rotate
from stack.parallel.rules import Layout


class Cache(NamedTuple):
    """Keys and values of one layer for tokens seen, [batch, slots, kv_heads, head_dim] each."""

    key: Float[Array, "*layers batch slots kv_heads head_dim"]
    value: Float[Array, "*layers batch slots kv_heads head_dim"]


class Attention(nnx.Module):
    """Queries, keys and values from x, attention, and the way back."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Weights normal with deviation `init_std`; `out` writes to the residual stream."""
        embed, width = (("embed", config.embed_dim),), ("head_dim", config.head_width)
        heads, kv_heads = (("heads", config.num_heads), width), (("kv_heads", config.kv_heads), width)
        linear = partial(Linear, std=config.init_std, bias=config.qkv_bias, rngs=rngs)
        self.config = config
        self.query = linear(embed, heads)
        self.key = linear(embed, kv_heads)
        self.value = linear(embed, kv_heads)
        self.out = Linear(heads, embed, std=residual_std(config), bias=config.out_bias, rngs=rngs)
        norm = partial(Norm, "rmsnorm" if config.norm == "layernorm" else config.norm, width)
        self.query_norm = norm(config.norm_epsilon) if config.qk_norm else None
        self.key_norm = norm(config.norm_epsilon) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        mask: Mask,
        layout: Layout,
        *,
        kernel: str,
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
          keys: [batch] dropout keys of this layer, or None.
          cache: tokens seen before, or None.
          slot: where in the cache x goes.
        """
        config = self.config
        query = self.query(x, layout, ("batch", "length", "heads", "head_dim"))
        key = self.key(x, layout, ("batch", "length", "kv_heads", "head_dim"))
        value = self.value(x, layout, ("batch", "length", "kv_heads", "head_dim"))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if config.position == "rotary":
            radians, factor = _rotation(config, mask)
            turn = partial(rotate, positions=mask.query_positions, radians=radians, amplitude=factor)
            query, key = turn(query), turn(key)
        query, key, value = (checkpoint_name(projected, "qkv_proj") for projected in (query, key, value))
        if cache is not None:
            update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
            cache = Cache(update(cache.key, key), update(cache.value, value))
            key, value = cache
        drop = None
        if keys is not None and config.attention_dropout:
            names = ("batch", "kv_heads", None, None, None)
            drop = partial(
                dropout,
                rate=config.attention_dropout,
                keys=keys,
                place=ATTENTION,
                layout=layout,
                names=names,
            )
        y = attend(
            query,
            key,
            value,
            mask,
            layout,
            kernel=kernel,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            drop=drop,
        )
        return self.out(y, layout, ("batch", "residual_length", "embed")), cache


def _rotation(config: BlockConfig, mask: Mask) -> tuple[Float32[Array, " half"], jax.Array | float]:
    """Radians per position and amplitude of a layer, by whether its mask has a window."""
    whole = frequencies(config.rope, config.head_width), amplitude(config.rope)
    if config.local_rope_theta is None or mask.window is None:
        return whole
    local = frequencies(RopeConfig(theta=config.local_rope_theta), config.head_width), 1.0
    return local if mask.local is None else jax.tree.map(partial(jnp.where, mask.local), local, whole)


def choose_attention(
    config: BlockConfig,
    *,
    platform: str,
    compute_capability: float | None = None,
    packed_length: int | None = None,
) -> Choice:
    """The attention kernel of a model's blocks on a platform, and why.

    Args:
      config: the blocks.
      platform: `cpu`, `gpu`, `rocm` or `tpu`.
      compute_capability: of an NVIDIA GPU, e.g. 9.0; None: not known, taken as new enough.
      packed_length: tokens of a row that documents share; None: each has rows of its own.

    Raises:
      ConfigError: a kernel was asked for that cannot run; nothing falls back.
    """
    request = Request(
        platform=platform,
        compute_capability=compute_capability,
        dtype=config.dtype,
        head_dim=config.head_width,
        packed_length=packed_length,
        dropout=config.attention_dropout,
        softcap=config.attention_softcap,
    )
    return choose(request, config.attention)
