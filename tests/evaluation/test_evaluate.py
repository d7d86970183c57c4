"""How held-out batches are gone through."""

import jax.numpy as jnp
import numpy as np

from stack.evaluation.evaluate import one_behind


def test_two_batches_are_under_way_at_most():
    """Programs that exchange something stood still for ever where all were: a run on 4 CPU devices."""
    begun = []

    def made():
        for number in range(5):
            begun.append(number)
            yield {"sum": jnp.float32(number)}

    for number, found in enumerate(one_behind(made())):
        assert len(begun) == min(number + 2, 5)
        assert isinstance(found["sum"], np.ndarray | np.float32)
        assert found["sum"] == number
    assert list(one_behind(iter(()))) == []
