"""ZeRO (arXiv 1910.02054) as a question of when weights are gathered.

Parameters lie split over `fsdp` in float32. `gather` makes one weight whole in the compute dtype, and
its transpose, `scatter`, sums the gradients of all replicas straight into the shards: a
reduce-scatter over `fsdp`, then an all-reduce of shards over `data`, both in float32.

The types do the work. A gathered weight is `reduced` over the replicas, so the cotangent of every
matmul it enters is `unreduced`: a partial sum that has not been communicated. Without them the
compiled GPU step all-reduces whole weights, with no warning.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout as memory_layout
from jax.sharding import PartitionSpec as P

from stack.parallel.rules import ELEMENTWISE, SPLIT_AXES, Layout, Role, split_axes
from stack.parallel.second_shard import SecondShard, gather_second, scatter_second


def gather_weight(
    weight: jax.Array | SecondShard, layout: Layout, names: tuple[str, ...], role: Role
) -> jax.Array:
    """One parameter, whole over `fsdp`, ready for use; differentiable.

    Matrices and tables come in the compute dtype and `reduced`; what is used elementwise cannot be
    `reduced`, is small, never split, and stays float32. At stage 3 a product in float8 gathers its weight by
    itself.
    """
    if isinstance(weight, SecondShard):
        return _gather_from_second(weight, layout, names, role)
    if role in ELEMENTWISE or (role == "float8" and layout.zero == 3):
        return weight
    dtype = layout.dtype or weight.dtype
    if layout.trivial or (layout.tables_once and role == "table" and is_gathered(weight, layout)):
        return weight.astype(dtype)
    split = layout.parameter_spec(names, weight.shape, role)

    @jax.custom_vjp
    def gather(weight: jax.Array) -> jax.Array:
        return _forward(weight, layout, split, layout.whole_spec(names), dtype)

    partial_sum = bool(jax.typeof(weight).sharding.spec.reduced)
    gather.defvjp(
        lambda weight: (gather(weight), None),
        lambda _, cotangent: (scatter_gradient(cotangent, layout, names, role, partial_sum=partial_sum),),
    )
    return gather(weight)


def _gather_from_second(shard: SecondShard, layout: Layout, names: tuple[str, ...], role: Role) -> jax.Array:
    """The same of a parameter that has a second shard, inside of a node."""

    @jax.custom_vjp
    def gather(weight: jax.Array, master: jax.Array) -> jax.Array:
        del master  # Of which the gradient is.
        return jax.reshard(_at_rest(weight), P(*layout.whole_spec(names), reduced=layout.replicas))

    partial_sum = bool(jax.typeof(shard.master).sharding.spec.reduced)

    def backward(_: None, cotangent: jax.Array) -> tuple[None, jax.Array]:
        return None, scatter_gradient(cotangent, layout, names, role, partial_sum=partial_sum)

    gather.defvjp(lambda weight, master: (gather(weight, master), None), backward)
    return gather(shard.weight, shard.master)


def is_gathered(weight: jax.Array | SecondShard, layout: Layout) -> bool:
    """Whether a matrix has been through `gather_weight`."""
    if isinstance(weight, SecondShard):
        return False
    spec = jax.typeof(weight).sharding.spec
    return layout.trivial or (not split_axes(spec) & SPLIT_AXES and spec.reduced == layout.replicas)


def _forward(weight: jax.Array, layout: Layout, split: P, whole: P, dtype: jnp.dtype) -> jax.Array:
    # Two steps: gathered in one, the transpose is an all-reduce of the whole weight when data > 1.
    weight = jax.reshard(_at_rest(weight).astype(dtype), P(*split, reduced=_others(layout, split)))
    return jax.reshard(weight, P(*whole, reduced=layout.replicas))


def _at_rest(weight: jax.Array) -> jax.Array:
    """Taken as it lies: XLA else lays all layers out anew, whole and in float32, before the loop."""
    at_rest = memory_layout.Layout(major_to_minor=tuple(range(weight.ndim)))
    return memory_layout.with_layout_constraint(weight, at_rest)


def _others(layout: Layout, split: P) -> frozenset[str]:
    """The replicas that hold the same shard of a parameter."""
    return layout.replicas - split_axes(split)


def scatter_gradient(
    cotangent: jax.Array, layout: Layout, names: tuple[str, ...], role: Role, *, partial_sum: bool = False
) -> jax.Array:
    """The sum over replicas of an unreduced cotangent of a matrix or table, split as the parameter is.

    A partial sum is still to be added over the replicas that hold the same shard.
    """
    at_rest = layout.parameter_spec(names, cotangent.shape, role)
    if layout.trivial or jax.typeof(cotangent).sharding.spec == at_rest:  # It has been scattered.
        return cotangent.astype(jnp.float32)
    cotangent = cotangent.astype(layout.reduce_dtype)
    split = layout.second_spec(names, cotangent.shape, role)
    cotangent = jax.reshard(cotangent, P(*split, unreduced=_others(layout, split)))
    return (cotangent if partial_sum else scatter_second(cotangent, layout, names, role)).astype(jnp.float32)


def gather_module[M](module: M, layout: Layout) -> M:
    """A module (or its state) whose parameters are gathered for use."""

    def gather(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(gather_weight(variable[...], layout, variable.axes, variable.role))

    return jax.tree.map(gather, module, is_leaf=is_variable)


def gather_at_use[M](module: M, layout: Layout) -> M:
    """What a model applies to the weights of one layer, or of one end, just before their use.

    Stage 3 gathers here, layer by layer; below it the step has gathered everything already.
    """
    return gather_module(module, layout) if layout.zero == 3 else module


def project(
    x: jax.Array, kernel: nnx.Variable, layout: Layout, names: tuple[str, ...], *, contracted: int
) -> jax.Array:
    """A matmul with a parameter that may be split, or not gathered yet, its partial sums added.

    Args:
      x: [..., inputs], any float dtype.
      kernel: [inputs, outputs], gathered by the step or the model, or at stage 3 as it lies at rest.
      layout: how things lie on the mesh.
      names: logical axes of the result, which has the dtype of `x`.
      contracted: how many axes the inputs are.
    """
    dimensions = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))), ((), ())
    partial_sums = layout.product_spec(names, contracted=kernel.axes[:contracted])
    split = layout.zero == 3 and not is_gathered(kernel[...], layout)

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        weight = gather_weight(weight, layout, kernel.axes, kernel.role) if split else weight
        return jax.lax.dot_general(x, weight.astype(x.dtype), dimensions, out_sharding=partial_sums)

    if split:
        # The backward pass gathers again: what was gathered for the forward pass would be kept until
        # then, for all layers, which is the whole model.
        product = jax.checkpoint(product, prevent_cse=False)
    return layout.shard(product(x, kernel[...]), *names)


def is_variable(node: object) -> bool:
    """Whether a node of a module's tree is one of its parameters."""
    return isinstance(node, nnx.Variable)


