"""The decoder: GPT-2 and Turing-NLG, Llama and Qwen, by config."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from stack.config import ModelConfig
from stack.kernels.attention import Mask
from stack.layers.attention import Attention, Cache
from stack.layers.dropout import ATTENTION_OUT, EMBEDDING, MLP_OUT, dropout, layer_keys
from stack.layers.embedding import Embedding
from stack.layers.mlp import Mlp
from stack.layers.norm import Norm
from stack.parallel.rules import ONE_DEVICE, Layout
from stack.parallel.zero import gather_at_use

RESIDUAL = ("batch", "residual_length", "embed")
LAYER_INPUT = "layer_input"
Remat = Literal["none", "full", "dots", "save_qkv_proj"]


def _dots(primitive: Primitive, *inputs: Any, **parameters: Any) -> bool:
    """Saves the results of matmuls; where a device holds a partial sum of one, the sum."""
    if primitive.name == "reshard":
        return bool(inputs[0].sharding.spec.unreduced)
    sharding = parameters.get("out_sharding")
    if sharding is not None and sharding.spec.unreduced:
        return False
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **parameters)


SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _dots,
    "save_qkv_proj": jax.checkpoint_policies.save_only_these_names("qkv_proj"),
}
"""What the backward pass finds saved, by the name of the remat policy."""

_to_host = partial(
    jax.checkpoint_policies.save_and_offload_only_these_names,
    names_which_can_be_saved=[],
    offload_src="device",
    offload_dst="pinned_host",
)
OFFLOADED = {
    "full": _to_host(names_which_can_be_offloaded=[LAYER_INPUT]),
    "save_qkv_proj": _to_host(names_which_can_be_offloaded=[LAYER_INPUT, "qkv_proj"]),
}
"""The same with what is saved in host memory until the backward pass comes to it."""


class Context(NamedTuple):
    """What every layer is told besides its input."""

    mask: Mask
    kernel: str
    layout: Layout
    slot: jax.Array | int = 0


class Output(NamedTuple):
    """What a decoder gives; `stack.layers.head.logits` makes scores of it."""

    hidden: jax.Array
    """[batch, length, embed] in the compute dtype."""
    table: jax.Array
    """[vocab, embed] in the compute dtype: the rows that hidden states are compared with."""
    cache: Cache | None
    """Keys and values of all layers, [layers, batch, slots, kv_heads, head_dim] each."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """One layer."""
        embed = ("embed", config.embed_dim)
        self.config = config
        self.attention_norm = Norm(config.norm, embed, config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config.norm, embed, config.norm_epsilon)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: Context, *, keys: jax.Array | None = None, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[batch, residual_length, embed] -> the same, and the cache with this layer's keys and values."""
        layout = context.layout
        drop = partial(dropout, rate=self.config.residual_dropout, keys=keys, layout=layout, names=RESIDUAL)
        whole = layout.shard(self.attention_norm(x), "batch", "length", "embed")
        y, cache = self.attention(
            whole, context.mask, layout, kernel=context.kernel, keys=keys, cache=cache, slot=context.slot
        )
        x = x + drop(y, place=ATTENTION_OUT)
        whole = layout.shard(self.mlp_norm(x), "batch", "length", "embed")
        return x + drop(self.mlp(whole, layout), place=MLP_OUT), cache


class Decoder(nnx.Module):
    """Embedding, a stack of blocks, a final norm; the head is applied by `logits` or by the loss."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Float32 parameters; under `nnx.eval_shape` nothing is allocated."""
        self.config = config
        words = partial(
            Embedding, ("vocab", config.padded_vocab_size), config.embed_dim, used=config.vocab_size
        )
        self.embed = words(std=config.init_std, rngs=rngs)
        self.position = _positions(config, rngs) if config.position == "learned" else None
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.final_norm = Norm(config.norm, ("embed", config.embed_dim), config.norm_epsilon)
        self.head = None if config.tied_embeddings else words(std=config.init_std, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        mask: Mask,
        *,
        layout: Layout = ONE_DEVICE,
        kernel: str = "xla",
        keys: jax.Array | None = None,
        remat: Remat = "none",
        offload: bool = False,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
    ) -> Output:
        """Hidden states after the final norm, and the table of the head.

        Args:
          tokens: [batch, length] int32.
          mask: who sees whom, and the positions of the tokens.
          layout: how things lie on the mesh.
          kernel: of attention, `xla` or `cudnn`.
          keys: [batch] dropout keys in training, else None.
          remat: what the backward pass computes again.
          offload: what it does not waits for it in host memory; of remat `full` and `save_qkv_proj`.
          cache: of all layers, [layers, batch, slots, kv_heads, head_dim] each, or None.
          slot: where in the cache the tokens go.

        Returns:
          Hidden states, the table they are compared with, and the cache with the tokens in it.
        """
        context = Context(mask, kernel, layout, slot)
        dtype = jnp.dtype(self.config.dtype)
        embed = gather_at_use(self.embed, layout)
        x = embed(tokens, layout, dtype)
        if self.position is not None:
            x = x + gather_at_use(self.position, layout)(mask.query_positions, layout, dtype)
        if keys is not None:
            x = dropout(
                x,
                rate=self.config.embedding_dropout,
                keys=layer_keys(keys, self.config.num_layers),
                place=EMBEDDING,
                layout=layout,
                names=RESIDUAL,
            )

        def layer(x: jax.Array, inputs: tuple) -> tuple[jax.Array, Cache | None]:
            block, number, cache = inputs
            x = checkpoint_name(x, LAYER_INPUT) if offload else x
            if remat != "none":  # Once for what is computed again and its gradients; else product by product.
                block = gather_at_use(block, layout)
            return block(x, context, keys=None if keys is None else layer_keys(keys, number), cache=cache)

        if remat != "none":
            policy = OFFLOADED[remat] if offload else SAVED[remat]
            # Without the barrier the compiler, which unrolls the loop by two, computes the next layer again
            # beside this one and holds both (10.5 instead of 9.4 GiB for qwen3_0_6b). At stage 3 it would
            # hold back the gathers of the next layer's weights.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=layout.zero < 3)
        stack = (self.layers, jnp.arange(self.config.num_layers), cache)
        # Unrolled, what is to be computed again is computed at once and kept: twice the memory.
        unroll = self.config.scan_unroll if remat == "none" else 1
        x, cache = jax.lax.scan(layer, x, stack, unroll=unroll)
        x = layout.shard(self.final_norm(x), "batch", "length", "embed")
        head = embed if self.head is None else gather_at_use(self.head, layout)
        return Output(x, head.table[...].astype(dtype), cache)


def _positions(config: ModelConfig, rngs: nnx.Rngs) -> Embedding:
    rows = ("length", config.max_length)
    return Embedding(rows, config.embed_dim, std=config.position_init_std, used=config.max_length, rngs=rngs)
