"""Documents made from a seed: something to learn, nothing to install or download."""

from collections.abc import Iterator

import numpy as np

_WORDS = 512
_SUCCESSORS = 8
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


def synthetic_documents(seed: int) -> Iterator[str]:
    """Texts without end, each a walk through one word graph drawn from the seed.

    Each of 512 words is followed by one of 8 others with falling probability, so that letters, words
    and word order can all be learned. Lengths are log-normal around 60 words, from 1 to thousands.
    Document n is a function of (seed, n).
    """
    graph = np.random.default_rng([seed, 0])
    lengths = graph.integers(2, 9, _WORDS)
    words = ["".join(graph.choice(_LETTERS, length)) for length in lengths]
    successors = graph.integers(0, _WORDS, (_WORDS, _SUCCESSORS)).tolist()
    weights = 0.5 ** np.arange(_SUCCESSORS)
    for number in range(1, 1 << 62):
        draw = np.random.default_rng([seed, number])
        length = 1 + int(draw.lognormal(4.1, 1.2))
        turns = draw.choice(_SUCCESSORS, length, p=weights / weights.sum()).tolist()
        word = int(draw.integers(_WORDS))
        walk = []
        for turn in turns:
            walk.append(words[word])
            word = successors[word][turn]
        yield " ".join(walk) + ".\n"