def gradients[M](
    loss: Callable[[M, Any], tuple[jax.Array, Any]],
    model: M,
    batch: Any,
    layout: Layout,
    *,
    accumulation: int,
) -> tuple[M, Any]:
    """The gradient of a loss summed over micro-batches, split as the parameters are.

    Stage 0 and 1 gather once, sum partial gradients over the micro-batches and scatter once; stage 2
    scatters every micro-batch; stage 3 leaves both to the model, layer by layer, but for tables where
    `tables_once` says so. Replicas that hold the same shard add their partial sums once, after the last
    micro-batch.

    Args:
      loss: (weights, micro-batch) -> (scalar, any sums); must already be divided by what the whole
        batch is divided by, so that micro-batches of unequal tokens add up.
      model: the parameters, float32, split.
      batch: arrays [batch, ...].
      layout: how things lie on the mesh.
      accumulation: number of micro-batches; divides the batch on every device.

    Returns:
      The gradient in float32, and the sums of all micro-batches.
    """
    if layout.zero < 3:
        weights = gather_module(model, layout)
    else:  # With one micro-batch the layers add up over the replicas too, each beside the next one's work.
        weights = model if accumulation == 1 else _before_micro_batches(model, layout)
    if layout.second_shard:
        loss = _with_second_shards(loss, model, layout)

    def one(micro: Any) -> tuple[Any, Any]:
        (_, sums), cotangent = jax.value_and_grad(loss, has_aux=True)(weights, micro)
        if layout.zero == 2:
            return scatter_module(cotangent, layout, partial_sum=True), sums
        if accumulation > 1:
            cotangent = jax.tree.map(lambda leaf: leaf.astype(layout.reduce_dtype), cotangent)
        return cotangent, sums

    total: Any
    if accumulation == 1:
        total = one(batch)
    else:
        micros = jax.tree.map(partial(split_rows, number=accumulation), batch)
        first = jax.tree.map(lambda leaf: leaf[0], micros)
        total = jax.tree.map(_zeros, jax.eval_shape(one, first))
        # The compiler unrolls loops of a known length that communicate by two, and holds for the second
        # micro-batch, beside the first, what is to be filled in: it is not told the length.
        length = jax.lax.optimization_barrier(jnp.int32(accumulation))

        def add(index: jax.Array, total: Any) -> Any:
            micro = jax.tree.map(lambda leaf: leaf[index], micros)
            return jax.tree.map(_combine, total, one(micro), is_leaf=is_variable)

        total = jax.lax.fori_loop(0, length, add, total)
    gradient, sums = total
    return scatter_module(gradient, layout), sums


