"""The loss over a vocabulary: in chunks, as Stack trains, and with all logits at once."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from stack.bench import data
from stack.bench.case import Case, Machine
from stack.bench.models import MODELS
from stack.bench.peers import tokamax
from stack.bench.serve import Ready
from stack.bench.suites.attention import LIMITS, relative_error
from stack.bench.timing import queued, temporary_bytes
from stack.kernels.linear_cross_entropy import Head, chunk_tokens, linear_cross_entropy

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Hidden states [tokens, embed], table [vocab, embed] and labels [tokens] -> mean loss."""

_CHUNK = 512


def cases(machine: Machine, *, tiny: bool) -> list[Case]:
    """The heads of models, of one micro-batch; loss and gradients."""
    if tiny:
        return [_case("tiny", 128, "float32", 0)]
    if machine.is_cpu:
        return [_case("quickstart", 1536, "float32", 0), _case("gpt2_124m", 512, "float32", 1)]
    sizes = [("gpt2_1_5b", 16_384), ("llama3_8b", 8192), ("gpt2_124m", 32_768), ("llama3_3b", 16_384)]
    return [_case(name, tokens, "bfloat16", 12 + 10 * place) for place, (name, tokens) in enumerate(sizes)]


def _case(name: str, tokens: int, dtype: str, priority: int) -> Case:
    model = MODELS[name]
    words = model["vocab_size"]
    padded = -(-words // 128) * 128
    flops = 6 * tokens * model["embed_dim"] * padded
    return Case(
        suite="cross_entropy",
        title=f"{name}, {tokens:,} x {model['embed_dim']} to {words:,} words, {dtype}",
        spec={
            "tokens": tokens,
            "embed_dim": model["embed_dim"],
            "words": words,
            "padded": padded,
            "dtype": dtype,
            "flops_full": flops,
        },
        priority=priority,
        seconds=120,
        peers=("torch", "tokamax"),
    )


def makers(spec: dict[str, Any], peers: list[str]) -> dict[str, Callable[[], Ready]]:
    """Stack's, the plain formula, and Tokamax's where it takes part."""
    losses: dict[str, Loss] = {"chunked": partial(_chunked, spec), "naive": partial(_naive, spec)}
    if "tokamax" in peers:
        losses["tokamax"] = tokamax.cross_entropy
    problem = _Problem(spec)
    return {name: partial(_prepare, loss, problem) for name, loss in losses.items()}


def _chunked(spec: dict[str, Any], hidden: jax.Array, table: jax.Array, labels: jax.Array) -> jax.Array:
    chunk = chunk_tokens(None, embed_dim=spec["embed_dim"], vocab_size=table.shape[0], tensor=1)
    head = Head(vocab_size=spec["words"], chunk=chunk)
    scale = jnp.float32(1 / labels.shape[0])
    return linear_cross_entropy(hidden[None], table, labels[None], scale, head).loss


def _naive(spec: dict[str, Any], hidden: jax.Array, table: jax.Array, labels: jax.Array) -> jax.Array:
    scores = jnp.einsum("te,ve->tv", hidden, table, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.arange(table.shape[0]) < spec["words"], scores, -jnp.inf)
    chosen = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(scores, axis=1) - chosen).mean()


class _Problem:
    """Operands of a case and, once asked for, what is right."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        dtype = jnp.dtype(spec["dtype"])
        self.hidden = jnp.asarray(data.normal(0, spec["tokens"], spec["embed_dim"]), dtype)
        table = 0.02 * data.normal(1, spec["padded"], spec["embed_dim"])
        self.table = jnp.asarray(table, dtype)
        self.labels = jnp.asarray(data.words(spec["tokens"], spec["words"]))

    @cached_property
    def right(self) -> tuple[jax.Array, ...]:
        """The loss and its two gradients, in float32, some tokens at a time."""
        tokens, words = self.spec["tokens"], self.spec["words"]
        chunk = _CHUNK if tokens % _CHUNK == 0 else tokens

        @jax.checkpoint
        def some(table: jax.Array, hidden: jax.Array, labels: jax.Array) -> jax.Array:
            scores = jnp.matmul(hidden, table[:words].T, precision="highest")
            chosen = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
            return (jax.nn.logsumexp(scores, axis=1) - chosen).sum()

        def mean(hidden: jax.Array, table: jax.Array) -> jax.Array:
            parts = hidden.reshape(-1, chunk, hidden.shape[1]), self.labels.reshape(-1, chunk)
            return jax.lax.map(lambda part: some(table, *part), parts).sum() / tokens

        exact = self.hidden.astype(jnp.float32), self.table.astype(jnp.float32)
        loss, gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(*exact)
        return loss, *gradients


def _prepare(loss: Loss, problem: _Problem) -> Ready:
    spec = problem.spec
    operands = problem.hidden, problem.table, problem.labels
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*operands).compile()
    value, gradients = compiled(*operands)
    names = ("loss", "hidden", "table")
    errors = {
        name: relative_error(result, right)
        for name, result, right in zip(names, (value, *gradients), problem.right, strict=True)
    }
    worst, limit = max(errors, key=lambda name: errors[name]), LIMITS[spec["dtype"]]
    facts = {
        "ok": all(error <= limit for error in errors.values()),
        "error": errors[worst],
        "error_of": worst,
        "limit": limit,
        "precision": spec["dtype"],
        "flops_full": spec["flops_full"],
        "temporary_bytes": temporary_bytes(compiled),
    }
    return Ready(queued(compiled, *operands), facts)
