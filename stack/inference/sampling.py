"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp

from stack.config.errors import StackError


def sample(
    logits: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> jax.Array:
    """Draws one token per row, after temperature, then top-k, then top-p.

    The three numbers are Python's, fixed at trace time; the order is that of Hugging Face's generate.

    Args:
        logits: [batch, vocab] float32, unsharded over vocab; -inf for words that cannot be, as the
            model gives for padded rows of the vocabulary.
        key: PRNG key. A row's draw depends on the key, its logits and its place in the batch, and
            not on how many rows follow.
        temperature: divides the logits; 0 takes the likeliest token, the first of equals.
        top_k: draws among this many likeliest tokens; None: all.
        top_p: draws among the likeliest tokens that together hold this probability.

    Returns:
        [batch] int32.

    Raises:
        StackError: a negative temperature, a top_k below 1, or a top_p outside (0, 1].
    """
    if temperature < 0:
        raise StackError(f"temperature={temperature} is negative; 0 takes the likeliest token")
    if temperature < jnp.finfo(jnp.float32).tiny:  # To float32, 0.
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the largest, which stays 0, so that no quotient of the best is infinite.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    return jax.random.categorical(key, keep_top_p(logits, top_p), axis=-1).astype(jnp.int32)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all but the k largest logits of each row to -inf; equals of the k-th stay (arXiv 1805.04833).

    Args:
        logits: [batch, vocab].
        k: at least 1; more than vocab keeps all.

    Raises:
        StackError: k is below 1.
    """
    if k < 1:
        raise StackError(f"top_k={k}: keep at least 1 token, or leave top_k out to keep all")
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Sets all but the nucleus of each row to -inf (arXiv 1904.09751, section 3.1).

    The nucleus is the smallest set of likeliest tokens that hold at least the probability p; equals
    of its last token stay.

    Args:
        logits: [batch, vocab] float32.
        p: in (0, 1].

    Raises:
        StackError: p is outside (0, 1].
    """
    if not 0 < p <= 1:
        raise StackError(f"top_p={p} is no probability above 0; 1 keeps all tokens")
    if p == 1:  # The sum below is rounded, and may hold 1 before the last token.
        return logits
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
