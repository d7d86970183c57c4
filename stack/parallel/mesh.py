"""The one place that builds meshes."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from stack.config import AXES, ConfigError, MeshConfig, ModelConfig


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
            f"mesh: {text} = {fixed} devices, but there are {num_devices}; set one axis to -1 to take what is left"
        )
    return sizes


def build(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with every named axis, size 1 included, all explicit.

    Explicit axes put the sharding into the type of every array, so that a mistake is an error at its
    line; under automatic propagation the compiler repairs it without a word.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve(config, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices
    )


def check_divides(model: ModelConfig, sizes: dict[str, int], batch_size: int, accumulation: int) -> None:
    """Refuses what the mesh cannot split evenly.

    Raises:
      ConfigError: `tensor` does not divide heads, MLP or vocabulary, naming the largest that does, or
        the micro-batch does not divide over data x fsdp.
    """
    tensor = sizes["tensor"]
    parts = {
        "num_heads": model.num_heads,
        "num_kv_heads": model.kv_heads,
        "mlp_dim": model.mlp_width,
        "padded vocabulary": model.padded_vocab_size,
    }
    for name, size in parts.items():
        if size % tensor:
            common = math.gcd(*parts.values())
            best = max(d for d in range(1, tensor + 1) if common % d == 0)
            raise ConfigError(
                f"mesh.tensor={tensor} does not divide model.{name}={size}; the largest that divides "
                f"heads, MLP and vocabulary is {best}"
            )
    ways = sizes["data"] * sizes["fsdp"]
    if batch_size % (ways * accumulation):
        micro = batch_size // accumulation
        raise ConfigError(
            f"train.batch_size={batch_size} in {accumulation} micro-batches is {micro} sequences each, "
            f"which do not divide over data {sizes['data']} x fsdp {sizes['fsdp']} = {ways} ways; "
            f"use a multiple of {ways * accumulation}"
        )
