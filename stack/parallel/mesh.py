"""The one place that builds meshes."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from stack.config import AXES, MeshConfig
from stack.config.layout import resolve


def build(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with every named axis, size 1 included, all explicit.

    Explicit axes put the sharding into the type of every array, so that a mistake is an error at its
    line; under automatic propagation the compiler repairs it without a word. What is compiled for the
    mesh from now on is kept in the persistent cache, or not: see `use`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve(config, len(devices))
    mesh = jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices
    )
    _choose_cache(mesh)
    return mesh


@contextmanager
def without_cache() -> Iterator[None]:
    """No persistent cache within, whatever the mesh: a hit prints none of the compiler's warnings."""
    global _withheld  # noqa: PLW0603 (see below)
    before = bool(jax.config.jax_enable_compilation_cache), _withheld
    _withheld = False
    _set_cache(enabled=False)
    try:
        yield
    finally:
        enabled, _withheld = before
        _set_cache(enabled=enabled)


def _set_cache(*, enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX looks at the setting once, unless it is told to look again.


def use(mesh: Mesh | AbstractMesh) -> AbstractContextManager[Any]:
    """Makes a mesh the one that traced code is typed for; only a mesh of real devices can run it.

    Programs of several CPU devices stay out of the persistent cache: one that is read back has lost the
    order of its collectives (XLA:CPU, jaxlib 0.11.2), and two devices that join two of them in different
    orders wait for each other until they are killed.
    """
    if not isinstance(mesh, Mesh):
        return jax.sharding.use_abstract_mesh(mesh)
    _choose_cache(mesh)
    return jax.set_mesh(mesh)


_withheld = False
"""Whether it was a mesh that turned JAX's persistent cache off, and so may turn it on again."""


def _choose_cache(mesh: Mesh) -> None:
    global _withheld  # noqa: PLW0603 (the setting that it remembers is JAX's, and global)
    unsafe = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    enabled = bool(jax.config.jax_enable_compilation_cache)
    if unsafe and enabled:
        _withheld = True
        _set_cache(enabled=False)
    elif not unsafe and not enabled and _withheld:
        _withheld = False
        _set_cache(enabled=True)


def abstract(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The same mesh of devices that are not here."""
    sizes = resolve(config, num_devices)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def retype(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same shards on the same devices, under a mesh of other axes or axis types."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)
