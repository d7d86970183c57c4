"""Lines of averaging that are broken; see `mutation_list.py`."""

from mutation import Mutation

INSTANCES = "tests/step/test_averaging.py"
STREAMING = "tests/step/test_streaming.py"

AVERAGING = (
    Mutation(
        "every instance reads the rows of the first",
        "stack/step/averaging.py",
        "of_one(one, jax.tree.map(lambda leaf: leaf[index], rows))",
        "of_one(one, jax.tree.map(lambda leaf: leaf[0], rows))",
        INSTANCES,
    ),
    Mutation(
        "the outer momentum is not looked ahead",
        "stack/step/averaging.py",
        "config.outer_learning_rate * (config.outer_momentum * speed + way)",
        "config.outer_learning_rate * speed",
        INSTANCES,
    ),
    Mutation(
        "an average is a step late",
        "stack/step/averaging.py",
        "ends = (step + 1) % self._program.config.average.every == 0",
        "ends = step % self._program.config.average.every == 0",
        INSTANCES,
    ),
    Mutation(
        "the sums of instances are averaged",
        "stack/step/averaging.py",
        "np.float64(sum(values))",
        "np.float64(sum(values) / len(values))",
        INSTANCES,
    ),
    Mutation(
        "all runs read the first part of a batch",
        "stack/data/loader.py",
        "first=part[0] * size",
        "first=0",
        STREAMING,
    ),
    Mutation(
        "a fragment is of the layers before",
        "stack/step/streaming.py",
        "places % rows.step == rows.start",
        "(places + 1) % rows.step == rows.start",
        STREAMING,
    ),
    Mutation(
        "a late average takes all of an instance's own steps",
        "stack/step/streaming.py",
        "kept = average.kept if average.delay else 0.0",
        "kept = 0.0",
        STREAMING,
    ),
)
