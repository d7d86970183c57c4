"""The train state: parameters, optimizer state and step, a plain tree of arrays.

Nothing is ever whole on one host: abstract shapes first, then shardings, then `jit(init)` straight
into place.
"""

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack.parallel import mesh as meshes
from stack.step import float8, guard, instances
from stack.step.program import Path, Program

State = dict[str, Any]
"""{"params": ..., "opt_state": ..., "step": int32 scalar, "guard": see `guard.Guard`}; the optimizer's
moments may be in host memory.
Parameters that are not trained are under "frozen", where there are any; the moving average of the others
under "ema", where there is one; what delayed scaling looks back on under "float8".
Where instances train apart: {"params": the last average, "step": as above, "outer": the momentum of the
outer step, if it has any, "rounds": how many averages it has taken of a meeting, "instances": of each such a
state, [instances, ...]}."""

_OF_TRAINING = ("opt_state", "outer", "rounds", "instances")


def without_training(state: State) -> State:
    """The parts of a state that evaluations and samples ask for."""
    return {name: part for name, part in state.items() if name not in _OF_TRAINING}


def init(program: Program, params: dict[str, Any] | None = None) -> State:
    """The state at step 0, every shard made on its own device; the same bits on every layout.

    Args:
      program: of the run.
      params: to begin with, as they lie; None: those of the seed.
    """
    mesh = concrete(program)
    with meshes.use(mesh):
        params, frozen = program.split(init_params(program) if params is None else params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, _abstract(program)["opt_state"])
        state = _with_frozen(frozen) | {
            "params": params,
            "opt_state": jax.jit(program.optimizer.init, out_shardings=shardings)(params),
            "step": jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P())),
        }
        state = completed(program, state)
    return state if program.instances is None else instances.spread(program, state)


MAY_BE_NEW = ("guard", "ema", "float8")
"""Parts of a state that a checkpoint may lack, or have of another size."""


def completed(program: Program, state: State) -> State:
    """A state with the parts that it lacks: a guard that has seen nothing, an average that begins here."""
    if "instances" in state:
        return state
    if "guard" not in state:
        mesh = concrete(program)
        state |= {"guard": jax.device_put(guard.init(program.config.stability), NamedSharding(mesh, P()))}
    if float8.is_kept(program) and "float8" not in state:
        state |= {"float8": jax.device_put(float8.init(program), NamedSharding(concrete(program), P()))}
    if program.config.optimizer.ema_decay and "ema" not in state:
        state |= {"ema": jax.tree.map(jnp.copy, state["params"])}
    return state


def init_params(program: Program, some: Collection[Path] | None = None) -> dict:
    """Parameters from the seed, or some of them; the same bits either way.

    The one place under automatic sharding: with explicit axes each random array would be typed whole
    before it is split, here the compiler makes only the shard that is asked for.
    """
    auto = automatic(concrete(program))
    likes: dict[Path, Any] = flatten_dict(program.parameters)
    wanted = unflatten_dict({path: like for path, like in likes.items() if some is None or path in some})
    shardings = jax.tree.map(lambda leaf: NamedSharding(auto, leaf.sharding.spec), wanted)

    def init() -> dict:
        params: dict[Path, Any] = flatten_dict(nnx.to_pure_dict(nnx.state(program.make_model())))
        return unflatten_dict({path: params[path].astype(likes[path].dtype) for path in flatten_dict(wanted)})

    # It runs once: on a CPU, LLVM would optimise for longer (3.8 s) than the whole thing takes (0.8 s).
    on_cpu = auto.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else {}
    with meshes.use(auto):
        params = jax.jit(init, out_shardings=shardings, compiler_options=options)()
    return jax.tree.map(lambda array, like: meshes.retype(array, like.sharding), params, wanted)


def abstract(program: Program) -> State:
    """Shapes, dtypes and shardings of the state, for restoring and for compiling."""
    state = _abstract(program)
    return state if program.instances is None else instances.abstract(program, state)


def _abstract(program: Program) -> State:
    """The same where no instances train apart."""
    mesh = program.mesh
    with meshes.use(mesh):
        params, frozen = program.split(program.parameters)
        opt_state = jax.eval_shape(program.optimizer.init, params)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding is not None else P()
        offload = leaf.ndim and program.config.train.offload_optimizer
        sharding = host_sharding(mesh, spec) if offload else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return _with_frozen(frozen) | {
        "params": params,
        **({"ema": params} if program.config.optimizer.ema_decay else {}),
        "opt_state": jax.tree.map(place, opt_state),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P())),
        "guard": {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P()))
            for name, leaf in jax.eval_shape(lambda: guard.init(program.config.stability)).items()
        },
        **({"float8": _abstract_history(program)} if float8.is_kept(program) else {}),
    }


def _abstract_history(program: Program) -> float8.History:
    whole = NamedSharding(program.mesh, P())
    shapes = jax.eval_shape(lambda: float8.init(program))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)


def join(state: State) -> dict[str, Any]:
    """All parameters of a state, as the model takes them; in place of the trained ones their average."""
    trained = state.get("ema", state["params"])
    return unflatten_dict(flatten_dict(trained) | flatten_dict(state.get("frozen", {})))


def _with_frozen(frozen: dict[str, Any]) -> State:
    return {"frozen": frozen} if frozen else {}


def host_sharding(mesh: Mesh | AbstractMesh, spec: P) -> NamedSharding:
    """In pinned host memory, split over the mesh as on its devices."""
    sharding = NamedSharding(mesh, spec, memory_kind="pinned_host")
    if sharding.memory_kind is None:  # Devices that are not here name no memories; an abstract mesh may.
        return NamedSharding(mesh.abstract_mesh, spec, memory_kind="pinned_host")
    return sharding


def concrete(program: Program) -> Mesh:
    """The program's mesh, which must be of devices that are here."""
    assert isinstance(program.mesh, Mesh), "an abstract mesh holds no arrays"
    return program.mesh


def automatic(mesh: Mesh) -> Mesh:
    """The same devices under automatic sharding."""
    return Mesh(mesh.devices, mesh.axis_names)


def to_host(array: Any, layer: int | None = None) -> np.ndarray:
    """An array of a mesh, or what one layer has of it, whole on this host; every process calls.

    Args:
      array: of any sharding; with a layer, [layers, ...].
      layer: its number; None: all of the array.
    """
    auto = automatic(array.sharding.mesh)
    array, whole = meshes.retype(array, NamedSharding(auto, array.sharding.spec)), NamedSharding(auto, P())
    with meshes.use(auto):
        return np.asarray(_gather(whole)(array) if layer is None else _gather_layer(whole)(array, layer))


@cache
def _gather(whole: NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda array: array, out_shardings=whole)


@cache
def _gather_layer(whole: NamedSharding) -> Callable[..., jax.Array]:
    def layer(array: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, number, keepdims=False)

    return jax.jit(layer, out_shardings=whole)
