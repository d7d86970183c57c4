"""The transformer block that every model's stack of layers is made of."""

from functools import partial

import jax
from flax import nnx

from stack.config import BlockConfig
from stack.kernels.attention import Mask
from stack.layers.attention import Attention, Cache
from stack.layers.dropout import ATTENTION_OUT, MLP_OUT, dropout
from stack.layers.mlp import Mlp
from stack.layers.norm import Norm
from stack.models.stack import Execution
from stack.parallel.rules import Layout

RESIDUAL = ("batch", "residual_length", "embed")


class Block(nnx.Module):
    """x + attention(x), then x + mlp(x) (arXiv 1706.03762), with norms where `norm_placement` says.

    `pre`: x + f(norm(x)), as GPT-2; `post`: norm(x + f(x)), as BERT; `both`: x + norm(f(norm(x))), as
    Gemma 2.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Float32 parameters of one layer."""
        norm = partial(Norm, config.norm, ("embed", config.embed_dim), config.norm_epsilon)
        self.config = config
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.attention_out_norm = norm() if config.norm_placement == "both" else None
        self.mlp_norm = norm()
        self.mlp = Mlp(config, rngs=rngs)
        self.mlp_out_norm = norm() if config.norm_placement == "both" else None

    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        run: Execution,
        *,
        bias: jax.Array | None = None,
        keys: jax.Array | None = None,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """[batch, residual_length, embed] -> the same, and the cache with this layer's keys and values."""
        x, cache = self.attend(x, mask, run, bias=bias, keys=keys, cache=cache, slot=slot)
        return self.transform(x, run, keys), cache

    def attend(
        self,
        x: jax.Array,
        mask: Mask,
        run: Execution,
        *,
        bias: jax.Array | None,
        keys: jax.Array | None,
        cache: Cache | None,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, Cache | None]:
        """The first half of a block: attention."""
        layout = run.layout
        whole = self.read(self.attention_norm, x, layout)
        y, cache = self.attention(
            whole, mask, layout, kernel=run.kernels["attention"], bias=bias, keys=keys, cache=cache, slot=slot
        )
        y = y if self.attention_out_norm is None else self.attention_out_norm(y)
        return self.write(self.attention_norm, x + self.drop(y, ATTENTION_OUT, run, keys)), cache

    def transform(self, x: jax.Array, run: Execution, keys: jax.Array | None) -> jax.Array:
        """The second half: the MLP."""
        y = self.mlp(self.read(self.mlp_norm, x, run.layout), run.layout)
        y = y if self.mlp_out_norm is None else self.mlp_out_norm(y)
        return self.write(self.mlp_norm, x + self.drop(y, MLP_OUT, run, keys))

    def drop(self, y: jax.Array, place: int, run: Execution, keys: jax.Array | None) -> jax.Array:
        """What a half adds to the residual stream, some of it dropped in training."""
        rate, layout = self.config.residual_dropout, run.layout
        return dropout(y, rate=rate, keys=keys, place=place, layout=layout, names=RESIDUAL)

    def read(self, norm: Norm, x: jax.Array, layout: Layout) -> jax.Array:
        """What attention or the MLP reads of the residual stream: all of its length."""
        x = x if self.config.norm_placement == "post" else norm(x)
        return layout.shard(x, "batch", "length", "embed")

    def write(self, norm: Norm, x: jax.Array) -> jax.Array:
        """The residual stream after a sum."""
        return norm(x) if self.config.norm_placement == "post" else x
