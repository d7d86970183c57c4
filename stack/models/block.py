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

RESIDUAL = ("batch", "residual_length", "embed")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (arXiv 1706.03762, norms first as in GPT-2)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Float32 parameters of one layer."""
        embed = ("embed", config.embed_dim)
        self.config = config
        self.attention_norm = Norm(config.norm, embed, config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config.norm, embed, config.norm_epsilon)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        run: Execution,
        *,
        keys: jax.Array | None = None,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """[batch, residual_length, embed] -> the same, and the cache with this layer's keys and values."""
        layout = run.layout
        drop = partial(dropout, rate=self.config.residual_dropout, keys=keys, layout=layout, names=RESIDUAL)
        whole = layout.shard(self.attention_norm(x), "batch", "length", "embed")
        y, cache = self.attention(
            whole, mask, layout, kernel=run.kernels["attention"], keys=keys, cache=cache, slot=slot
        )
        x = x + drop(y, place=ATTENTION_OUT)
        whole = layout.shard(self.mlp_norm(x), "batch", "length", "embed")
        return x + drop(self.mlp(whole, layout), place=MLP_OUT), cache
