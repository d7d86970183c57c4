"""The one place that builds meshes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh

from stack.config import AXES, Config, ConfigError, MeshConfig


def resolve(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes for `num_devices`, the -1 filled in.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    named = {axis: size for axis, size in sizes.items() if size > 1}
    text = " x ".join(f"{axis} {size}" for axis, size in named.items()) or "1"
    fixed = math.prod(named.values())
    free = [axis for axis, size in sizes.items() if size == -1]
    if free:
        if num_devices % fixed:
            raise ConfigError(
                f"mesh: {text} = {fixed} does not divide the {num_devices} devices, "
                f"so {free[0]}=-1 has no size; change one of them"
            )
        return sizes | {free[0]: num_devices // fixed}
    if fixed != num_devices:
        raise ConfigError(
            f"mesh: {text} = {fixed} devices, but there are {num_devices}; "
            "set one axis to -1 to take what is left"
        )
    return sizes


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


def check_divides(config: Config, sizes: dict[str, int]) -> None:
    """Refuses what the mesh cannot split evenly.

    Raises:
      ConfigError: `tensor` does not divide heads, MLP or vocabulary, naming the largest that does;
        sequence parallelism does not divide the sequence; or a micro-batch or an evaluation batch
        does not divide over data x fsdp.
    """
    model, train, tensor = config.model, config.train, sizes["tensor"]
    parts = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.mlp_dim": model.mlp_width,
        "the padded vocabulary": model.padded_vocab_size,
    }
    for name, size in parts.items():
        if size % tensor:
            common = math.gcd(*parts.values())
            best = max(d for d in range(1, tensor + 1) if common % d == 0)
            raise ConfigError(
                f"mesh.tensor={tensor} does not divide {name}={size}; the largest up to it that divides "
                f"heads, MLP and vocabulary is {best}"
            )
    if config.mesh.sequence_parallel and config.data.sequence_length % tensor:
        raise ConfigError(
            f"mesh.sequence_parallel splits data.sequence_length={config.data.sequence_length} over "
            f"tensor={tensor} ways, which do not divide it; change one, or set sequence_parallel=false"
        )
    ways = sizes["data"] * sizes["fsdp"]
    batches = {
        "train.batch_size": (train.batch_size, train.accumulation),
        "eval.batch_size": (config.eval.batch_size or train.batch_size, 1),
    }
    for name, (size, pieces) in batches.items():
        if size % (ways * pieces):
            remedy = f"use a multiple of {ways * pieces}"
            if pieces > 1 and size % ways == 0:
                remedy += f", or a train.accumulation that divides {size // ways}"
            raise ConfigError(
                f"{name}={size} in {pieces} micro-batch{'es' * (pieces > 1)} does not divide over data "
                f"{sizes['data']} x fsdp {sizes['fsdp']} = {ways} ways; {remedy}"
            )
