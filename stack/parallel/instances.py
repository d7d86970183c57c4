"""How the instances of a model lie on a mesh: side by side over `data`, or several on each slice of it.

The state of all instances has a leading axis, which is split over the slices. A slice's shards, seen alone,
are an array of the slice's own mesh, and the other way: neither way copies a byte, or says a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack.parallel.rules import axes_of, spec_entry

AXIS = "instance"
"""The mesh axis over slices; it stands before all others."""


@dataclass(frozen=True)
class Instances:
    """So many instances on a mesh.

    Args:
      number: of instances; a multiple of the mesh's `data`, or a divisor of it.
      whole: the mesh of all of them.
    """

    number: int
    whole: Mesh | AbstractMesh

    @property
    def slices(self) -> int:
        """Parts of the mesh that know nothing of each other between two averages."""
        return min(self.number, self.whole.shape["data"])

    @property
    def each(self) -> int:
        """Instances of one slice; if several, one after the other."""
        return self.number // self.slices

    @cached_property
    def mesh(self) -> Mesh | AbstractMesh:
        """All devices in the same order, slices along an axis of their own."""
        names, shape = self.whole.axis_names, dict(self.whole.shape)
        sizes = {AXIS: self.slices, **shape, "data": shape["data"] // self.slices}
        types = (AxisType.Explicit,) * len(sizes)
        if isinstance(self.whole, Mesh):
            return Mesh(self.whole.devices.reshape(tuple(sizes.values())), (AXIS, *names), axis_types=types)
        return AbstractMesh(tuple(sizes.values()), (AXIS, *names), axis_types=types)

    @cached_property
    def slice_meshes(self) -> tuple[Mesh, ...]:
        """The mesh of each slice."""
        assert isinstance(self.mesh, Mesh), "an abstract mesh holds no arrays"
        types = self.whole.axis_types
        return tuple(Mesh(devices, self.whole.axis_names, axis_types=types) for devices in self.mesh.devices)

    @cached_property
    def local(self) -> tuple[int, ...]:
        """The slices that this process has devices of."""
        return tuple(number for number, mesh in enumerate(self.slice_meshes) if mesh.local_devices)

    @cached_property
    def firsts(self) -> frozenset[jax.Device]:
        """The first device of each slice, whose process speaks for the slice."""
        return frozenset(mesh.devices.flat[0] for mesh in self.slice_meshes)

    def stacked(self, spec: P) -> NamedSharding:
        """Of [instances, ...], where one instance's array is partitioned so."""
        return NamedSharding(self.mesh, P(AXIS, *spec))

    def common(self, spec: P) -> NamedSharding:
        """Of an array that is the same for all instances."""
        return NamedSharding(self.mesh, spec)

    def part(self, array: jax.Array, index: int) -> jax.Array:
        """What a slice has of [instances, ...]: [instances of the slice, ...]."""
        spec = _spec(array)
        return self._on_slice(array, index, P(None, *spec[1:]), (self.each, *array.shape[1:]))

    def rows(self, array: jax.Array, index: int) -> jax.Array:
        """What a slice has of the rows of a batch, which are split over `data` first: [rows, ...]."""
        mesh, (first, *rest) = self.slice_meshes[index], (*_spec(array), None)[: array.ndim]
        kept = tuple(name for name in axes_of(first) if mesh.shape[name] > 1)
        shape = (array.shape[0] // self.slices, *array.shape[1:])
        return self._on_slice(array, index, P(spec_entry(kept), *rest), shape)

    def join(self, parts: Mapping[int, jax.Array]) -> jax.Array:
        """[instances, ...] of the parts of the slices that this process has devices of."""
        first = next(iter(parts.values()))
        shards = [shard.data for part in parts.values() for shard in part.addressable_shards]
        shape = (self.number, *first.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.stacked(P(*_spec(first)[1:])), shards)

    def _on_slice(self, array: jax.Array, index: int, spec: P, shape: tuple[int, ...]) -> jax.Array:
        mine = self._devices[index]
        shards = [shard.data for shard in array.addressable_shards if shard.device in mine]
        return jax.make_array_from_single_device_arrays(
            shape, NamedSharding(self.slice_meshes[index], spec), shards
        )

    @cached_property
    def _devices(self) -> tuple[frozenset[jax.Device], ...]:
        return tuple(frozenset(mesh.devices.flat) for mesh in self.slice_meshes)


def _spec(array: jax.Array) -> P:
    assert isinstance(array.sharding, NamedSharding)
    return array.sharding.spec
