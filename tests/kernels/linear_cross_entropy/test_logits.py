import jax.numpy as jnp
import numpy as np

from stack.kernels.linear_cross_entropy import logits

HIDDEN = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
TABLE = np.random.default_rng(1).normal(size=(24, 16)).astype(np.float32)


def test_scores_are_products_and_padded_words_have_none():
    scores = np.asarray(logits(jnp.asarray(HIDDEN), jnp.asarray(TABLE), vocab_size=21))
    np.testing.assert_allclose(scores[..., :21], HIDDEN @ TABLE[:21].T, atol=1e-5)
    assert (scores[..., 21:] == np.finfo(np.float32).min).all()


def test_the_soft_cap_bounds_words_and_leaves_padding_out():
    scores = np.asarray(logits(jnp.asarray(HIDDEN), jnp.asarray(TABLE), vocab_size=21, softcap=2.0))
    np.testing.assert_allclose(scores[..., :21], 2 * np.tanh(HIDDEN @ TABLE[:21].T / 2), atol=1e-5)
    assert (scores[..., 21:] == np.finfo(np.float32).min).all()


def test_bfloat16_products_are_summed_in_float32():
    hidden, table = jnp.ones((1, 1, 512), jnp.bfloat16), jnp.ones((8, 512), jnp.bfloat16)
    table = table.at[:, 0].set(2.0)
    scores = logits(hidden, table, vocab_size=8)
    assert scores.dtype == np.float32
    assert (scores == 513).all(), "513 is no bfloat16"
