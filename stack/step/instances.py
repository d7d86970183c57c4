"""The state of instances that train apart: a leading axis on all that a plain state has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stack.parallel import mesh as meshes
from stack.parallel.instances import Instances
from stack.step.program import Program

State = dict[str, Any]
"""See `stack.step.state.State`."""


def abstract(program: Program, state: State) -> State:
    """Shapes, dtypes and shardings of a state of instances, from those of one that is plain."""
    instances = instances_of(program)

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = instances.stacked(_spec(leaf))
        return jax.ShapeDtypeStruct((instances.number, *leaf.shape), leaf.dtype, sharding=sharding)

    outer = {"outer": state["params"]} if _has_momentum(program) else {}
    whole = NamedSharding(program.mesh, P())
    rounds = {"rounds": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)} if _meets(program) else {}
    shared = {"params": state["params"], "step": state["step"]}
    return {**shared, **outer, **rounds, "instances": jax.tree.map(stack, state)}


def spread(program: Program, state: State) -> State:
    """A state of instances that are all as a plain one is."""
    likes = abstract(program, state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, likes["instances"])
    number = instances_of(program).number

    def make(state: State) -> State:
        return jax.tree.map(
            lambda leaf, to: jnp.broadcast_to(leaf, (number, *leaf.shape), out_sharding=to), state, shardings
        )

    with meshes.use(instances_of(program).mesh):
        stacked = jax.jit(make)(common(program, state))
    outer = {"outer": jax.tree.map(jnp.zeros_like, state["params"])} if _has_momentum(program) else {}
    rounds = {"rounds": counted(program, 0)} if _meets(program) else {}
    return {"params": state["params"], "step": state["step"], **outer, **rounds, "instances": stacked}


def counted(program: Program, number: int) -> jax.Array:
    """A count of a state's: of steps, or of the rounds of a meeting that it has taken."""
    return jax.device_put(np.int32(number), NamedSharding(program.mesh, P()))


def instances_of(program: Program) -> Instances:
    """Where the instances of a program lie, which it must have."""
    assert program.instances is not None, "no instances train apart"
    return program.instances


def common(program: Program, tree: Any) -> Any:
    """Arrays of the program's mesh on that of its instances, the same for all of them."""
    instances = instances_of(program)
    return jax.tree.map(lambda leaf: meshes.retype(leaf, instances.common(leaf.sharding.spec)), tree)


def _meets(program: Program) -> bool:
    return program.config.average.folder is not None


def _has_momentum(program: Program) -> bool:
    return program.config.average.outer == "nesterov"


def _spec(leaf: jax.ShapeDtypeStruct) -> P:
    assert leaf.sharding is not None
    return leaf.sharding.spec
