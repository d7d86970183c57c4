"""Text from a model: prompts in, new tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stack.config import LanguageConfig, StackError
from stack.inference import cache as caches
from stack.inference.sampling import sample
from stack.layers.attention import Cache
from stack.layers.head import logits
from stack.models.decoder import Decoder
from stack.models.stack import Execution
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout
from stack.parallel.zero import gather_module
from stack.step.program import Program
from stack.step.state import concrete

SHORTEST_BUCKET = 16
"""Prompts are padded to a power of two from here on, so that few lengths are compiled."""


def generate(
    program: Program,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | None = None,
) -> list[list[int]]:
    """Continues each prompt, all of them at once, with a key-value cache.

    A row's text depends on its prompt, on `seed` and on its number in the batch; not on the other
    prompts, so the same prompt given twice is continued in two ways. Prompt and text together end at
    `model.max_length`, even where positions are not learned.

    Args:
      program: of the run; its mesh is used whole, with the batch on every device and heads, MLP and
        vocabulary over `tensor`.
      params: parameters that lie as `program.parameters`.
      prompts: tokens, at least one each.
      length: new tokens at most.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among this many likeliest tokens; None: all.
      top_p: sample among the likeliest tokens that together hold this probability.
      seed: of the random choices.
      eos: the token that ends a text; None: none does.

    Returns:
      The new tokens of each prompt, up to `eos`, which is left out.

    Raises:
      StackError: no token is asked for, or a prompt is empty, has a token the model does not know, or
        fills the context.
    """
    if length < 1:
        raise StackError(f"length={length} asks for no new token; ask for at least 1")
    config = program.config.model
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, config, name=f"prompt {number}")
    if not prompts:
        return []
    settings = _Settings(
        graph=program.graph,
        config=config,
        layout=_layout(program.layout),
        length=min(length, config.max_length),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    with meshes.use(concrete(program)):
        tokens, padding = jax.device_put(pad(prompts, config.max_length), program.layout.sharding())
        end = -1 if eos is None else eos
        new, lengths = _generate(settings, params, tokens, padding, jax.random.key(seed), end)
    new, lengths = np.asarray(new), np.asarray(lengths)
    return [row[:end].tolist() for row, end in zip(new, lengths, strict=True)]


def pad(prompts: Sequence[Sequence[int]], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array, padded on the left to a power of two or to `max_length`.

    Returns:
      Tokens [batch, bucket] and the padding before each, [batch], int32.
    """
    longest = max(map(len, prompts))
    bucket = min(max(SHORTEST_BUCKET, 1 << (longest - 1).bit_length()), max_length)
    padding = [bucket - len(prompt) for prompt in prompts]
    rows = [[0] * empty + list(prompt) for prompt, empty in zip(prompts, padding, strict=True)]
    return np.asarray(rows, np.int32), np.asarray(padding, np.int32)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What one compiled program is made for."""

    graph: nnx.GraphDef
    config: LanguageConfig
    layout: Layout
    length: int
    temperature: float
    top_k: int | None
    top_p: float


class _Progress(NamedTuple):
    """What one new token changes."""

    number: jax.Array
    """Tokens chosen so far, int32 scalar."""
    tokens: jax.Array
    """[batch, length] int32."""
    lengths: jax.Array
    """[batch] int32: tokens that belong to the text."""
    ended: jax.Array
    """[batch] bool."""
    cache: Cache


@partial(jax.jit, static_argnames="settings")
def _generate(
    settings: _Settings, params: dict, prompts: jax.Array, padding: jax.Array, key: jax.Array, eos: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """New tokens [batch, length] and how many of them are text, [batch]."""
    config, layout = settings.config, settings.layout
    batch, bucket = prompts.shape
    slots = bucket + settings.length
    room = config.max_length - (bucket - padding)
    model: Decoder = nnx.merge(settings.graph, params)
    run = Execution(layout=layout)
    if layout.zero < 3:
        model = gather_module(model, layout)

    def append(progress: _Progress, tokens: jax.Array, first: jax.Array | int) -> _Progress:
        """Puts `tokens`, [batch, queries], into the cache from slot `first` on and chooses the next."""
        queries, window = tokens.shape[1], config.sliding_window
        mask = caches.mask(padding, first=first, queries=queries, slots=slots, window=window)
        output, cache = model.decode(tokens, mask, run, cache=progress.cache, slot=first)
        scores = logits(
            output.hidden[:, -1:],
            output.table,
            vocab_size=config.vocab_size,
            softcap=config.logit_softcap,
            layout=layout,
        )
        chosen = sample(
            layout.shard(scores[:, 0], "batch", None),
            jax.random.fold_in(key, progress.number),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        ended = progress.ended | (chosen == eos)
        lengths = progress.lengths + ~ended
        return _Progress(
            number=progress.number + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                progress.tokens, chosen[:, None], progress.number, axis=1
            ),
            lengths=lengths,
            ended=ended | (lengths >= room),
            cache=cache,
        )

    def unfinished(progress: _Progress) -> jax.Array:
        return (progress.number < settings.length) & ~progress.ended.all()

    def one_more(progress: _Progress) -> _Progress:
        last = jax.lax.dynamic_slice_in_dim(progress.tokens, progress.number - 1, 1, axis=1)
        return append(progress, last, bucket + progress.number - 1)

    start = _Progress(
        number=jnp.int32(0),
        tokens=jnp.zeros((batch, settings.length), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        ended=jnp.zeros(batch, bool),
        cache=caches.empty(config, layout, batch=batch, slots=slots),
    )
    end = jax.lax.while_loop(unfinished, one_more, append(start, prompts, 0))
    return end.tokens, end.lengths


def _layout(layout: Layout) -> Layout:
    """The layout of training for few rows of one token each.

    Where nothing is split over `fsdp`, stage 3 would only cast the weights again for every token.
    """
    zero = layout.zero if layout.size("fsdp") > 1 else 0
    return replace(layout, split_batch=False, sequence_parallel=False, zero=zero)


def check_prompt(prompt: Sequence[int], config: LanguageConfig, *, name: str) -> None:
    """Refuses a prompt that cannot be continued.

    Args:
      prompt: tokens.
      config: of the model.
      name: of the prompt, for the error.

    Raises:
      StackError: it is empty, has a token the model does not know, or fills the context.
    """
    if not len(prompt):
        raise StackError(f"{name} is empty; start it with at least one token, such as end of document")
    if len(prompt) >= config.max_length:
        raise StackError(
            f"{name} has {len(prompt)} tokens, but the context is model.max_length={config.max_length} and a "
            "new one must fit; shorten the prompt"
        )
    foreign = [token for token in prompt if not 0 <= token < config.vocab_size]
    if foreign:
        raise StackError(
            f"{name} holds token {foreign[0]}, but the model's are 0 to {config.vocab_size - 1}; "
            f"use the tokenizer the model was trained with"
        )
