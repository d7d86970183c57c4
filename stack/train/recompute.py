"""A gradient computed twice, on other devices, to find hardware that computes wrongly without a word."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stack.config.errors import StackError
from stack.data.loader import Batch
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step.program import Program
from stack.step.state import State, concrete
from stack.step.step import loss_gradient
from stack.train.bits import digests
from stack.train.checkpoint.checkpoints import named_leaves


class Recompute:
    """Compares the gradient of a batch with the same from the next device of each process.

    Every device's part is done by the one after it in its process; a process of one device does it again.
    What a collective sums, it sums in the order of the mesh, so that the bits are the same.
    """

    def __init__(self, program: Program, options: Mapping[str, Any]) -> None:
        """Compiles when it is first asked, with these options of the compiler."""
        self._program = program
        self._options = dict(options)
        self._jitted: dict[int, Any] = {}

    def check(self, step: int, state: State, batch: Batch) -> None:
        """Computes the gradient of a step twice; waits for both.

        Raises:
            StackError: they differ, by the names of the parameters.
        """
        mine = self._digest(self._program, state, batch)
        trees = self._move(
            {name: state[name] for name in ("params", "step", "frozen", "float8") if name in state}
        )
        moved: Any = trees, self._move(batch)
        with meshes.use(concrete(self._other)):
            others = self._digest(self._other, *moved)
        names = [name for name, value in named_leaves(mine).items() if value != named_leaves(others)[name]]
        if names:
            here = ", ".join(str(device) for device in self._program_mesh.local_devices[:8])
            raise StackError(
                f"step {step:,}: the gradient of {names[0]} and {len(names) - 1} more differs when it is"
                f" computed on other devices than {here}: one computes wrongly, or a kernel is not"
                f" deterministic; see whether --replay {step} differs, or set stability.recompute_every=0"
            )

    def _digest(self, program: Program, state: State, batch: Batch) -> Any:
        def digest(state: State, batch: Batch) -> Any:
            gradient, _ = loss_gradient(
                program,
                state["params"],
                state["step"],
                batch,
                state.get("frozen"),
                state.get("float8"),
            )
            return digests(gradient)

        if id(program) not in self._jitted:
            self._jitted[id(program)] = jax.jit(digest, compiler_options=self._options)
        return jax.device_get(self._jitted[id(program)](state, batch))

    @property
    def _program_mesh(self) -> Mesh:
        return concrete(self._program)

    @cached_property
    def _next(self) -> dict[jax.Device, jax.Device]:
        """The device that stands in for each."""
        after: dict[jax.Device, jax.Device] = {}
        by_process: dict[int, list[jax.Device]] = {}
        for device in self._program_mesh.devices.flat:
            by_process.setdefault(device.process_index, []).append(device)
        for devices in by_process.values():
            after |= dict(zip(devices, devices[1:] + devices[:1], strict=True))
        return after

    @cached_property
    def _other(self) -> Program:
        mesh = self._program_mesh
        devices = np.vectorize(self._next.__getitem__, otypes=[object])(mesh.devices)
        other = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
        return programs.on_mesh_like(self._program, other)

    def _move(self, tree: Any) -> Any:
        """The same arrays, every shard on the device that stands in for its own."""
        mesh = concrete(self._other)

        def move(array: jax.Array) -> jax.Array:
            assert isinstance(array.sharding, NamedSharding)
            sharding = NamedSharding(mesh, array.sharding.spec, memory_kind=array.sharding.memory_kind)
            parts = [
                jax.device_put(shard.data, self._next[shard.device]) for shard in array.addressable_shards
            ]
            return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

        return jax.tree.map(move, tree)
