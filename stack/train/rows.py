"""The rows that a run trains on, in its order."""

from collections.abc import Callable

import numpy as np

from stack.data.dataset import Dataset
from stack.data.loader import Batch, training_batches
from stack.data.position import Position
from stack.step.program import Program


def batches_of(
    program: Program,
    dataset: Dataset,
    position: Position,
    audit: Callable[[int, np.ndarray], None] | None = None,
) -> Callable[[int], Batch]:
    """The function from a step to its batch, as the config of a run says; see `training_batches`."""
    config, average = program.config, program.config.average
    return training_batches(
        dataset,
        fields=program.objective.fields,
        batch_size=config.train.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        layout=program.layout,
        position=position,
        audit=audit,
        part=(average.instance, average.runs),
    )
