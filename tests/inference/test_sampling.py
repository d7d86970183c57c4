"""Sampling keeps the tokens the definitions name and draws them with their probabilities."""

import functools
from typing import Any

import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stack.config.errors import StackError
from stack.inference.sampling import keep_top_k, keep_top_p, sample

VOCAB = 12
# Tenths, so that equal logits are common; the last two words are padding.
LOGITS = hypothesis.extra.numpy.arrays(np.int64, (3, VOCAB), elements=st.integers(-60, 60)).map(
    lambda tenths: np.where(np.arange(VOCAB) < VOCAB - 2, tenths / 10, -np.inf).astype(np.float32)
)
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def nucleus(row: np.ndarray, p: float) -> np.ndarray:
    """The tokens to keep, by the definition: add the likeliest until they hold p."""
    probabilities = softmax(row)
    held, least = 0.0, np.inf
    for token in np.argsort(-probabilities):
        if held >= p:
            break
        assume(abs(held - p) > 1e-5)  # Too close to call in float32.
        held += probabilities[token]
        least = row[token]
    return row >= least


@PROPERTY
@given(logits=LOGITS, k=st.integers(1, VOCAB + 3))
def test_top_k_keeps_the_k_largest_and_their_equals(logits: np.ndarray, k: int) -> None:
    kept = keep_top_k(jnp.asarray(logits), k)
    least = np.sort(logits, axis=-1)[:, ::-1][:, [min(k, VOCAB) - 1]]
    np.testing.assert_array_equal(kept, np.where(logits >= least, logits, -np.inf))


@PROPERTY
@given(logits=LOGITS, p=st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_holds_p(logits: np.ndarray, p: float) -> None:
    kept = keep_top_p(jnp.asarray(logits), p)
    mask = np.stack([nucleus(row, p) for row in logits])
    np.testing.assert_array_equal(kept, np.where(mask, logits, -np.inf))


def test_top_p_keeps_one_token_however_small_p_is() -> None:
    logits = jnp.array([[0.0, 1.0, 0.5]])
    np.testing.assert_array_equal(keep_top_p(logits, 1e-6), [[-np.inf, 1.0, -np.inf]])


def test_top_p_of_one_keeps_all() -> None:
    logits = jnp.array([[0.0, 50.0, -50.0, -jnp.inf]])
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)


def draws(logits: list[float], count: int = 40_000, **options: Any) -> np.ndarray:
    """Frequencies of the tokens over many draws from one distribution."""
    rows = jnp.tile(jnp.array(logits, jnp.float32), (count, 1))
    tokens = jax.jit(functools.partial(sample, **options))(rows, jax.random.key(0))
    assert (tokens.shape, tokens.dtype) == ((count,), jnp.int32)
    return np.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4, 0]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30, 0]),
        ({"top_k": 3}, [0, 2 / 9, 3 / 9, 4 / 9, 0]),
        ({"top_p": 0.65}, [0, 0, 3 / 7, 4 / 7, 0]),
        # Top-p is of what top-k left: two tokens hold 0.7 / 0.9. Of all tokens they hold only 0.7.
        ({"top_k": 3, "top_p": 0.71}, [0, 0, 3 / 7, 4 / 7, 0]),
        # Temperature comes first: the likeliest then holds 16 / 30, and not 0.4.
        ({"temperature": 0.5, "top_p": 0.5}, [0, 0, 0, 1, 0]),
        ({"top_k": 1}, [0, 0, 0, 1, 0]),
    ],
    ids=str,
)
def test_tokens_come_with_their_probabilities(options: dict[str, Any], expected: list[float]) -> None:
    logits = [float(np.log(p)) for p in (0.1, 0.2, 0.3, 0.4)] + [-np.inf]
    frequencies = draws(logits, **options)
    deviation = np.sqrt(np.array(expected) * (1 - np.array(expected)) / 40_000)
    assert (np.abs(frequencies - expected) <= 5 * deviation).all()


@PROPERTY
@given(logits=LOGITS)
def test_temperature_zero_takes_the_first_of_the_likeliest(logits: np.ndarray) -> None:
    tokens = sample(jnp.asarray(logits), jax.random.key(0), temperature=0.0, top_k=5, top_p=0.1)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert tokens.dtype == jnp.int32


def test_padded_words_are_never_drawn() -> None:
    assert draws([0.0, -20.0, -np.inf, -np.inf], temperature=100.0, top_k=4, top_p=0.9999)[2:].sum() == 0


def test_a_row_draws_the_same_whatever_rows_follow() -> None:
    logits = jnp.zeros((8, 100))
    alone = sample(logits[:2], jax.random.key(7))
    together = sample(logits, jax.random.key(7))
    np.testing.assert_array_equal(alone, together[:2])
    assert len(set(together.tolist())) > 1, "rows draw each for itself"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
        ({"top_k": 0}, "top_k=0: keep at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 is no probability above 0"),
        ({"top_p": 1.5}, "top_p=1.5 is no probability above 0; 1 keeps all"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StackError, match=message):
        sample(jnp.zeros((1, 4)), jax.random.key(0), **options)
