"""Lines of pipelines that are broken; see `mutation_list.py`."""

from mutation import Mutation

NUMBERS = "tests/step/test_pipeline.py"
TABLES = "tests/parallel/pipeline/test_schedules.py"

PIPELINES = (
    Mutation(
        "a micro-batch is done twice, another never",
        "stack/parallel/pipeline/places.py",
        'fields["micro_batch"][ticks, stage], fields["chunk"][ticks, stage] = where',
        'fields["micro_batch"][ticks, stage], fields["chunk"][ticks, stage] = where[0] & ~1, where[1]',
        TABLES,
    ),
    Mutation(
        "what waits lies in one slot",
        "stack/parallel/pipeline/places.py",
        "slot = next((number for number, last in enumerate(until) if last < begin), len(until))",
        "slot = 0",
        TABLES,
    ),
    Mutation(
        "a stage's gradient is summed twice",
        "stack/step/pipeline/weights.py",
        '            summed -= {"stage"}\n',
        "            summed -= set()\n",
        NUMBERS,
    ),
    Mutation(
        "a tied table has its gradient of the last stage alone",
        "stack/step/pipeline/run.py",
        "replaced(flow, stack, jnp.where(first, 0, flow[stack])), _added(totals, ends)",
        "replaced(flow, stack, jnp.where(first, 0, flow[stack])), totals",
        NUMBERS,
    ),
    Mutation(
        "the dropout of a stage is that of the first one",
        "stack/step/pipeline/layers.py",
        "args = weights, place.first + number,",
        "args = weights, place.first + index,",
        NUMBERS,
    ),
    Mutation(
        "the last micro-batch's gradient stands for all",
        "stack/step/pipeline/layers.py",
        "one = at(total, slot) + gradient.astype(total.dtype)",
        "one = gradient.astype(total.dtype)",
        NUMBERS,
    ),
    Mutation(
        "the loss of the last stage is that of one replica",
        "stack/step/pipeline/run.py",
        "jax.tree.map(lambda value: jax.lax.psum(value, MANUAL), sums)",
        'jax.tree.map(lambda value: jax.lax.psum(value, "stage"), sums)',
        NUMBERS,
    ),
)
