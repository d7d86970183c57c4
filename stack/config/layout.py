"""Whether a mesh fits the devices, and a config the mesh: told without any device."""

import math

from stack.config.errors import ConfigError
from stack.config.instances import check_instances
from stack.config.mesh import AXES, MeshConfig
from stack.config.pipeline import check_pipeline
from stack.config.tree import Config


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


def check_divides(config: Config, sizes: dict[str, int]) -> None:
    """Refuses what the mesh cannot split evenly.

    Raises:
      ConfigError: `tensor` does not divide heads, MLP or vocabulary, naming the largest that does; it cuts
        what shares a scale of 8 bits; sequence parallelism does not divide the sequence; a micro-batch or
        an evaluation batch does not divide over data x fsdp; a second shard has no `data`; or see
        `check_pipeline`.
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
    _check_blocks(config, tensor)
    check_pipeline(config, sizes["stage"])
    check_instances(config, sizes)
    if config.mesh.second_shard and sizes["data"] == 1:
        raise ConfigError(
            "mesh.second_shard splits parameters over mesh.data as well, which is 1 beside"
            f" fsdp={sizes['fsdp']}; set mesh.data to the number of nodes and mesh.fsdp to the devices of"
            " one, or second_shard=false"
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


FLOAT8_BLOCKS = {"block": 128, "mx": 32}
"""Numbers along a sum that share a scale, by kernels.fp8.blocks."""


def _check_blocks(config: Config, tensor: int) -> None:
    """What shares a scale lies on one device."""
    model, kernels, blocks = config.model, config.kernels, config.kernels.fp8.blocks
    shared = FLOAT8_BLOCKS.get(blocks)
    if tensor == 1 or kernels.matmul != "fp8" or shared is None:
        return
    parts = {
        "model.num_heads x head_dim": model.num_heads * model.head_width,
        "model.num_kv_heads x head_dim": model.kv_heads * model.head_width,
        "model.mlp_dim": model.mlp_width,
    }
    for name, size in parts.items():
        if size // tensor % shared:
            raise ConfigError(
                f"kernels.fp8.blocks={blocks}: mesh.tensor={tensor} cuts {name}={size} in {size // tensor}s, "
                f"which the {shared} that share a scale do not divide; lower mesh.tensor, or set "
                "blocks=channel"
            )
