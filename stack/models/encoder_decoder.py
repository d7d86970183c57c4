"""The encoder and decoder of T5 (arXiv 1910.10683), v1.0 and v1.1 by config."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from stack.config import BlockConfig, EncoderDecoderConfig
from stack.kernels.attention import Mask, row_mask
from stack.layers.attention import Cache, CrossAttention
from stack.layers.dropout import CROSS_OUT, EMBEDDING, dropout, layer_keys
from stack.layers.embedding import Embedding
from stack.layers.mlp import matrix_std
from stack.layers.norm import Norm
from stack.layers.relative import RelativeBias
from stack.models.block import RESIDUAL, Block
from stack.models.cost import Cost, encoder_decoder_cost
from stack.models.decoder import final_norm
from stack.models.protocol import Output
from stack.models.stack import Execution, run_layers, stack_layers
from stack.parallel.zero import gather_at_use


class Memory(NamedTuple):
    """What was read, as every layer of the decoder sees it."""

    seen: Cache
    """Keys and values of all layers, [layers, batch, length, kv_heads, head_dim] each."""
    segments: jax.Array
    """[batch, length] int32; 0 is padding."""


class CrossBlock(Block):
    """A block with attention to another text between its two halves."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Float32 parameters of one layer."""
        super().__init__(config, rngs=rngs)
        norm = partial(Norm, config.norm, ("embed", config.embed_dim), config.norm_epsilon)
        self.cross_norm = norm()
        self.cross = CrossAttention(config, rngs=rngs)
        self.cross_out_norm = norm() if config.norm_placement == "both" else None

    def look(
        self, x: jax.Array, seen: Cache, mask: Mask, run: Execution, keys: jax.Array | None
    ) -> jax.Array:
        """What stands between the halves, [batch, residual_length, embed] -> the same."""
        whole = self.read(self.cross_norm, x, run.layout)
        y = self.cross(whole, seen, mask, run.layout, kernel=run.kernels["attention"], keys=keys)
        y = y if self.cross_out_norm is None else self.cross_out_norm(y)
        return self.write(self.cross_norm, x + self.drop(y, CROSS_OUT, run, keys))


class Side[B: Block](nnx.Module):
    """One of the two stacks: its layers, their positions, and the norm after them."""

    def __init__(
        self,
        config: EncoderDecoderConfig,
        block: type[B],
        number: int,
        *,
        both_ways: bool,
        rngs: nnx.Rngs,
    ):
        """So many blocks, whose tokens see those before them, or those to either side."""
        rows = ("length", config.max_length)
        self.relative = (
            RelativeBias(config, both_ways=both_ways, rngs=rngs) if config.position == "relative" else None
        )
        self.position = (
            Embedding(rows, config.embed_dim, std=config.position_init_std, used=config.max_length, rngs=rngs)
            if config.position == "learned"
            else None
        )
        self.layers = stack_layers(lambda rngs: block(config, rngs=rngs), number, rngs=rngs)
        self.final_norm = final_norm(config)

    def bias(self, mask: Mask, run: Execution, *, first: jax.Array | int = 0) -> jax.Array | None:
        """What is added to the scores of every layer; see `RelativeBias`."""
        if self.relative is None:
            return None
        queries, keys = mask.query_positions.shape[1], mask.key_positions.shape[1]
        return self.relative(queries, keys, run.layout, first=first)

    def end(self, x: jax.Array, run: Execution) -> jax.Array:
        """The last hidden states, whole in length."""
        x = x if self.final_norm is None else self.final_norm(x)
        return run.layout.shard(x, "batch", "length", "embed")


