"""Instances that train apart and are averaged now and then: local SGD and DiLoCo.

Within a period each slice of the mesh runs the plain training step of its instances as a program of its own,
so that nothing can be said between them. Only at its end are all devices in one program, which averages.
"""

import itertools
import json
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stack.config import AverageConfig
from stack.parallel import mesh as meshes
from stack.parallel import messages
from stack.step.instances import common, instances_of
from stack.step.plain import Steps
from stack.step.program import Program, on_mesh_like
from stack.step.state import State, abstract
from stack.step.step import Batch, update

_SUMS = "sums."
_calls = itertools.count()  # Every process counts alike.


def train_steps(program: Program, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """One step of each instance of a slice: the plain step of one instance, on its rows.

    Args:
      program: of one instance.
      state: of the instances of the slice, [instances, ...].
      batch: their rows, those of the first instance first.

    Returns:
      The next state, and of each instance, [instances], the metrics that are no sums, and the objective's
      sums with `sums.` before their names.
    """

    def of_one(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        state, sums, told = update(program, state, _laid_out(program, batch))
        return state, told | {f"{_SUMS}{name}": value for name, value in sums.items()}

    number = jax.tree.leaves(state)[0].shape[0]
    if number == 1:
        one = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), state)
        return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), of_one(one, batch))
    rows = {name: _by_instance(program, values, number) for name, values in batch.items()}

    def step(index: Any, state: State) -> tuple[State, dict[str, jax.Array]]:
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), state)
        return of_one(one, jax.tree.map(lambda leaf: leaf[index], rows))

    def turn(index: jax.Array, carried: Any) -> Any:
        new = step(index, carried[0])
        put = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return jax.tree.map(put, carried, new)

    shapes = jax.eval_shape(partial(step, 0), state)[1]
    metrics = jax.tree.map(lambda like: jnp.zeros((number, *like.shape), like.dtype), shapes)
    return jax.lax.fori_loop(0, number, turn, (state, metrics))


def average(config: AverageConfig, params: Any, outer: Any, apart: Any) -> tuple[Any, Any, Any]:
    """The end of a period.

    With outer `none` all go on from the average of the instances (arXiv 1805.09767, equation 2); with
    `nesterov` the way from the average to where the period began is the gradient of a step of SGD (arXiv
    2311.08105, algorithm 1).

    Args:
      config: what becomes of the average.
      params: where the period began.
      outer: the momentum, like `params`; None where there is none.
      apart: the parameters of the instances now, [instances, ...].

    Returns:
      The new parameters, the new momentum, and the parameters of the instances: the new ones of each.
    """
    new = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), apart)
    if config.outer == "nesterov":
        way = jax.tree.map(jnp.subtract, params, new)
        outer = jax.tree.map(partial(outer_speed, config), outer, way)
        new = jax.tree.map(partial(outer_step, config), params, outer, way)
    return new, outer, jax.tree.map(_like_all, new, apart)


def outer_step(config: AverageConfig, begun: Any, speed: Any, way: Any) -> Any:
    """A parameter after an outer step with Nesterov momentum; arrays of JAX or NumPy.

    Args:
      config: rate and momentum.
      begun: the last average.
      speed: the momentum, this step in it; see `outer_speed`.
      way: from the average of the instances to the last one.
    """
    return begun - config.outer_learning_rate * (config.outer_momentum * speed + way)


def outer_speed(config: AverageConfig, speed: Any, way: Any) -> Any:
    """The momentum of a parameter after an outer step, of that before it."""
    return config.outer_momentum * speed + way


def _like_all(new: jax.Array, apart: jax.Array) -> jax.Array:
    return jnp.broadcast_to(new, apart.shape, out_sharding=jax.typeof(apart).sharding)


