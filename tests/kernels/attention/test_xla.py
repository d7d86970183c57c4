"""Attention in array operations equals the definition, computed one query at a time."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.kernels.attention import Mask, attend, row_mask
from stack.parallel.rules import ONE_DEVICE

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 11, 6, 2, 8
POSITIONS = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]], jnp.int32)
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]], jnp.int32)


def draw(seed, heads, length=LENGTH):
    shape = (BATCH, length, heads, HEAD_DIM)
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, shape), jnp.float32)


QUERY, KEY, VALUE = draw(0, HEADS), draw(1, KV_HEADS), draw(2, KV_HEADS)


def sees(mask, row, place, other):
    query, key = mask.query_positions[row, place], mask.key_positions[row, other]
    if mask.query_segments is not None and mask.query_segments[row, place] != mask.key_segments[row, other]:
        return False
    if mask.lengths is not None and other >= mask.lengths[row]:
        return False
    if mask.window is not None and abs(query - key) >= mask.window:
        return False
    in_prefix = mask.kind == "prefix" and mask.prefix[row, other]
    return mask.kind == "full" or key <= query or in_prefix


def reference(query, key, value, mask, *, bias=None, softcap=None):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    mask = jax.tree.map(np.asarray, mask)
    result = np.zeros(query.shape)
    for row, place, head in itertools.product(*map(range, query.shape[:3])):
        kv_head = head // (HEADS // KV_HEADS)
        seen = [other for other in range(key.shape[1]) if sees(mask, row, place, other)]
        if not seen:
            continue
        scores = key[row, seen, kv_head] @ query[row, place, head] / np.sqrt(HEAD_DIM)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + np.broadcast_to(bias, (BATCH, HEADS, LENGTH, LENGTH))[row, head, place, seen]
        weights = np.exp(scores - scores.max())
        result[row, place, head] = weights / weights.sum() @ value[row, seen, kv_head]
    return result


xla = partial(attend, layout=ONE_DEVICE, kernel="xla")
ROW = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
WHOLE = Mask(query_positions=ROW, key_positions=ROW)
PACKED = row_mask(SEGMENTS, POSITIONS, packed=True)
ONE_EACH = row_mask(jnp.array([[1] * LENGTH, [1] * 6 + [0] * 5]), POSITIONS, packed=False)
PREFIX = (POSITIONS < 2) & (SEGMENTS > 0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kind", ["causal", "full", "prefix"])
@pytest.mark.parametrize(
    "mask", [WHOLE, PACKED, ONE_EACH], ids=["one document", "packed", "one document and padding"]
)
def test_attention_is_its_definition(mask, kind, window, softcap):
    mask = dataclasses.replace(mask, kind=kind, window=window, prefix=PREFIX if kind == "prefix" else None)
    actual = xla(QUERY, KEY, VALUE, mask, softcap=softcap)
    expected = reference(QUERY, KEY, VALUE, mask, softcap=softcap)
    real = np.ones((BATCH, LENGTH), bool)
    if mask.lengths is not None:  # Padding may see nothing.
        real = np.arange(LENGTH) < np.asarray(mask.lengths)[:, None]
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual[real], expected[real], atol=2e-6)


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_a_window_that_is_told_late_holds_or_does_not(kind):
    attention = jax.jit(lambda local, mask: xla(QUERY, KEY, VALUE, dataclasses.replace(mask, local=local)))
    near = dataclasses.replace(PACKED, kind=kind, window=3)
    for local, mask in ((True, near), (False, dataclasses.replace(near, window=None))):
        np.testing.assert_allclose(attention(local, near), xla(QUERY, KEY, VALUE, mask), atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(1, HEADS, LENGTH, LENGTH), (BATCH, 1, LENGTH, LENGTH), (BATCH, HEADS, 1, LENGTH)]
)
def test_a_bias_is_added_to_the_scores_and_gets_its_gradient(shape):
    bias = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    actual = xla(QUERY, KEY, VALUE, PACKED, bias=jnp.asarray(bias))
    np.testing.assert_allclose(actual, reference(QUERY, KEY, VALUE, PACKED, bias=bias), atol=2e-6)

    def total(bias):
        return jnp.square(xla(QUERY, KEY, VALUE, PACKED, bias=bias)).sum()

    direction = np.random.default_rng(6).normal(size=shape).astype(np.float32)
    slope = (jax.grad(total)(jnp.asarray(bias)) * direction).sum()
    ends = [
        np.square(reference(QUERY, KEY, VALUE, PACKED, bias=bias + e * direction)).sum()
        for e in (1e-4, -1e-4)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-4, rtol=1e-3)


def test_a_prefix_mask_without_a_prefix_is_an_error():
    with pytest.raises(ValueError, match="prefix needs the keys"):
        Mask(kind="prefix", query_positions=ROW, key_positions=ROW).allowed()


def test_a_query_reads_the_written_slots_of_a_cache():
    slots = jnp.array([[0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    written = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, -1, -1, -1], [1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1]])
    mask = Mask(
        query_positions=jnp.array([[5], [7]]),
        key_positions=slots,
        query_segments=jnp.ones((BATCH, 1), jnp.int32),
        key_segments=written,
    )
    query = draw(3, HEADS, length=1)
    actual = np.asarray(xla(query, KEY, VALUE, mask))
    np.testing.assert_allclose(actual, reference(query, KEY, VALUE, mask), atol=2e-6)
    garbage = jnp.where(written[..., None, None] == -1, 1e6, VALUE)
    np.testing.assert_array_equal(actual, xla(query, KEY, garbage, mask))


def test_window_one_is_the_value_itself():
    alone = xla(QUERY, KEY, VALUE, dataclasses.replace(WHOLE, window=1))
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


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(
        ValueError, match="unknown attention kernel 'flash': cudnn, mosaic_gpu, tokamax, xla_chunked, xla"
    ):
        attend(QUERY, KEY, VALUE, WHOLE, ONE_DEVICE, kernel="flash")
