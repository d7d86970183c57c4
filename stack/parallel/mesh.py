"""The one place that builds meshes."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
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
    line; under automatic propagation the compiler repairs it without a word. Several CPU devices turn
    the persistent compilation cache off.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve(config, len(devices))
    if len(devices) > 1 and devices[0].platform == "cpu" and jax.config.jax_enable_compilation_cache:
        # A program read back has lost the order of its collectives (XLA:CPU, jaxlib 0.11.2): two devices
        # that join two of them in different orders wait for each other until they are killed.
        set_compilation_cache(enabled=False)
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices
    )


def set_compilation_cache(*, enabled: bool) -> None:
    """Whether this process stores compiled programs and loads them, from now on."""
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX looks at the setting once, unless it is told to look again.


def use(mesh: Mesh | AbstractMesh) -> AbstractContextManager[Any]:
    """Makes a mesh the one that traced code is typed for; only a mesh of real devices can run it."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


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
