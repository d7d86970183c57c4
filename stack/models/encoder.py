"""The encoder: BERT, RoBERTa, UniLM and the Turing NLU family, by config."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from stack.config import EncoderConfig
from stack.kernels.attention import row_mask
from stack.layers.dropout import EMBEDDING, dropout, layer_keys
from stack.layers.embedding import Embedding, select
from stack.layers.linear import Linear
from stack.layers.mlp import ACTIVATIONS, matrix_std
from stack.layers.norm import Norm
from stack.layers.parameter import parameter
from stack.models.block import RESIDUAL, Block
from stack.models.cost import Cost, Product, decoder_cost
from stack.models.decoder import final_norm, local_layers
from stack.models.protocol import Output
from stack.models.stack import Execution, run_layers, stack_layers
from stack.parallel.rules import Layout
from stack.parallel.zero import gather_at_use


def square(config: EncoderConfig, rngs: nnx.Rngs) -> Linear:
    """A layer as wide as its input."""
    width = (("embed", config.embed_dim),)
    return Linear(width, width, bias=True, std=matrix_std(config, config.embed_dim), rngs=rngs)


class Head(nnx.Module):
    """What stands between the last hidden state and the table of words (BERT, arXiv 1810.04805)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        """A square layer and a norm; a bias of words. Each where the config has it."""
        self.activation = "gelu" if config.gated else config.mlp
        self.transform = square(config, rngs) if config.head_transform else None
        norm = Norm(config.norm, ("embed", config.embed_dim), config.norm_epsilon)
        self.norm = norm if config.head_transform else None
        zeros = jnp.zeros((config.padded_vocab_size,), jnp.float32)
        self.bias = parameter(zeros, axes=("vocab",), role="vector") if config.head_bias else None

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """[batch, length, embed] -> the same, to be compared with the table."""
        if self.transform is None or self.norm is None:
            return x
        return self.norm(
            ACTIVATIONS[self.activation](self.transform(x, layout, ("batch", "length", "embed")))
        )


class Encoder(nnx.Module):
    """Embeddings, a stack of blocks in which every token sees its whole text, and a head over words."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        """Float32 parameters; under `nnx.eval_shape` nothing is allocated."""
        self.config = config
        embed = ("embed", config.embed_dim)
        table = partial(Embedding, embed_dim=config.embed_dim, rngs=rngs)
        words = partial(table, ("vocab", config.padded_vocab_size), used=config.vocab_size)
        rows = config.first_position + config.max_length
        scale = math.sqrt(config.embed_dim) if config.scale_embedding else None
        self.embed = words(std=config.init_std, scale=scale)
        self.position = (
            table(("length", rows), used=rows, std=config.position_init_std)
            if config.position == "learned"
            else None
        )
        self.types = (
            table(("types", config.num_types), used=config.num_types, std=config.init_std)
            if config.num_types
            else None
        )
        self.embedding_norm = Norm(config.norm, embed, config.norm_epsilon) if config.embedding_norm else None
        self.layers = stack_layers(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs=rngs)
        self.final_norm = final_norm(config)
        self.head: Head | None = Head(config, rngs=rngs)
        self.output = None if config.tied_embeddings else words(std=matrix_std(config, config.embed_dim))
        self.pooler = square(config, rngs) if config.pooler else None

    @staticmethod
    def cost(config: EncoderConfig) -> Cost:
        """The matrix products and attentions of a forward pass."""
        return encoder_cost(config)

    def __call__(self, batch: Mapping[str, jax.Array], run: Execution) -> Output:
        """Hidden states of whole rows, or of some of their places.

        Args:
          batch: tokens, positions and segments, [batch, length] int32; `types`, 0 without; with `prefix`,
            tokens where it is 1 are seen by all of their text and others by those after them; with `masked`,
            [batch, masked] int32, the places whose hidden states are asked for.
          run: how.
        """
        layout = run.layout
        x = self.encode(batch, run)
        if "masked" in batch:
            x = select(x, batch["masked"], layout)
        assert self.head is not None, "this model scores no words"
        x = gather_at_use(self.head, layout)(x, layout)
        table = gather_at_use(self.embed if self.output is None else self.output, layout).table[...]
        bias = None if self.head.bias is None else self.head.bias[...]
        return Output(hidden=x, table=table.astype(x.dtype), bias=bias)

    def encode(self, batch: Mapping[str, jax.Array], run: Execution) -> jax.Array:
        """The last hidden states, [batch, length, embed]; see `__call__`."""
        config, layout = self.config, run.layout
        x = self._embed(batch, run)
        mask = row_mask(
            batch["segments"],
            batch["positions"],
            packed=run.packed,
            kind="prefix" if "prefix" in batch else "full",
            window=config.window,
            prefix=batch.get("prefix"),
        )

        def layer(
            block: Block, x: jax.Array, keys: jax.Array | None, local: jax.Array | None
        ) -> tuple[jax.Array, jax.Array | None]:
            return block(x, replace(mask, local=local), run, keys=keys)[0], local

        state = local_layers(config)
        x, _ = run_layers(layer, self.layers, x, run, state=state, unroll=config.scan_unroll)
        return layout.shard(x if self.final_norm is None else self.final_norm(x), "batch", "length", "embed")

    def leave_out_words(self, *, pooler: bool) -> None:
        """Takes away what only scores words; the pooler too, unless it is kept."""
        self.head = self.output = None
        self.pooler = self.pooler if pooler else None

    def pool(self, hidden: jax.Array, layout: Layout) -> jax.Array:
        """The tanh of a square layer, over first tokens, [batch, texts, embed] -> the same.

        Raises:
          ValueError: the model has no pooler.
        """
        if self.pooler is None:
            raise ValueError("this encoder has no pooler; set model.pooler=true")
        hidden = layout.shard(hidden, "batch", "length", "embed")
        return jnp.tanh(gather_at_use(self.pooler, layout)(hidden, layout, ("batch", "length", "embed")))

    def _embed(self, batch: Mapping[str, jax.Array], run: Execution) -> jax.Array:
        config, layout, dtype = self.config, run.layout, jnp.dtype(self.config.dtype)
        x = gather_at_use(self.embed, layout)(batch["tokens"], layout, dtype)
        if self.position is not None:
            places = batch["positions"] + config.first_position
            x = x + gather_at_use(self.position, layout)(places, layout, dtype)
        if self.types is not None:
            types = batch.get("types", jnp.zeros_like(batch["tokens"]))
            x = x + gather_at_use(self.types, layout)(types, layout, dtype)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        keys = None if run.keys is None else layer_keys(run.keys, config.num_layers)
        rate = config.embedding_dropout
        return dropout(x, rate=rate, keys=keys, place=EMBEDDING, layout=layout, names=RESIDUAL)


def encoder_cost(config: EncoderConfig) -> Cost:
    """As of a decoder, with all keys seen; the head is of the places that are hidden."""
    cost = decoder_cost(config, kind="full")
    square = Product(inner=("embed", config.embed_dim), columns=("embed", config.embed_dim), tokens="masked")
    return Cost(stacks=cost.stacks, head=(*[square] * config.head_transform, *cost.head))
