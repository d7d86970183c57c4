"""Lines of products in 8 bits that are broken; see `mutation_list.py`."""

from mutation import Mutation

FP8 = (
    Mutation(
        "products in 8 bits are computed again where remat says dots",
        "stack/models/stack.py",
        'return parameters["name"] == PRODUCT',
        "return False",
        "tests/step/test_float8.py",
    ),
    Mutation(
        "each block of a product has the scale of the first",
        "stack/kernels/matmul/mosaic_gpu.py",
        "source.at[number, place] for source",
        "source.at[0, place] for source",
        "tests/kernels/matmul/test_blocks.py",
    ),
    Mutation(
        "columns of the second operand are not scaled",
        "stack/kernels/matmul/mosaic_gpu.py",
        "scales = spread(of_rows, tile, 0) * spread(of_columns, tile, 1)",
        "scales = spread(of_rows, tile, 0)",
        "tests/kernels/matmul/test_blocks.py",
    ),
    Mutation(
        "a ring of blocks is filled before it is read",
        "stack/kernels/matmul/mosaic_gpu.py",
        "plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)",
        "plgpu.Barrier(num_arrivals=1, num_barriers=stages)",
        "tests/kernels/matmul/test_blocks.py",
    ),
    Mutation(
        "the gradient of an input takes the weight as the forward pass rounds it",
        "stack/kernels/matmul/blocks.py",
        "*self._weight(weight, dtype, axis=1)",
        "*self._weight(weight, dtype, axis=0)",
        "tests/kernels/matmul/test_blocks.py",
    ),
    Mutation(
        "blocks of tokens reach into the next example",
        "stack/kernels/matmul/blocks.py",
        "(0, -x.shape[-2] % self.form.size)",
        "(0, 0)",
        "tests/kernels/matmul/test_blocks.py",
    ),
    Mutation(
        "a weight is rounded where its blocks are cut",
        "stack/kernels/matmul/blocks.py",
        "math.prod(sizes[group]) % size == 0 and not any",
        "not any",
        "tests/numerics/test_float8.py",
    ),
    Mutation(
        "an infinite number is rounded to the largest",
        "stack/kernels/matmul/float8.py",
        "jnp.where(jnp.isfinite(values), jnp.clip(values, -limit, limit), jnp.nan)",
        "jnp.clip(values, -limit, limit)",
        "tests/kernels/matmul/test_float8.py",
    ),
    Mutation(
        "a gradient in 8 bits is not scaled by the other operand",
        "stack/kernels/matmul/fp8.py",
        "_scale(change, x8, ())",
        "change",
        "tests/kernels/matmul/test_fp8.py",
    ),
    Mutation(
        "channels of a weight are left out of its product's gradient",
        "stack/kernels/matmul/fp8.py",
        "self._gradient(_scale(cotangent, w8, outputs), outputs)",
        "self._gradient(cotangent, outputs)",
        "tests/kernels/matmul/test_fp8.py",
    ),
    Mutation(
        "partial sums of gradients are cut to 14 bits",
        "stack/kernels/matmul/fp8.py",
        "highest = jax.lax.Precision.HIGHEST",
        "highest = jax.lax.Precision.DEFAULT",
        "tests/kernels/matmul/test_compiled.py",
    ),
    Mutation(
        "a step that is not applied changes what delayed scaling looks back on",
        "stack/step/step.py",
        'guard.choose(is_good, history, state["float8"])',
        "history",
        "tests/step/test_float8.py",
    ),
)
