import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import DecoderConfig
from stack.inference import cache as caches
from stack.parallel.rules import ONE_DEVICE

PADDING = jnp.array([4, 0, 7], jnp.int32)
SLOTS = 12


@pytest.mark.parametrize(("first", "queries"), [(0, 8), (8, 1), (11, 1)])
def test_a_token_sees_its_own_prompt_up_to_itself(first, queries):
    allowed = caches.mask(PADDING, first=first, queries=queries, slots=SLOTS).allowed()
    for row, padding in enumerate(PADDING.tolist()):
        for query in range(max(first, padding), first + queries):
            seen = np.flatnonzero(allowed[row, query - first])
            assert seen.tolist() == list(range(padding, query + 1))


def test_the_window_counts_tokens_not_padding():
    allowed = caches.mask(PADDING, first=8, queries=1, slots=SLOTS, window=3).allowed()
    assert np.flatnonzero(allowed[0, 0]).tolist() == [6, 7, 8]
    assert np.flatnonzero(allowed[2, 0]).tolist() == [7, 8]


def test_padding_sees_something_so_that_its_softmax_is_finite():
    allowed = caches.mask(PADDING, first=0, queries=8, slots=SLOTS).allowed()
    assert allowed.any(-1).all()


def test_positions_count_from_the_first_token_of_the_prompt():
    mask = caches.mask(PADDING, first=8, queries=1, slots=SLOTS)
    assert mask.query_positions[:, 0].tolist() == [4, 8, 1]
    assert mask.key_positions[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cache_holds_only_key_value_heads_in_the_compute_dtype(dtype):
    config = DecoderConfig(num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=12, dtype=dtype)
    cache = caches.empty(config, ONE_DEVICE, batch=5, slots=7)
    for array in cache:
        assert array.shape == (3, 5, 7, 2, 12)
        assert array.dtype == dtype
        assert not array.any()
