"""An interpolated trigram model of bytes: what a model has to beat to have learned anything."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from stack.config.errors import StackError

_END = 256
_SYMBOLS = 257
_CHUNK = 1 << 22  # symbols counted at one time
_EM_ROUNDS = 30
_BUCKETS = 64
_HELD_BACK = 10
_LONE_PIECES = 100


def trigram_nats_per_byte(train: Iterable[bytes], heldout: Iterable[bytes]) -> float:
    """Held-out loss, in nats per byte of text, of a trigram model fitted on the training documents.

    Jelinek-Mercer interpolation (Jelinek and Mercer 1980; Chen and Goodman 1998, section 2.3): the
    probability of a symbol mixes its trigram, bigram and unigram frequencies and the uniform
    distribution. The weights of the mixture depend on how often the context was seen, in powers of
    two; expectation maximisation finds them on every tenth training document, held back from the
    counts meanwhile. The symbols are the 256 bytes and the end of a document, which is predicted too,
    as language models of tokens do; no context crosses a document.

    Raises:
        StackError: fewer than two training documents, or no held-out text.
    """
    counts = np.zeros(_SYMBOLS**3, np.int64)
    tuning = np.zeros(_SYMBOLS**3, np.int64)
    for codes, held_back in _chunks(_pieces(train)):
        (tuning if held_back else counts)[:] += np.bincount(codes, minlength=_SYMBOLS**3)
    if not tuning.any():
        raise StackError("the trigram baseline needs more training text; check data.sources")
    seen = np.flatnonzero(tuning)
    weights = _fit_weights(*_components(counts, seen), tuning[seen])
    counts += tuning

    scored = np.zeros(_SYMBOLS**3, np.int64)
    for codes, _ in _chunks(heldout):
        scored += np.bincount(codes, minlength=_SYMBOLS**3)
    num_bytes = scored.reshape(-1, _SYMBOLS).sum(axis=0)[:_END].sum()
    if not num_bytes:
        raise StackError("the trigram baseline has no held-out text; raise data.heldout_fraction")
    seen = np.flatnonzero(scored)
    probabilities, buckets = _components(counts, seen)
    nats = -np.log((weights[:, buckets] * probabilities).sum(axis=0))
    return float(nats @ scored[seen] / num_bytes)


def _chunks(documents: Iterable[bytes]) -> Iterator[tuple[np.ndarray, bool]]:
    """Trigram codes a x 257^2 + b x 257 + c, int32, of many documents at a time, every tenth apart."""
    waiting: dict[bool, list[np.ndarray]] = {False: [], True: []}
    size = {False: 0, True: 0}
    for number, text in enumerate(documents):
        symbols = np.full(len(text) + 3, _END, np.int32)
        symbols[2:-1] = np.frombuffer(text, np.uint8)
        codes = (symbols[:-2] * _SYMBOLS + symbols[1:-1]) * _SYMBOLS + symbols[2:]
        held_back = number % _HELD_BACK == 1
        waiting[held_back].append(codes)
        size[held_back] += len(codes)
        if size[held_back] >= _CHUNK:
            yield np.concatenate(waiting[held_back]), held_back
            waiting[held_back], size[held_back] = [], 0
    for held_back, rest in waiting.items():
        if rest:
            yield np.concatenate(rest), held_back


def _pieces(documents: Iterable[bytes]) -> Iterator[bytes]:
    """The documents; a lone one in pieces, so that some can be held back."""
    iterator = iter(documents)
    first, second = next(iterator, b""), next(iterator, None)
    if second is not None:
        yield from itertools.chain((first, second), iterator)
        return
    size = max(1, -(-len(first) // _LONE_PIECES))
    yield from (first[start : start + size] for start in range(0, len(first), size))


def _components(counts: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trigram, bigram, unigram and uniform probability [4, codes] of each code, and its bucket [codes].

    An unseen context passes on the next shorter one's probability, so each row is a distribution.
    """
    cube = counts.reshape(_SYMBOLS, _SYMBOLS, _SYMBOLS)
    context, symbol = np.divmod(codes, _SYMBOLS)
    middle = context % _SYMBOLS
    pairs = cube.sum(axis=0)
    singles = pairs.sum(axis=0)
    uniform = np.full(len(codes), 1 / _SYMBOLS)
    unigram = singles[symbol] / singles.sum()
    middle_count = pairs.sum(axis=1)[middle]
    bigram = np.where(middle_count, pairs[middle, symbol] / np.maximum(middle_count, 1), unigram)
    context_count = cube.sum(axis=2).ravel()[context]
    trigram = np.where(context_count, counts[codes] / np.maximum(context_count, 1), bigram)
    return np.stack([trigram, bigram, unigram, uniform]), np.frexp(context_count)[1]


def _fit_weights(probabilities: np.ndarray, buckets: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Mixture weights [4, buckets] by expectation maximisation on codes seen `times` times."""
    weights = np.full((4, _BUCKETS), 0.25)
    for _ in range(_EM_ROUNDS):
        shares = weights[:, buckets] * probabilities
        shares *= times / shares.sum(axis=0)
        totals = np.stack([np.bincount(buckets, share, _BUCKETS) for share in shares])
        weights = (totals + 1e-3) / (totals + 1e-3).sum(axis=0)
    return weights
