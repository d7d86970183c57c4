"""The trigram yardstick is a probability model that knows what three bytes can tell."""

import math

import numpy as np
import pytest

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.sources import read_documents
from stack.evaluation import trigram as baseline
from stack.evaluation.trigram import trigram_nats_per_byte


def test_text_that_three_bytes_determine_costs_almost_nothing() -> None:
    documents = [b"abcdefgh" * 500] * 20
    assert trigram_nats_per_byte(documents, documents[:1]) < 0.01


def test_random_bytes_cost_their_entropy() -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 4, 5000).astype(np.uint8).tobytes() for _ in range(40)]
    assert trigram_nats_per_byte(documents[:30], documents[30:]) == pytest.approx(math.log(4), rel=0.01)


def test_the_second_order_of_a_chain_is_found_and_the_third_is_not() -> None:
    """Each bit is the exclusive or of the two before it, or (third order) of the ones 2 and 3 before."""
    draw = np.random.default_rng(0)

    def chain(order: tuple[int, int]) -> bytes:
        bits = draw.integers(0, 2, 3).tolist()
        for _ in range(3000):
            noise = int(draw.random() < 0.1)
            bits.append(bits[-order[0]] ^ bits[-order[1]] ^ noise)
        return bytes(bits)

    entropy = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    second = [chain((1, 2)) for _ in range(40)]
    third = [chain((2, 3)) for _ in range(40)]
    assert trigram_nats_per_byte(second[:30], second[30:]) == pytest.approx(entropy, rel=0.06)
    assert trigram_nats_per_byte(third[:30], third[30:]) == pytest.approx(math.log(2), rel=0.03)


def test_probabilities_of_every_symbol_after_any_context_sum_to_one() -> None:
    documents = [text.encode() for text in read_documents(SourceConfig(kind="synthetic", max_bytes=50_000))]
    counts = np.zeros(257**3, np.int64)
    for codes, _ in baseline._chunks(documents):
        counts += np.bincount(codes, minlength=len(counts))
    weights = np.random.default_rng(0).dirichlet(np.ones(4), baseline._BUCKETS).T
    for context in (0, 97 * 257 + 98, 256 * 257 + 256, 200 * 257 + 101):
        probabilities, buckets = baseline._components(counts, context * 257 + np.arange(257))
        assert (weights[:, buckets] * probabilities).sum() == pytest.approx(1.0)


def test_unseen_bytes_have_a_finite_cost() -> None:
    cost = trigram_nats_per_byte([b"abc" * 10] * 20, [bytes(range(256))])
    assert 3 < cost < 20


def test_it_says_what_it_lacks() -> None:
    with pytest.raises(StackError, match="needs more training text"):
        trigram_nats_per_byte([b"a"], [b"abc"])
    with pytest.raises(StackError, match=r"no held-out text; raise data\.heldout_fraction"):
        trigram_nats_per_byte([b"abc"] * 20, [])


def test_a_lone_text_is_held_back_in_pieces() -> None:
    text = b"".join(b"line %d of a text\n" % number for number in range(4000))
    assert trigram_nats_per_byte([text], [text[-2000:]]) < 0.7
