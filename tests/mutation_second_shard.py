"""Lines of the second shard that are broken; see `mutation_list.py`."""

from mutation import Mutation

NUMBERS = "tests/parallel/test_second_shard.py"
ROUNDING = "tests/parallel/test_int8.py"
TRAFFIC = "tests/parallel/test_second_shard_gpu.py"

SECOND_SHARD = (
    Mutation(
        "numbers in 8 bits are cut, not rounded",
        "stack/parallel/int8.py",
        "Blocks(jnp.round(steps).astype(jnp.int8), scales)",
        "Blocks(steps.astype(jnp.int8), scales)",
        ROUNDING,
    ),
    Mutation(
        "a block with a NaN becomes zeros",
        "stack/parallel/int8.py",
        "x = blocks.values.astype(jnp.float32) * blocks.scales",
        "x = blocks.values.astype(jnp.float32) * jnp.nan_to_num(blocks.scales)",
        NUMBERS,
    ),
    Mutation(
        "a block lies on two devices",
        "stack/parallel/int8.py",
        "size = block_size(length // ways)",
        "size = block_size(length)",
        ROUNDING,
    ),
    Mutation(
        "the gradient of one node stands for all",
        "stack/parallel/second_shard.py",
        "return dequantize(blocks).sum(0)",
        "return dequantize(blocks)[0]",
        NUMBERS,
    ),
    Mutation(
        "the gradient is of the weights at rest",
        "stack/parallel/second_shard.py",
        "return jax.reshard(dequantize(blocks).astype(dtype), marked)",
        "return jax.reshard(weight.astype(dtype), marked)",
        NUMBERS,
    ),
    Mutation(
        "a gradient is rounded twice",
        "stack/parallel/zero.py",
        "if layout.trivial or jax.typeof(cotangent).sharding.spec == at_rest:",
        "if layout.trivial:",
        TRAFFIC,
    ),
    Mutation(
        "weights cross nodes for every layer again",
        "stack/parallel/zero.py",
        "        value: Any = shard[...]\n        if not isinstance(value, SecondShard):",
        "        value: Any = shard[...]\n        if isinstance(value, SecondShard):",
        TRAFFIC,
    ),
)