def scatter_module[M](cotangent: M, layout: Layout, *, partial_sum: bool = False) -> M:
    """Gradients of a module's matrices, summed over replicas and split as the parameters are.

    Those that are whole are scattered one after another, the smallest first: each is laid out for it in
    the reduce dtype, and the largest, of all layers, finds the others' memory free.
    """
    leaves, tree = jax.tree.flatten(cotangent, is_leaf=is_variable)
    gradients, before = [leaf[...] for leaf in leaves], None
    for index in sorted(range(len(leaves)), key=lambda index: gradients[index].size):
        axes, role = leaves[index].axes, leaves[index].role
        if role in ELEMENTWISE:
            gradients[index] = gradients[index].astype(jnp.float32)
            continue
        if before is not None and layout.zero == (2 if partial_sum else 1):
            after = jax.lax.optimization_barrier((gradients[index], gradients[before]))
            gradients[index], gradients[before] = after
        gradients[index] = scatter_gradient(gradients[index], layout, axes, role, partial_sum=partial_sum)
        before = index
    return jax.tree.unflatten(tree, [leaf.replace(new) for leaf, new in zip(leaves, gradients, strict=True)])


def _before_micro_batches[M](model: M, layout: Layout) -> M:
    """Parameters of stage 3 as every micro-batch takes them.

    Their gradients stay partial sums over the replicas that hold the same shard; those of tables that
    are gathered here, over all replicas.
    """

    def prepare(variable: nnx.Variable) -> nnx.Variable:
        if layout.trivial or variable.role in ELEMENTWISE:
            return variable
        if layout.tables_once and variable.role == "table":
            return variable.replace(gather_weight(variable[...], layout, variable.axes, variable.role))
        split = layout.second_spec(variable.axes, variable.shape, variable.role)
        spec = P(*split, reduced=_others(layout, split))
        if layout.second_shard:  # Nothing reads it: it is what the gradient is of.
            return variable.replace(jnp.zeros(variable.shape, jnp.float32, out_sharding=spec))
        return variable.replace(jax.reshard(variable[...], spec))

    return jax.tree.map(prepare, model, is_leaf=is_variable)


def _with_second_shards[M](
    loss: Callable[[M, Any], tuple[jax.Array, Any]], model: M, layout: Layout
) -> Callable[[M, Any], tuple[jax.Array, Any]]:
    """The same loss, of what its gradient goes to: it computes with second shards, which are made here."""
    shards = take_second_shards(model, layout)

    def give(variable: nnx.Variable, shard: nnx.Variable) -> nnx.Variable:
        value: Any = shard[...]
        if not isinstance(value, SecondShard):
            return variable
        return variable.replace(replace(value, master=variable[...]))

    return lambda weights, micro: loss(jax.tree.map(give, weights, shards, is_leaf=is_variable), micro)


def take_second_shards[M](module: M, layout: Layout) -> M:
    """A module (or its state) as a step computes with it, if its parameters have a second shard."""

    def take(variable: nnx.Variable) -> nnx.Variable:
        if not layout.second_shard or variable.role in ELEMENTWISE:
            return variable
        weight = gather_second(variable[...], layout, variable.axes, variable.role)
        return variable.replace(SecondShard(weight=weight, master=variable[...]))

    return jax.tree.map(take, module, is_leaf=is_variable)


def split_rows(x: jax.Array, *, number: int) -> jax.Array:
    """[batch, ...] -> [number, batch / number, ...]; every device keeps its own rows."""
    return jnp.moveaxis(x.reshape(x.shape[0] // number, number, *x.shape[1:]), 1, 0)


def _combine(total: Any, new: Any) -> Any:
    """Of micro-batches: gradients and sums are added, of largest numbers it is the largest."""
    if not is_variable(total):
        return total + new
    join = jnp.maximum if total.role == "amax" else jnp.add
    return total.replace(join(total[...], new[...]))


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = like.sharding
    return jnp.zeros(like.shape, like.dtype, out_sharding=sharding.spec if sharding else None)