class EncoderDecoder(nnx.Module):
    """One stack of blocks reads a text, another writes one and attends to what was read."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
        """Float32 parameters; under `nnx.eval_shape` nothing is allocated."""
        self.config = config
        words = partial(
            Embedding, ("vocab", config.padded_vocab_size), config.embed_dim, used=config.vocab_size
        )
        self.embed = words(std=config.init_std, rngs=rngs)
        self.encoder = Side(config, Block, config.num_layers, both_ways=True, rngs=rngs)
        self.decoder: Any = Side(config, CrossBlock, config.decoder_layers, both_ways=False, rngs=rngs)
        std = matrix_std(config, config.embed_dim)
        self.head = None if config.tied_embeddings else words(std=std, rngs=rngs)

    @staticmethod
    def cost(config: EncoderDecoderConfig) -> Cost:
        """The matrix products and attentions of a forward pass."""
        return encoder_decoder_cost(config)

    def __call__(self, batch: Mapping[str, jax.Array], run: Execution) -> Output:
        """Hidden states of what is written.

        Args:
          batch: tokens, positions and segments of what is read, [batch, length] int32; target_tokens,
            target_positions and target_segments of what is written, [batch, target_length] int32, each of
            which was predicted from those before it. Texts have one segment in both.
          run: how.
        """
        memory, segments = self.encode(batch, run), batch["segments"]
        # The gradients of all layers' keys and values are added up before `tensor` sums them, once.
        memory = run.layout.sum_late(memory, "batch", "length", "embed")
        mask = row_mask(
            batch["target_segments"],
            batch["target_positions"],
            packed=run.packed,
            window=self.config.sliding_window,
        )
        cross = _cross_mask(batch["target_segments"], segments)

        def layer(
            block: CrossBlock, x: jax.Array, keys: jax.Array | None, state: None
        ) -> tuple[jax.Array, None]:
            x, _ = block.attend(x, mask, run, bias=bias, keys=keys, cache=None, slot=0)
            x = block.look(x, block.cross.keys(memory, run.layout), cross, run, keys)
            return block.transform(x, run, keys), state

        bias = self.decoder.bias(mask, run)
        x = self._embed(self.decoder, batch["target_tokens"], batch["target_positions"], run)
        first, unroll = self._first(self.decoder), self.config.scan_unroll
        x, _ = run_layers(layer, self.decoder.layers, x, run, first=first, unroll=unroll)
        return self._output(x, run)

    def encode(self, batch: Mapping[str, jax.Array], run: Execution) -> jax.Array:
        """The last hidden states of what is read, [batch, length, embed]; see `__call__`."""
        mask = row_mask(
            batch["segments"],
            batch["positions"],
            packed=run.packed,
            kind="full",
            window=self.config.sliding_window,
        )
        bias = self.encoder.bias(mask, run)

        def layer(block: Block, x: jax.Array, keys: jax.Array | None, state: None) -> tuple[jax.Array, None]:
            return block(x, mask, run, bias=bias, keys=keys)[0], state

        x = self._embed(self.encoder, batch["tokens"], batch["positions"], run)
        x, _ = run_layers(layer, self.encoder.layers, x, run, unroll=self.config.scan_unroll)
        return self.encoder.end(x, run)

    def leave_out_words(self, *, pooler: bool) -> None:
        """Takes away what only writes words: the decoder too."""
        self.decoder = self.head = None

    def remember(self, batch: Mapping[str, jax.Array], run: Execution) -> Memory:
        """What is read, ready for `decode`: keys and values are computed once for all that is written.

        Args:
          batch: tokens, positions and segments, [batch, length] int32.
          run: how.
        """
        hidden, layout = self.encode(batch, run), run.layout

        def layer(block: CrossBlock, x: jax.Array, _: jax.Array | None, __: Any) -> tuple[jax.Array, Any]:
            return x, block.cross.keys(hidden, layout)

        nothing: Any = None
        _, seen = run_layers(layer, self.decoder.layers, jnp.zeros(()), run, state=nothing)
        return Memory(seen, batch["segments"])

    def decode(
        self,
        tokens: jax.Array,
        mask: Mask,
        run: Execution,
        *,
        cache: Cache,
        slot: jax.Array | int,
        memory: Memory,
    ) -> tuple[Output, Cache]:
        """Hidden states of written tokens that follow those in a cache; see `Decoder.decode`.

        Args:
          tokens: [batch, length] int32.
          mask: who sees whom in the cache, and the positions of the tokens.
          run: how.
          cache: of all layers of the decoder, [layers, batch, slots, kv_heads, head_dim] each.
          slot: where in the cache the tokens go.
          memory: what was read.
        """
        cross = _cross_mask(jnp.ones_like(tokens), memory.segments)
        bias = self.decoder.bias(mask, run, first=slot)

        def layer(
            block: CrossBlock, x: jax.Array, keys: jax.Array | None, state: Any
        ) -> tuple[jax.Array, Any]:
            cache, seen = state
            x, cache_after = block.attend(x, mask, run, bias=bias, keys=keys, cache=cache, slot=slot)
            x = block.look(x, seen, cross, run, keys)
            return block.transform(x, run, keys), (cache_after, seen)

        x = self._embed(self.decoder, tokens, mask.query_positions, run)
        x, (cache, _) = run_layers(layer, self.decoder.layers, x, run, state=(cache, memory.seen))
        return self._output(x, run), cache

    def _first(self, side: Side) -> int:
        """The number of a stack's first layer, for dropout keys; its embedding's is that after its last."""
        return 0 if side is self.encoder else self.config.num_layers + 1

    def _embed(self, side: Side, tokens: jax.Array, positions: jax.Array, run: Execution) -> jax.Array:
        config, layout, dtype = self.config, run.layout, jnp.dtype(self.config.dtype)
        x = gather_at_use(self.embed, layout)(tokens, layout, dtype)
        if side.position is not None:
            x = x + gather_at_use(side.position, layout)(positions, layout, dtype)
        number = config.num_layers if side is self.encoder else self._first(side) + config.decoder_layers
        keys = None if run.keys is None else layer_keys(run.keys, number)
        rate = config.embedding_dropout
        return dropout(x, rate=rate, keys=keys, place=EMBEDDING, layout=layout, names=RESIDUAL)

    def _output(self, x: jax.Array, run: Execution) -> Output:
        config = self.config
        x = self.decoder.end(x, run)
        if config.tied_embeddings and config.scale_output:
            x = x * config.embed_dim**-0.5
        table = gather_at_use(self.embed if self.head is None else self.head, run.layout).table[...]
        return Output(hidden=x, table=table.astype(config.dtype))


def _cross_mask(segments: jax.Array, read: jax.Array) -> Mask:
    """Every token of a text sees all that was read of it; positions tell nothing."""
    return Mask(
        kind="full",
        query_positions=segments,
        key_positions=read,
        query_segments=segments,
        key_segments=read,
    )
