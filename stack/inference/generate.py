"""Text from a model: prompts in, new tokens out."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stack.config import EncoderDecoderConfig, LanguageConfig, StackError
from stack.inference import cache as caches
from stack.inference.sampling import sample
from stack.kernels.linear_cross_entropy import logits
from stack.layers.attention import Cache
from stack.models.encoder_decoder import Memory
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
    eos: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues each prompt, all of them at once, with a key-value cache.

    A model of two stacks reads the prompts, once, and writes texts of their own. A row's text depends on its
    prompt, on `seed` and on its number in the batch; not on the other prompts, so the same prompt given twice
    is continued in two ways. A text that fills the context, `model.max_length`, goes on from its last half.

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
      eos: the tokens that end a text; None: none does.

    Returns:
      The new tokens of each prompt, up to the first of `eos`, which is left out.

    Raises:
      StackError: no token is asked for, or a prompt is empty, has a token the model does not know, or
        fills the context.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "eos": eos}
    texts: list[list[int]] = [[] for _ in prompts]
    for more in stream(program, params, prompts, length=length, chunk=length, **options):
        for number, tokens in enumerate(more):
            texts[number] += tokens
    return texts


def stream(
    program: Program,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    chunk: int = 8,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
) -> Iterator[list[list[int]]]:
    """The same, as it comes: each time up to `chunk` new tokens of every prompt.

    What is chosen does not depend on `chunk`. The other arguments and errors are those of `generate`.
    """
    if length < 1:
        raise StackError(f"length={length} asks for no new token; ask for at least 1")
    config = program.config.model
    if config.shape == "encoder":
        raise StackError(f"model.kind={config.kind} writes no text: it fills hidden places; sample a decoder")
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, config, name=f"prompt {number}")
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    rows, memory = [_Row(list(prompt), length) for prompt in prompts], None
    if isinstance(config, EncoderDecoderConfig):
        memory = _remember(program, params, prompts, config.max_length)
        rows = [_Row([config.start_token], length) for _ in prompts]
    key = jax.random.key(seed)
    for number in itertools.count():
        if not any(row.left for row in rows):
            return
        settings = _Settings(
            graph=program.graph,
            config=config,
            layout=_layout(program.layout),
            reads_both_ways=any(field.name == "prefix" for field in program.objective.fields),
            length=min(max(row.left for row in rows), config.max_length),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            ends=ends,
        )
        turn = jax.random.fold_in(key, _FIRST_TURN + number) if number else key
        for more in _fill_context(program, settings, params, rows, turn, chunk, memory):
            yield [row.take(tokens, ends) for row, tokens in zip(rows, more, strict=True)]


_FIRST_TURN = 1 << 30
"""Beyond every number of a token, with which keys are folded too."""


class _Row:
    """One text: what the model sees of it, and how many tokens are still to come."""

    def __init__(self, tokens: list[int], left: int) -> None:
        """Begins with a prompt."""
        self.tokens = tokens
        self.left = left

    def prompt(self, max_length: int) -> list[int]:
        """What the next turn begins with: all of it while it fits the context, else as much as half of that.

        A text that is at its end begins with its last token, as rows of a batch begin with something.
        """
        if not self.left:
            return self.tokens[-1:]
        if len(self.tokens) < max_length:
            return self.tokens
        return self.tokens[-max(1, max_length // 2) :]

    def take(self, tokens: list[int], ends: tuple[int, ...]) -> list[int]:
        """Adds new tokens, up to an end; returns those that are text."""
        new = tokens[: self.left]
        end = next((place for place, token in enumerate(new) if token in ends), None)
        self.left = 0 if end is not None else self.left - len(new)
        new = new[:end]
        self.tokens += new
        return new


def _remember(
    program: Program, params: dict, prompts: Sequence[Sequence[int]], max_length: int
) -> Memory | None:
    """What the encoder makes of prompts, for all that is written from them; None for none."""
    if not prompts:
        return None
    with meshes.use(concrete(program)):
        tokens, padding = jax.device_put(pad(prompts, max_length), program.layout.sharding())
        return _read(program.graph, _layout(program.layout), params, tokens, padding)


@partial(jax.jit, static_argnames=("graph", "layout"))
def _read(graph: nnx.GraphDef, layout: Layout, params: dict, tokens: jax.Array, padding: jax.Array) -> Memory:
    """Reads prompts [batch, bucket], of which so many first places are padding, [batch]."""
    positions, segments = caches.place(jnp.arange(tokens.shape[1], dtype=jnp.int32), padding)
    batch = {"tokens": tokens, "positions": positions, "segments": segments}
    return _model(graph, layout, params).remember(batch, Execution(layout=layout))


def _model(graph: nnx.GraphDef, layout: Layout, params: dict) -> Any:
    """The model, whole over `fsdp` below stage 3."""
    model = nnx.merge(graph, params)
    return gather_module(model, layout) if layout.zero < 3 else model


def _fill_context(
    program: Program,
    settings: "_Settings",
    params: dict,
    rows: Sequence[_Row],
    key: jax.Array,
    chunk: int,
    memory: Memory | None,
) -> Iterator[list[list[int]]]:
    """New tokens of every row until its context is full, it ends, or there are as many as asked for."""
    limit = settings.config.max_length
    prompts = [row.prompt(limit) for row in rows]
    with meshes.use(concrete(program)):
        everywhere = program.layout.sharding()
        tokens, padding = jax.device_put(pad(prompts, limit), everywhere)
        done = jax.device_put(np.array([not row.left for row in rows]), everywhere)
        room = min(settings.length, chunk)
        progress = _begin(settings, params, tokens, padding, done, key, room, memory)
    told = np.zeros(len(rows), np.int64)
    while True:
        with meshes.use(concrete(program)):
            counts, new, is_done = jax.device_get((progress.lengths, progress.tokens, progress.ended))
            finished = is_done.all() or int(progress.number) >= settings.length
            if not finished:
                room = min(settings.length, room + chunk)
                progress = _go_on(settings, params, padding, tokens.shape[1], progress, key, room, memory)
        yield [
            new[row, start:end].tolist() for row, (start, end) in enumerate(zip(told, counts, strict=True))
        ]
        told = counts
        if finished:
            return


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
    reads_both_ways: bool
    """Whether what is given is seen by all of its text, as the objective had it."""
    length: int
    temperature: float
    top_k: int | None
    top_p: float
    ends: tuple[int, ...]


class _Progress(NamedTuple):
    """What one new token changes."""

    number: jax.Array
    """Tokens chosen so far, int32 scalar."""
    tokens: jax.Array
    """[batch, length] int32."""
    lengths: jax.Array
    """[batch] int32: tokens chosen before a row ended, its end included."""
    ended: jax.Array
    """[batch] bool."""
    cache: Cache


type _Append = Callable[[_Progress, jax.Array, jax.Array | int], _Progress]


@partial(jax.jit, static_argnames="settings")
def _begin(
    settings: _Settings,
    params: dict,
    prompts: jax.Array,
    padding: jax.Array,
    ended: jax.Array,
    key: jax.Array,
    until: jax.Array,
    memory: Memory | None,
) -> _Progress:
    """Reads the prompts [batch, bucket] and chooses up to `until` tokens of every row."""
    batch, bucket = prompts.shape
    empty = caches.empty(settings.config, settings.layout, batch=batch, slots=bucket + settings.length)
    start = _Progress(
        number=jnp.int32(0),
        tokens=jnp.zeros((batch, settings.length), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        ended=ended,
        cache=empty,
    )
    append = _append(settings, params, padding, bucket, key, memory)
    return _choose(append, append(start, prompts, 0), bucket, until)


@partial(jax.jit, static_argnames=("settings", "bucket"), donate_argnames="progress")
def _go_on(
    settings: _Settings,
    params: dict,
    padding: jax.Array,
    bucket: int,
    progress: _Progress,
    key: jax.Array,
    until: jax.Array,
    memory: Memory | None,
) -> _Progress:
    """Chooses more tokens of every row, up to `until`."""
    return _choose(_append(settings, params, padding, bucket, key, memory), progress, bucket, until)


def _choose(append: _Append, progress: _Progress, bucket: int, until: jax.Array) -> _Progress:
    """One token after another, until there are so many or every row has ended."""

    def unfinished(progress: _Progress) -> jax.Array:
        return (progress.number < until) & ~progress.ended.all()

    def one_more(progress: _Progress) -> _Progress:
        last = jax.lax.dynamic_slice_in_dim(progress.tokens, progress.number - 1, 1, axis=1)
        return append(progress, last, bucket + progress.number - 1)

    return jax.lax.while_loop(unfinished, one_more, progress)


def _append(
    settings: _Settings,
    params: dict,
    padding: jax.Array,
    bucket: int,
    key: jax.Array,
    memory: Memory | None,
) -> _Append:
    """The function that takes tokens [batch, queries] into the cache and chooses the next of every row."""
    config, layout = settings.config, settings.layout
    slots = bucket + settings.length
    room = config.max_length - (bucket - padding)
    model, run = _model(settings.graph, layout, params), Execution(layout=layout)
    decode = model.decode if memory is None else partial(model.decode, memory=memory)

    def append(progress: _Progress, tokens: jax.Array, first: jax.Array | int) -> _Progress:
        queries, window = tokens.shape[1], config.window
        prefix = bucket if settings.reads_both_ways else 0
        mask = caches.mask(padding, first=first, queries=queries, slots=slots, window=window, prefix=prefix)
        output, cache = decode(tokens, mask, run, cache=progress.cache, slot=first)
        scores = logits(
            output.hidden[:, -1:],
            output.table,
            bias=output.bias,
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
        lengths = progress.lengths + ~progress.ended
        is_end = jnp.isin(chosen, jnp.asarray(settings.ends, jnp.int32))
        return _Progress(
            number=progress.number + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                progress.tokens, chosen[:, None], progress.number, axis=1
            ),
            lengths=lengths,
            ended=progress.ended | is_end | (lengths >= room),
            cache=cache,
        )

    return append


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
    if isinstance(config, EncoderDecoderConfig):
        if len(prompt) > config.max_length:
            raise StackError(
                f"{name} has {len(prompt)} tokens, but the context is model.max_length={config.max_length};"
                " shorten the prompt"
            )
    elif len(prompt) >= config.max_length:
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
