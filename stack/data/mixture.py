"""Which row comes when: a function of the seed and the place in the training sequence."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import grain

    from stack.data.dataset import Dataset

VERSION = 1
"""Of the order of rows; raise it when `training_order` gives another: runs that began with the old one are
then told so, and not gone on with."""


def training_order(dataset: "Dataset", *, seed: int, shuffle: bool) -> "grain.MapDataset":
    """Row numbers of `dataset` by place, without end: order[i] is the row trained on at place i.

    Grain's random-access datasets: each source is permuted as a whole, anew in every epoch of its own,
    and the sources are interleaved evenly by weight, which Grain rounds down to hundredths of the
    smallest. No state: any place can be asked for at once.
    """
    import grain  # Which imports JAX; who prepares data needs neither.

    parts, weights, start = [], [], 0
    for number, (part, weight) in enumerate(zip(dataset.parts, dataset.weights, strict=True)):
        rows = grain.MapDataset.range(start, start + part.num_rows)
        if shuffle:
            rows = rows.seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0])).shuffle()
        parts.append(rows.repeat())
        weights.append(weight)
        start += part.num_rows
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