class AveragedSteps(Steps):
    """The steps of instances; see `Steps`."""

    def __init__(self, program: Program, options: Mapping[str, Any]) -> None:
        """Compiles when it is first asked, with these options of the compiler."""
        super().__init__(program, options)
        self._instances = instances_of(program)
        self._before: str | None = None

    @cached_property
    def _steps(self) -> Any:
        steps = partial(train_steps, self._program.instance)
        return jax.jit(steps, donate_argnums=0, compiler_options=self._options)

    @cached_property
    def _average(self) -> Any:
        step = partial(average, self._program.config.average)
        return jax.jit(step, donate_argnums=(0, 1, 2), compiler_options=self._options)

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step of every instance, slice by slice; the metrics are of each, [instances].

        Every process runs the slices that it has devices of. The state's buffers are donated.
        """
        instances, after, metrics = self._instances, {}, {}
        parts = {
            index: jax.tree.map(partial(instances.part, index=index), state["instances"])
            for index in instances.local
        }
        for index, part in parts.items():
            rows = {name: instances.rows(values, index) for name, values in batch.items()}
            with meshes.use(instances.slice_meshes[index]):
                after[index], metrics[index] = self._steps(part, rows)
        taken = state["step"] + 1
        return state | {"step": taken, "instances": self._join(after)}, self._join(metrics)

    def lower(self) -> jax.stages.Lowered:
        """The step of the instances of one slice, traced and typed for its devices."""
        instances, program = self._instances, self._program
        mesh = instances.slice_meshes[0]
        one = on_mesh_like(program, mesh, program.instance.config)

        def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            assert isinstance(leaf.sharding, NamedSharding)
            sharding = NamedSharding(mesh, P(None, *leaf.sharding.spec))
            return jax.ShapeDtypeStruct((instances.each, *leaf.shape), leaf.dtype, sharding=sharding)

        def rows(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                (instances.each * leaf.shape[0], *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding
            )

        with meshes.use(mesh):
            return self._steps.lower(
                jax.tree.map(stack, abstract(one)), jax.tree.map(rows, one.abstract_batch())
            )

    def lower_average(self) -> jax.stages.Lowered:
        """The average at the end of a period, traced and typed for all devices."""
        state, mesh = abstract(self._program), self._instances.mesh

        def common(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            assert isinstance(leaf.sharding, NamedSharding)
            sharding = self._instances.common(leaf.sharding.spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        params, outer = (jax.tree.map(common, state.get(part)) for part in ("params", "outer"))
        with meshes.use(mesh):
            return self._average.lower(params, outer, state["instances"]["params"])

    def advance(self, step: int, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """The same after so many steps, and the average if a period ends with it."""
        state, metrics = self.step(state, batch)
        ends = (step + 1) % self._program.config.average.every == 0
        return (self.average(state) if ends else state), metrics

    def average(self, state: State) -> State:
        """The state after the average that ends a period; its buffers are donated."""
        program, apart = self._program, state["instances"]
        with meshes.use(instances_of(program).mesh):
            params, outer, new = self._average(
                common(program, state["params"]), common(program, state.get("outer")), apart["params"]
            )
        back = partial(jax.tree.map, lambda leaf, like: meshes.retype(leaf, like.sharding))
        after = {"params": back(params, program.parameters), "instances": apart | {"params": new}}
        return state | after | ({} if outer is None else {"outer": back(outer, program.parameters)})

    def read(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of a step, of all instances together; waits for them.

        Those of the objective are made of the sum of its sums, others are means. Processes tell each other in
        words: their devices are at the next step, and apart.
        """
        arrays = {name: value for name, value in metrics.items() if isinstance(value, jax.Array)}
        of_host = {name: float(value) for name, value in metrics.items() if name not in arrays}
        told = self._of_all(self._own(arrays))
        sums = {
            name.removeprefix(_SUMS): np.float64(sum(values))
            for name, values in told.items()
            if name.startswith(_SUMS)
        }
        means = {
            name: sum(values) / len(values) for name, values in told.items() if not name.startswith(_SUMS)
        }
        objective = self._program.objective.metrics(sums)
        return {name: float(value) for name, value in objective.items()} | means | of_host

    def _own(self, arrays: Mapping[str, jax.Array]) -> dict[str, list[float]]:
        """The values of the instances that this process speaks for."""
        firsts = self._instances.firsts
        shards = {
            name: [shard.data for shard in array.addressable_shards if shard.device in firsts]
            for name, array in arrays.items()
        }
        values = jax.device_get(shards)
        return {name: [float(one) for part in parts for one in part] for name, parts in values.items()}

    def _of_all(self, own: dict[str, list[float]]) -> dict[str, list[float]]:
        """The same of all processes."""
        if jax.process_count() == 1:
            return own
        name = f"instances/{next(_calls)}"
        texts = messages.gather(name, json.dumps(own))
        if texts is not None and self._before:  # Who tells of this step has heard of the one before.
            messages.forget(self._before)
        self._before = name
        each = [] if texts is None else [json.loads(text) for text in texts]
        joined = {key: [value for one in each for value in one[key]] for key in own}
        return json.loads(messages.broadcast(name, json.dumps(joined)))

    def _join(self, parts: dict[int, Any]) -> Any:
        trees = [jax.tree.flatten(part) for part in parts.values()]
        joined = [
            self._instances.join(dict(zip(parts, leaves, strict=True)))
            for leaves in zip(*(leaves for leaves, _ in trees), strict=True)
        ]
        return jax.tree.unflatten(trees[0][1], joined)


def _laid_out(program: Program, batch: Batch) -> Batch:
    layout, axes = program.layout, {field.name: field.axes for field in program.objective.fields}
    return {name: layout.shard(values, *axes.get(name, ("batch",))) for name, values in batch.items()}


def _by_instance(program: Program, values: jax.Array, number: int) -> jax.Array:
    """[rows, ...] -> [instances, rows of each, ...], whole on every device of the slice: it is small."""
    values = program.layout.everywhere(values)
    return values.reshape(number, values.shape[0] // number, *values.shape[1:])
