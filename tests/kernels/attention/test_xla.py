"""Attention in array operations equals the definition, computed one query at a time."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.kernels.attention import Mask, attend
from stack.parallel.rules import ONE_DEVICE

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 11, 6, 2, 8
POSITIONS = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]], jnp.int32)
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]], jnp.int32)


def draw(seed, heads, length=LENGTH):
    shape = (BATCH, length, heads, HEAD_DIM)
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, shape), jnp.float32)


QUERY, KEY, VALUE = draw(0, HEADS), draw(1, KV_HEADS), draw(2, KV_HEADS)


def sees(query, key, *, window, same_segment):
    return same_segment and key <= query and (window is None or query - key < window)


def reference(query, key, value, mask, *, window=None, softcap=None):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    mask = jax.tree.map(np.asarray, mask)
    result = np.zeros(query.shape)
    for row, place, head in itertools.product(*map(range, query.shape[:3])):
        kv_head = head // (HEADS // KV_HEADS)
        seen = [
            other
            for other in range(key.shape[1])
            if sees(
                mask.query_positions[row, place],
                mask.key_positions[row, other],
                window=window,
                same_segment=mask.query_segments is None
                or mask.query_segments[row, place] == mask.key_segments[row, other],
            )
        ]
        scores = key[row, seen, kv_head] @ query[row, place, head] / np.sqrt(HEAD_DIM)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        result[row, place, head] = weights / weights.sum() @ value[row, seen, kv_head]
    return result


xla = partial(attend, layout=ONE_DEVICE, kernel="xla")
ROW = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
WHOLE, PACKED = Mask(ROW, ROW), Mask(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("mask", [WHOLE, PACKED], ids=["one document", "packed"])
def test_attention_is_its_definition(mask, window, softcap):
    actual = xla(QUERY, KEY, VALUE, mask, window=window, softcap=softcap)
    expected = reference(QUERY, KEY, VALUE, mask, window=window, softcap=softcap)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_a_query_reads_the_written_slots_of_a_cache():
    slots = jnp.array([[0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    written = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, -1, -1, -1], [1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1]])
    mask = Mask(jnp.array([[5], [7]]), slots, jnp.ones((BATCH, 1), jnp.int32), written)
    query = draw(3, HEADS, length=1)
    actual = np.asarray(xla(query, KEY, VALUE, mask))
    np.testing.assert_allclose(actual, reference(query, KEY, VALUE, mask), atol=2e-6)
    garbage = jnp.where(written[..., None, None] == -1, 1e6, VALUE)
    np.testing.assert_array_equal(actual, xla(query, KEY, garbage, mask))


def test_window_one_is_the_value_itself():
    alone = xla(QUERY, KEY, VALUE, WHOLE, window=1)
    np.testing.assert_allclose(alone, jnp.repeat(VALUE, HEADS // KV_HEADS, axis=2), rtol=1e-6)


def test_bfloat16_scores_are_summed_in_float32():
    query, key, value = (array.astype(jnp.bfloat16) for array in (QUERY, KEY, VALUE))
    actual = xla(query, key, value, WHOLE)
    assert actual.dtype == jnp.bfloat16
    exact = reference(query, key, value, WHOLE)
    np.testing.assert_allclose(np.float32(actual), exact, atol=0.03, err_msg="weights are rounded to 8 bits")


def test_gradients_stay_within_the_document():
    def first_document(key, value):
        return jnp.square(xla(QUERY, key, value, PACKED)[0, :4]).sum()

    for gradient in jax.grad(first_document, argnums=(0, 1))(KEY, VALUE):
        assert np.asarray(gradient)[0, :4].any()
        assert not np.asarray(gradient)[0, 4:].any()
        assert not np.asarray(gradient)[1].any()


def test_dropout_sees_the_weights():
    seen = {}

    def drop(weights):
        seen["shape"] = weights.shape
        return weights * 0

    assert not np.asarray(xla(QUERY, KEY, VALUE, WHOLE, drop=drop)).any()
    assert seen["shape"] == (BATCH, KV_HEADS, HEADS // KV_HEADS, LENGTH, LENGTH)


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="unknown attention kernel 'flash': xla or cudnn"):
        attend(QUERY, KEY, VALUE, WHOLE, ONE_DEVICE, kernel="flash")
