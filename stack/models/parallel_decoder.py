"""A decoder whose attention and MLP stand side by side: GPT-J, and PaLM (arXiv 2204.02311, section 2)."""

from functools import partial
from typing import Any, ClassVar

import jax
from flax import nnx

from stack.config import BlockConfig, LanguageConfig
from stack.kernels.attention import Mask
from stack.layers.attention import Attention, Cache
from stack.layers.dropout import ATTENTION_OUT, MLP_OUT, dropout
from stack.layers.mlp import Mlp
from stack.layers.norm import Norm
from stack.models.block import RESIDUAL
from stack.models.cost import Cost, decoder_cost
from stack.models.decoder import Decoder
from stack.models.stack import Execution


class ParallelBlock(nnx.Module):
    """x + attention(norm(x)) + mlp(norm(x)), from one norm."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Float32 parameters of one layer."""
        self.config = config
        self.norm = Norm(config.norm, ("embed", config.embed_dim), config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
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
        whole = layout.shard(self.norm(x), "batch", "length", "embed")
        attention, cache = self.attention(
            whole, mask, layout, kernel=run.kernels["attention"], keys=keys, cache=cache, slot=slot
        )
        mlp = self.mlp(whole, layout)
        return x + drop(attention, place=ATTENTION_OUT) + drop(mlp, place=MLP_OUT), cache


class ParallelDecoder(Decoder):
    """A decoder of parallel blocks."""

    block: ClassVar[Any] = ParallelBlock

    @staticmethod
    def cost(config: LanguageConfig) -> Cost:
        """A decoder's, with one norm and one sum a layer."""
        return decoder_cost(config, sums=1)
