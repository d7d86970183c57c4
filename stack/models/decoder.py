"""The decoder: GPT-2 and Turing-NLG, Llama, Qwen and Gemma, by config."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from stack.config import BlockConfig, LanguageConfig
from stack.kernels.attention import Mask, row_mask
from stack.layers.attention import Cache
from stack.layers.dropout import EMBEDDING, dropout, layer_keys
from stack.layers.embedding import Embedding
from stack.layers.mlp import matrix_std
from stack.layers.norm import Norm
from stack.models.block import RESIDUAL, Block
from stack.models.cost import Cost, decoder_cost
from stack.models.protocol import Output
from stack.models.stack import Execution, run_layers, stack_layers
from stack.parallel.zero import gather_at_use

type State = tuple[Cache | None, jax.Array | None]
"""What each layer has of its own: its cache, and whether it has the window, where not all have."""


class Decoder(nnx.Module):
    """Embedding, a stack of blocks, a final norm; the head is applied by `logits` or by the loss."""

    block: ClassVar[Any] = Block
    """The layer that is stacked."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        """Float32 parameters; under `nnx.eval_shape` nothing is allocated."""
        self.config = config
        words = partial(
            Embedding, ("vocab", config.padded_vocab_size), config.embed_dim, used=config.vocab_size
        )
        scale = math.sqrt(config.embed_dim) if config.scale_embedding else None
        self.embed = words(std=config.init_std, scale=scale, rngs=rngs)
        self.position = _positions(config, rngs) if config.position == "learned" else None
        make = partial(_make_layer, self.block, config)
        self.layers = stack_layers(make, config.num_layers, rngs=rngs)
        self.final_norm = final_norm(config)
        std = matrix_std(config, config.embed_dim)
        self.head = None if config.tied_embeddings else words(std=std, rngs=rngs)

    @staticmethod
    def cost(config: LanguageConfig) -> Cost:
        """The matrix products and attentions of a forward pass."""
        return decoder_cost(config)

    def __call__(self, batch: Mapping[str, jax.Array], run: Execution) -> Output:
        """Hidden states of whole rows.

        Args:
          batch: tokens, positions and segments, [batch, length] int32; with `prefix`, tokens where it is 1
            are seen by all of their text.
          run: how.
        """
        mask = row_mask(
            batch["segments"],
            batch["positions"],
            packed=run.packed,
            kind="prefix" if "prefix" in batch else "causal",
            window=self.config.window,
            prefix=batch.get("prefix"),
        )
        return self._run(batch["tokens"], batch["positions"], mask, run, None, 0)[0]

    def encode(self, batch: Mapping[str, jax.Array], run: Execution) -> jax.Array:
        """The last hidden states, [batch, length, embed]; see `__call__`."""
        return self(batch, run).hidden

    def leave_out_words(self, *, pooler: bool) -> None:
        """Takes away what only scores words."""
        self.head = None

    def decode(
        self, tokens: jax.Array, mask: Mask, run: Execution, *, cache: Cache, slot: jax.Array | int
    ) -> tuple[Output, Cache]:
        """Hidden states of tokens that follow those in a cache.

        Args:
          tokens: [batch, length] int32.
          mask: who sees whom in the cache, and the positions of the tokens.
          run: how.
          cache: of all layers, [layers, batch, slots, kv_heads, head_dim] each.
          slot: where in the cache the tokens go.

        Returns:
          The hidden states, and the cache with the tokens in it.
        """
        output, cache_after = self._run(tokens, mask.query_positions, mask, run, cache, slot)
        assert cache_after is not None, "a cache goes in, so one comes out"
        return output, cache_after

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: Mask,
        run: Execution,
        cache: Cache | None,
        slot: jax.Array | int,
    ) -> tuple[Output, Cache | None]:
        config, layout = self.config, run.layout
        dtype = jnp.dtype(config.dtype)
        embed = gather_at_use(self.embed, layout)
        x = embed(tokens, layout, dtype)
        if self.position is not None:
            x = x + gather_at_use(self.position, layout)(positions, layout, dtype)
        if run.keys is not None:
            keys = layer_keys(run.keys, config.num_layers)
            rate = config.embedding_dropout
            x = dropout(x, rate=rate, keys=keys, place=EMBEDDING, layout=layout, names=RESIDUAL)

        def layer(
            block: Block, x: jax.Array, keys: jax.Array | None, state: State
        ) -> tuple[jax.Array, State]:
            cache, local = state
            own = replace(mask, local=local)
            x, cache = block(x, own, run, keys=keys, cache=cache, slot=slot)
            return x, (cache, local)

        state = cache, local_layers(config)
        x, (cache, _) = run_layers(layer, self.layers, x, run, state=state, unroll=config.scan_unroll)
        x = layout.shard(x if self.final_norm is None else self.final_norm(x), "batch", "length", "embed")
        head = embed if self.head is None else gather_at_use(self.head, layout)
        return Output(hidden=x, table=head.table[...].astype(dtype)), cache


def local_layers(config: BlockConfig) -> jax.Array | None:
    """Whether each layer has the window, [layers] bool; None where all of them are alike."""
    return jnp.array(config.local_layers) if len(set(config.local_layers)) > 1 else None


def final_norm(config: BlockConfig) -> Norm | None:
    """The norm after the last block, where the block does not end with one."""
    if config.norm_placement == "post":
        return None
    return Norm(config.norm, ("embed", config.embed_dim), config.norm_epsilon)


def _make_layer(block: Any, config: LanguageConfig, rngs: nnx.Rngs) -> Any:
    return block(config, rngs=rngs)


def _positions(config: LanguageConfig, rngs: nnx.Rngs) -> Embedding:
    rows = ("length", config.max_length)
    return Embedding(rows, config.embed_dim, std=config.position_init_std, used=config.max_length, rngs=rngs)
